"""An initialised adapter's ways to disk and back, to go on training at rank r.

On disk it is a plain LoRA; of rank 2r and with ``filet.json`` where one half of it is frozen
(:mod:`filet.adapter.state`). Beside it lie, of a report, its file, picture and model card.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from torch import Tensor, nn

from filet.adapter.card import card_of
from filet.adapter.state import FORMAT, describe, factors_of, key_of, set_rank, starts_of
from filet.distributed.group import current
from filet.model.factors import StartedFactor, started_class
from filet.model.fingerprint import check_weights
from filet.model.sharded import gathering, resharded, units, whole
from filet.model.targets import check_init, check_peft_model, find_targets
from filet.model.values import Unreadable, dtype_of_model, is_quantised, unpack, values_of
from filet.report.names import (
    CARD_FILE,
    CONFIG_FILE,
    FILET_FILE,
    MARK,
    PLOT_FILE,
    REPORT_FILE,
    WEIGHTS_FILE,
    can_draw,
)
from filet.report.report import FiletReport
from filet.system.files import replaced_together, staged

__all__ = ["begin_as_saved", "load", "save_as_lora", "write_folder"]

_ALL_OF_IT = "(peft.PeftModel.from_pretrained loads the adapter as an ordinary LoRA)"


def save_as_lora(
    peft_model: PeftModel,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    report: FiletReport | None = None,
) -> None:
    """Save a LoRA adapter: what PEFT saves, into ``folder`` itself.

    One that started at B = 0 is a plain LoRA of rank r. One with a frozen half is a plain LoRA of
    rank 2r for the base model as it is,
        A' = [A; A0],  B' = [B, −B0],  alpha' = 2r s,
    with A and B to the bit. Both load in any PEFT, without this package; ``filet.json`` beside the
    second lets :func:`load` go on training at rank r. ``peft_model.save_pretrained``, a Trainer's
    checkpoints and uploads write the same files.

    With the ``report`` of its initialisation also that (``filet_report.safetensors``), a picture of
    the energies where matplotlib is installed (``energies.png``), and a model card (``README.md``).
    Of a card that is there, only the part that an earlier report wrote is replaced.

    All files are in place, or on an exception those that were there before. Killed while they are
    renamed, the folder has no ``adapter_config.json``, so nothing loads what belongs to two saves.

    Of a model that FSDP2 has sharded, all processes call this, and the first one writes.

    Raises ValueError for an adapter for whose initialisation PEFT changed the base weights.
    """
    config = check_peft_model(peft_model, adapter_name).peft_config[adapter_name]
    check_init(config, f"adapter {adapter_name!r}")
    unpack(peft_model)
    if not units(peft_model):
        _save(peft_model, Path(folder), adapter_name, report)
        return
    with current() or contextlib.nullcontext() as group:
        state = _gathered(peft_model, adapter_name)
        if group is None or group.rank == 0:
            _save(peft_model, Path(folder), adapter_name, report, state)


def _gathered(peft_model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """What PEFT saves of an adapter, of a model that FSDP has sharded, whole. Collective."""
    resharded(peft_model)
    with gathering():
        state = peft_model.state_dict()
        saved = get_peft_model_state_dict(peft_model, state_dict=state, adapter_name=adapter_name)
        its = {id(value) for value in saved.values()}
        return {name: whole(value).cpu() for name, value in state.items() if id(value) in its}


def _save(
    peft_model: PeftModel,
    folder: Path,
    adapter_name: str,
    report: FiletReport | None,
    state: dict[str, Any] | None = None,
) -> None:
    """``state``: what ``state_dict`` would have of the adapter, where that has parts."""
    config = peft_model.peft_config[adapter_name]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".filet.", dir=folder) as beside:
        try:
            describe(peft_model, adapter_name)  # with scalings that somebody changed, for now
            peft_model.save_pretrained(
                beside, selected_adapters=[adapter_name], state_dict=state,
                save_embedding_layers=_with_embeddings(peft_model),
            )  # fmt: skip
        finally:
            peft_model.peft_config[adapter_name] = config
        place = Path(beside) / ("" if adapter_name == "default" else adapter_name)
        names = [WEIGHTS_FILE, FILET_FILE]
        if report is not None:
            names += _described_by(report, peft_model, adapter_name, place, folder / CARD_FILE)
        replaced_together(place, folder, [*names, CONFIG_FILE])


def _with_embeddings(peft_model: PeftModel) -> Any:
    """PEFT saves the weight of a head that has LoRA; not where that is packed.

    Another base would take the codes for its weight: PEFT loads them without a word.
    """
    model: Any = peft_model.base_model.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    base = head.get_base_layer() if isinstance(head, LoraLayer) else None
    return False if isinstance(base, nn.Module) and is_quantised(base) else "auto"


def _without_packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of an adapter without the codes of a packed head, which PEFT's own saving has there.

    They are the base's, where it is the same; any other would be left with no head.
    """
    weights = {key for key in tensors if key.endswith(".base_layer.weight")}
    packed = {
        key.removesuffix("weight")
        for key in weights
        # In 4 bits codes may lie in a floating dtype; their scales are beside them.
        if not tensors[key].is_floating_point() or f"{key}.absmax" in tensors
    }
    return {k: value for k, value in tensors.items() if not k.startswith(tuple(packed))}


