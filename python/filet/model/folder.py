"""The model in a local folder: what is refused of it, and the loading.

transformers gives a weight that no file has random numbers, and a model of another task a head of
its own: whoever only looks at the exit status trains on an initialisation of noise.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel

from filet.model.checkpoint import (
    check_codes,
    check_numbers,
    check_shapes,
    missing_weight,
    understood,
    warn_of_unused,
)
from filet.model.gptq import KERNELS, choose_kernel, method_of
from filet.model.packed import check_tied
from filet.model.targets import adapted
from filet.model.tasks import CAUSAL, SEEING, TASKS
from filet.model.values import is_quantised
from filet.system.memory import named_shortage

__all__ = [
    "NewHead",
    "Quantize",
    "load_adapted",
    "load_model",
    "outline",
    "quantization_of",
    "settings_of",
]

Quantize = Literal["nf4", "fp4", "int8"]

_EXPECTED = (
    "expected a causal language model, or another --task (filet.initialize_lora_filet_weights "
    "takes any model, loaded by its own class)"
)

# What a class of transformers is for stands behind its last "For"; a bare model has none.
_TASK = re.compile(r".*For([A-Z]\w*)")
_TASKS = ("CausalLM", "ConditionalGeneration")


def settings_of(
    folder: str | os.PathLike[str], *, trust_remote_code: bool = False, task: str = CAUSAL
) -> Any:
    """The folder's config, of a model for ``task``; else a ValueError that says what it is of.

    GPTQ's and AWQ's kernel is chosen where the folder leaves it open.
    """
    import transformers

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json in {folder}; expected the folder of a model")
    with understood(folder):
        settings = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    if task == CAUSAL:
        _check_causal(folder, settings)
    elif type(settings) not in getattr(transformers, TASKS[task].auto)._model_mapping:
        raise ValueError(
            f"{folder} is of model_type {settings.model_type!r} (in config.json), of which "
            f"transformers has no model for --task {task}"
        )
    elif task == SEEING and getattr(settings, "is_encoder_decoder", False):
        raise ValueError(f"{folder} is an encoder-decoder; --task {task} is for decoders that see")
    if getattr(settings, "return_dict", True) is False:
        raise ValueError(
            f"{folder} has return_dict false in config.json, by which its outputs have no names; "
            "expected true, or none"
        )
    choose_kernel(folder, settings)
    return settings


def _check_causal(folder: Path, settings: Any) -> None:
    """ValueError for what is no causal language model.

    Loaded as one, a classifier may lack nothing but sense: with tied embeddings it has a head, and
    a BERT sees the very tokens that it is to predict.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    names = getattr(settings, "architectures", None) or []
    tasks = [match[1] for match in map(_TASK.fullmatch, names) if match is not None]
    if tasks and not any(task.startswith(_TASKS) for task in tasks):
        raise ValueError(f"{folder} is a {names[0]} (architectures in config.json); {_EXPECTED}")
    if getattr(settings, "is_encoder_decoder", False):
        raise ValueError(f"{folder} is an encoder-decoder; {_EXPECTED}")
    own_code = getattr(settings, "auto_map", None) or {}
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        raise ValueError(
            f"{folder} is of model_type {settings.model_type!r} (in config.json), of which "
            f"transformers has no causal language model; {_EXPECTED}"
        )
    # The kinds that are masked language models as well attend both ways, unless they are told.
    causal = getattr(settings, "is_decoder", False) or getattr(settings, "causal", False)
    if type(settings) in MODEL_FOR_MASKED_LM_MAPPING and not causal:
        raise ValueError(
            f"{folder} is of model_type {settings.model_type!r} and attends both ways, so that it "
            f"sees its labels (is_decoder in config.json is not true); {_EXPECTED}"
        )


