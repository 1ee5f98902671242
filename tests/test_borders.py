"""How often one part of the library asks another while one batch goes through.

A border is the line between two folders of ``python/filet``, between one and a module that lies
beside them (``config``, ``select``, ``initialize``), or between any of these and ``filet_kernels``.
It is crossed by every Python call whose nearest caller among our own files lies on the other side:
functions, properties, and every time that a generator is resumed. Hooks count as well, which torch
calls from within another part's backward. Each crossing is something that a reader has to look up
elsewhere; so neighbours are asked once, and for what they alone know.
"""

from __future__ import annotations

import json
import subprocess
import sys

MOST = 60

PROGRAM = """
import collections, json, os, sys, threading, warnings
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import filet, filet.initialize, filet_kernels

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, vocab_size=64, max_position_embeddings=64,
)
peft_model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj"]))
ids = torch.randint(0, 64, (2, 16))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

ours, kernels = (os.path.dirname(package.__file__) for package in (filet, filet_kernels))

def part(path):
    if path.startswith(kernels + os.sep):
        return "filet_kernels"
    if path.startswith(ours + os.sep):
        return os.path.relpath(path, ours).split(os.sep)[0]
    return None

crossed = collections.Counter()

def watch(frame, event, arg):
    here = part(frame.f_code.co_filename) if event == "call" else None
    if here is None:
        return
    caller = frame.f_back
    while caller is not None and part(caller.f_code.co_filename) is None:
        caller = caller.f_back
    there = None if caller is None else part(caller.f_code.co_filename)
    if there not in (None, here):
        crossed[f"{there} -> {here}: {frame.f_code.co_name}"] += 1

threading.setprofile(watch)
sys.setprofile(watch)
filet.initialize_lora_filet_weights(
    peft_model, [batch], filet.FiletConfig(samples=2), show_progress_bar=False
)
sys.setprofile(None)
print(json.dumps(crossed))
"""


def test_a_batch_and_a_layer_cross_few_borders() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    crossed: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    pairs = "\n".join(f"{count:3} {pair}" for pair, count in sorted(crossed.items()))
    total = sum(crossed.values())
    assert 20 < total <= MOST, f"{total} calls cross a border; expected at most {MOST}:\n{pairs}"
