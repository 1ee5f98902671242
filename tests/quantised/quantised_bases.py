"""A small Llama, quantised by each library that runs on a CPU, and what its tests share."""

from __future__ import annotations

import functools
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from filet import FiletConfig, FiletReport, initialize_lora_filet_weights
from filet.model.values import Values, dtype_of_model, values_of

VOCAB = 64
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]  # square, and smaller on either side

# What is quantised by which library.
LIBRARIES = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "nf4 twice": "bitsandbytes",
    "int8": "bitsandbytes",
    "hqq": "hqq",
    "torchao": "torchao",
}

# Whose forward multiplies by the dequantised values and does nothing else.
PRODUCTS = ("nf4", "fp4", "nf4 twice", "hqq")


def kinds(*names: str) -> list[Any]:
    """Parameters of a test: these kinds, all by default; skipped where their library is not."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                find_spec(LIBRARIES[name]) is None, reason=f"{LIBRARIES[name]} is not installed"
            ),
        )
        for name in names or LIBRARIES
    ]


@functools.cache
def plain_folder() -> Path:
    """Of the model as it was before, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    folder = Path(tempfile.mkdtemp(prefix="filet-quantised-"))
    model.save_pretrained(folder)
    return folder


def plain(dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(plain_folder(), dtype=dtype, **more)


def of_bits(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **config: Any
) -> Any:
    """The model as bitsandbytes quantises it by these settings."""
    how = BitsAndBytesConfig(**config)
    return plain(dtype, quantization_config=how, device_map={"": device})


def quantised(
    kind: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """The model in eval mode, its linear layers quantised anew, but for the head."""
    if kind == "hqq":
        return _with_hqq(plain(dtype).to(device), dtype)
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        how = TorchAoConfig(Int8WeightOnlyConfig())
        return plain(dtype, quantization_config=how, device_map={"": device})
    if kind == "int8":
        return of_bits(dtype, device, load_in_8bit=True)
    return of_bits(
        dtype,
        device,
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.split()[0],
        bnb_4bit_use_double_quant="twice" in kind,
        bnb_4bit_compute_dtype=dtype,
    )


def _with_hqq(model: Any, dtype: torch.dtype) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in linears(model).items():
        parent, _, child = name.rpartition(".")
        config = BaseQuantizeConfig(nbits=4, group_size=64)
        new = HQQLinear(module, config, compute_dtype=dtype, device=str(module.weight.device))
        setattr(model.get_submodule(parent), child, new)
    return model


def linears(model: Any) -> dict[str, Any]:
    """The linear layers of the blocks, quantised or not, by name; also below an adapter."""
    found = {name: m for name, m in model.named_modules() if name.endswith("_proj")}
    return {name: getattr(m, "get_base_layer", lambda m=m: m)() for name, m in found.items()}


def values(model: Any) -> dict[str, Values]:
    dtype = dtype_of_model(model)
    return {name: values_of(module, dtype) for name, module in linears(model).items()}


def dense(model: Any) -> Any:
    """A plain model that holds what this one multiplies by."""
    found = plain(model.config.dtype).to(model.device)
    for name, its in values(model).items():
        linear = found.get_submodule(name)
        linear.weight.data.copy_(its.weight())
        linear.bias = None if its.module.bias is None else linear.bias
    return found


def peft_of(model: Any, **config: Any) -> PeftModel:
    settings: dict[str, Any] = {"r": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(**{**settings, **config}))


@functools.cache
def _ids() -> Tensor:
    return torch.randint(0, VOCAB, (6, 12), generator=torch.Generator().manual_seed(1))


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in _ids().split(2)]


def initialised(peft_model: PeftModel, **config: Any) -> FiletReport:
    keep = config.pop("keep", None)
    return initialize_lora_filet_weights(
        peft_model,
        batches(),
        FiletConfig(**{"samples": None, **config}),
        show_progress_bar=False,
        keep=keep,
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=_ids().to(model.device)).logits
    return found


def stored(model: Any) -> dict[str, list[Tensor]]:
    """Copies of what every quantised layer is made of, and of W, which it makes of that."""
    return {
        name: [*(part.clone() for part in its.stored()), its.weight()]
        for name, its in values(model).items()
    }


def assert_stored(model: Any, before: dict[str, list[Tensor]]) -> None:
    after = stored(model)
    assert after.keys() == before.keys()
    for name, parts in before.items():
        assert len(after[name]) == len(parts)
        assert all(map(torch.equal, after[name], parts)), name


def assert_energies(found: FiletReport, expected: dict[str, Tensor], rtol: float) -> None:
    assert found.modules.keys() == expected.keys()
    for name, energies in expected.items():
        torch.testing.assert_close(found.modules[name].energies, energies, rtol=rtol, atol=0)


def trained(model: Any, steps: int = 3, rate: float = 1e-2) -> list[float]:
    """The loss before each step of AdamW on all batches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    losses = []
    for _ in range(steps):
        loss = sum(
            model(**{k: v.to(model.device) for k, v in batch.items()}).loss for batch in batches()
        )
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    return losses


def trainer_of(peft_model: PeftModel, folder: Path, steps: int, **more: Any) -> Trainer:
    """On the same batches as :func:`trained`, with a checkpoint every other step."""
    args = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to="none", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    rows = [{k: v[0] for k, v in batch.items()} for batch in batches()]
    return Trainer(peft_model, args, train_dataset=rows, **more)
