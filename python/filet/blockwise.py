"""FILet initialisation of a model larger than the GPU: layers outer, batches inner.

Forward sweep: block after block is loaded from the shards, every batch goes through it without a
graph, and each block's inputs go to host memory or disk. Then the head and the loss, some rows at a
time. Reverse sweep: a block is loaded again, recomputed with a graph for every batch, and given the
gradient of what follows it; its moments are finished, its A and B chosen and written, and it goes.
The recomputation sees the same weights and inputs as the forward sweep and every operation is
deterministic, so it takes the same path: the same experts, for a router.

What the reverse sweep has finished lies in a folder beside the output, with the gradient that the
next block needs: a run that was killed goes on there (docs/blockwise.md).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from filet import walk
from filet.adapters import Layer, commit, save_as_lora
from filet.checks import Inputs, check_dataloader, checked_config
from filet.config import FiletConfig
from filet.files import PLOT_FILE, replaced, staged
from filet.folder import load_model, outline, settings_of, understood
from filet.initialize import check_rank, materialise_rest, nothing_seen, warn_of
from filet.lock import FolderLock
from filet.loss import IGNORED, SummedLoss, drawn
from filet.memory import named_shortage
from filet.offload import Abandoned, Arena, ArenaPool, BlockInputs, Copies, Fetched, Layout
from filet.parts import Calls, Parts, described
from filet.report import FiletReport, ModuleReport
from filet.shards import (
    Entry,
    Loading,
    ShardedWeights,
    WeightSource,
    WeightStream,
    entries,
    shard_files,
    size_of,
)
from filet.statistics import peak_memory
from filet.targets import (
    Target,
    adapted,
    check_init,
    check_targets,
    find_targets,
    fingerprints,
)
from filet.transfer import values
from filet.walk import (
    MomentHooks,
    check_terms,
    first_samples,
    preserved,
    samples_in,
    token_masks,
    without_token_mask,
)
from filet_kernels import cross_entropy_, fisher_energies, lora_factors, select

__all__ = [
    "Blockwise",
    "Engine",
    "Plan",
    "Unsupported",
    "choose_engine",
    "empty_model",
    "initialize_folder",
]

Engine = Literal["auto", "memory", "blockwise"]
Groups = Sequence[Sequence[Entry]]  # of weights that are on the device together

_ADAPTER = "default"
_FORMAT = "filet-run-1"
_BLOCK_FORMAT = "filet-block-1"
_MANIFEST = "manifest.json"
_HEAD = "the head and the loss"

# Logits that exist at a time: 2²⁷, 0.25 GiB in bfloat16 and four times that for the loss.
_LOGITS = 2**27
# A float16 gradient is scaled so that the largest number of a boundary is at 2⁴ (see walk.py).
_FP16_EXPONENT = 4
# Arenas that a sweep works with, besides those kept: in reverse the inputs of a block, those of the
# next on their way from the disk, the gradients of its outputs and inputs, and a gradient on its
# way to the disk. Where no inputs go to the disk, the gradient of a block's inputs takes the arena
# that the block above had its inputs in; two are left, which the head needs as well.
_WORKING = 5
_WORKING_ON_HOST = 2
# What is timed before the run is done so often; the first time compiles and sets up.
_ROUNDS = 2
# Batches that a GPU is timed on: of one alone, much would be the launch of its first kernels.
_TIMED = 4
# Batches whose work the host has handed to a GPU and not seen finished.
_IN_FLIGHT = 2
# After a gradient in its file: what it is multiplied by, and its largest number where that matters.
_TRAILER = struct.Struct("<dd")
# Of what is free on the scratch disk, this share is used.
_DISK_SHARE = 0.9

# The public function.


def initialize_folder(
    model: str | os.PathLike[str],
    batches: Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    lora_config: LoraConfig,
    config: FiletConfig | None = None,
    *,
    engine: Engine = "auto",
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    host_memory: int | None = None,
    scratch: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> FiletReport:
    """Initialise a LoRA adapter with FILet for the model in a folder, and write it to another.

    The result is what :func:`filet.initialize_lora_filet_weights` and :func:`filet.save_as_lora`
    give; ``filet.load(base_model, output)`` trains on it. With ``engine="blockwise"`` the model is
    never whole in memory: its blocks come from the safetensors shards one by one, twice. A run that
    was killed goes on at its last finished block when it is called again with the same arguments:
    it keeps its state in ``<output>.filet-run`` until the adapter is written.

    Args:
        model: local folder of a causal language model: config.json and safetensors weights, one
            for every weight of the model.
        batches: dicts of ``input_ids``, ``labels``, and what else the model takes
            (``attention_mask``, ``position_ids``), each a CPU tensor of (samples, tokens). Read to
            ``config.samples``. What goes through a block at once is one batch.
        output: folder to create, with the adapter and ``filet_report.safetensors``.
        lora_config: :class:`peft.LoraConfig`: rank, alpha, patterns, rslora, targets. The blockwise
            engine takes layers inside the blocks only, and nothing to save besides.
        config: :class:`FiletConfig`, the paper's settings by default. The blockwise engine computes
            the loss itself, the cross-entropy of the next token: ``loss_reduction`` has no use.
        engine: "memory" loads the whole model onto ``device``; "blockwise" never does; "auto" takes
            "memory" where weights and statistics fit there with room to spare.
        dtype: of the weights in memory, "auto" for what the folder says.
        device: where to compute; a GPU if there is one, by default.
        host_memory: bytes of host memory for block inputs and gradients; half of what is available
            by default. What does not fit goes to ``scratch``, or is recomputed.
        scratch: folder on a fast disk for block inputs; 90 % of what is free there may be used.
        trust_remote_code: run Python code that lies in the model's folder.
        overwrite: replace an adapter that is at ``output``.
        show_progress_bar: also says the plan beforehand: GPU and host memory, disk, time.

    Returns:
        :class:`FiletReport`, which is also in the folder. ``seconds`` are of this call: a resumed
        one does less.

    Deterministic: bitwise the same for the same arguments on the same machine, killed or not.

    Raises:
        TypeError: ``batches`` are none.
        ValueError: an argument that does not fit, a batch among them; a model of another task, or
            with a weight that no file has; a model that the blockwise engine does not do
            (quantised, no safetensors, blocks that hand on more than one tensor or share weights;
            targets outside the blocks), before any block is computed; a run folder of other data
            or settings, naming the first difference.
        FloatingPointError: NaN or infinity, naming the module.
        OutOfMemoryError: naming what was asked for and what to change.
        OSError: a full disk, say. What was finished stays, and the same call goes on there.
    """
    config = checked_config(config)
    check_dataloader(batches, "batches")
    if engine not in ("auto", "memory", "blockwise"):
        raise ValueError(f"engine={engine!r}; expected 'auto', 'memory' or 'blockwise'")
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"lora_config is a {type(lora_config).__name__}; expected a LoraConfig")
    check_init(lora_config)
    if host_memory is not None and host_memory < 1:
        raise ValueError(f"host_memory={host_memory}; expected a positive number of bytes")
    folder, output = Path(model), Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not overwrite:
            raise ValueError(f"output={str(output)!r} exists; expected overwrite=True to replace")
        if not (output / "adapter_config.json").is_file():
            raise ValueError(
                f"output={str(output)!r} holds no adapter; overwrite=True replaces only adapters"
            )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    if engine == "auto":
        engine = choose_engine(
            folder, lora_config, device, dtype=dtype, trust_remote_code=trust_remote_code
        )
    if engine == "memory":
        return _in_memory(
            folder, batches, output, lora_config, config, dtype, device, trust_remote_code,
            show_progress_bar,
        )  # fmt: skip
    whole = empty_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    run_folder = output.parent / f"{output.name}.filet-run"
    with contextlib.ExitStack() as stack:
        scratch_folder = None
        if scratch is not None:
            # One name for one run folder, which is locked: what a killed run has left there is
            # replaced, and nothing of another one.
            name = hashlib.blake2b(str(run_folder.resolve()).encode(), digest_size=6).hexdigest()
            scratch_folder = Path(scratch) / f"filet-scratch-{name}"
        run = stack.enter_context(
            Blockwise(
                whole,
                ShardedWeights(folder, whole),
                batches,
                lora_config,
                config,
                device=device,
                run_folder=run_folder,
                host_memory=host_memory,
                scratch=scratch_folder,
                show_progress_bar=show_progress_bar,
            )
        )
        run.sweep()
        report = run.write(output)
        run.discard()
    return report


def _in_memory(
    folder: Path,
    batches: Iterable[Mapping[str, Any]],
    output: Path,
    lora_config: LoraConfig,
    config: FiletConfig,
    dtype: Any,
    device: torch.device,
    trust_remote_code: bool,
    show_progress_bar: bool,
) -> FiletReport:
    from filet.initialize import initialize_lora_filet_weights

    base = load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    peft_model = adapted(base, lora_config, config.seed)
    report = initialize_lora_filet_weights(
        peft_model, batches, config, show_progress_bar=show_progress_bar
    )
    _write_folder(peft_model, report, output)
    return report


def _write_folder(peft_model: PeftModel, report: FiletReport, output: Path) -> None:
    import importlib.util

    with staged(output) as place:
        place.mkdir()
        save_as_lora(peft_model, place)
        report.save(place)
        if report.modules and importlib.util.find_spec("matplotlib") is not None:
            report.plot(place / PLOT_FILE)


def _check_alone(lora_config: LoraConfig) -> None:
    """ValueError for what is saved with an adapter besides A and B."""
    nothing: dict[str, Any] = {
        "modules_to_save": None, "trainable_token_indices": None, "bias": "none",
        "layer_replication": None,
    }  # fmt: skip
    for key, none in nothing.items():
        value = getattr(lora_config, key)
        if value and value != none:
            raise ValueError(
                f"{key}={value!r}: the blockwise engine has no weights left to save beside the "
                f"adapter's; expected {none!r} (or engine='memory')"
            )


class Unsupported(ValueError):
    """A kind of model that the blockwise engine does not take."""


def empty_model(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model of a folder without its weights: parameters on the meta device.

    Buffers are real (rotary frequencies, say). Raises :class:`Unsupported` for what the blockwise
    engine does not take, as far as config.json and the names of the files say it, and ValueError
    for what no engine does (:func:`filet.folder.settings_of`).
    """
    folder = Path(folder)
    settings = settings_of(folder, trust_remote_code=trust_remote_code)
    if getattr(settings, "quantization_config", None) is not None:
        raise Unsupported(
            f"{folder} is quantised (quantization_config in config.json); expected weights in "
            "float32, bfloat16 or float16"
        )
    try:
        files = shard_files(folder)
    except FileNotFoundError as error:
        raise Unsupported(str(error)) from error
    if dtype == "auto":
        with understood(folder):
            dtype = getattr(settings, "dtype", None) or _dtype_of(files)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
    with understood(folder):
        return outline(settings, dtype, trust_remote_code=trust_remote_code)


