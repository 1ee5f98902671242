"""What tests of the pass share: statistics of a model, and what it was before."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from filet import FiletConfig, collect_statistics
from models import VOCAB, Case, case, energies_of, loader, peft_of

# float32 passes are off by up to 3e-6 in any energy (all models here, on a CPU); 1e-4 is asked for.
FLOAT32 = 2e-5


def statistics_of(
    peft_model: PeftModel, batches: Any, forward_fn: Any = None, **config: Any
) -> Any:
    return collect_statistics(
        peft_model,
        batches,
        FiletConfig(**{"samples": None, **config}),
        forward_fn=forward_fn,
        show_progress_bar=False,
    )


def hooked(peft_model: PeftModel, name: str) -> nn.Module:
    return peft_model.base_model.model.get_submodule(name)


def padding_warnings(c: Case, batches: list[Any], **config: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        statistics_of(peft_of(c), batches, c.forward_fn, **config)
    return [str(w.message) for w in caught if "so padding counts" in str(w.message)]


def models_own(model: Any, batch: Any) -> Any:
    """A forward_fn: the loss is the model's."""
    return model(**batch)


def snapshot(peft_model: PeftModel) -> dict[str, Any]:
    config = getattr(peft_model.base_model.model, "config", None)
    modules = dict(peft_model.named_modules())
    state = {
        "weights": {n: p.detach().clone() for n, p in peft_model.named_parameters()},
        "gradients": {n: p.grad for n, p in peft_model.named_parameters()},
        "gradient values": {
            n: p.grad.clone() for n, p in peft_model.named_parameters() if p.grad is not None
        },
        "requires_grad": {n: p.requires_grad for n, p in peft_model.named_parameters()},
        "training": {n: m.training for n, m in modules.items()},
        "attributes": {
            (n, key): value
            for n, m in modules.items()
            for key, value in vars(m).items()
            if isinstance(value, (bool, int, float, str)) and key != "_disable_adapters"
        },
        "hooks": {
            (n, key): list(vars(m)[key])
            for n, m in modules.items()
            for key in vars(m)
            if key.endswith("_hooks")
        },
        "config": None if config is None else config.to_dict(),
        "active": list(peft_model.active_adapters),
        "tuner's active": copy.copy(peft_model.base_model.active_adapter),
        "switches": {
            n: (copy.copy(m._active_adapter), m._disable_adapters)
            for n, m in modules.items()
            if hasattr(m, "_active_adapter")
        },
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def assert_same(one: Any, two: Any, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}: {key}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, two), where
    else:
        assert one == two, f"{where}: {one} became {two}"


def assert_unchanged(peft_model: PeftModel, before: dict[str, Any]) -> None:
    after = snapshot(peft_model)
    for name, gradient in before["gradients"].items():
        assert after["gradients"][name] is gradient, f"the .grad of {name} is another object"
    for key in before.keys() - {"gradients"}:
        assert_same(before[key], after[key], key)


def draws(model: Any) -> None:
    """What a forward_fn may do to the random states."""
    random.random()
    np.random.rand()
    torch.rand(1, device=next(model.parameters()).device)


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def randomise(peft_model: PeftModel, *parts: str) -> None:
    """Adapter weights as after a training: with them the energies are others."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if any(part in name for part in parts):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / max(parameter.shape) ** 0.5)


def rows(*shape: int, below: int = VOCAB) -> Tensor:
    return torch.arange(np.prod(shape)).reshape(shape) % below


def of_llama(batches: list[dict[str, Any]], forward_fn: Any = None, **config: Any) -> Any:
    return energies_of(peft_of(case("llama")), batches, forward_fn, **config)


def padded(side: str = "right") -> list[dict[str, Tensor]]:
    return list(loader(case("llama").samples, 4, side))
