"""A script that accelerate starts, in two processes: one call in it, and one adapter.

They hash strings by other seeds, as started processes do and forked ones, of the other tests, not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import filet

accelerator = Accelerator(cpu=True)
torch.manual_seed(1)
config = LlamaConfig(
    vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
)
lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(LlamaForCausalLM(config), lora)
rows = torch.randint(29, (11, 8))
loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=2)
model, loader = accelerator.prepare(model, loader)
report = filet.initialize_lora_filet_weights(model, loader, show_progress_bar=False)
assert report.samples == 11 and accelerator.num_processes == int(sys.argv[2])
if accelerator.is_main_process:
    filet.save_as_lora(accelerator.unwrap_model(model), sys.argv[1])
keep = [{"input_ids": row.flip(0)} for row in rows]
keep = accelerator.prepare(DataLoader(keep, batch_size=2))
report = filet.initialize_lora_filet_weights(model, loader, keep=keep, show_progress_bar=False)
assert report.keep["samples"] == 11
if accelerator.is_main_process:
    filet.save_as_lora(accelerator.unwrap_model(model), sys.argv[1] + " keep")
"""


def start(argv: list[str], folder: Path, size: int) -> dict[str, torch.Tensor]:
    """By a shell that knows nothing of a launcher; the adapters that it wrote, both in one."""
    (folder / "train.py").write_text(SCRIPT)
    known = ("PATH", "HOME", "TMPDIR", "HF_HOME")
    env = {name: os.environ[name] for name in known if name in os.environ}
    env |= {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    output = folder / f"by {size}"
    argv = [sys.executable, *argv, str(folder / "train.py"), str(output), str(size)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    keep = load_file(folder / f"by {size} keep/adapter_model.safetensors")
    found = load_file(output / "adapter_model.safetensors")
    return found | {f"keep: {name}": value for name, value in keep.items()}


def test_accelerate_launch(tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    many = start([*launch, "--main_process_port", "0"], tmp_path, 2)
    one = start([], tmp_path, 1)
    assert many.keys() == one.keys() and many
    for name, value in one.items():
        # The contrast's are eigenvectors: sums that round otherwise turn them by 3e-5.
        atol = 1e-4 if name.startswith("keep: ") else 1e-5
        torch.testing.assert_close(many[name], value, rtol=1e-4, atol=atol)
