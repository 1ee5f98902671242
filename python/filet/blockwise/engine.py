"""FILet initialisation of a model larger than the GPU: layers outer, batches inner.

Forward sweep: block after block is loaded from the shards, every batch goes through it without a
graph, and each block's inputs go to host memory or disk. Then the head and the loss, some rows at a
time. Reverse sweep: a block is loaded again, recomputed with a graph for every batch, and given the
gradient of what follows it; its moments are finished, its A and B chosen and written, and it goes.
Batches of data to keep go along in the forward sweep, and in the reverse sweep once more forward
through each block whose moments are finished.

The recomputation sees the same weights and inputs as the forward sweep and every operation is
deterministic, so it takes the same path: the same experts, for a router.

What the reverse sweep has finished lies in a folder beside the output, with the gradient that the
next block needs: a run that was killed goes on there (docs/blockwise.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor

from filet.adapter.saved import write_folder
from filet.adapter.write import commit, materialise_rest
from filet.blockwise.arenas import Arena, Gradient, Layout
from filet.blockwise.batches import read_batches, read_keep
from filet.blockwise.boundaries import Boundaries
from filet.blockwise.folder import ADAPTER, empty_model, scratch_folder
from filet.blockwise.head import head
from filet.blockwise.journal import Journal
from filet.blockwise.keeping import DISK_SHARE, Keeping
from filet.blockwise.machine import Machine, PeakMemory
from filet.blockwise.manifest import manifest_of
from filet.blockwise.parted import PartedModel
from filet.blockwise.plan import RunPlan
from filet.blockwise.progress import Times, say
from filet.blockwise.rehearse import Measured, Rehearsal, disk_seconds, plan_of
from filet.blockwise.samples import samples_of
from filet.blockwise.stream import WeightStream
from filet.blockwise.sweeps import Reverse, capture, check_candidates, forward
from filet.blockwise.weights import ShardedWeights, WeightSource
from filet.blockwise.work import Work
from filet.collect.keep import Keep, check_keep_used
from filet.collect.padding import warn_of_padding
from filet.collect.statistics import Statistics
from filet.config import FiletConfig, resolved
from filet.distributed.channel import Channel
from filet.distributed.group import Group
from filet.model.isolation import preserved
from filet.report.report import FiletReport
from filet.select import Choice, check_contrast_rank, warn_of
from filet.system.memory import available_on_host, named_shortage, peak_memory

__all__ = ["Blockwise", "blockwise_run"]


class Blockwise:
    """One run: :meth:`sweep` over the blocks, then :meth:`write` the adapter.

    ``source`` gives the weights of ``model`` (from :func:`empty_model`). ``run_folder`` and
    ``scratch`` are created; a run folder that is there is resumed. A context manager: it holds a
    lock on the run folder, threads and pinned memory.

    Attributes:
        plan: what the sweeps will need, once it is known.
        times: seconds that the run took and waited.
        memory: the peak of the GPU's memory, measuring for the plan included.
        boundaries: where block inputs and gradients go, once their size is known.

    Of several processes (``group``) each takes its share of the batches, and all go through the
    blocks together: each reads its share of a block's weights, and chooses for its share of the
    block's modules. ``host_memory`` is that of the processes on one machine.
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
        machine: Machine | None = None,
        keep: Keep | None = None,
        save_statistics: Path | None = None,
        group: Group | None = None,
    ) -> None:
        if device.type == "cuda":
            torch.cuda.init()  # what preserved() makes deterministic depends on it
            device = torch.device("cuda", device.index or 0)
        check_keep_used(keep, config)
        self.config = config = resolved(config, keep is not None)
        self.device = device
        self.scratch = scratch
        self.save_statistics = save_statistics
        self.group = group
        # Of this process: what those on one machine may have, they share.
        self._beside = 1 if group is None else group.beside()
        self.host_memory = (host_memory or available_on_host() // 2) // self._beside
        self.show = show_progress_bar and (group is None or group.rank == 0)
        self.machine = machine or Machine()
        self.times = Times(self.machine.clock, device, group is not None)
        self.memory = PeakMemory(device)
        self.plan: RunPlan | None = None
        self.boundaries: Boundaries | None = None
        self.model = PartedModel(model, lora_config, device)
        if config.select == "contrast":
            check_contrast_rank(self.model.targets)
        task = read_batches(batches, config, self.model.base, group)
        kept = read_keep(keep, config, self.model.peft_model, group)
        self._channel = None if group is None else Channel(group, device)
        self.stream = WeightStream(source, device, channel=self._channel)
        whole = save_statistics is not None
        self._samples = [samples_of(batch) for batch in task[0]]
        digests = [each.digest for its in self._samples for each in its]
        to_keep = [each.digest for batch in kept[0] for each in samples_of(batch)]
        quantised = getattr(self.model.base.config, "quantization_config", None)
        manifest = manifest_of(
            source, digests, to_keep, lora_config, config, self.model.entries, quantised, device,
            whole, group,
        )  # fmt: skip
        self.work = Work(
            self.model, task, kept, config, self.stream, self.times, self.show, group, whole
        )
        self.journal = Journal(
            run_folder, manifest, self.model.first, self.model.number, self.machine, whole, group
        )
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Blockwise:
        with contextlib.ExitStack() as stack:
            stack.push(self._ended)
            stack.enter_context(self.journal)
            if self.scratch is not None:
                stack.enter_context(self._cleared(self.scratch))
            self._stack = stack.pop_all()
        return self

    def _ended(self, kind: object, *exception: object) -> None:
        if kind is not None and self._channel is not None:
            self.journal.settle()  # before the others hear of it: their run ends with that
            self._channel.stop()  # the others wait for no weights of this process

    def __exit__(self, kind: object = None, *exception: object) -> None:
        self._ended(kind)
        self._stack.close()
        if kind is None and self._channel is not None:
            self._channel.close()

    @contextlib.contextmanager
    def _cleared(self, scratch: Path) -> Iterator[None]:
        """The scratch folder, without what a killed run left; of several processes each has one."""
        shutil.rmtree(scratch, ignore_errors=True)
        if self.group is not None:
            self.group.settle()  # what others had there is gone
            self.scratch = scratch / str(self.group.rank)
        assert self.scratch is not None
        self.scratch.mkdir(parents=True)
        try:
            yield
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            with contextlib.suppress(OSError):  # others are in it yet, or it was this one
                scratch.rmdir()

    def sweep(self) -> None:
        """Finish every block that is not yet. What is finished survives an exception."""
        if self.journal.top < self.model.first:
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(named_shortage("blockwise", self.work.place))
            stack.enter_context(preserved(self.model.peft_model, ADAPTER, self.model.targets))
            stack.callback(self.stream.drop_ahead)
            start = self.times.clock.now()
            self.memory.reset()
            self.memory.most = 0  # that was before the run
            boundaries, hidden = self._prepare(stack)
            waited = self.stream.settle()
            start = self.times.passed("preparing", start)
            reverse = Reverse(self.work, boundaries, self.journal)
            if self.journal.has_gradient:
                gradient = self._forward_again(boundaries, hidden, reverse)
                start = self.times.passed("forward", start)
            else:
                hidden = self._forward(boundaries, hidden)
                start = self.times.passed("forward", start)
                gradient = head(self.work, boundaries, hidden, reverse.groups)
                self.journal.save_gradient(self.journal.top, gradient)
                start = self.times.passed("head", start)
            reverse.run(gradient)
            self.times.passed("reverse", start)
            self.times.waited["weights"] = self.stream.settle() - waited
            self.memory.reset()
        self._say(self.times.text())

    def _prepare(self, stack: contextlib.ExitStack) -> tuple[Boundaries, Arena]:
        """The first block's inputs, room for what follows, and the plan."""
        with closing(self.stream.loaded([self.model.others])) as loaded:
            next(loaded)
            loading, seconds = self.stream.loading, 0.0
            boundaries, hidden = capture(self.work, partial(self._room, stack))
            rehearsal = Rehearsal(self.work, boundaries, self.memory)
            if not self.journal.has_gradient:
                seconds = rehearsal.head(hidden) + loading
        of_head = Measured(forward=seconds, forward_bytes=self.memory.reset())
        of_block = rehearsal.block(hidden)
        on_disk = disk_seconds(boundaries, hidden, self.journal, self.machine.disk)
        self.plan = plan_of(self.work, boundaries, self.journal, of_block, of_head, on_disk)
        self._say(self.plan.text())
        return boundaries, hidden

    def _say(self, text: str) -> None:
        if self.show:
            whose = "" if self.group is None else f"{self.group}, of its share of the samples:\n"
            say(whose + text)

    def _room(self, stack: contextlib.ExitStack, hidden: Tensor | None) -> Boundaries:
        """Decide what is kept where, now that the first batch shows what a boundary is like."""
        layout = self._layout(hidden)
        nbytes, disk = layout.nbytes, 0
        if self.scratch is not None:
            free = self.machine.disk.free(self.scratch) // self._beside
            disk = int(free * DISK_SHARE) // nbytes
        host, top = self.host_memory // nbytes, self.journal.top
        if self.group is not None:  # all go through the same blocks in the same order
            hosts, disks, sizes = zip(*self.group.exchanged((host, disk, nbytes)), strict=True)
            host, disk, nbytes = min(hosts), min(disks), max(sizes)
        keeping = Keeping.choose(self.model.first, top, host, disk, nbytes, self._beside)
        with_B = self.config.start == "untouched"
        self.journal.reserve(layout, self._samples, self.model.of_block, with_B, self.work.keeps)
        self.boundaries = Boundaries(
            layout, keeping, self.device, self.scratch, self.times, self.machine
        )
        stack.callback(self.boundaries.close)
        stack.callback(self.journal.settle)  # the output's thread may read an arena
        return self.boundaries

    def _layout(self, hidden: Tensor | None) -> Layout:
        """Of a boundary of this process, given one batch of it; None: another process has one."""
        form = None if hidden is None else (hidden.shape[-1], hidden.dtype)
        if self.group is not None:
            form = next(each for each in self.group.exchanged(form) if each is not None)
        assert form is not None
        width, dtype = form
        shapes = [torch.Size((*b.inputs["input_ids"].shape, width)) for b in self.work.batches]
        return Layout(shapes, dtype, len(self.work.task))

    def _forward(self, boundaries: Boundaries, hidden: Arena) -> Arena:
        """All blocks up to the topmost one to finish; returns its outputs."""
        blocks = range(self.journal.top + 1)
        then = [self.model.others]
        hidden, candidates = forward(self.work, boundaries, hidden, blocks, then)
        check_candidates(self.model.targets, candidates)
        return hidden

    def _forward_again(self, boundaries: Boundaries, hidden: Arena, reverse: Reverse) -> Gradient:
        """The blocks below the one to go on with; returns the gradient of that one's outputs."""
        top = self.journal.top
        hidden, _ = forward(self.work, boundaries, hidden, range(top), reverse.groups)
        boundaries.keep(top, hidden)
        return self.journal.load_gradient(boundaries.pool.get(), boundaries.layout)

    def write(self, output: Path) -> FiletReport:
        """The adapter's folder, from the blocks' files. Returns the report, which is in it.

        Before it the statistics, where they are wanted. With the adapter there, the run folder is
        removed on leaving. Of several processes the first one writes.
        """
        if self.group is None:
            return self._written(output)
        report = self._written(output) if self.group.rank == 0 else None
        whole = self.group.from_first(report)
        assert whole is not None
        return whole

    def _written(self, output: Path) -> FiletReport:
        start = self.times.clock.now()
        model, whole = self.model, Choice()
        left: dict[str, str] = dict(model.unsupported)
        unmasked: list[str] = []
        for finished in self.journal.finished():
            whole.layers |= finished.choice.layers
            whole.reports |= finished.choice.reports
            left |= finished.choice.left_default
            unmasked += finished.unmasked
        if not whole.layers:
            raise ValueError(
                "no module saw a token and its gradient; expected data that reaches at least one"
            )
        most = self.memory.most if self.device.type == "cuda" else peak_memory(set())
        if self.save_statistics is not None:
            parts, seconds = self.journal.statistics(), sum(self.times.seconds.values())
            Statistics.joined(parts, seconds, most).save(self.save_statistics)
        # In the model's order.
        layers = {name: whole.layers[name] for name in model.targets if name in whole.layers}
        order = [*model.unsupported, *model.targets]
        left_default = {name: left[name] for name in order if name in left}
        commit(model.peft_model, ADAPTER, model.targets, layers)
        materialise_rest(model.peft_model, ADAPTER, self.config.seed)
        warn_of(left_default, layers, whole.reports)
        warn_of_padding(unmasked)
        self.times.seconds["writing"] = self.times.clock.now() - start
        report = FiletReport(
            modules={name: whole.reports[name] for name in layers},
            left_default=left_default,
            seconds=self.times.seconds,
            peak_memory=most,
            config=dataclasses.asdict(self.config),
            keep=self.work.kept,
            **self.work.counts,
        )
        write_folder(model.peft_model, report, output)
        self.journal.discard()
        return report


def blockwise_run(
    folder: Path,
    batches: Iterable[Mapping[str, Any]],
    output: Path,
    lora_config: LoraConfig,
    config: FiletConfig,
    show_progress_bar: bool,
    host_memory: int | None = None,
    scratch: str | os.PathLike[str] | None = None,
    keep: Keep | None = None,
    save_statistics: Path | None = None,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    trust_remote_code: bool,
    quantization_config: Any,
    task: str,
    machine: Machine | None = None,
    group: Group | None = None,
) -> Blockwise:
    """The run of :func:`filet.initialize_folder`, whose arguments have been checked."""
    model = empty_model(
        folder,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        quantization_config=quantization_config,
        task=task,
    )
    run_folder = output.parent / f"{output.name}.filet-run"
    return Blockwise(
        model,
        ShardedWeights(folder, model),
        batches,
        lora_config,
        config,
        device=device,
        run_folder=run_folder,
        host_memory=host_memory,
        scratch=None if scratch is None else scratch_folder(scratch, run_folder),
        show_progress_bar=show_progress_bar,
        machine=machine,
        keep=keep,
        save_statistics=save_statistics,
        group=group,
    )
