"""Which layers of a PeftModel FILet can initialise, and their weights as the paper writes them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from filet.model.beside import is_beside
from filet.model.factors import StartedFactor, plain_class
from filet.model.gptq import is_gptqmodel
from filet.model.sharded import (
    check_division,
    columns_in_use,
    is_sharded,
    local,
    over_shards,
    resharded,
)
from filet.model.values import Unreadable, Values, dtype_of_model, values_of
from filet.system.text import some
from filet.system.transfer import values

__all__ = [
    "Target",
    "adapted",
    "candidates",
    "check_init",
    "check_peft_model",
    "check_targets",
    "check_unmerged",
    "checked_targets",
    "find_targets",
    "layers_of",
]

# Values of LoraConfig.init_lora_weights, or their beginnings, by which PEFT changes W.
_CHANGES_W = ("pissa", "corda", "olora", "loftq", "lora_ga")
# PEFT's classes of a LoRA over a linear layer, W x + s B A x, in ``peft.tuners.lora``.
_LORA_LAYERS = {
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "HqqLoraLinear",
    "TorchaoLoraLinear",
    "GPTQLoraLinear",
    "QuantLinear",  # GPTQ's before PEFT 0.18
    "AwqLoraLinear",
}
# In the names of what torch's CheckpointWrapper wraps, and not in those of its state_dict.
_WRAPPED = "_checkpoint_wrapped_module"
# What PEFT before 0.21 takes from a model with task_type="SEQ_2_SEQ_LM".
_GENERATION = "_prepare_encoder_decoder_kwargs_for_generation"


@dataclass(frozen=True, eq=False)
class Target:
    """A LoRA layer over a linear module, plain or quantised.

    Its fields are what the layer was when it was found; its weight is looked up: blockwise weights
    come and go.

    Attributes:
        name: path below the base model, "model.layers.0.self_attn.q_proj".
        layer, adapter: the layer of PEFT's, and which of its adapters.
        base: the module under the adapter.
        values: what that multiplies by.
        A, B: the adapter's factors.
        shape: (m, n) = (out, in) of the base weight.
        rank: of what trains: PEFT counts the frozen half of an initialised layer as well.
        scaling: by which B A is added.
        dtype: in which A and B are stored.
        beside: its rows are no tokens of the text (:func:`filet.model.beside.is_beside`).
    """

    name: str
    layer: LoraLayer
    adapter: str
    base: nn.Module
    values: Values
    A: nn.Linear
    B: nn.Linear
    shape: tuple[int, int]
    rank: int
    scaling: float
    dtype: torch.dtype
    beside: bool = False

    @classmethod
    def of(
        cls, name: str, layer: LoraLayer, adapter: str, values: Values, beside: bool = False
    ) -> Target:
        A = layer.lora_A[adapter]
        return cls(
            name=name,
            layer=layer,
            adapter=adapter,
            base=values.module,
            values=values,
            A=A,
            B=layer.lora_B[adapter],
            shape=values.shape,
            rank=A.rank if isinstance(A, StartedFactor) else layer.r[adapter],
            scaling=layer.scaling[adapter],
            dtype=next(A.parameters()).dtype,
            beside=beside,
        )

    @property
    def weight(self) -> Tensor:
        """The base weight (m, n) = (out, in), detached: a view, or dequantised whenever read."""
        return self.values.weight()

    def weight_for(self, x: torch.dtype) -> Tensor:
        """The base weight as an x of this dtype is multiplied by it."""
        return self.values.weight(self.values.dtype_for(x))

    @property
    def sums(self) -> tuple[torch.dtype, torch.device]:
        """Of its moments: float32, float64 for a float64 weight, where that lies."""
        double = self.values.dtype == torch.float64
        return torch.float64 if double else torch.float32, self.device

    @property
    def device(self) -> torch.device:
        """Where the base weight lies."""
        return self.values.device


def adapted(model: Any, lora_config: LoraConfig, seed: int | None = None) -> PeftModel:
    """``model`` with an adapter, drawn by PEFT from ``seed``; without one A and B are on meta.

    The process's own random state is what it was. PEFT may rewrite ``lora_config.target_modules``.

    Raises ValueError for a name in it that no module has, where PEFT drops it in silence as long as
    another name has some; for an initialisation that changes the base weights; and for a model of
    sequences to sequences that this PEFT cannot wrap.
    """
    check_init(lora_config)
    if lora_config.use_dora:  # PEFT would look at weights first, which may not be there yet
        raise ValueError(
            "lora_config has use_dora=True: its adapters are DoraLinearVariant, not plain LoRA; "
            "expected use_dora=False"
        )
    modules = dict(model.named_modules())
    _name_all_linear(lora_config, model, modules)
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU, for an embedding always
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            peft_model = get_peft_model(model, lora_config, low_cpu_mem_usage=seed is None)
    except ValueError:
        _check_names(lora_config, modules, type(model).__name__)  # which says what is near
        raise
    except AttributeError as error:
        if _GENERATION not in str(error):
            raise
        raise ValueError(
            f"PEFT {peft.__version__} asks {type(model).__name__} for what this transformers has "
            f"no longer ({_GENERATION}); expected PEFT >= 0.21 for "
            "task_type='SEQ_2_SEQ_LM'"
        ) from error
    # Not before: PEFT knows names of experts' layers that transformers has fused since.
    _check_names(lora_config, modules, type(model).__name__)
    return peft_model


def _name_all_linear(lora_config: LoraConfig, model: Any, modules: Mapping[str, nn.Module]) -> None:
    """Where layers are gptqmodel's, which PEFT takes for none, "all-linear" becomes names."""
    names = lora_config.target_modules
    if not isinstance(names, str) or names.lower() != "all-linear":
        return
    if any(map(is_gptqmodel, modules.values())):
        head = model.get_output_embeddings()
        lora_config.target_modules = {
            path
            for path, module in modules.items()
            if module is not head
            and (isinstance(module, (nn.Linear, Conv1D)) or is_gptqmodel(module))
        }


def _check_names(lora_config: LoraConfig, modules: dict[str, nn.Module], model: str) -> None:
    names = lora_config.target_modules
    if names is None or isinstance(names, str):  # PEFT's choice, or a pattern, which it checks
        return
    for name in sorted(names):
        parts = name.count(".") + 1
        called = {".".join(path.split(".")[-parts:]): None for path in modules}
        if name in called:
            continue
        linear = {
            path.rpartition(".")[2]: None
            for path, module in modules.items()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        near: Sequence[str] = difflib.get_close_matches(name, called) or list(linear)[:12]
        expected = f"names like {', '.join(map(repr, near))}"
        raise ValueError(
            f"target_modules has {name!r} (--target-modules), and {model} no module of that name; "
            f"expected {'it alone' if name == 'all-linear' else expected}"
        )


def check_peft_model(peft_model: object, adapter_name: str) -> PeftModel:
    """The model, if it is a PeftModel with a LoRA adapter of that name; an error otherwise."""
    if not isinstance(peft_model, PeftModel):
        compiled = hasattr(peft_model, "_orig_mod")  # by a Trainer with torch_compile and FSDP2
        raise TypeError(
            f"peft_model is a {type(peft_model).__name__}; expected the PeftModel that "
            "peft.get_peft_model(model, LoraConfig(...)) returns"
            f"{', before torch.compile (torch_compile=False, with FSDP2)' if compiled else ''}"
        )
    if adapter_name not in peft_model.peft_config:
        raise ValueError(
            f"adapter_name={adapter_name!r}; expected one of {list(peft_model.peft_config)}"
        )
    kind = peft_model.peft_config[adapter_name].peft_type
    if kind != PeftType.LORA:
        raise ValueError(f"adapter {adapter_name!r} is of type {kind}; expected a LoRA adapter")
    if any(_WRAPPED in name for name, _ in peft_model.named_modules()):
        raise ValueError(
            "modules of peft_model are in torch's CheckpointWrapper (an fsdp_config's "
            "activation_checkpointing), of which PEFT saves no adapter: the file would be empty; "
            "expected gradient_checkpointing=True of the training's arguments instead"
        )
    return peft_model


def checked_targets(
    peft_model: PeftModel, adapter_name: str
) -> tuple[dict[str, Target], dict[str, str]]:
    """What :func:`find_targets` finds in a model that can be initialised; an error for another."""
    if isinstance(peft_model, nn.Module):
        check_division(peft_model)
    peft_model = check_peft_model(peft_model, adapter_name)
    targets, unsupported = find_targets(peft_model, adapter_name)
    check_targets(peft_model, targets, unsupported, adapter_name)
    return targets, unsupported


def find_targets(
    peft_model: PeftModel, adapter_name: str, *, loaded: bool = True
) -> tuple[dict[str, Target], dict[str, str]]:
    """The adapter's layers that can be initialised, and for each of the others the reason.

    ``loaded=False`` takes weights on the meta device as well: they come later.
    """
    resharded(peft_model)
    targets: dict[str, Target] = {}
    unsupported: dict[str, str] = {}
    wrapped: list[str] = []  # whose inner layers PEFT handles as parts of them
    tied = _embedding_storages(peft_model, adapter_name)
    firsts: dict[int, str] = {}
    dtype = dtype_of_model(peft_model.base_model.model)
    for name, layer in layers_of(peft_model, adapter_name):
        if name.startswith(tuple(wrapped)):
            continue
        if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            wrapped.append(f"{name}.")
        try:
            values = _checked_values(layer, adapter_name, dtype, tied)
        except Unreadable as error:
            unsupported[name] = str(error)
            continue
        if not values.shareable:
            _check_alone(name, values, firsts)
        if loaded and values.device.type == "meta":
            raise ValueError(
                f"the base weight of {name} is on the meta device (not loaded, offloaded by "
                "device_map, or left to rank 0 by cpu_ram_efficient_loading); expected a model on "
                "real devices, as accelerate's prepare() has it and FiletInitCallback finds it"
            )
        beside = is_beside(peft_model.base_model.model, name)
        targets[name] = Target.of(name, layer, adapter_name, values, beside)
    return targets, unsupported


def _check_alone(name: str, values: Values, firsts: dict[int, str]) -> None:
    """ValueError where a layer before has this weight too. Mutates ``firsts``: weight → layer."""
    first = firsts.setdefault(id(values.module.weight), name)
    if first != name:
        raise ValueError(
            f"{first} and {name} share one weight in {values.kind} (layer_replication), and the "
            "library multiplies by codes without their scales in one of them; expected a base in "
            "4 bits, or one that is not quantised"
        )


def layers_of(peft_model: PeftModel, adapter_name: str) -> list[tuple[str, LoraLayer]]:
    """The LoRA layers that an adapter has, of whatever kind, by their paths."""
    return [
        (name, layer)
        for name, layer in peft_model.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
        and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A)
    ]