def _described_by(
    report: FiletReport, peft_model: PeftModel, adapter_name: str, place: Path, card: Path
) -> list[str]:
    """Write what a report says of an adapter into ``place``; the files that there may be.

    ``card``: where one may lie already.
    """
    report.save(place)
    picture = bool(report.modules) and can_draw()
    if picture:
        report.plot(place / PLOT_FILE)
    # In any encoding and with any line ends: what is not ours comes back to the byte.
    there = card.read_bytes().decode("utf-8", "surrogateescape") if card.is_file() else None
    text = card_of(peft_model, adapter_name, report, picture=picture, there=there)
    (place / CARD_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    return [REPORT_FILE, PLOT_FILE, CARD_FILE]


def load(
    base_model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> PeftModel:
    """Load what :func:`save_as_lora` wrote, ready to go on training at rank r.

    A folder without ``filet.json`` is loaded as the plain LoRA that it is; the weights' file says
    whether it is one.

    Args:
        base_model: with the very weights that the adapter was made for; they stay as they are.
        folder: what :func:`save_as_lora`, ``save_pretrained`` or a Trainer wrote.
        adapter_name: the adapter's name in the new model.

    Returns:
        A PeftModel like the saved one. For inference alone, plain PEFT loads the folder as well.

    Raises:
        ValueError: no such adapter in the folder, or a base model of other weights (the first
            module that differs is named), as ``filet.json`` tells, or that file lost;
            ``base_model`` is then as it was.
    """
    if isinstance(base_model, PeftModel):
        raise ValueError("base_model is a PeftModel; expected the model without adapters")
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_FILE}; expected a folder that filet.save_as_lora wrote"
        )
    config = LoraConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} has a {type(config).__name__}; expected a LoRA adapter")
    check_init(config, str(folder))
    layers, tensors = _described(folder)
    replicated = bool(config.layer_replication)
    if not replicated:  # else its layers are not there yet
        _check_base(base_model, layers, folder)
    config.inference_mode = False
    # Of the factors alone: a head that is saved beside them may be in half precision by itself.
    half = any(
        value.dtype in (torch.float16, torch.bfloat16)
        for key, value in tensors.items()
        if ".lora_" in key
    )
    unpack(base_model)
    with _kept_on_error(base_model, tensors):
        peft_model = get_peft_model(
            base_model, config, adapter_name=adapter_name, autocast_adapter_dtype=not half
        )
        found = set_peft_model_state_dict(peft_model, tensors, adapter_name=adapter_name)
        # With bias="all" PEFT writes those of modules to save twice, once under a name of its own.
        unknown = [key for key in found.unexpected_keys if ".modules_to_save." not in key]
        if unknown:
            raise ValueError(f"the base model has no place for {unknown[0]!r}, which {folder} has")
        if replicated:
            _check_base(base_model, layers, folder)
        targets, _ = find_targets(peft_model, adapter_name)
        for name, layer in layers.items():
            for linear, dim in ((targets[name].A, 0), (targets[name].B, 1)):
                trained, start = linear.weight.detach().tensor_split([layer["rank"]], dim)
                linear.weight = nn.Parameter(trained.clone())
                StartedFactor.begin(linear, start.clone(), dim, layer["weight"])
            place = targets[name].layer
            place.__class__ = started_class(type(place))
        describe(peft_model, adapter_name)
    return peft_model


