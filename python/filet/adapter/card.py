"""The model card of an adapter's folder: the base, the data, the settings, how to load it.

It says what the report does, and no time: two equal runs write equal cards.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from filet.adapter.state import factors_of
from filet.model.values import dtype_of_model, is_quantised
from filet.report.names import FILET_FILE, PLOT_FILE
from filet.report.report import FiletReport
from filet.report.table import hash_text, kept_text
from filet.system.text import plural

__all__ = ["card_of"]

_BEGIN, _END = "<!-- filet: what is between these two lines is its own -->", "<!-- /filet -->"
_CACHED = re.compile(r".*[\\/]models--([^\\/]+)[\\/]snapshots[\\/][^\\/]+[\\/]?")
_METHOD = "[FILet](https://arxiv.org/abs/2605.01046)"
_CHOSEN = {
    "min": "to which the loss on its data is least sensitive, those of lowest Fisher energy",
    "max": "to which the loss on its data is most sensitive, those of highest Fisher energy",
    "random": "at random",
    "contrast": "that matter most to its data, over data that was not to be forgotten",
}
_STARTS = {
    "zero": "A started as them and B as 0: this is plain LoRA, and before it is trained the model "
    "computes what it computed without it.",
    "untouched": "A and B started as them. The other half of both is frozen and takes away what "
    f"they started as; `{FILET_FILE}` says so.",
    "residual": "A and B started as them, and the base's weights are less what they started as.",
}


def card_of(
    peft_model: PeftModel,
    adapter_name: str,
    report: FiletReport,
    *,
    picture: bool,
    there: str | None = None,
) -> str:
    """The text of a card; with one that is ``there`` already, that one with our part renewed.

    ``picture``: whether that of the energies lies beside it.
    """
    facts = _Facts(peft_model, adapter_name, report)
    part = f"{_BEGIN}\n{facts.text(picture)}\n{_END}"
    if there is not None:
        before, begin, rest = there.partition(_BEGIN)
        _, end, after = rest.partition(_END)
        if begin and end:
            return f"{before}{part}{after}"
        return f"{there.rstrip()}\n\n{part}\n"
    causal = type(facts.base).__name__.endswith("ForCausalLM")
    data = ModelCardData(
        base_model=facts.repository,
        library_name="peft",
        pipeline_tag="text-generation" if causal else None,
        tags=["filet", "lora"],
    )
    title = f"# LoRA for {facts.short}, initialised by FILet"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{title}\n\n{part}\n"))


class _Facts:
    """What is said.

    Attributes:
        start: of the config; "residual" where the frozen half has been written into the base.
        base: the model below the adapter.
        path: of it, as PEFT recorded it; None where it did not.
        repository: its name on the Hub; None of a folder that is no download of one.
    """

    def __init__(self, peft_model: PeftModel, adapter_name: str, report: FiletReport) -> None:
        self.base: Any = peft_model.base_model.model
        self.path: str | None = peft_model.peft_config[adapter_name].base_model_name_or_path or None
        self.repository = None if self.path is None else _repository(self.path)
        self._report = report
        self.start = str(report.config["start"])
        if self.start == "untouched" and not factors_of(peft_model, adapter_name):
            self.start = "residual"

    @property
    def short(self) -> str:
        name = self.repository or self.path
        return type(self.base).__name__ if name is None else Path(name).name

    def text(self, picture: bool) -> str:
        report = self._report
        which = _CHOSEN[report.config["select"]]
        lines = [f"{_METHOD} chose directions of every layer {which}. {_STARTS[self.start]}", ""]
        if picture:
            lines += [f"![Energies of every layer, the chosen ones marked]({PLOT_FILE})", ""]
        lines += ["| | |", "| --- | --- |"]
        cells = [(label, text.replace("|", "\\|")) for label, text in self._rows()]
        lines += [f"| {label} | {text} |" for label, text in cells]
        return "\n".join([*lines, "", *self._loading()])

    def _rows(self) -> list[tuple[str, str]]:
        report = self._report
        modules = list(report.modules.values())
        ranks = sorted({module.rank for module in modules}) or [0]
        rank = " to ".join(str(each) for each in dict.fromkeys((ranks[0], ranks[-1])))
        quantised = _quantised(self.base)
        counts = (
            plural(report.samples, "sample"),
            plural(report.tokens, "token"),
            plural(report.loss_terms, "loss term"),
        )
        found = [("base model", self._base())]
        if quantised:
            found.append(("quantised", f"`{_words(quantised)}`"))
        found.append(("data", ", ".join(counts)))
        found.append(("hash of the samples", f"`{hash_text(report.data)}`" if report.data else "-"))
        if report.keep:
            found.append(("data to keep", kept_text(report.keep)))
        found.append(("directions", f"{rank} in each of {plural(len(modules), 'module')}"))
        if report.left_default:
            found.append(("left as PEFT draws them", plural(len(report.left_default), "module")))
        found.append(("settings", f"`{_words(report.config)}`"))
        found.append(("made by", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)))
        return found

    def _base(self) -> str:
        dtype = _dtype(self.base)
        if self.path is None:
            return f"{type(self.base).__name__}, {dtype}; where it lay was not recorded"
        if self.repository is not None:
            return f"[{self.repository}](https://huggingface.co/{self.repository}), {dtype}"
        return f"`{self.path}`, {dtype}: a folder of the machine that this was made on"

    def _loading(self) -> list[str]:
        kind = type(self.base)
        quantised = _quantised(self.base)
        known = kind.__module__.startswith("transformers.") and self._loads_so(quantised)
        imports, more = [kind.__name__], ""
        if quantised.get("quant_method") == "bitsandbytes":
            imports.append("BitsAndBytesConfig")
            its = {key: value for key, value in quantised.items() if key != "quant_method"}
            arguments = ", ".join(f"{key}={value!r}" for key, value in its.items())
            more = f"    quantization_config=BitsAndBytesConfig({arguments}),\n"
        if kind.__name__.endswith("Classification"):
            more += f"    num_labels={self.base.config.num_labels},\n"
        of = self.repository or self.path or "path/to/the/base"
        code = f"base = ...  # the {kind.__name__} above"
        if quantised or self._packed:
            code += ", quantised as it was"
        elif self._dequantised:
            code += ", dequantised"
        if known:
            code = f"from transformers import {', '.join(sorted(imports))}\n\n"
            code += f"base = {kind.__name__}.from_pretrained(\n"
            code += f'    {of!r},\n    dtype="{_dtype(self.base)}",\n{more})'
        train = "model = PeftModel.from_pretrained(base, folder, is_trainable=True)"
        if self.start == "untouched":
            train = "model = PeftModel.from_pretrained(base, folder)  # to train: filet.load"
        first = "from peft import PeftModel\n"
        return ["```python", f'{first}{code}\nfolder = "..."  # this one\n{train}', "```"]

    def _loads_so(self, quantised: Mapping[str, Any]) -> bool:
        """Whether from_pretrained gives the base again, which we know how to call.

        What was quantised as it was loaded, by another library than bitsandbytes, it does not; nor
        what a library quantised after that, or dequantised as it was loaded.
        """
        if quantised.get("quant_method") == "bitsandbytes":
            return True
        if quantised:
            quantizer = getattr(self.base, "hf_quantizer", None)
            return bool(getattr(quantizer, "pre_quantized", True))
        return not self._packed and not self._dequantised

    @functools.cached_property
    def _packed(self) -> bool:
        """Whether a layer that was initialised has codes for a weight."""
        layers = dict(self.base.named_modules())
        found = (layers.get(name) for name in self._report.modules)
        return any(is_quantised(x.get_base_layer()) for x in found if isinstance(x, LoraLayer))

    @functools.cached_property
    def _dequantised(self) -> bool:
        """Of a base that is not quantised, whether its folder on this machine is."""
        if self.path is None or not (file := Path(self.path) / "config.json").is_file():
            return False
        return json.loads(file.read_text("utf-8")).get("quantization_config") is not None


def _dtype(base: Any) -> str:
    """That it was loaded in: codes are of the numbers in it, whatever was cast after that."""
    said = getattr(getattr(base, "config", None), "dtype", None)
    loaded = said if _quantised(base) and isinstance(said, torch.dtype) else dtype_of_model(base)
    return str(loaded).removeprefix("torch.")


_PACKAGES = ("filet-kernels", "peft", "transformers", "torch")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # of ours, run from its sources
        return "(not installed)"


def _repository(path: str) -> str | None:
    """The Hub's name of a model: of one loaded by it, or from the cache of what was downloaded."""
    cached = _CACHED.fullmatch(path)
    name = "/".join(cached[1].split("--", 1)) if cached else path
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if cached or not Path(path).exists() else None


def _quantised(base: Any) -> dict[str, Any]:
    """What the base's config says of its quantisation, without what it does not do."""
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is None:
        return {}
    its: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    simple: dict[str, Any] = {
        key: value if isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))
        for key, value in its.items()
        if not key.startswith("_") and not isinstance(value, (Mapping, list, tuple))
        if value is not None and value is not False and value != ""
    }
    if its.get("llm_int8_skip_modules") is not None:  # none of them is said too
        simple["llm_int8_skip_modules"] = list(its["llm_int8_skip_modules"])
    if not simple.get("load_in_8bit"):  # bitsandbytes names the other kind's settings as well
        simple = {
            key: value
            for key, value in simple.items()
            if not key.startswith("llm_int8") or key == "llm_int8_skip_modules"
        }
    if not simple.get("load_in_4bit"):
        simple = {key: value for key, value in simple.items() if not key.startswith("bnb_4bit")}
    return simple


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
    )
