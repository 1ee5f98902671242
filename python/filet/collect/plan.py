"""What a pass will need: bytes on each device, batch size, passes, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from filet.system.memory import ADVICE
from filet.system.text import readable

__all__ = ["MOST_TOKENS", "DevicePlan", "Plan"]

# More tokens a batch hardly pay: at 16384 rows of 4096 and more syrk_ is at its ceiling
# (docs/kernels.md).
MOST_TOKENS = 16384


@dataclass(frozen=True)
class DevicePlan:
    """Bytes on one device.

    Attributes:
        device: "cuda:0", "cpu".
        total, free: what the process may have of the device, and what of it is free for the pass,
            without a reserve of 4% of the total. None on a CPU, where memory is not limited here.
        weights: what the model has there already.
        moments: of all modules there.
        moments_at_a_time: the largest part of them that a pass takes, by the number of passes.
        fixed, per_sample: what a batch needs during forward and backward, besides the moments:
            fixed + samples · per_sample; measured. None on a CPU.
        selection: of one layer at a time, when the energies are computed and the weights written.
    """

    device: str
    total: int | None
    free: int | None
    weights: int
    moments: int
    moments_at_a_time: Mapping[int, int]
    fixed: int | None
    per_sample: int | None
    selection: int

    def needed(self, batch_size: int, passes: int) -> int:
        """Bytes besides the weights, at the worst moment of the pass or of the selection."""
        batch = (self.fixed or 0) + batch_size * (self.per_sample or 0)
        # What several passes took is in host memory by then.
        afterwards = self.selection + (self.moments if passes == 1 else 0)
        return max(self.moments_at_a_time[passes] + batch, afterwards)

    def largest_batch(self, passes: int) -> int:
        """Samples of a batch that fit, 0 where not one does; no bound on a CPU."""
        if self.free is None:
            return MOST_TOKENS
        if self.needed(0, passes) > self.free:
            return 0
        room = self.free - self.moments_at_a_time[passes] - (self.fixed or 0)
        return room // max(self.per_sample or 0, 1)


@dataclass(frozen=True)
class Plan:
    """What a pass needs and how it would go; ``str(plan)`` is a table of it.

    Attributes:
        devices: one :class:`DevicePlan` each.
        moments: module → bytes of its input and its output moment; 0 for an input moment that is
            another module's.
        shared_input: module → the module whose input moment it shares.
        length: tokens of a sample in the batch that was given; what follows is for that length.
        batch_size: samples in a batch: the given number, or the largest that fits, of at most 16384
            tokens (4096 on a CPU).
        passes: as in :class:`FiletConfig`; the number set there, or the smallest that fits.
        samples, tokens: of the whole run, where they are known.
        seconds: an estimate for the pass, from the measured forward and backward of two samples
            and the operations of the moments; None without ``tokens``.
    """

    devices: tuple[DevicePlan, ...]
    moments: Mapping[str, tuple[int, int]]
    shared_input: Mapping[str, str]
    length: int
    batch_size: int
    passes: int
    samples: int | None
    tokens: int | None
    seconds: float | None

    @property
    def missing(self) -> dict[str, int]:
        """Device → the bytes by which it is too small; empty where everything fits."""
        short = {
            d.device: d.needed(self.batch_size, self.passes) - d.free
            for d in self.devices
            if d.free is not None
        }
        return {device: size for device, size in short.items() if size > 0}

    @property
    def fits(self) -> bool:
        return not self.missing

    @property
    def advice(self) -> str:
        """What does not fit and what to change, "" where everything fits."""
        if self.fits:
            return ""
        short = ", ".join(f"{device} by {readable(size)}" for device, size in self.missing.items())
        return (
            f"a batch of {self.batch_size} samples × {self.length} tokens is likely to be too "
            f"large for {short}; expected one or more of: {', '.join(ADVICE)}"
        )

    @property
    def sooner(self) -> str:
        """Which smaller batches would leave room for half as many passes at most, "" where none."""
        size = self.batch_size // 2
        while size:
            fitting = (
                passes
                for passes in sorted(self.devices[0].moments_at_a_time)
                if all(d.largest_batch(passes) >= size for d in self.devices)
            )
            passes = next(fitting, self.passes)
            if 2 * passes <= self.passes:
                of = f"batches of {size}" if size > 1 else "single samples"
                return f"{of} would take {passes}, gradient checkpointing saves passes too"
            size //= 2
        return ""

    def __str__(self) -> str:
        rows = []
        for d in self.devices:
            free = ""
            if d.total is not None and d.free is not None:
                free = f", {readable(d.free)} of {readable(d.total)} free for the pass"
            rows.append(("device", d.device + free))
            rows.append(("  weights", f"{readable(d.weights)}, there already"))
            part = ""
            if self.passes > 1:
                part = f", {readable(d.moments_at_a_time[self.passes])} at a time"
            rows.append(("  moments", readable(d.moments) + part))
            if d.per_sample is not None and d.fixed is not None:
                batch = readable(d.fixed + self.batch_size * d.per_sample)
                rows.append(("  a batch", f"{batch}, {readable(d.per_sample)} a sample (measured)"))
            rows.append(("  selection", f"{readable(d.selection)}, after the pass"))
        rows.append(("batches", f"of {self.batch_size} samples x {self.length} tokens"))
        samples = "all samples" if self.samples is None else f"{self.samples} samples"
        rows.append(("data", samples + ("" if self.tokens is None else f", {self.tokens} tokens")))
        rows.append(("passes", f"{self.passes}{f' ({self.sooner})' if self.sooner else ''}"))
        if self.seconds is not None:
            about = f"{self.seconds:.{0 if self.seconds >= 10 else 1}f}"
            rows.append(("time", f"about {about} s (estimated from two samples)"))
        if not self.fits:
            rows.append(("does not fit", self.advice))
        return "\n".join(f"{name:<14}{value}" for name, value in rows)
