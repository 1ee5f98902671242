"""Kinds of models: what a folder holds, what of it is adapted, and how its tasks are read.

All that differs between a language model and a classifier is here; :func:`kind_of` tells which.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from effect.class_task import ClassTask, Form
from effect.images import Images
from effect.tasks import CausalTask, Row, Task, causal_task, length_multiple, token_mask
from effect.texts import Texts

__all__ = ["CausalKind", "ClassKind", "Kind", "kind_of"]

OPTIONS = {
    "boolq": ("true", "false"),
    "brown": ("fact", "fiction"),
    **dict.fromkeys(
        ("arc_easy", "arc_challenge", "openbookqa"), ("answer1", "answer2", "answer3", "answer4")
    ),
}
TESTS, GENERALS, KEEPS = 1000, 500, 1000  # samples of a classifier's


class Kind(Protocol):
    """One model, on its device.

    Attributes:
        model: what a population trains on, in the dtype to compute in.
        targets: the layers that are adapted, names or endings of names.
    """

    model: Any
    targets: Sequence[str]

    def load(self, task: str) -> Any:
        """The base model anew, float32, as the task's samples go through it."""
        ...

    def task(self, name: str) -> Task:
        """From the data folder."""
        ...

    def batch(self, task: Task, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Arguments of the model from :meth:`load`, labels among them, on its device."""
        ...


class CausalKind:
    """A causal language model; tasks are TASK_train, TASK_test, general and keep, .jsonl[.gz]."""

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self, folder: Path, data: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.data, self.device = data, device
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.base = self.base.to(device).requires_grad_(False).eval()
        self.model = copy.deepcopy(self.base).to(dtype)

    def load(self, task: str) -> Any:
        return copy.deepcopy(self.base)

    def task(self, name: str) -> CausalTask:
        task = causal_task(
            name,
            self._file(f"{name}_train"),
            self._file(f"{name}_test"),
            self.tokenizer,
            general=self._file("general"),
            keep=self._file("keep"),
            options=OPTIONS.get(name, ()),
            tests=512 if name in OPTIONS else 256,
        )
        task.multiple = length_multiple(self.device)
        return task

    def _file(self, name: str) -> Path:
        for path in (self.data / f"{name}.jsonl.gz", self.data / f"{name}.jsonl"):
            if path.exists():
                return path
        raise FileNotFoundError(f"{self.data} has no {name}.jsonl or {name}.jsonl.gz")

    def batch(self, task: Task, rows: Sequence[Row]) -> dict[str, Tensor]:
        inputs, labels = task.batch(rows, self.device)
        mask = token_mask([ids for ids, _ in rows], labels.shape[1])
        rest = {"attention_mask": mask.to(self.device), "labels": labels.to(self.device)}
        return {**inputs, **rest}


class ClassKind:
    """A classifier whose classes are those of several data sets, "SET/CLASS" in id2label.

    A task is one of them by its name, TASK_train.npz and TASK_test.npz, as the form reads them.
    What may be forgotten are the others' test samples, told apart by their own classes; what is
    kept are their training samples. The head is frozen.
    """

    def __init__(
        self, form: type[Form], folder: Path, data: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.data, self.device = data, device
        base = form.loads.from_pretrained(folder, dtype=torch.float32)
        self.form = form(base.config, device)
        self.base = base.to(device).requires_grad_(False).eval()
        self.head = base.classifier
        self.targets = [
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and module is not self.head
        ]
        labels = [base.config.id2label[number] for number in range(self.head.out_features)]
        of = [label.rpartition("/")[0] for label in labels]
        self.sets = list(dict.fromkeys(of))
        self.groups = torch.tensor([self.sets.index(name) for name in of], device=device)
        self.firsts = {name: of.index(name) for name in self.sets}
        self.model = copy.deepcopy(base).to(dtype)
        self.model.classifier = nn.Identity()

    def load(self, task: str) -> Any:
        """With the classes of the task alone, by their numbers in its file."""
        model, own = copy.deepcopy(self.base), self.groups == self.sets.index(task)
        weight, bias = self.head.weight[own], self.head.bias[own]
        model.config.num_labels = model.num_labels = len(weight)
        # No random numbers are drawn: what starts are drawn from is the seed's.
        model.classifier = nn.utils.skip_init(nn.Linear, *weight.T.shape, device=self.device)
        model.classifier.requires_grad_(False)
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)
        return model

    def task(self, name: str) -> ClassTask:
        if name not in self.sets:
            raise ValueError(f"task={name!r}; expected one of the model's: {self.sets}")
        others = [other for other in self.sets if other != name]
        return ClassTask(
            name,
            self.form,
            self._rows(name, "train", None),
            self._rows(name, "test", TESTS),
            [row for other in others for row in self._rows(other, "test", GENERALS)],
            self.head,
            self.groups,
            [row for other in others for row in self._rows(other, "train", KEEPS)],
        )

    def _rows(self, name: str, part: str, limit: int | None) -> list[Row]:
        rows, first = self.form.read(self.data / f"{name}_{part}.npz", limit), self.firsts[name]
        return [(sample, label + first) for sample, label in rows]

    def batch(self, task: Task, rows: Sequence[Row]) -> dict[str, Tensor]:
        inputs, labels = task.batch(rows, self.device)
        own = (labels - self.firsts[task.name]).to(self.device)
        return {**self.form.arguments(inputs), "labels": own}


_KINDS: dict[str, Callable[[Path, Path, torch.device, torch.dtype], Kind]] = {
    "ForCausalLM": CausalKind,
    "ForImageClassification": partial(ClassKind, Images),
    Texts.loads.__name__: partial(ClassKind, Texts),
}


def kind_of(folder: Path, data: Path, device: torch.device, dtype: torch.dtype) -> Kind:
    """The folder's model, of the kind that its config.json names. ValueError for any other."""
    names = AutoConfig.from_pretrained(folder).architectures or ["nothing"]
    for ending, kind in _KINDS.items():
        if names[0].endswith(ending):
            return kind(folder, data, device, dtype)
    raise ValueError(f"{folder} holds {names[0]}; expected a model {' or '.join(_KINDS)}")
