"""What a pass asks of the process to be deterministic, for whom, and that it is put back."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch import Tensor

import filet
from filet import FiletConfig
from filet.model import isolation
from models import Case, case, linears, llama, loader, peft_of, randomised

pytestmark = pytest.mark.usefixtures("one_thread")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
NAME = "FLASH_ATTENTION_DETERMINISTIC"


def run(peft_model: Any, batches: Any = None, forward_fn: Any = None) -> filet.Statistics:
    return filet.collect_statistics(
        peft_model,
        loader(case("llama").samples) if batches is None else batches,
        FiletConfig(samples=None),
        forward_fn=forward_fn,
        show_progress_bar=False,
    )


@pytest.mark.parametrize("before", [None, "0"])
def test_flash_attention_is_asked_by_its_own_switch(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads it at every call; afterwards it is what it was, also after an error."""
    monkeypatch.delenv(NAME, raising=False)
    if before is not None:
        monkeypatch.setenv(NAME, before)
    seen: list[str | None] = []

    def forward_fn(model: Any, batch: Any) -> Any:
        seen.append(os.environ.get(NAME))
        if len(seen) == 5:
            raise KeyboardInterrupt
        return model(**batch)

    run(peft_of(case("llama")), forward_fn=forward_fn)
    assert seen == ["1"] * 3 and os.environ.get(NAME) == before
    with pytest.raises(KeyboardInterrupt):
        run(peft_of(case("llama")), forward_fn=forward_fn)
    assert os.environ.get(NAME) == before


def test_the_backward_runs_in_the_thread_of_the_pass(device: torch.device) -> None:
    """Autograd has a thread of its own for each GPU; the switch for attention has one state."""
    peft_model = peft_of(case("llama"), device)
    seen: list[tuple[int, bool]] = []

    def forward_fn(model: Any, batch: Any) -> Any:
        output = model(**batch)
        output.logits.register_hook(
            lambda _: seen.append((threading.get_ident(), torch._C._is_multithreading_enabled()))
        )
        return output

    run(peft_model, forward_fn=forward_fn)
    assert set(seen) == {(threading.get_ident(), False)}
    assert torch._C._is_multithreading_enabled()


def test_another_threads_attention_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward does not make the process strict, while the pass's own does, and undoes it."""
    before = F.scaled_dot_product_attention
    thrown: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda *a, **k: thrown.append((a, k))
    )

    def attend() -> None:
        q = torch.randn(1, 2, 8, 16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()

    with isolation.deterministic_attention():
        assert F.scaled_dot_product_attention is not before
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
        assert not thrown
        attend()
    assert thrown == [((True,), {}), ((True,), {"warn_only": True})]
    assert F.scaled_dot_product_attention is before


def long_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 29, (2, 2048), generator=generator)
    return [{"input_ids": ids, "labels": ids}]


def assert_bitwise(one: filet.Statistics, other: filet.Statistics) -> None:
    for name, moments in one.moments.items():
        for side in ("input", "output"):
            mine, theirs = (getattr(m, side).sum.tril() for m in (moments, other.moments[name]))
            assert torch.equal(mine, theirs), f"{name} {side}"


def long_model() -> Any:
    settings = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 2048}
    return randomised(llama(layers=2, **settings))


@needs_gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bitwise_on_a_gpu(attention: str, dtype: torch.dtype) -> None:
    model = long_model()
    model.set_attn_implementation(attention)
    c = Case(model, [], linears(model, "lm_head"))
    found = [run(peft_of(c, "cuda", dtype), long_batches()) for _ in range(3)]
    assert_bitwise(found[0], found[1])
    assert_bitwise(found[0], found[2])


@needs_two_gpus
def test_bitwise_over_two_gpus() -> None:
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    found = []
    for _ in range(5):
        model = dispatch_model(long_model().bfloat16(), places)
        config = LoraConfig(r=4, target_modules=linears(model, "lm_head"))
        found.append(run(get_peft_model(model, config), long_batches()))
    for other in found[1:]:
        assert_bitwise(found[0], other)
