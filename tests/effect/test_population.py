"""A population against as many runs of PEFT and torch's AdamW, one after the other."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from effect.population import Population
from effect.runs import train_population
from effect.start import Start, scaled
from effect.tasks import CausalTask, order
from effect.train import FROZEN, Member, Recipe
from models import SMALL, llama, randomised

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RANK = 4
MEMBERS = [
    Member("lora", rate=1e-3),
    Member("lora", rate=1e-2, decay=0.3),
    Member("pissa", rate=3e-3),
    Member("lora", rate=3e-3, ratio=8.0, seed=1),
    Member("olora", rate=1e-3, scale=2.0, seed=1),
    Member("lora.frozen", rate=1e-2, ratio=2.0, decay=0.3, seed=1),
]
RECIPE = Recipe(steps=20, batch_size=8, warmup=3)


def qwen() -> Qwen3ForCausalLM:
    """It has norms of queries and keys, and heads that are not the hidden size together."""
    settings = {**SMALL, "max_position_embeddings": 64, "head_dim": 12}
    return randomised(Qwen3ForCausalLM(Qwen3Config(**settings)))


BASES = {"llama": llama, "qwen": qwen}


def base(family, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return BASES[family]().to(device, dtype).requires_grad_(False).eval()


@functools.cache
def task() -> CausalTask:
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        lengths = torch.randint(15, 30, (count,), generator=generator).tolist()
        ids = [torch.randint(1, 9, (n,), generator=generator) for n in lengths]  # of few: learnt
        return [(x, torch.where(torch.arange(len(x)) < 2, -100, x)) for x in ids]

    return CausalTask("random", rows(80), rows(8), rows(6), options=(3, 4, 5))


def config(method: str) -> LoraConfig:
    method = method.removesuffix(FROZEN)
    init = True if method == "lora" else method
    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=init)


def adapted(family, member: Member, dtype, device):
    torch.manual_seed(member.seed)
    model = get_peft_model(base(family, dtype, device), config(member.method))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= member.scale
        if "lora_A" in name and member.method.endswith(FROZEN):
            parameter.requires_grad_(False)
    return model


def start_of(family, member: Member) -> dict[str, Start]:
    """From PEFT's own layers; PiSSA and OLoRA have taken B A out of the base."""
    plain = Member(member.method, member.rate, seed=member.seed)
    model = adapted(family, plain, torch.float32, "cpu")
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            A, B = (x["default"].weight.detach() for x in (layer.lora_A, layer.lora_B))
            taken = (A, B) if member.method in ("pissa", "olora") else (None, None)
            found[name] = scaled(Start(A, B, *taken), member.scale)
    return found


def alone(family, member: Member, dtype, device) -> list[float]:
    """The training losses of PEFT's model with torch's AdamW, its scheduler and its clip."""
    model = adapted(family, member, dtype, device)
    if member.scale != 1:  # what PEFT took out of the base was not scaled
        for _, layer in model.base_model.model.named_modules():
            if hasattr(layer, "lora_A") and member.method in ("pissa", "olora"):
                A, B = (x["default"].weight.detach() for x in (layer.lora_A, layer.lora_B))
                layer.base_layer.weight.data -= (B @ A) * (1 - 1 / member.scale**2)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "lora_A" in n], "lr": member.rate},
        {"params": [p for n, p in named if "lora_B" in n], "lr": member.rate * member.ratio},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=member.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, RECIPE.factor)
    data, losses = task(), []
    for rows in order(data.train, member.seed, RECIPE.batch_size, RECIPE.steps):
        inputs, labels = data.batch(rows, torch.device(device))
        mask = torch.zeros_like(inputs["input_ids"])
        for i, (ids, _) in enumerate(rows):
            mask[i, : len(ids)] = 1
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**inputs, attention_mask=mask, labels=labels.to(device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], RECIPE.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("family", BASES)
def test_a_population_is_as_many_separate_runs(family, dtype, tolerance, device):
    # W_res of PiSSA in bfloat16 is another model; what is subtracted beside W is not rounded.
    members = [m for m in MEMBERS if dtype == torch.float32 or m.method.startswith("lora")]
    model = base(family, dtype, device)
    before = copy.deepcopy(model.state_dict())
    starts = [start_of(family, m) for m in members]
    population = Population(model, starts[::-1])  # of others of those shapes first
    train_population(population, task(), members, Recipe(steps=2, batch_size=8, warmup=1))
    population.load(starts)
    results = train_population(population, task(), members, RECIPE)
    population.close()
    for member, result in zip(members, results, strict=True):
        expected = alone(family, member, dtype, device)
        worst = max(abs(a / b - 1) for a, b in zip(result.losses, expected, strict=True))
        assert worst < tolerance, (member, worst)
        assert math.isfinite(result.loss) and abs(expected[0] - expected[-1]) > 10 * tolerance
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