def outline(
    settings: Any,
    dtype: Any,
    *,
    trust_remote_code: bool = False,
    quantizer: Any = None,
    task: str = CAUSAL,
) -> Any:
    """The model of a config, its parameters on the meta device, in eval mode.

    ``quantizer``: transformers', which then has put its layers in, as it does before loading.
    """
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, TASKS[task].auto).from_config(
            settings, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()  # again: the meta device parted them
    if quantizer is not None:
        _put_in_layers(model, dtype, quantizer)
    return model.eval()


def _put_in_layers(model: Any, dtype: Any, quantizer: Any) -> None:
    """The quantizer's, without the tensors that files have."""
    streamed = method_of(quantizer.quantization_config) in KERNELS
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # biases of its layers
    try:
        with torch.device("meta") if streamed else contextlib.nullcontext():
            quantizer.preprocess_model(
                model=model, dtype=dtype, device_map={"": "cpu"}, checkpoint_files=[],
                use_kernels=False,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    if streamed:  # each layer is finished when its tensors are there
        quantizer._process_model_after_weight_loading = lambda model, **_: model
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def load_model(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    quantization_config: Any = None,
    task: str = CAUSAL,
    head: NewHead | None = None,
) -> Any:
    """The model of a folder, whole, on ``device``.

    ``quantization_config``: transformers', by which it is quantised as it is loaded. ``head``: of a
    classifier, drawn where the folder has none.

    Raises ValueError for another kind of model (:func:`settings_of`), and for a weight that no file
    has, or that is quantised without a word of it in config.json or has another shape, naming it;
    OutOfMemoryError where it does not fit. Warns of weights that the model does not use.
    """
    import transformers

    folder = Path(folder)
    settings = settings_of(folder, trust_remote_code=trust_remote_code, task=task)
    if head is not None and head.classes is not None:
        settings.num_labels = head.classes
    saved = getattr(settings, "quantization_config", None)
    if saved is not None and quantization_config is not None:
        raise ValueError(
            f"{folder} is quantised already (quantization_config in config.json); expected no "
            "quantization_config (--quantize), or the folder that it was made from"
        )
    quantised: dict[str, Any] = {}
    if saved is not None or quantization_config is not None:
        quantised["device_map"] = {"": device}  # as it is loaded: some cannot be moved later
    if quantization_config is not None:
        quantised["quantization_config"] = _but_heads(
            quantization_config, settings, trust_remote_code, task
        )
    with understood(folder), named_shortage("loading", lambda: f"the loading of {folder}"):
        _check_stored(folder, settings, allow_pickle, trust_remote_code, task)
        with torch.random.fork_rng(devices=[], enabled=head is not None):
            if head is not None:
                torch.manual_seed(head.seed)
            model, found = getattr(transformers, TASKS[task].auto).from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused here, by name
                **quantised,
                config=settings,
            )
        check_shapes(folder, sorted(found["mismatched_keys"]))
        _check_missing(folder, model, sorted(found["missing_keys"]), TASKS[task].classifies, head)
        model = model if quantised else model.to(device)
    unused = found["unexpected_keys"]
    if head is not None:  # and what is not of the base is the head of another task
        unused = [name for name in unused if name.startswith(f"{model.base_model_prefix}.")]
    warn_of_unused(folder, model, unused)
    return model


def _check_stored(
    folder: Path, settings: Any, allow_pickle: bool, trust_remote_code: bool, task: str
) -> None:
    """ValueError for what the files have and transformers would take for something else."""
    saved = getattr(settings, "quantization_config", None)
    if saved is None:
        how: Any = {"trust_remote_code": trust_remote_code, "task": task}
        check_numbers(
            folder, partial(outline, settings, torch.float32, **how), pickled=allow_pickle
        )
    elif method_of(saved) in KERNELS:
        check_codes(folder)


def _check_missing(
    folder: Path, model: Any, names: list[str], classifies: bool, head: NewHead | None
) -> None:
    """ValueError for weights that no file has, but those of a new head.

    ``names`` is without those that are tied to one that is there.
    """
    new = [name for name in names if not name.startswith(f"{model.base_model_prefix}.")]
    new = new if classifies else []
    rest = [name for name in names if name not in new]
    if rest:
        raise missing_weight(folder, rest)
    if new and head is None:
        raise ValueError(
            f"{folder} has no weight for {new[0]}: the head of its classes is not there; expected "
            "a model that has been trained for the task, or a seed for a new head (--new-head SEED)"
        )
    if head is not None and not new:
        raise ValueError(f"{folder} has a head of classes; expected no --new-head")


def quantization_of(
    folder: str | os.PathLike[str],
    kind: Quantize,
    *,
    double: bool = False,
    dtype: torch.dtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
    task: str = CAUSAL,
) -> Any:
    """transformers' config by which bitsandbytes quantises a folder's model as it is loaded.

    4-bit layers compute in the model's dtype, in float32 where neither ``dtype`` nor config.json
    says one; ``double`` quantises their scales once more.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if dtype == "auto":
        settings = settings_of(folder, trust_remote_code=trust_remote_code, task=task)
        dtype = getattr(settings, "dtype", None) or torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )


@dataclass(frozen=True)
class NewHead:
    """A head of classes that no file has: the seed of its numbers, and how many classes.

    ``classes`` None: as many as config.json says.
    """

    seed: int
    classes: int | None = None


def load_adapted(
    folder: str | os.PathLike[str],
    lora_config: LoraConfig,
    seed: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    gradient_checkpointing: bool = False,
    quantization_config: Any = None,
    task: str = CAUSAL,
    head: NewHead | None = None,
) -> PeftModel:
    """The model of a folder with an adapter, drawn by PEFT from ``seed``.

    A head of classes is trained, and belongs to the adapter.

    Raises what :func:`load_model` and :func:`filet.model.targets.adapted` do.
    """
    model = load_model(
        folder,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        quantization_config=quantization_config,
        task=task,
        head=head,
    )
    check_tied(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()  # it checkpoints in this mode only; dropout is off in the pass
    if TASKS[task].classifies:
        _check_heads(folder, model)
        lora_config = _with_head(lora_config, model)
    return adapted(model, lora_config, seed)


def _heads_of(model: Any) -> list[str]:
    """All beside the base model that has parameters: it is trained whole."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def _but_heads(config: Any, settings: Any, trust_remote_code: bool, task: str) -> Any:
    """bitsandbytes' config; of a classifier's model one by which its heads are left as they are."""
    if not TASKS[task].classifies:
        return config
    model = outline(settings, torch.float32, trust_remote_code=trust_remote_code, task=task)
    config = copy.deepcopy(config)
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or ()), *_heads_of(model)]
    return config


def _check_heads(folder: str | os.PathLike[str], model: Any) -> None:
    heads = _heads_of(model)
    for head in heads:
        for name, module in model.get_submodule(head).named_modules(prefix=head):
            if is_quantised(module):
                raise ValueError(
                    f"{folder}: {name} is quantised, and a head is trained whole; expected a model "
                    f"that was quantised without it, by llm_int8_skip_modules={heads} or as its "
                    "library names what it leaves out"
                )


def _with_head(lora_config: LoraConfig, model: Any) -> LoraConfig:
    """A config by which all beside the base model is trained whole, and saved with the adapter.

    PEFT knows heads that are called classifier or score, and no pooler before them.
    """
    heads = _heads_of(model)
    config = copy.copy(lora_config)
    config.modules_to_save = heads
    config.exclude_modules = rf"({'|'.join(map(re.escape, heads))})(\..*)?"
    return config
