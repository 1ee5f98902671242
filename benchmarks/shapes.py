"""Models of real shapes with random weights, and the batches that the model benchmarks run."""

from __future__ import annotations

import copy
import datetime
import platform
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAMPLES = 320  # the paper's minibatch


@dataclass(frozen=True)
class Shape:
    """What the config of the model on the hub says."""

    title: str
    hidden: int
    mlp: int
    blocks: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    family: str = "Llama"

    def linears(self) -> dict[str, tuple[int, int]]:
        """(m, n) = (out, in) of each linear layer of a block."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        return {
            "q_proj": (q, self.hidden), "k_proj": (kv, self.hidden), "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q), "gate_proj": (self.mlp, self.hidden),
            "up_proj": (self.mlp, self.hidden), "down_proj": (self.hidden, self.mlp),
        }  # fmt: skip

    def config(self, blocks: int) -> Any:
        return getattr(transformers, f"{self.family}Config")(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
            initializer_range=0.02,
            use_cache=False,
        )


SHAPES = {
    "llama-1b": Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3b": Shape("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "llama-8b": Shape("Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-70b": Shape("Llama-3-70B", 8192, 28672, 80, 64, 8, 128, 128256, False),
    "qwen-8b": Shape("Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936, False, "Qwen3"),
    "tiny": Shape("tiny, no statement on speed", 64, 160, 2, 4, 2, 16, 256, False),
}
LARGEST = Shape("Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128, 128256, False)
"""Which nothing here runs: bench_scale.py says what it would take."""


def build(shape: Shape, blocks: int) -> nn.Module:
    """The model, bfloat16, frozen, built where it runs: normal weights of deviation 0.02."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            model = getattr(transformers, f"{shape.family}ForCausalLM")(shape.config(blocks))
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    return model.eval()


def twin(model: nn.Module) -> nn.Module:
    """The same modules once more over the same weights: each has its own hooks."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def lora_config(rank: int, **settings: Any) -> LoraConfig:
    """An adapter on all seven linear layers, of scaling 1."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, **settings)


def with_lora(model: nn.Module, rank: int) -> PeftModel:
    """A PeftModel over the model's own weights, with PEFT's default initialisation."""
    return get_peft_model(twin(model), lora_config(rank))


def linears(model: nn.Module, blocks: int) -> dict[str, nn.Linear]:
    """The seven linear layers of each of the first blocks."""
    layers: Any = model.model.layers[:blocks]  # type: ignore[index,union-attr]
    return {
        name: module
        for name, module in layers.named_modules()
        if name.rpartition(".")[2] in LINEARS
    }


def token_batches(
    shape: Shape, samples: int, length: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """Random tokens without padding, on the CPU as a dataloader's; the labels are the tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (samples, length), generator=generator)
    return [{"input_ids": part, "labels": part} for part in ids.split(batch_size)]


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(DEVICE) for key, value in batch.items()}


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def about() -> dict[str, str]:
    """What a result depends on, for the files it is kept in."""
    return {
        "gpu": torch.cuda.get_device_name() if CUDA else "no GPU: no statement on speed",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }
