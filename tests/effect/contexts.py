"""Tiny models with calibration data, for the tests of initialisations."""

from __future__ import annotations

import copy
import functools

from effect.context import Context
from models import Case, Sample, case, collate, llama

KINDS = ("llama", "vit")
RANK = 4


@functools.cache
def task(kind: str) -> Case:
    """A case without dropout, which PEFT's LoRA-GA has on, and without a target outside of rows."""
    found = case(kind)
    model = llama(attention_dropout=0.0) if kind == "llama" else found.model
    targets = [name for name in found.targets if name != "classifier"]
    return Case(model, found.samples, targets, found.shift)


def batches(samples: list[Sample]) -> list[Sample]:
    return [collate(samples[i : i + 4]) for i in range(0, len(samples), 4)]


def kept(kind: str) -> list[Sample]:
    return task(kind).samples[2:7]


@functools.cache
def context(kind: str) -> Context:
    """Shared between tests: nothing in it changes but what it remembers."""
    its = task(kind)
    return Context(
        load=lambda: copy.deepcopy(its.model).eval().requires_grad_(False),
        targets=its.targets,
        rank=RANK,
        seed=3,
        batches=batches(its.samples),
        keep=batches(kept(kind)),
    )
