"""A pytest plugin: PEFT's own tests with FILet after every ``get_peft_model``.

Each LoRA adapter that is made starts from FILet, by statistics of random vectors, with factors as
large as the weights ("singular"), so that whatever forgets a half of them shows. Random states stay
what they were. What FILet refuses stays PEFT's.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import peft
import pytest
import torch

import filet
from filet import FiletConfig, Statistics
from filet.targets import find_targets, fingerprints
from filet.walk import empty_moments

_TOKENS = 64
_plain = peft.get_peft_model
_initialised = 0  # adapters, in the test that runs


def statistics_of(peft_model: Any, adapter_name: str) -> Statistics:
    targets, _ = find_targets(peft_model, adapter_name)
    moments = {}
    generator = torch.Generator().manual_seed(0)
    for name, target in targets.items():
        weight = target.weight
        moments[name] = empty_moments(weight)
        for side in (moments[name].input, moments[name].output):
            rows = torch.randn(_TOKENS, side.sum.shape[0], generator=generator)
            side.update(rows.to(side.sum))
        moments[name].loss_terms.fill_(_TOKENS)
    counts = {"samples": 1, "tokens": _TOKENS, "loss_terms": _TOKENS}
    hashes = fingerprints({name: target.weight for name, target in targets.items()})
    return Statistics(moments, hashes, {}, **counts, fisher="empirical")


@functools.wraps(_plain)
def get_peft_model(model: Any, peft_config: Any, adapter_name: str = "default", *args: Any, **kwargs: Any) -> Any:
    peft_model = _plain(model, peft_config, adapter_name, *args, **kwargs)
    initialise(peft_model, adapter_name)
    return peft_model


def initialise(peft_model: Any, adapter_name: str) -> None:
    global _initialised
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        try:
            statistics = statistics_of(peft_model, adapter_name)
            config = FiletConfig(scaling="singular")
            filet.apply_statistics(peft_model, statistics, config, adapter_name)
        except (TypeError, ValueError):  # not LoRA, or refused: a rank above W's columns, PiSSA, ...
            return
    _initialised += 1


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "single_gpu_tests: PEFT's")
    config.addinivalue_line("markers", "multi_gpu_tests: PEFT's")
    config.addinivalue_line("markers", "bitsandbytes: PEFT's")
    config.addinivalue_line("markers", "regression: PEFT's")
    utils = importlib.import_module("tests.testing_utils")  # PEFT's, beside its tests
    utils.hub_online_once = _needs_the_hub
    if config.getoption("--with-filet"):
        peft.get_peft_model = peft.mapping_func.get_peft_model = get_peft_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--with-filet", action="store_true", help="initialise after get_peft_model")


def _needs_the_hub(model_id: str) -> Any:
    pytest.skip(f"{model_id} is on the hub")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    global _initialised
    _initialised = 0
    yield
    item.user_properties.append(("initialised", _initialised))