def _embedding_storages(peft_model: PeftModel, adapter_name: str) -> set[int]:
    """Where the factors of embeddings lie: those of a tied head are views of them."""
    return {
        local(factors[adapter_name]).untyped_storage().data_ptr()
        for _, layer in layers_of(peft_model, adapter_name)
        for factors in (layer.lora_embedding_A, layer.lora_embedding_B)
        if adapter_name in factors and factors[adapter_name].device.type != "meta"
    }


def _checked_values(
    layer: LoraLayer, adapter_name: str, dtype: torch.dtype, tied: set[int]
) -> Values:
    """The values under a layer; :class:`Unreadable` where its adapter is no plain LoRA."""
    base = layer.get_base_layer()
    kind = type(base).__name__
    if adapter_name in layer.lora_variant:
        variant = type(layer.lora_variant[adapter_name]).__name__
        raise Unreadable(f"its adapter is a {variant}, not plain LoRA")
    if isinstance(layer, lora.ParamWrapper):
        raise Unreadable(
            f"{layer.parameter_name} of this {kind} is a parameter (target_parameters), no layer"
        )
    if isinstance(base, nn.MultiheadAttention):
        raise Unreadable(
            "nn.MultiheadAttention multiplies by its weights itself, no layer of it is called"
        )
    values = values_of(base, dtype)
    if values.quantised and is_sharded(getattr(base, "weight", None)):
        raise Unreadable(
            f"this {kind} is quantised and FSDP has sharded it; expected it whole, as accelerate "
            "leaves it with bnb_4bit_quant_storage=torch.uint8"
        )
    its_class = plain_class(type(layer))
    ours = its_class.__module__.startswith("peft.tuners.lora.")
    if not ours or its_class.__name__ not in _LORA_LAYERS:
        raise Unreadable(f"its LoRA layer over this {kind} is a {its_class.__name__}")
    factor = layer.lora_A[adapter_name]
    if type(factor) not in (nn.Linear, StartedFactor):
        raise Unreadable(f"its A is a {type(factor).__name__}; expected nn.Linear")
    if local(next(factor.parameters())).untyped_storage().data_ptr() in tied - {0}:
        raise Unreadable("its adapter is tied to that of the embedding")
    return values


def check_targets(
    peft_model: PeftModel,
    targets: Mapping[str, Target],
    unsupported: Mapping[str, str],
    adapter_name: str,
) -> None:
    """An error where nothing can be initialised, or a weight is not the original."""
    if not targets:
        of_reason: dict[str, list[str]] = {}
        for name, why in unsupported.items():
            of_reason.setdefault(why, []).append(name)
        reasons = [f"{some(names, 1)}: {why}" for why, names in of_reason.items()]
        raise ValueError(
            f"adapter {adapter_name!r} has no module that FILet can initialise "
            f"({'; '.join(reasons[:3]) or 'it has no module at all'}); expected LoRA on linear "
            "modules"
        )
    check_unmerged(targets)
    for other, config in peft_model.peft_config.items():
        if any(other in target.layer.lora_A for target in targets.values()):
            check_init(config, f"adapter {other!r}")


def candidates(targets: Mapping[str, Target]) -> list[int]:
    """How many directions each target has to choose from: W's non-zero columns. Collective."""
    used = over_shards((target.weight for target in targets.values()), columns_in_use)
    found: list[int] = values([torch.count_nonzero(columns) for columns in used])
    return found


def check_unmerged(targets: Mapping[str, Target]) -> None:
    merged = [name for name, target in targets.items() if target.layer.merged]
    if merged:
        raise ValueError(
            f"{merged[0]}: an adapter is merged into its weight; expected an unmerged model "
            "(call peft_model.unmerge_adapter() first)"
        )


def check_init(config: LoraConfig, what: str = "lora_config") -> None:
    """An error for an initialisation of PEFT's that changes the base weights.

    W_res + s B A is W to rounding only (docs/adapters.md), and only while nothing was trained,
    which A and B do not tell. So it is not undone.
    """
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_W):
        raise ValueError(
            f"{what} has init_lora_weights={init!r}, by which PEFT changes the base weights; "
            "expected the original ones: a base model loaded anew, and init_lora_weights=True"
        )