def _dtype_of(files: Sequence[Path]) -> torch.dtype:
    """That of the first floating weight, as transformers has it; where all are quantised, any."""
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():
                dtype = file.get_slice(key)[:0].dtype
                if dtype.is_floating_point and dtype.itemsize > 1:
                    return dtype
    return torch.float32


def choose_engine(
    folder: str | os.PathLike[str],
    lora_config: LoraConfig,
    device: torch.device,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
) -> Literal["memory", "blockwise"]:
    """What "auto" is: "blockwise" where weights and second moments take more than 3/4 of a device.

    Of its free memory, that is; the rest is for activations. A kind of model that the blockwise
    engine does not take is "memory" in any case.
    """
    try:
        model = empty_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except Unsupported:
        return "memory"
    weights = size_of(entries(model))
    peft_model = adapted(model, lora_config)
    targets, _ = find_targets(peft_model, _ADAPTER, loaded=False)
    moments = sum(2 * 4 * min(target.weight.shape) ** 2 for target in targets.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    return "memory" if weights + moments <= 0.75 * free else "blockwise"


def _available_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    with contextlib.suppress(FileNotFoundError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The plan.


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Memory and disk are exact sums of what is allocated there; the GPU's peak and the times are
    measured on one block and one batch (the largest) before the run.
    """

    blocks: tuple[int, int]  # to sweep forward, to sweep in reverse
    of: int  # blocks of the model
    stride: int  # k: the inputs of every k-th block are kept
    kept: int  # so many boundaries, of one for each block in reverse
    recomputed: int  # blocks that the reverse sweep runs forward again, for the others
    on_disk: int  # boundaries whose values go to disk
    device: str
    device_bytes: int  # 0 on a CPU
    host_bytes: int
    scratch_bytes: int
    run_bytes: int
    seconds: dict[str, float]

    def text(self) -> str:
        forward, reverse = self.blocks
        lines = [
            f"plan          {forward} blocks forward, {reverse} in reverse, of {self.of}",
            f"  host        {_gib(self.host_bytes)} for block inputs and gradients",
            f"  disk        {_gib(self.run_bytes)} beside the output, "
            f"{_gib(self.scratch_bytes)} of scratch",
            f"  time        {sum(self.seconds.values()):,.0f} s: "
            + ", ".join(f"{name} {value:,.0f} s" for name, value in self.seconds.items()),
        ]
        if self.device_bytes:
            lines.insert(1, f"  {self.device:<11} {_gib(self.device_bytes)} at the peak")
        if self.stride > 1:
            lines.append(
                f"  recomputed  {self.kept} of {reverse} boundaries are kept (k = {self.stride}), "
                f"{self.recomputed} blocks computed once more for the others: raise host_memory "
                "or give a scratch folder to avoid it"
            )
        return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


@dataclass(frozen=True)
class _Keeping:
    """Which boundaries are kept, and where."""

    stride: int
    kept: tuple[int, ...]  # blocks whose inputs are, in ascending order
    on_disk: frozenset[int]
    arenas: int  # of host memory, at most

    @classmethod
    def choose(cls, first: int, last: int, host: int, disk: int, nbytes: int) -> _Keeping:
        """For the reverse sweep over blocks ``last`` … ``first``.

        ``host`` and ``disk`` are how many boundaries fit there. The smallest stride that fits.
        """
        number = last - first + 1
        for stride in range(1, number + 1):
            kept = tuple(range(first, last + 1, stride))
            between = stride - 1  # blocks between two kept ones, one stretch at a time
            on_host = _WORKING_ON_HOST + between + len(kept)
            if on_host <= host:
                return cls(stride, kept, frozenset(), on_host)
            held = host - _WORKING - between
            if held < 0 or len(kept) > held + disk:
                continue
            # Spread over the sweep, so that the disk has time.
            written = len(kept) - held
            on_disk = frozenset(
                block
                for index, block in enumerate(kept)
                if (index + 1) * written // len(kept) > index * written // len(kept)
            )
            return cls(stride, kept, on_disk, host)
        best = min(-(-number // stride) + stride - 1 for stride in range(1, number + 1))
        raise ValueError(
            f"host_memory holds {host} of the block boundaries of {_gib(nbytes)} each, and the "
            f"scratch folder {disk}; expected host_memory of at least "
            f"{_gib((_WORKING_ON_HOST + best) * nbytes)}, or {_gib(_WORKING * nbytes)} and a "
            f"scratch folder with {_gib(number * nbytes / _DISK_SHARE)} free"
        )


# The engine.


@dataclass(eq=False)
class _Batch:
    inputs: dict[str, Any]  # of the model, on the CPU, without labels
    rows: Tensor  # positions (flattened) that predict a label
    labels: Tensor  # the labels there
    uniform: Tensor | None  # numbers (T, 1) that draw the labels, where they are drawn
    mask: Tensor | None  # tokens that count, None for all
    samples: int
    tokens: int

    @property
    def positions(self) -> int:
        return self.inputs["input_ids"].numel()


@dataclass(eq=False)
class _Finished:
    """A block's results: A, B, energies and indices by module, and the report's other columns."""

    block: int
    tensors: dict[str, Tensor]
    modules: list[dict[str, Any]]
    left_default: dict[str, str]
    unmasked: list[str]


class Blockwise:
    """One run: :meth:`sweep` over the blocks, then :meth:`write` the adapter.

    ``source`` gives the weights of ``model`` (from :func:`empty_model`). ``run_folder`` and
    ``scratch`` are created; a run folder that is there is resumed. A context manager: it holds a
    lock on the run folder, threads and pinned memory.
    """

    def __init__(
        self,
        model: Any,
        source: WeightSource,
        batches: Iterable[Mapping[str, Any]],
        lora_config: LoraConfig,
        config: FiletConfig,
        *,
        device: torch.device,
        run_folder: Path,
        host_memory: int | None = None,
        scratch: Path | None = None,
        show_progress_bar: bool = True,
    ) -> None:
        if device.type == "cuda":
            torch.cuda.init()  # what preserved() makes deterministic depends on it
            device = torch.device("cuda", device.index or 0)
        self.config = config
        self.device = device
        self.folder = run_folder
        self.scratch = scratch
        self.host_memory = host_memory or _available_memory() // 2
        self.show = show_progress_bar
        self.seconds: dict[str, float] = {}
        # How long the computation of the sweeps waited: for weights; for host memory to be made
        # (once each arena); for a disk.
        self.waited = {"weights": 0.0, "memory": 0.0, "disk": 0.0}
        # What each block took, by the host, which a GPU may be two batches behind. "recomputed" is
        # a block's forward in the reverse sweep, for the inputs of the next ones.
        kinds = ("forward", "recomputed", "reverse")
        self.block_seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        self.plan: Plan | None = None

        _check_alone(lora_config)
        weights = entries(model)  # before PEFT renames them
        self.peft_model = adapted(model, lora_config)
        self.model = self.peft_model.base_model.model
        self.targets, self.unsupported = find_targets(self.peft_model, _ADAPTER, loaded=False)
        check_targets(self.peft_model, self.targets, self.unsupported, _ADAPTER)
        for name, target in self.targets.items():
            if target.rank > target.weight.shape[1]:
                raise ValueError(
                    f"{name}: rank {target.rank} exceeds the {target.weight.shape[1]} columns of "
                    f"W {tuple(target.weight.shape)}; expected a smaller r"
                )
        self.parts = Parts(self.model, self.targets, self.unsupported)
        self.number = len(self.parts.blocks)
        self._part_weights(weights)
        self.of_block: list[dict[str, Target]] = [{} for _ in range(self.number)]
        for name, target in self.targets.items():
            self.of_block[self._block_of(name)][name] = target
        # Below the first block with a target no gradient is needed.
        self.first = min(index for index, mine in enumerate(self.of_block) if mine)
        for module in self.model.modules():
            for key, value in module._buffers.items():
                if value is not None and value.device.type != "meta":
                    module._buffers[key] = value.to(device)

        self.batches = _read(batches, config, self.model)
        self.counts = {
            "samples": sum(batch.samples for batch in self.batches),
            "tokens": sum(batch.tokens for batch in self.batches),
            "loss_terms": sum(batch.rows.numel() for batch in self.batches),
        }
        self.stream = WeightStream(source, device)
        self.manifest = _manifest(source, self.batches, lora_config, config, weights, device)
        self.masks = [None if b.mask is None else b.mask.to(device) for b in self.batches]
        self._candidates: dict[str, Tensor] = {}
        self._in_flight: collections.deque[Any] = collections.deque()
        self._writing: Future[None] | None = None
        self._being_written: Arena | None = None
        self._saved: list[Future[None]] = []  # the files of this run's blocks
        self._useless = threading.Event()  # the gradient that is being written is
        self.peak_bytes = 0  # of the GPU's memory, measuring for the plan included
        self._ahead: Loading | None = None  # what the next sweep begins with
        self._at = "the blocks' first inputs"  # what is under way, for the message of a shortage
        self._stack = contextlib.ExitStack()
        self._needed = True  # the run folder
        # One for a gradient, which takes a while, and one for the blocks done meanwhile.
        self._output = ThreadPoolExecutor(2, "filet output")

    def _part_weights(self, weights: Sequence[Entry]) -> None:
        """Weights by block, and those of no block."""
        self.block_weights: list[list[Entry]] = [[] for _ in range(self.number)]
        self.other_weights: list[Entry] = []
        for entry in weights:
            homes = {self._block_of(name) for name in entry.names}
            if len(homes) > 1:
                raise ValueError(
                    f"a weight is shared between blocks ({', '.join(entry.names)}); the blockwise "
                    "engine takes blocks with weights of their own"
                )
            home = homes.pop()
            (self.other_weights if home < 0 else self.block_weights[home]).append(entry)

    def _block_of(self, name: str) -> int:
        """The block a module or weight lies in, -1 for none."""
        prefix = f"{self.parts.path}."
        return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else -1

    def __enter__(self) -> Blockwise:
        with contextlib.ExitStack() as stack:
            self._lock = stack.enter_context(FolderLock(self.folder))
            self._resume()
            stack.callback(self._leave)
            if self.scratch is not None:
                shutil.rmtree(self.scratch, ignore_errors=True)
                self.scratch.mkdir(parents=True)
                stack.callback(shutil.rmtree, self.scratch, ignore_errors=True)
            stack.callback(self._output.shutdown, cancel_futures=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def discard(self) -> None:
        """Have the run folder removed on leaving, while it is locked: the adapter is there."""
        self._needed = False

    def _leave(self) -> None:
        if not self._needed or not self._finished_before(self._next_block()):  # nothing to go on
            self._lock.remove()

    # The run folder.

    def _resume(self) -> None:
        """Check that the folder is of this run, or begin one; find the block to go on with."""
        path = self.folder / _MANIFEST
        for left in self.folder.glob(".*"):  # by a kill while a file was written
            left.unlink()
        others = [each for each in self.folder.iterdir() if each.name != "lock"]
        if others and not path.is_file():
            raise ValueError(f"{self.folder} is there, but no run of filet; expected no folder")
        self.top = self._next_block()
        if self._finished_before(self.top):
            _compare(json.loads(path.read_text()), self.manifest, self.folder)
        else:
            with replaced(path, durable=True) as beside:
                beside.write_text(json.dumps(self.manifest, indent=1))
        for block in self._numbers("block"):
            if block <= self.top:  # not finished: its gradient never came
                self._block_file(block).unlink()
        self._unlink_gradients(but=self.top)

    def _numbers(self, kind: str) -> list[int]:
        """The blocks that there is a file of this kind of."""
        return [int(each.stem.rpartition("-")[2]) for each in self.folder.glob(f"{kind}-*")]

    def _next_block(self) -> int:
        """Of the reverse sweep: the first that is not finished.

        Blocks are finished, those above them too, when their files are there and the gradient that
        the next one needs; or when the files of all are.
        """
        there, lowest = set(self._numbers("block")), self.number
        while lowest - 1 in there:
            lowest -= 1
        if lowest <= self.first:
            return self.first - 1
        gradients = [block for block in self._numbers("gradient") if block + 1 >= lowest]
        return min(gradients, default=self.number - 1)

    def _finished_before(self, block: int) -> bool:
        """Whether there is something to go on from at this block: at least the head's gradient."""
        return block < self.number - 1 or self._gradient_file(block).is_file()

    def _block_file(self, block: int) -> Path:
        return self.folder / f"block-{block}.safetensors"

    def _gradient_file(self, block: int) -> Path:
        """The gradient with respect to a block's output."""
        return self.folder / f"gradient-{block}.raw"

    def _unlink_gradients(self, but: int | None = None) -> None:
        for block in self._numbers("gradient"):
            if block != but:
                self._gradient_file(block).unlink()

    def _save_gradient(
        self,
        block: int,
        arena: Arena,
        scales: tuple[float, float],
        above: Sequence[Future[None]],
    ) -> None:
        """What ``block`` needs to go on; ``above`` write the files of those that it follows.

        With it these are finished, so it comes last.
        """
        with replaced(self._gradient_file(block), durable=True) as beside:
            arena.save(beside, _TRAILER.pack(*scales), self._useless)
            for each in above:
                each.result()
        self._unlink_gradients(but=block)

    def _save_block(self, finished: _Finished) -> None:
        metadata = {
            "format": _BLOCK_FORMAT,
            "modules": json.dumps(finished.modules),
            "left_default": json.dumps(finished.left_default),
            "unmasked": json.dumps(finished.unmasked),
        }
        with replaced(self._block_file(finished.block), durable=True) as beside:
            beside.write_bytes(save(finished.tensors, metadata))

    # The sweeps.

    def sweep(self) -> None:
        """Finish every block that is not yet. What is finished survives an exception."""
        if self.top < self.first:
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(named_shortage("blockwise", lambda: self._at))
            stack.enter_context(preserved(self.peft_model, _ADAPTER, self.targets))
            stack.callback(self._drop_ahead)
            self.copies = Copies(self.device)
            resumed = self._gradient_file(self.top)
            start = time.perf_counter()
            self._reset_peak()
            self.peak_bytes = 0  # that was before the run
            hidden, head_seconds = self._capture(stack, head=not resumed.is_file())
            head_bytes = self._reset_peak()
            self._rehearse(hidden, head_seconds, head_bytes)
            waited = self.stream.settle()
            start = self._passed("preparing", start)
            if resumed.is_file():
                hidden = self._forward(hidden, range(self.top), self._reverse_groups())
                self._keep(self.top, hidden)
                gradient = self.pool.get()
                self.scale, self.peak = _TRAILER.unpack(gradient.load(resumed, _TRAILER.size))
                start = self._passed("forward", start)
            else:
                hidden = self._forward(hidden, range(self.top + 1), [self.other_weights])
                self._check_candidates()
                start = self._passed("forward", start)
                gradient = self._head(hidden)
                start = self._passed("head", start)
            self._reverse(gradient)
            self._passed("reverse", start)
            self.waited["weights"] = self.stream.settle() - waited
            self._reset_peak()
        if self.show:
            _say(
                f"waited        {self.waited['weights']:.1f} s for weights, "
                f"{self.waited['memory']:.1f} s for host memory to be page-locked, "
                f"{self.waited['disk']:.1f} s for the disk"
            )

    def _load_ahead(self, groups: Groups) -> None:
        """Start to load what the next sweep begins with, during the end of this one."""
        self._ahead = self.stream.run(groups)

    def _loading(self, groups: Groups) -> Loading:
        """Of these groups, which may be under way already."""
        ahead, self._ahead = self._ahead, None
        return ahead or self.stream.run(groups)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _passed(self, phase: str, start: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - start
        return now

    def _on_device(self, batch: _Batch) -> dict[str, Any]:
        return {
            key: value.to(self.device) if isinstance(value, Tensor) else value
            for key, value in batch.inputs.items()
        }

    def _capture(self, stack: contextlib.ExitStack, head: bool) -> tuple[Arena, float]:
        """The first block's inputs of every batch, and what all blocks are called with.

        Also how long the head takes for all batches, from the largest one.
        """
        self.calls: list[Calls] = []
        arena: Arena | None = None
        seconds = 0.0
        with closing(self.stream.run([self.other_weights])) as loaded:
            next(loaded)
            loading = self.stream.loading
            for index, batch in enumerate(self.batches):
                inputs = self._on_device(batch)
                hidden, calls = self.parts.capture(inputs)
                if arena is None:
                    arena = self._make_room(hidden, stack)
                expected = self.layout.shapes[index]
                if hidden.shape != expected or hidden.dtype != self.layout.dtype:
                    raise ValueError(
                        f"the hidden states of batch {index} are {described(hidden)}; expected "
                        f"{self.layout.dtype} {tuple(expected)}"
                    )
                self.calls.append(calls)
                self.copies.store(hidden, arena, index)
            if head:
                with self.pool.paused():
                    seconds = self._time_head(arena) + loading
        assert arena is not None
        return arena, seconds

    def _make_room(self, hidden: Tensor, stack: contextlib.ExitStack) -> Arena:
        """Decide what is kept where, now that the size of a boundary is known."""
        width = hidden.shape[-1]
        self.layout = Layout(
            [torch.Size((*b.inputs["input_ids"].shape, width)) for b in self.batches], hidden.dtype
        )
        self.half = hidden.dtype == torch.float16
        nbytes = self.layout.nbytes
        disk = 0
        if self.scratch is not None:
            disk = int(shutil.disk_usage(self.scratch).free * _DISK_SHARE) // nbytes
        self.keeping = _Keeping.choose(
            self.first, self.top, self.host_memory // nbytes, disk, nbytes
        )
        # Two gradients at a time, and A, B and the energies of what is not finished.
        self.run_bytes = 2 * (nbytes + _TRAILER.size) + sum(
            4 * target.rank * sum(target.weight.shape) + 8 * target.weight.shape[1]
            for mine in self.of_block[self.first : self.top + 1]
            for target in mine.values()
        )
        free = shutil.disk_usage(self.folder).free
        if free < self.run_bytes:
            text = f"{_gib(self.run_bytes)} needed, {_gib(free)} free"
            raise OSError(errno.ENOSPC, text, str(self.folder))
        ahead = self.keeping.arenas if self.device.type == "cuda" else 0
        self.pool = ArenaPool(self.layout, self.keeping.arenas, self.device, ahead)
        self.inputs = BlockInputs(self.pool, self.scratch)
        # The disk's thread may wait for an arena, the output's may read one.
        stack.callback(self.pool.close)
        stack.callback(self.inputs.close)
        stack.callback(self.pool.stop)
        stack.callback(self._settle_output)
        return self.pool.get()

    def _settle_output(self) -> None:
        if self._writing is not None:
            self._writing.exception()

    def _fetched(self, block: int, arenas: Sequence[Arena]) -> Iterator[tuple[int, list[Tensor]]]:
        """Each batch's tensors on the device: the arenas' and the block's leaves; one ahead."""

        def fetch(index: int) -> Fetched:
            return self.copies.fetch(arenas, index, self.calls[index].of(block))

        coming: Fetched | None = fetch(0)
        for index in range(len(self.batches)):
            assert coming is not None
            now = coming
            coming = fetch(index + 1) if index + 1 < len(self.batches) else None
            yield index, now.ready()

    def _throttle(self, event: Any) -> None:
        """Keep the host at most so many batches ahead of a GPU: each holds memory there."""
        if event is not None:
            self._in_flight.append(event)
            if len(self._in_flight) > _IN_FLIGHT:
                self._in_flight.popleft().synchronize()

    def _store(self, value: Tensor, arena: Arena, index: int) -> None:
        self._throttle(self.copies.store(value, arena, index))

    def _keep(self, block: int, arena: Arena) -> None:
        """Put a block's inputs where the plan wants them, once everything of them is on its way."""
        if block in self.keeping.on_disk:
            self.inputs.write(block, arena)
            self.inputs.release(block, arena)
        elif block in self.keeping.kept or block > self.keeping.kept[-1]:
            self.inputs.hold(block, arena)
        else:
            self.pool.put(arena)

    @torch.no_grad()
    def _run_forward(self, block: int, arena: Arena, progress: Any) -> Arena:
        """A block over all batches; returns its outputs."""
        self._at = f"the forward of block {block}"
        made = self._timed_get()
        with self._products(block) as start_batch:
            for index, (hidden, *leaves) in self._fetched(block, [arena]):
                start_batch()
                output = self.parts.run_block(block, hidden, self.calls[index], leaves)
                self._store(output, made, index)
                self._advance(progress, block, index)
        return made

    @contextlib.contextmanager
    def _products(self, block: int) -> Iterator[Callable[[], None]]:
        """The forward runs by the products that the reverse sweep will run it by.

        On a GPU the hooks that count form some outputs in float32 and round them themselves. A
        rounding apart, the router of a mixture of experts would choose others now and then.
        """
        if self.device.type not in walk.HANDS_ON:
            yield lambda: None
            return
        with MomentHooks(self.of_block[block], self.config) as hooks:
            hooks.counting = False
            hooks.phase = "forward"
            yield lambda: hooks.start_batch({})

    def _forward(self, arena: Arena, blocks: range, then: Groups) -> Arena:
        """Blocks in ascending order; keeps their inputs; returns the last one's outputs.

        The weights ``then`` are loaded during the last block.
        """
        progress = self._progress("FILet forward", len(blocks))
        groups = [self.block_weights[block] for block in blocks]
        with progress, closing(self._loading(groups)) as loaded:
            start = time.perf_counter()
            for block, _ in zip(blocks, loaded, strict=True):
                if block == blocks[-1]:
                    self._load_ahead(then)
                for name, target in self.of_block[block].items():
                    self._candidates[name] = (target.weight != 0).any(0).sum()
                made = self._run_forward(block, arena, progress)
                self._keep(block, arena)
                self.inputs.check()
                arena = made
                start = self._took("forward", start)
        return arena

    def _took(self, sweep: str, start: float) -> float:
        now = time.perf_counter()
        self.block_seconds[sweep].append(now - start)
        return now

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited[what] += time.perf_counter() - start

    def _timed_get(self) -> Arena:
        with self._waiting("memory" if self.pool.grows() else "disk"):
            return self.pool.get()

    def _check_candidates(self) -> None:
        for name, target in self.targets.items():
            if name in self._candidates:
                check_rank(target, int(self._candidates[name]))
        self._candidates.clear()

    # The head.

    def _head(self, hidden: Arena) -> Arena:
        """Gradients of the summed loss with respect to the last block's outputs."""
        self._at = _HEAD
        gradients = self._timed_get()
        self.scale, self.peak = 1.0, 0.0
        if self.half:
            self.scale = 2.0**_FP16_EXPONENT
        peak = torch.zeros((), device=self.device)
        progress = self._progress("FILet head", 1)
        with progress, closing(self._loading([self.other_weights])) as loaded:
            next(loaded)
            self._load_ahead(self._reverse_groups())
            for index, batch in enumerate(self.batches):
                (rows,) = self.copies.fetch([hidden], index, []).ready()
                gradient = self._loss_gradient(batch, rows)
                if self.half:
                    peak = torch.maximum(peak, gradient.abs().amax())
                self._store(gradient, gradients, index)
                self._advance(progress, self.number, index)
        self.peak = float(peak)
        self.pool.put(hidden)
        self._write(self.top, gradients)
        return gradients

    def _loss_gradient(self, batch: _Batch, hidden: Tensor) -> Tensor:
        """Of the summed cross-entropy, times ``scale``, some rows of logits at a time."""
        hidden = hidden.requires_grad_()
        output = self.parts.epilogue(self._on_device(batch), hidden)
        states = output.last_hidden_state
        flat = states.detach().reshape(-1, states.shape[-1])
        gradient = torch.zeros_like(flat)
        rows, labels = batch.rows.to(self.device), batch.labels.to(self.device)
        uniform = None if batch.uniform is None else batch.uniform.to(self.device)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        step = max(1, _LOGITS // vocabulary)
        for start in range(0, rows.numel(), step):
            chunk = slice(start, start + step)
            states_here = flat[rows[chunk]].requires_grad_()
            logits = self.parts.logits(output, states_here)
            with torch.no_grad():
                of_logits = logits.clone()  # what the model did to them may need them
                wanted = labels[chunk] if uniform is None else drawn(logits, uniform[chunk])
                cross_entropy_(of_logits, wanted, scale=self.scale)
            (part,) = torch.autograd.grad(logits, states_here, of_logits)
            gradient.index_copy_(0, rows[chunk], part)
        states.backward(gradient.view_as(states))
        assert hidden.grad is not None
        return hidden.grad

    def _time_head(self, arena: Arena | None) -> float:
        """Seconds for all batches, from the largest."""
        assert arena is not None
        self._at = _HEAD
        index, timed = self._largest(), self._timed()
        self.scale = 1.0
        seconds = 0.0
        for _ in range(_ROUNDS):
            start = self._clock()
            for _ in range(timed):
                (rows,) = self.copies.fetch([arena], index, []).ready()
                self._loss_gradient(self.batches[index], rows)
            seconds = self._clock() - start
        return seconds * self._share(index) / timed

    def _timed(self) -> int:
        return min(_TIMED, len(self.batches)) if self.device.type == "cuda" else 1

    # The reverse sweep.

    def _reverse(self, gradients: Arena) -> None:
        """Blocks in descending order: moments, energies, A and B."""
        steps = self._steps()
        progress = self._progress("FILet reverse", len(steps))
        with progress, closing(self._loading(self._reverse_groups())) as loaded:
            start = time.perf_counter()
            for number in loaded:
                again, block = steps[number]
                arena = self._timed_take(block)
                if number + 1 < len(steps) and steps[number + 1][1] != block:
                    self.inputs.ahead(steps[number + 1][1])
                if again:
                    made = self._run_forward(block, arena, progress)
                    self.inputs.hold(block, arena)
                    self.inputs.hold(block + 1, made)
                    start = self._took("recomputed", start)
                    continue
                gradients = self._reverse_block(block, arena, gradients, progress)
                start = self._took("reverse", start)
            self._useless.set()
            with self._waiting("disk"):
                if self._writing is not None:
                    with contextlib.suppress(Abandoned):
                        self._writing.result()
                for each in self._saved:
                    each.result()
            self._unlink_gradients()

    def _reverse_groups(self) -> Groups:
        return [self.block_weights[block] for _, block in self._steps()]

    def _steps(self) -> list[tuple[bool, int]]:
        """(recompute its output only, block) in the order of the reverse sweep."""
        steps: list[tuple[bool, int]] = []
        end = self.top + 1
        for start in reversed(self.keeping.kept):
            if end <= self.top:  # of the last stretch the forward sweep kept everything
                steps += [(True, block) for block in range(start, end - 1)]
            steps += [(False, block) for block in range(end - 1, start - 1, -1)]
            end = start
        return steps

    def _timed_take(self, block: int) -> Arena:
        with self._waiting("disk"):
            return self.inputs.take(block)

    def _reverse_block(self, block: int, arena: Arena, gradients: Arena, progress: Any) -> Arena:
        """Finish a block, given its inputs and the gradients of its outputs.

        Returns the gradients of its inputs.
        """
        self._at = f"the forward and backward of block {block}"
        made = self._timed_get() if block > self.first else None
        factor = 1.0
        if self.half and self.peak > 0 and self.peak < float("inf"):
            # What the block below gave may have grown or shrunk.
            factor = 2.0 ** (_FP16_EXPONENT - torch.frexp(torch.tensor(self.peak)).exponent.item())
        self.scale *= factor
        peak = torch.zeros((), device=self.device)
        with MomentHooks(self.of_block[block], self.config) as hooks:

            def through(index: int, hidden: Tensor, gradient: Tensor, *leaves: Tensor) -> Tensor:
                gradient = gradient if factor == 1.0 else gradient * factor
                return self._backward(block, index, hidden, gradient, leaves, hooks)

            def again(index: int) -> Tensor:
                of_block = self.calls[index].of(block)
                return through(
                    index, *self.copies.fetch([arena, gradients], index, of_block).ready()
                )

            for index, fetched in self._fetched(block, [arena, gradients]):
                hidden = through(index, *fetched)
                hooks.note_run(partial(again, index))
                if made is not None:
                    assert hidden.grad is not None
                    if self.half:
                        peak = torch.maximum(peak, hidden.grad.abs().amax())
                    self._store(hidden.grad, made, index)
                else:
                    self._throttle(self._recorded())
                self._advance(progress, block, index)
            hooks.add_left_out()
        self.pool.put(arena)
        hooks.finish()
        hooks.check_finite("one of the batches")
        self.peak = float(peak) if self.half else 0.0
        self._saved.append(self._output.submit(self._save_block, self._finished(block, hooks)))
        if gradients is self._being_written:
            assert self._writing is not None
            self._writing.add_done_callback(lambda _: self.pool.put(gradients))
        else:
            self.pool.put(gradients)
        if made is None:
            return gradients
        # A disk that is behind does not hold up the computation: until it has caught up, blocks
        # wait to be finished together, by the gradient of the last one's inputs.
        if not self._is_behind():
            self._write(block - 1, made)
        return made

    def _backward(
        self,
        block: int,
        index: int,
        hidden: Tensor,
        gradient: Tensor,
        leaves: Sequence[Tensor],
        hooks: MomentHooks,
    ) -> Tensor:
        """Recompute a block for a batch, and back; returns ``hidden``, which has its gradient."""
        hooks.start_batch({"decoder": self.masks[index]})
        hooks.phase = "forward"
        hidden = hidden.requires_grad_()
        output = self.parts.run_block(block, hidden, self.calls[index], leaves)
        hooks.phase = "backward"
        hooks.gradient_scale = self.scale
        output.backward(gradient)
        hooks.phase = "idle"
        hooks.check_sharing(index)
        return hidden

    def _recorded(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _finished(self, block: int, hooks: MomentHooks) -> _Finished:
        """A, B, energies and choices of a block's modules."""
        config = self.config
        on_host: dict[str, Tensor] = {}
        factors: dict[str, Tensor] = {}
        modules: list[dict[str, Any]] = []
        left_default: dict[str, str] = {}
        for moments in hooks.moments.values():
            moments.loss_terms.fill_(self.counts["loss_terms"])
        hashes = fingerprints({n: target.weight for n, target in self.of_block[block].items()})
        # A GPU has no work whenever its numbers are waited for. So this is done for all modules at
        # a time: counts, energies (by which the host chooses), factors.
        counts = values([m.count for moments in hooks.moments.values()
                         for m in (moments.input, moments.output)])  # fmt: skip
        seen = dict(zip(hooks.moments, zip(counts[::2], counts[1::2], strict=True), strict=True))
        energies_of: dict[str, Tensor] = {}
        for name, target in self.of_block[block].items():
            # An expert that no token was routed to has no moments.
            empty = nothing_seen(*seen.get(name, (0, 0)))
            if empty is not None:
                left_default[name] = empty
                continue
            energies_of[name] = fisher_energies(
                target.weight, hooks.moments[name], normalization=config.normalization
            )
        energies_of = {name: energies.cpu() for name, energies in energies_of.items()}
        for name, energies in energies_of.items():
            target, moments, tokens = self.targets[name], hooks.moments[name], seen[name]
            weight = target.weight
            indices = select(energies, target.rank, config.select, seed=config.seed)
            A, B = lora_factors(
                weight, energies, indices, scaling=config.scaling, dtype=target.dtype
            )
            factors |= {f"{name}.A": A, f"{name}.B": B}
            on_host |= {f"{name}.energies": energies, f"{name}.indices": indices}
            modules.append(
                {
                    "name": name,
                    "fingerprint": hashes[name],
                    "shape": moments.shape,
                    "rank": target.rank,
                    "input_space": moments.input.space,
                    "output_space": moments.output.space,
                    "input_tokens": tokens[0],
                    "output_tokens": tokens[1],
                    "shared_input": hooks.shared_input.get(name),
                }
            )
        on_host |= {key: value.cpu() for key, value in factors.items()}
        return _Finished(block, on_host, modules, left_default, sorted(hooks.unmasked))

    def _write(self, block: int, arena: Arena) -> None:
        """Have a gradient written beside the computation; ``arena`` is being read for that."""
        self._being_written = arena
        scales = (self.scale, self.peak)
        self._writing = self._output.submit(
            self._save_gradient, block, arena, scales, list(self._saved)
        )

    def _is_behind(self) -> bool:
        """Whether a gradient is still being written; raises what went wrong with any file."""
        for each in [*self._saved, *([] if self._writing is None else [self._writing])]:
            if each.done():
                each.result()
        return self._writing is not None and not self._writing.done()

    # Before the run, and during it.

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _largest(self) -> int:
        return max(range(len(self.batches)), key=lambda index: self.batches[index].positions)

    def _share(self, index: int) -> float:
        """All batches' positions over those of one."""
        return sum(batch.positions for batch in self.batches) / self.batches[index].positions

    def _reset_peak(self) -> int:
        """The peak of the GPU's memory since the last call, in bytes; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.peak_bytes = max(self.peak_bytes, peak)
        return peak

    def _rehearse(self, arena: Arena, head_seconds: float, head_bytes: int) -> None:
        """The first block with targets on the largest batch, to refuse early and to plan."""
        block, index = self.first, self._largest()
        share, timed = self._share(index), self._timed()
        shape = "×".join(map(str, self.batches[index].inputs["input_ids"].shape))
        self._at = f"the rehearsal of block {block} on the largest batch, {shape} tokens"
        self.scale = 1.0
        # After another block: setting up the thread and its buffers is no part of loading.
        groups = [self.block_weights[self.number - 1], self.block_weights[block]]
        with contextlib.ExitStack() as stack:
            loaded = stack.enter_context(closing(self.stream.run(groups)))
            next(loaded), next(loaded)
            loading = self.stream.loading
            stack.enter_context(self.pool.paused())

            def fetched() -> list[Tensor]:
                return self.copies.fetch([arena], index, self.calls[index].of(block)).ready()

            def back(hooks: MomentHooks) -> None:
                hidden, *leaves = fetched()
                gradient = torch.full_like(hidden, 2**-6)
                self._backward(block, index, hidden, gradient, leaves, hooks)

            for _ in range(_ROUNDS):
                times = [self._clock()]
                self._reset_peak()
                with torch.no_grad(), self._products(block) as start_batch:
                    for _ in range(timed):
                        start_batch()
                        hidden, *leaves = fetched()
                        self.parts.run_block(block, hidden, self.calls[index], leaves)
                times.append(self._clock())
                forward_bytes = self._reset_peak()
                with MomentHooks(self.of_block[block], self.config) as hooks:
                    back(hooks)  # which also makes the moments
                    times.append(self._clock())
                    for _ in range(timed):
                        back(hooks)
                times.append(self._clock())
                hooks.finish()
                hooks.check_finite(f"batch {index} (counted from 0)")
                self._finished(block, hooks)
                del hooks
                times.append(self._clock())
        forward, begin, reverse, finish = (b - a for a, b in itertools.pairwise(times))
        forward *= share / timed
        reverse = begin + (share - 1) * reverse / timed + finish
        resumed = self._gradient_file(self.top).is_file()
        steps = self._steps()
        backs = self.top - self.first + 1
        forwards = self.top + (0 if resumed else 1)
        again = len(steps) - backs
        largest = self.layout.shapes[index].numel() * self.layout.dtype.itemsize
        device_bytes = 0
        if self.device.type == "cuda":
            # Two places for blocks, beside what the next sweep begins with; and what is on its way
            # in and out.
            places = 2 * max(map(size_of, self.block_weights))
            more = places - 2 * max(map(size_of, groups)) + 4 * largest
            then = places if resumed else size_of(self.other_weights)
            device_bytes = max(
                forward_bytes + more + then,
                0 if resumed else head_bytes + places,
                self._reset_peak() + more,
            )
        reverse_seconds = loading + backs * max(reverse, loading) + again * max(forward, loading)
        on_disk = len(self.keeping.on_disk)
        write_seconds = read_seconds = 0.0
        if on_disk:
            assert self.scratch is not None
            write, read = self.inputs.speed(arena)
            write_seconds, read_seconds = on_disk * write, on_disk * read
            if _on_one_disk(self.scratch, self.folder):
                # Where the inputs are waited for, as many gradients are written meanwhile.
                read_seconds += write_seconds
        self.plan = Plan(
            blocks=(forwards, backs),
            of=self.number,
            stride=self.keeping.stride,
            kept=len(self.keeping.kept),
            recomputed=again,
            on_disk=on_disk,
            device=torch.cuda.get_device_name(self.device) if device_bytes else "cpu",
            device_bytes=device_bytes,
            host_bytes=self.keeping.arenas * self.layout.nbytes
            + sum(leaf.nbytes for calls in self.calls for leaf in calls.leaves),
            scratch_bytes=on_disk * self.layout.nbytes,
            run_bytes=self.run_bytes,
            seconds={
                # Nothing hides the loading of the first block; arenas or a disk may take longer.
                "forward": max(
                    loading + forwards * max(forward, loading),
                    self.pool.seconds_left(),
                    write_seconds,
                ),
                "head": head_seconds,
                "reverse": max(reverse_seconds, read_seconds),
            },
        )
        if self.show:
            _say(self.plan.text())

    def _progress(self, what: str, blocks: int) -> Any:
        self._done = 0
        return tqdm(
            total=blocks * len(self.batches), unit="batch", desc=what, disable=not self.show
        )

    def _advance(self, progress: Any, block: int, index: int) -> None:
        self._done += self.batches[index].positions
        progress.update()
        elapsed = progress.format_dict["elapsed"]
        if elapsed and self.show:
            where = f"block {block + 1}/{self.number}" if block < self.number else "head"
            text = f"{where}, {self._done / elapsed:,.0f} tokens/s a block"
            if self.device.type == "cuda":
                text += f", {_gib(torch.cuda.memory_allocated(self.device))}"
            progress.set_postfix_str(text, refresh=False)

    # The output.

    def write(self, output: Path) -> FiletReport:
        """The adapter's folder, from the blocks' files. Returns the report, which is in it."""
        start = time.perf_counter()
        layers: dict[str, Layer] = {}
        reports: dict[str, ModuleReport] = {}
        left: dict[str, str] = dict(self.unsupported)
        unmasked: list[str] = []
        for block in range(self.number - 1, self.first - 1, -1):
            metadata = self._read_block(self._block_file(block), layers, reports)
            left |= json.loads(metadata["left_default"])
            unmasked += json.loads(metadata["unmasked"])
        if not layers:
            raise ValueError(
                "no module saw a token and its gradient; expected data that reaches at least one"
            )
        # In the model's order.
        layers = {name: layers[name] for name in self.targets if name in layers}
        order = [*self.unsupported, *self.targets]
        left_default = {name: left[name] for name in order if name in left}
        commit(self.peft_model, _ADAPTER, self.targets, layers)
        materialise_rest(self.peft_model, _ADAPTER, self.config.seed)
        warn_of(left_default, layers)
        walk.warn_of_padding(unmasked)
        self.seconds["writing"] = time.perf_counter() - start
        report = FiletReport(
            modules={name: reports[name] for name in layers},
            left_default=left_default,
            seconds=self.seconds,
            peak_memory=self.peak_bytes if self.device.type == "cuda" else peak_memory(set()),
            config=dataclasses.asdict(self.config),
            **self.counts,
        )
        _write_folder(self.peft_model, report, output)
        return report

    def _read_block(
        self,
        path: Path,
        layers: dict[str, Layer],
        reports: dict[str, ModuleReport],
    ) -> dict[str, str]:
        """Add the modules of a block's file; returns what else it says."""
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != _BLOCK_FORMAT:
                raise ValueError(
                    f"{path}: format {metadata.get('format')!r}; expected {_BLOCK_FORMAT!r}"
                )
            for row in json.loads(metadata["modules"]):
                name = row["name"]
                A, B, energies, indices = (
                    file.get_tensor(f"{name}.{key}") for key in ("A", "B", "energies", "indices")
                )
                layers[name] = Layer(A, B, row.pop("fingerprint"))
                row["shape"] = tuple(row["shape"])
                reports[name] = ModuleReport(energies=energies, indices=indices, **row)
        return metadata


def _on_one_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _read(
    batches: Iterable[Mapping[str, Any]], config: FiletConfig, model: nn.Module
) -> list[_Batch]:
    """The batches up to ``config.samples``, and which positions predict what."""
    loss = SummedLoss(config, model)
    if not loss.shift:
        raise ValueError(
            f"{type(model).__name__} is not a causal language model; the blockwise engine takes "
            "those whose logits predict the next token"
        )
    inputs = Inputs(model)
    result: list[_Batch] = []
    samples = 0
    for number, batch in enumerate(batches):
        batch = inputs.checked(batch, number)
        for key in ("input_ids", "labels"):
            value = batch.get(key)
            if not isinstance(value, Tensor) or value.dim() != 2:
                raise ValueError(
                    f"batch {number} has no {key} of shape (samples, tokens); expected a dict with "
                    "input_ids and labels"
                )
        if config.samples is not None:
            batch = first_samples(batch, config.samples - samples)
        size = samples_in(batch)
        if size == 0:
            continue
        masks, tokens = token_masks(batch, size, False, config.token_mask)
        batch = loss.without_padded_terms(batch, masks["decoder"])
        inputs.check_labels(batch, number, shift=True)
        batch = {
            key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()
        }
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        counted = labels != IGNORED
        uniform = None
        if config.fisher == "sampled":
            drawn = []
            for index, row in enumerate(counted):
                drawn.append(loss.uniform(batch, index, int(row.sum())))
            uniform = torch.cat(drawn)
        result.append(
            _Batch(
                inputs=without_token_mask(batch, config.token_mask),
                rows=counted.flatten().nonzero().squeeze(1),
                labels=labels[counted],
                uniform=uniform,
                mask=masks["decoder"],
                samples=size,
                tokens=tokens,
            )
        )
        samples += size
        if config.samples is not None and samples >= config.samples:
            break
    if not result:
        raise ValueError("there was no sample; expected at least one")
    check_terms(samples, sum(batch.rows.numel() for batch in result))
    return result


def _manifest(
    source: WeightSource,
    batches: Sequence[_Batch],
    lora_config: LoraConfig,
    config: FiletConfig,
    weights: Sequence[Entry],
    device: torch.device,
) -> dict[str, Any]:
    """What the result depends on."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        tensors = {**batch.inputs, "rows": batch.rows, "labels": batch.labels}
        for key, value in sorted(tensors.items()):
            digest.update(f"{key}:{getattr(value, 'shape', value)}".encode())
            if isinstance(value, Tensor):
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    manifest = {
        "format": _FORMAT,
        "model": source.identity(),
        "dtype": str(weights[0].dtype),
        "device": device.type,
        "data": digest.hexdigest(),
        "settings": dataclasses.asdict(config),
        "adapter": {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in lora_config.to_dict().items()
            if key not in ("base_model_name_or_path", "auto_mapping", "peft_version")
        },
    }
    # As it will be read back.
    plain: dict[str, Any] = json.loads(json.dumps(manifest, default=str))
    return plain


def _compare(there: Any, now: Any, folder: Path, where: str = "") -> None:
    """ValueError naming the first difference of two manifests."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in there if key not in now)]:
            _compare(there.get(key), now.get(key), folder, f"{where}{'.' if where else ''}{key}")
    elif there != now:
        raise ValueError(
            f"{folder} holds a run that was not finished and that is not this one: {where} is "
            f"{there!r} there and {now!r} now; expected the same to resume it, or the folder "
            "removed to begin anew"
        )
