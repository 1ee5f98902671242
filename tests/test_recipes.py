"""docs/recipes.md: other trainers go on from the plain adapter, by the configs in examples/recipes.

What is installed here is asked itself: axolotl's schema and loader, LLaMA-Factory's parser and
loader. What they do in the end, PEFT does always.
"""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import filet
from models import case, llama, loader

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"

# By axolotl 0.19.0: axolotl/utils/schemas/{config,peft,model,training,datasets}.py.
AXOLOTL = {
    "base_model", "adapter", "lora_model_dir", "load_in_4bit", "datasets", "val_set_size",
    "output_dir", "sequence_len", "micro_batch_size", "gradient_accumulation_steps", "num_epochs",
    "optimizer", "learning_rate", "lr_scheduler", "warmup_steps", "bf16",
}  # fmt: skip
# By LLaMA-Factory 0.9.5: llamafactory/hparams/*_args.py, and transformers' TrainingArguments.
LLAMA_FACTORY = {
    "model_name_or_path", "adapter_name_or_path", "create_new_adapter", "stage", "do_train",
    "finetuning_type", "quantization_bit", "dataset_dir", "dataset", "template", "cutoff_len",
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "bf16",
}  # fmt: skip


def recipe(name: str, four_bits: bool = False) -> dict[str, Any]:
    """A config; with the line for 4 bits that is a comment in it."""
    text = (RECIPES / name).read_text()
    if four_bits:
        lines = [line.removeprefix("# ") for line in text.splitlines() if "_4bit:" in line]
        lines += [line.removeprefix("# ") for line in text.splitlines() if "ization_bit:" in line]
        assert len(lines) == 1
        text = "\n".join([text, *lines])
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a base and of an adapter that was initialised on it."""
    place = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    llama().save_pretrained(place / "base")
    lora = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"], task_type="CAUSAL_LM",
    )  # fmt: skip
    filet.initialize_folder(
        place / "base", list(loader(case("llama").samples)), place / "adapter", lora,
        filet.FiletConfig(samples=None), device="cpu", show_progress_bar=False,
    )  # fmt: skip
    return place / "base", place / "adapter"


def base_of(made: tuple[Path, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(made[0], dtype=torch.float32)


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}


def assert_goes_on(model: Any, made: tuple[Path, Path]) -> None:
    """All of A and B trains, from what the folder has, by its config."""
    saved = load_file(made[1] / "adapter_model.safetensors")
    found = {name.replace(".default", ""): p for name, p in trained(model).items()}
    assert found.keys() == {name for name in saved if "lora_" in name} and len(found) == 8
    for name, parameter in found.items():
        assert torch.equal(parameter.float(), saved[name]), name
        assert bool(parameter.any()) == ("lora_A" in name)
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (4, 6, True, 0)


def test_plain_peft_goes_on_from_the_start(made: tuple[Path, Path]) -> None:
    model = PeftModel.from_pretrained(base_of(made), made[1], is_trainable=True)
    assert_goes_on(model, made)
    batch = next(iter(loader(case("llama").samples)))
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in trained(model).items() if "_B" in n)


def test_a_new_adapter_would_not(made: tuple[Path, Path]) -> None:
    """What LLaMA-Factory does with create_new_adapter: true."""
    merged = PeftModel.from_pretrained(base_of(made), made[1]).merge_and_unload()
    for name, weight in base_of(made).named_parameters():
        assert torch.equal(weight, merged.get_parameter(name)), name  # nothing says that it is lost
    other = get_peft_model(merged, LoraConfig.from_pretrained(str(made[1])))
    with pytest.raises(AssertionError):
        assert_goes_on(other, made)


def test_recipes_have_known_keys() -> None:
    axolotl = recipe("axolotl.yaml", four_bits=True)
    assert axolotl.keys() == AXOLOTL
    assert (axolotl["adapter"], axolotl["lora_model_dir"]) == ("lora", "adapter")
    factory = recipe("llama_factory.yaml", four_bits=True)
    assert factory.keys() == LLAMA_FACTORY
    assert (factory["finetuning_type"], factory["create_new_adapter"]) == ("lora", False)
    assert (factory["adapter_name_or_path"], factory["quantization_bit"]) == ("adapter", 4)
    assert factory["dataset"] in json.loads((RECIPES / "dataset_info.json").read_text())


def test_the_script_for_unsloth_makes_no_adapter() -> None:
    tree = ast.parse((RECIPES / "train_with_unsloth.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [call.func.attr for call in calls if isinstance(call.func, ast.Attribute)]
    assert "from_pretrained" in names and "get_peft_model" not in names
    (load,) = [c for c in calls if getattr(c.func, "attr", "") == "from_pretrained"]
    given = {k.arg: ast.literal_eval(k.value) for k in load.keywords}
    assert given["model_name"] == "adapter" and given["load_in_4bit"] is False
    assert isinstance(tree.body[2], ast.ImportFrom) and tree.body[2].module == "unsloth"


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_their_four_bits_are_ours(made: tuple[Path, Path]) -> None:
    """NF4 with double quantisation, whatever the codes are stored in."""
    from filet.model.folder import quantization_of
    from filet.model.values import values_of

    ours = quantization_of(made[0], "nf4", double=True, dtype=torch.float32)
    theirs = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip
    models = [
        AutoModelForCausalLM.from_pretrained(made[0], quantization_config=how, dtype=torch.float32)
        for how in (ours, theirs)
    ]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        one, other = (values_of(m.get_submodule(name), torch.float32) for m in models)
        assert torch.equal(one.weight(), other.weight())


@pytest.mark.skipif(not find_spec("axolotl"), reason="axolotl is not installed")
@pytest.mark.parametrize("four_bits", [False, True])
def test_axolotl(four_bits: bool, made: tuple[Path, Path]) -> None:
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    given = recipe("axolotl.yaml", four_bits)
    given["adapter"] = "qlora" if four_bits else given["adapter"]
    taken = AxolotlInputConfig(**given).model_dump(exclude_none=True)
    assert (
        taken.items() >= {k: v for k, v in given.items() if k not in ("datasets", "bf16")}.items()
    )
    if four_bits:
        return
    from axolotl.loaders.adapter import load_lora

    model, _ = load_lora(base_of(made), DictDefault({**taken, "lora_model_dir": str(made[1])}))
    assert_goes_on(model, made)


@pytest.mark.skipif(not find_spec("llamafactory"), reason="LLaMA-Factory is not installed")
@pytest.mark.parametrize("four_bits", [False, True])
def test_llama_factory(
    four_bits: bool, made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")  # of PEFT, newer than it says it takes
    from llamafactory.hparams.parser import get_train_args

    given = recipe("llama_factory.yaml", four_bits)
    given |= {"bf16": False, "output_dir": str(tmp_path)}  # no GPU is asked for
    given |= {"model_name_or_path": str(made[0]), "adapter_name_or_path": str(made[1])}
    model_args, _, _, finetuning, _ = get_train_args(given)
    assert model_args.quantization_bit == (4 if four_bits else None)
    assert (model_args.quantization_type, model_args.double_quantization) == ("nf4", True)
    if four_bits:
        return
    from llamafactory.model.adapter import init_adapter

    base = base_of(made)
    assert_goes_on(init_adapter(base.config, base, model_args, finetuning, True), made)