def begin_as_saved(
    peft_model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Give an adapter at rank r the frozen half that one in a folder has, to be loaded next.

    PEFT loads tensors into the shapes that are there. Nothing happens where the folder's adapter
    has no frozen half, or the model's has one already.

    Raises ValueError, with the model as it was, for a base model of other weights and for an
    adapter of other modules or ranks.
    """
    folder = Path(folder)
    unpack(peft_model)
    if adapter_name not in peft_model.peft_config or factors_of(peft_model, adapter_name):
        return
    if not (folder / FILET_FILE).is_file():
        if (folder / WEIGHTS_FILE).is_file():
            _check_plain(folder)
        return
    layers, tensors = _described(folder)
    targets, _ = find_targets(peft_model, adapter_name)
    for name, layer in layers.items():
        rank = targets[name].rank if name in targets else None
        if rank != layer["rank"]:
            raise ValueError(
                f"{folder} has an adapter of rank {layer['rank']} at {name}, where adapter "
                f"{adapter_name!r} has {'none' if rank is None else f'rank {rank}'}; expected the "
                "LoraConfig that it was made by"
            )
    _check_base(peft_model.base_model.model, layers, folder)
    for name, layer in layers.items():
        target = targets[name]
        for linear, side, dim in ((target.A, "A", 0), (target.B, "B", 1)):
            start = tensors[key_of(name, side)].tensor_split([target.rank], dim)[1]
            StartedFactor.begin(linear, start.clone().to(linear.weight), dim, layer["weight"])
        target.layer.__class__ = started_class(type(target.layer))
        set_rank(target.layer, adapter_name, 2 * target.rank, False, [])
    describe(peft_model, adapter_name)


@contextlib.contextmanager
def _kept_on_error(base_model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """On an exception the base model is as it was: its modules, what asks for gradients, values.

    ``tensors`` are an adapter's. Those of the base's own weights among them (biases that were
    trained, embeddings that were saved along) are loaded into it. PEFT's ``unload`` would leave
    them there, and trained heads in place of the base's.
    """
    children = [(m, *child) for m in base_model.modules() for child in m.named_children()]
    flags = {parameter: parameter.requires_grad for parameter in base_model.parameters()}
    names = {k.removeprefix("base_model.model.").replace(".base_layer", "") for k in tensors}
    own = dict(base_model.named_parameters(remove_duplicate=False))
    values = {own[name]: own[name].detach().clone() for name in names & own.keys()}
    try:
        yield
    except BaseException:
        for module, name, child in children:
            module._modules[name] = child
        base_model.__dict__.pop("peft_config", None)  # PEFT's
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter, value in values.items():
            parameter.data.copy_(value)
        raise


def _described(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The layers of the adapter in a folder that have a frozen half, and all its tensors."""
    tensors = _without_packed(load_peft_weights(str(folder), device="cpu"))
    if not any(".lora_" in key for key in tensors):
        raise ValueError(
            f"{folder / WEIGHTS_FILE} has no tensor of LoRA; expected an adapter's (PEFT writes an "
            "empty file for a model in CheckpointWrapper, fsdp_config's activation_checkpointing)"
        )
    try:
        description = json.loads((folder / FILET_FILE).read_text())
    except FileNotFoundError:
        _check_plain(folder)
        return {}, tensors
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{folder / FILET_FILE}: format {description.get('format')!r}; expected {FORMAT!r}"
        )
    layers: dict[str, dict[str, Any]] = description["layers"]
    for name, layer in layers.items():
        starts = {key: layer[key] for key in ("A0", "B0")}
        key = key_of(name, "A")
        if key not in tensors or starts_of(tensors, name, layer["rank"]) != starts:
            raise ValueError(
                f"{folder / FILET_FILE} describes another adapter than lies beside it: the frozen "
                f"half of {name} is another; expected them of one save {_ALL_OF_IT}"
            )
    return layers, tensors


def _check_plain(folder: Path) -> None:
    """ValueError where an adapter without ``filet.json`` has a frozen half, or may have one."""
    if not (folder / WEIGHTS_FILE).exists():
        raise ValueError(
            f"{folder} has neither {FILET_FILE} nor {WEIGHTS_FILE}, to say that no half of "
            f"the adapter is frozen; expected one of them {_ALL_OF_IT}"
        )
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        if MARK in (file.metadata() or {}):
            raise ValueError(
                f"{folder} has no {FILET_FILE}, which says what half of this adapter is frozen; "
                f"expected the file that was saved with it {_ALL_OF_IT}"
            )


def _check_base(
    base_model: nn.Module, layers: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    values, dtype = {}, dtype_of_model(base_model)
    for name in layers:
        try:
            linear = base_model.get_submodule(name)
        except AttributeError:
            linear = base_model
        if isinstance(linear, LoraLayer):
            linear = linear.get_base_layer()
        try:
            values[name] = values_of(linear, dtype)
        except Unreadable as error:
            raise ValueError(
                f"the base model has no linear module {name!r}, which {folder} has: {error}"
            ) from error
        if values[name].device.type == "meta":
            raise ValueError(
                f"the base weight of {name} is on the meta device (not loaded, or left to rank 0 "
                f"by cpu_ram_efficient_loading); expected what {folder} was made for, which is "
                "compared, in every process"
            )
    recorded = {name: layer["weight"] for name, layer in layers.items()}
    check_weights(values, recorded, f"{folder} belongs")


def write_folder(peft_model: PeftModel, report: FiletReport, output: Path) -> None:
    """:func:`save_as_lora` with a report, into a folder of their own; all, or nothing.

    What is at ``output`` is replaced, a card that somebody wrote included.
    """
    with staged(output) as place:
        save_as_lora(peft_model, place, report=report)
