"""A part of PEFT's own tests with FILet in every adapter; `make test-peft` runs all of LoRA's."""

from __future__ import annotations

import pytest

import peft_suite


def test_one_of_twenty(capfd: pytest.CaptureFixture[str]) -> None:
    if not peft_suite.is_there():
        pytest.skip("PEFT's tests are not there; python tests/peft_suite.py --fetch gets them")
    status = peft_suite.main(["--part"])
    assert status == 0, capfd.readouterr().out


def test_every_exception_has_a_reason() -> None:
    reasons = peft_suite.reasons()
    assert reasons and all(len(reason) > 20 for reason in reasons.values())
