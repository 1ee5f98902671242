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
import itertools
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from filet.adapter.saved import write_folder
from filet.adapter.write import commit, materialise_rest
from filet.blockwise.batches import Batch, read_batches
from filet.blockwise.boundaries import (
    Abandoned,
    Arena,
    ArenaPool,
    BlockInputs,
    Copies,
    Fetched,
    Layout,
)
from filet.blockwise.folder import ADAPTER, check_alone
from filet.blockwise.journal import BLOCK_FORMAT, MANIFEST, TRAILER, Finished, compare, manifest_of
from filet.blockwise.keeping import DISK_SHARE, Keeping
from filet.blockwise.plan import RunPlan
from filet.blockwise.stream import Loading, WeightStream, size_of
from filet.blockwise.weights import WeightSource
from filet.collect.hooks import MomentHooks, hands_on
from filet.collect.run import warn_of_padding
from filet.config import FiletConfig
from filet.loss.sampling import drawn
from filet.model.chain import Calls, Parts, described
from filet.model.checkpoint import Entry, entries
from filet.model.fingerprint import fingerprints
from filet.model.isolation import preserved
from filet.model.targets import Target, adapted, check_targets, find_targets
from filet.report.modules import ModuleReport
from filet.report.report import FiletReport
from filet.select import Layer, check_rank, choose, warn_of
from filet.system.files import replaced
from filet.system.lock import FolderLock
from filet.system.memory import available_on_host, named_shortage, peak_memory
from filet.system.text import readable
from filet_kernels import cross_entropy_

__all__ = ["Blockwise", "Groups"]

Groups = Sequence[Sequence[Entry]]  # of weights that are on the device together


_HEAD = "the head and the loss"


# Logits that exist at a time: 2²⁷, 0.25 GiB in bfloat16 and four times that for the loss.
_LOGITS = 2**27


# A float16 gradient is scaled so that the largest number of a boundary is at 2⁴ (see walk.py).
_FP16_EXPONENT = 4


# What is timed before the run is done so often; the first time compiles and sets up.
_ROUNDS = 2


# Batches that a GPU is timed on: of one alone, much would be the launch of its first kernels.
_TIMED = 4


# Batches whose work the host has handed to a GPU and not seen finished.
_IN_FLIGHT = 2


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
        self.host_memory = host_memory or available_on_host() // 2
        self.show = show_progress_bar
        self.seconds: dict[str, float] = {}
        # How long the computation of the sweeps waited: for weights; for host memory to be made
        # (once each arena); for a disk.
        self.waited = {"weights": 0.0, "memory": 0.0, "disk": 0.0}
        # What each block took, by the host, which a GPU may be two batches behind. "recomputed" is
        # a block's forward in the reverse sweep, for the inputs of the next ones.
        kinds = ("forward", "recomputed", "reverse")
        self.block_seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        self.plan: RunPlan | None = None

        check_alone(lora_config)
        weights = entries(model)  # before PEFT renames them
        self.peft_model = adapted(model, lora_config)
        self.model = self.peft_model.base_model.model
        self.targets, self.unsupported = find_targets(self.peft_model, ADAPTER, loaded=False)
        check_targets(self.peft_model, self.targets, self.unsupported, ADAPTER)
        for target in self.targets.values():
            check_rank(target, target.weight.shape[1])
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

        self.batches = read_batches(batches, config, self.model)
        self.counts = {
            "samples": sum(batch.samples for batch in self.batches),
            "tokens": sum(batch.tokens for batch in self.batches),
            "loss_terms": sum(batch.rows.numel() for batch in self.batches),
        }
        self.stream = WeightStream(source, device)
        self.manifest = manifest_of(source, self.batches, lora_config, config, weights, device)
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
        path = self.folder / MANIFEST
        for left in self.folder.glob(".*"):  # by a kill while a file was written
            left.unlink()
        others = [each for each in self.folder.iterdir() if each.name != "lock"]
        if others and not path.is_file():
            raise ValueError(f"{self.folder} is there, but no run of filet; expected no folder")
        self.top = self._next_block()
        if self._finished_before(self.top):
            compare(json.loads(path.read_text()), self.manifest, self.folder)
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
            arena.save(beside, TRAILER.pack(*scales), self._useless)
            for each in above:
                each.result()
        self._unlink_gradients(but=block)

    def _save_block(self, finished: Finished) -> None:
        with replaced(self._block_file(finished.block), durable=True) as beside:
            beside.write_bytes(finished.content())

    # The sweeps.

    def sweep(self) -> None:
        """Finish every block that is not yet. What is finished survives an exception."""
        if self.top < self.first:
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(named_shortage("blockwise", lambda: self._at))
            stack.enter_context(preserved(self.peft_model, ADAPTER, self.targets))
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
                self.scale, self.peak = TRAILER.unpack(gradient.load(resumed, TRAILER.size))
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

    def _on_device(self, batch: Batch) -> dict[str, Any]:
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
            disk = int(shutil.disk_usage(self.scratch).free * DISK_SHARE) // nbytes
        self.keeping = Keeping.choose(
            self.first, self.top, self.host_memory // nbytes, disk, nbytes
        )
        # Two gradients at a time, and A, B and the energies of what is not finished.
        self.run_bytes = 2 * (nbytes + TRAILER.size) + sum(
            4 * target.rank * sum(target.weight.shape) + 8 * target.weight.shape[1]
            for mine in self.of_block[self.first : self.top + 1]
            for target in mine.values()
        )
        free = shutil.disk_usage(self.folder).free
        if free < self.run_bytes:
            text = f"{readable(self.run_bytes)} needed, {readable(free)} free"
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
        if not hands_on(self.device):
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

    def _loss_gradient(self, batch: Batch, hidden: Tensor) -> Tensor:
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

    def _finished(self, block: int, hooks: MomentHooks) -> Finished:
        """A, B, energies and choices of a block's modules."""
        for moments in hooks.moments.values():
            moments.loss_terms.fill_(self.counts["loss_terms"])
        targets = self.of_block[block]
        hashes = fingerprints({name: target.weight for name, target in targets.items()})
        choice = choose(targets, hooks.moments, hooks.shared_input, hashes, self.config)
        for layer in choice.layers.values():
            layer.A0, layer.B0 = layer.A0.cpu(), layer.B0.cpu()
        return Finished(block, choice, sorted(hooks.unmasked))

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
        self.plan = RunPlan(
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
                text += f", {readable(torch.cuda.memory_allocated(self.device))}"
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
        commit(self.peft_model, ADAPTER, self.targets, layers)
        materialise_rest(self.peft_model, ADAPTER, self.config.seed)
        warn_of(left_default, layers)
        warn_of_padding(unmasked)
        self.seconds["writing"] = time.perf_counter() - start
        report = FiletReport(
            modules={name: reports[name] for name in layers},
            left_default=left_default,
            seconds=self.seconds,
            peak_memory=self.peak_bytes if self.device.type == "cuda" else peak_memory(set()),
            config=dataclasses.asdict(self.config),
            **self.counts,
        )
        write_folder(self.peft_model, report, output)
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
            if metadata.get("format") != BLOCK_FORMAT:
                raise ValueError(
                    f"{path}: format {metadata.get('format')!r}; expected {BLOCK_FORMAT!r}"
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
