"""Separate runs of a classifier by PEFT and torch, which populations are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from effect.bench import Bench
from effect.start import Start
from effect.tasks import Row, order
from effect.train import Member, Recipe

RANK = 4
RECIPE = Recipe(steps=20, batch_size=8, warmup=3)
MEMBERS = [Member("lora", 1e-2), Member("pissa", 3e-3, decay=0.3), Member("lora", 3e-3, seed=1)]


def adapted(bench: Bench, task: str, member: Member) -> Any:
    torch.manual_seed(member.seed)
    init: Any = True if member.method == "lora" else member.method
    targets = list(bench.kind.targets)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=init)
    return get_peft_model(bench.kind.load(task), config)


def start_of(bench: Bench, task: str, member: Member) -> dict[str, Start]:
    found = {}
    for name, layer in adapted(bench, task, member).base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            assert layer.base_layer.bias.any()
            A, B = (x["default"].weight.detach() for x in (layer.lora_A, layer.lora_B))
            found[name] = Start(A, B, *((A, B) if member.method == "pissa" else ()))
    return found


def alone(
    bench: Bench, task: str, member: Member, loss_of: Callable[[Any, Sequence[Row]], Tensor]
) -> list[float]:
    """The training losses of PEFT's model with torch's AdamW, its scheduler and its clip."""
    model = adapted(bench, task, member)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=member.rate, weight_decay=member.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, RECIPE.factor)
    losses = []
    for rows in order(bench.task(task).train, member.seed, RECIPE.batch_size, RECIPE.steps):
        loss = loss_of(model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, RECIPE.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
