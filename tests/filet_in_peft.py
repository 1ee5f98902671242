"""A pytest plugin: PEFT's own tests with FILet after every ``get_peft_model`` (see peft_suite.py).

Each LoRA adapter that is made starts from FILet, by statistics of random vectors: with a frozen
half, and factors as large as the weights ("singular"), so that whatever forgets one of them shows.
Random states stay what they were. What FILet refuses stays PEFT's, and so does all without
``--with-filet``.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import peft
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

import filet
from filet import FiletConfig
from recipes import random_statistics

_plain = peft.get_peft_model


@functools.wraps(_plain)
def _with_filet(
    model: Any, peft_config: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> Any:
    peft_model = _plain(model, peft_config, adapter_name, *args, **kwargs)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        try:
            statistics = random_statistics(peft_model, adapter_name)
            config = FiletConfig(start="untouched", scaling="singular", normalization="mean")
            filet.apply_statistics(peft_model, statistics, config, adapter_name)
        except (
            TypeError,
            ValueError,
        ):  # not LoRA, or refused: a rank above W's columns, PiSSA, ...
            pass
    return peft_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--with-filet", action="store_true", help="initialise after get_peft_model")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one test of N")


def pytest_configure(config: pytest.Config) -> None:
    for name in ("single_gpu_tests", "multi_gpu_tests", "bitsandbytes", "regression", "skipf"):
        config.addinivalue_line("markers", f"{name}: PEFT's")
    utils: Any = importlib.import_module("tests.testing_utils")  # PEFT's, beside its tests
    utils.hub_online_once = _needs_the_hub
    if config.getoption("--with-filet"):
        peft.get_peft_model = peft.mapping_func.get_peft_model = _with_filet


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[:: config.getoption("--every")]


def _needs_the_hub(model_id: str) -> Any:
    pytest.skip(f"{model_id} is on the hub")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A test that asks for what is on the hub is skipped, whichever way it asks."""
    report: Any = yield
    error = call.excinfo.value if call.excinfo is not None and report.failed else None
    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            report.outcome, report.longrepr = "skipped", (__file__, 0, "Skipped: on the hub")
            break
        error = error.__cause__ or error.__context__
    return report
