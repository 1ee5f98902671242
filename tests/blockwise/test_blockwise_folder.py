"""Models in folders: which of them, and what beside them, is refused, by one engine or by both."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import LAYERS, MARKS, batches, initialize, lora, model_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

import models
import smollm2
from filet.blockwise.folder import empty_model
from filet.blockwise.weights import ShardedWeights
from filet.model.chain import Parts
from filet.model.folder import load_model
from oldest_peft import needs

pytestmark = MARKS


# Arguments, models and data.


@pytest.mark.parametrize("engine", ["memory", "blockwise", "auto"])
@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "olora", "loftq", "lora_ga"])
def test_a_changed_base_is_refused_before_the_model_is_loaded(
    init: str, engine: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("PEFT was called")

    chosen = lora()
    chosen.init_lora_weights = init  # type: ignore[assignment]
    monkeypatch.setattr("filet.model.targets.get_peft_model", never)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    with pytest.raises(ValueError, match=f"lora_config has init_lora_weights='{init}', by which"):
        initialize(folder, tmp_path / "out", engine, lora_config=chosen)
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    no_labels = [{"input_ids": torch.ones(2, 3, dtype=torch.int64)}]
    for change, message in (
        ({"lora_config": lora(target_modules=["q_proj", "lm_head"])}, "lm_head: outside"),
        ({"lora_config": lora(r=33)}, "rank 33 exceeds"),
        ({"engine": "fast"}, "expected 'auto', 'memory' or 'blockwise'"),
        ({"host_memory": 0}, "host_memory=0"),
        ({"host_memory": 5}, "host_memory holds 0"),
        ({"output": tmp_path / "taken"}, "overwrite=True"),
        ({"output": tmp_path / "taken", "overwrite": True}, "replaces only adapters"),
        ({"batches": []}, "no sample"),
        ({"batches": no_labels}, "no labels"),
        ({"lora_config": lora(target_modules=["q_proj", "embed_tokens"])}, "embed_tokens: outside"),
        ({"lora_config": lora(modules_to_save=["lm_head"])}, r"modules_to_save=\['lm_head'\]: .*"),
        ({"lora_config": lora(trainable_token_indices=[1])}, "trainable_token_indices="),
        ({"lora_config": lora(bias="all")}, "bias='all': .* expected 'none'"),
        (
            {"lora_config": lora(init_lora_weights="pissa")},
            "has init_lora_weights=.pissa., by which PEFT changes the base weights; expected",
        ),
        (
            {"lora_config": lora(target_modules=["q_proj", "mlp.upproj"])},
            r"target_modules has 'mlp\.upproj' .* expected names like 'mlp\.up_proj'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(**{"folder": folder, "output": tmp_path / "out", **change})
        assert not (tmp_path / "out.filet-run").exists()


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_batches_that_are_refused(engine: str, folder: Path, tmp_path: Path) -> None:
    first, *_ = batches()
    wrong_id = {**first, "input_ids": first["input_ids"].clone()}
    wrong_id["input_ids"][1, -1] = models.VOCAB
    wrong_label = {**first, "labels": first["labels"].clone()}
    wrong_label["labels"][1, 1] = models.VOCAB
    long = {key: torch.ones(2, 17, dtype=torch.int64) for key in ("input_ids", "labels")}
    pairs = {f"chosen_{key}": value for key, value in first.items()}
    for path, given, kind, message in (
        (folder, [first, wrong_id], ValueError, r"input_ids of batch 1 has 29; expected 0 … 28"),
        (folder, [wrong_label], ValueError, r"labels of batch 0 has 29; expected -100, or"),
        (model_folder("gpt2"), [long], ValueError, r"17 tokens a sample; expected at most 16"),
        (folder, [pairs], ValueError, r"no input_ids in the keys of batch 0, chosen_input_ids"),
        (folder, models._text(1), ValueError, r"input_ids of batch 0 has shape \(5,\), as one"),
        (folder, models.loader(models._text(1)).dataset[0], TypeError, "batches is a dict"),
        (folder, [[first]], TypeError, "gave a list; expected a dict"),
    ):
        with pytest.raises(kind, match=message):
            initialize(path, tmp_path / "out", engine, batches=given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.filet-run").exists()


def test_nan_names_the_module(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for shard in broken.glob("*.safetensors"):
        weights = load_file(shard)
        for name, value in weights.items():
            if name == "model.layers.3.mlp.down_proj.weight":
                value[0, 0] = torch.nan
        save_file(weights, shard, {"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"model\.layers\.4\..*has a NaN or infinity"):
        initialize(broken, tmp_path / "out")


def changed_config(folder: Path, goal: Path, **values: Any) -> Path:
    shutil.copytree(folder, goal)
    config = json.loads((goal / "config.json").read_text())
    (goal / "config.json").write_text(json.dumps({**config, **values}))
    return goal


def test_models_that_are_refused(folder: Path, tmp_path: Path) -> None:
    quantised = changed_config(
        folder, tmp_path / "quantised", quantization_config={"quant_method": "aqlm"}
    )
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, max_position_embeddings=16,
        )
    )  # fmt: skip
    bart.save_pretrained(tmp_path / "bart")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "config.json", pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    wider = changed_config(folder, tmp_path / "wider", intermediate_size=50)
    deeper = changed_config(folder, tmp_path / "deeper", num_hidden_layers=LAYERS + 1)
    holed = tmp_path / "holed"
    shutil.copytree(folder, holed)
    sorted(holed.glob("*.safetensors"))[1].unlink()
    for path, message in (
        (quantised, "is quantised"),
        (tmp_path / "bart", "encoder-decoder"),
        (pickled, "safetensors weights only"),
        (wider, r"has shape \(48, 32\) .* expected \(50, 32\)"),
        (deeper, rf"no weight for model\.layers\.{LAYERS}\."),
        (holed, "no file model-00002"),
        (tmp_path / "nothing", r"no config\.json"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(path, tmp_path / "out")
        assert not (tmp_path / "out.filet-run").exists()


@pytest.mark.parametrize("engine", ["memory", "blockwise", "auto"])
@pytest.mark.parametrize("kind", models.UNFIT)
def test_folders_of_another_model(kind: str, engine: str, tmp_path: Path) -> None:
    """A head that transformers makes up, or a model that sees its labels: refused by its name."""
    make, said = models.UNFIT[kind]
    make().save_pretrained(tmp_path / "model")
    for _ in range(2):  # with the names of its classes, and without
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            initialize(tmp_path / "model", tmp_path / "out", engine)
        assert str(tmp_path / "model") in str(caught.value)
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        if kind != "masked":
            break
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": []}))
        said = "attends both ways"
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.filet-run").exists()


# Weights and names in the files.


def test_a_folder_in_memory_lacks_no_weight(folder: Path, tmp_path: Path) -> None:
    """As in the blockwise engine; transformers would make the weight up."""
    deeper = changed_config(folder, tmp_path / "deeper", num_hidden_layers=LAYERS + 1)
    wider = changed_config(folder, tmp_path / "wider", intermediate_size=50)
    for path, message in (
        (deeper, rf"no weight for model\.layers\.{LAYERS}\.\S+ and 8 more"),
        (wider, r"has shape \(32, 48\) .* expected \(32, 50\)"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(path, tmp_path / "out", "memory")


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_weights_that_the_model_does_not_use(engine: str, folder: Path, tmp_path: Path) -> None:
    """Named once and counted; the adapter is that of the model which config.json describes."""
    shallow = changed_config(folder, tmp_path / "shallow", num_hidden_layers=LAYERS - 1)
    said = rf"does not use, model\.layers\.{LAYERS - 1}\.\S+ and 8 more; expected a config\.json"
    with pytest.warns(UserWarning) as caught:
        report = initialize(shallow, tmp_path / "out", engine)
    warned = [str(each.message) for each in caught if "does not use" in str(each.message)]
    assert len(warned) == 1 and re.search(said, warned[0])
    assert not any(f"layers.{LAYERS - 1}." in name for name in report.modules)


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_nothing_is_said_of_folders_as_they_are_saved(engine: str, tmp_path: Path) -> None:
    """Of tied heads, bare models and experts that are saved one by one."""
    models.FIT["no head, tied"]().save_pretrained(tmp_path / "bare")
    tied = models.llama(tie_word_embeddings=True)
    state = {**tied.state_dict(), "lm_head.weight": tied.lm_head.weight.detach().clone()}
    tied.save_pretrained(tmp_path / "tied")
    save_file(state, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    for path in (tmp_path / "bare", tmp_path / "tied", model_folder("gpt2"), smollm2.prepare()):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*does not use")
            if engine == "memory":
                load_model(path, device="cpu")
            else:
                ShardedWeights(path, empty_model(path))


def test_experts_by_the_names_they_had(tmp_path: Path) -> None:
    """PEFT knows names of layers that transformers has fused since: they are no unknown ones."""
    needs("0.19", "does not know them, and an unknown name is refused")
    names = ["q_proj", "w1", "w2", "w3"]
    with pytest.warns(UserWarning, match="keep PEFT's default"):
        report = initialize(
            model_folder("mixtral"), tmp_path / "out", lora_config=lora(target_modules=names)
        )
    assert [name.rpartition(".")[2] for name in report.modules] == ["q_proj"] * 2


# Chains of blocks.


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.linear(hidden)


class _Inner(nn.Module):
    def __init__(self, between: Callable[..., Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(_Block() for _ in range(2))
        self.between = between

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return self.between(self.layers, self.embedding(input_ids))


class _Outer(nn.Module):
    def __init__(self, between: Callable[..., Any]) -> None:
        super().__init__()
        self.model = _Inner(between)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class _Target:
    shape = (8, 8)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda layers, x: layers[1](layers[0](x) * 2), r"output of one block .*\(at block 1\)"),
        (lambda layers, x: layers[1](layers[1](x)), r"output of one block .*\(at block 1\)"),
        (lambda layers, x: layers[0](x), "1 of the 2 blocks"),
        (lambda layers, x: layers[1](layers[0](x), x), "hidden states of another block"),
        (lambda layers, x: layers[1](layers[0](x), object()), "called with a object"),
        (lambda layers, x: layers[1](hidden=layers[0](x)), "no positional argument"),
        (lambda layers, x: (lambda y: layers[1](y[0], y[1]))(layers[0](x)), "takes more than"),
    ],
)
def test_models_whose_blocks_are_no_chain(between: Callable[..., Any], message: str) -> None:
    model = _Outer(between)
    parts = Parts(model, {"model.layers.0.linear": _Target()})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=message):
        parts.capture({"input_ids": torch.zeros(3, 2, dtype=torch.int64)})
    assert all("forward" not in vars(block) for block in parts.blocks)
