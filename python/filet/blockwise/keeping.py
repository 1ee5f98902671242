"""Which inputs of blocks the forward sweep keeps for the reverse sweep, and where."""

from __future__ import annotations

from dataclasses import dataclass

from filet.system.text import readable

__all__ = ["DISK_SHARE", "Keeping"]

# Arenas that a sweep works with, besides those kept: in reverse the inputs of a block, those of the
# next on their way from the disk, the gradients of its outputs and inputs, and a gradient on its
# way to the disk. Where no inputs go to the disk, the gradient of a block's inputs takes the arena
# that the block above had its inputs in; two are left, which the head needs as well.
_WORKING = 5
_WORKING_ON_HOST = 2

# Of what is free on the scratch disk, this share is used.
DISK_SHARE = 0.9


@dataclass(frozen=True)
class Keeping:
    """Which boundaries are kept, and where."""

    stride: int
    kept: tuple[int, ...]  # blocks whose inputs are, in ascending order
    on_disk: frozenset[int]
    arenas: int  # of host memory, at most

    @classmethod
    def choose(
        cls, first: int, last: int, host: int, disk: int, nbytes: int, processes: int = 1
    ) -> Keeping:
        """For the reverse sweep over blocks ``last`` … ``first``.

        ``host`` and ``disk`` are how many boundaries fit there. The smallest stride that fits.
        ``processes``: that share the host memory, for the error where nothing does.
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
        of_each = f", for each of {processes} processes" if processes > 1 else ""
        whole = nbytes * processes
        raise ValueError(
            f"host_memory holds {host} of the block boundaries of {readable(nbytes)} each, and the "
            f"scratch folder {disk}{of_each}; expected host_memory of at least "
            f"{readable((_WORKING_ON_HOST + best) * whole)}, or {readable(_WORKING * whole)} "
            f"and a scratch folder with {readable(number * whole / DISK_SHARE)} free"
        )

    def steps(self, top: int) -> list[tuple[bool, int]]:
        """(recompute its output only, block) in the order of the reverse sweep from ``top`` on."""
        steps: list[tuple[bool, int]] = []
        end = top + 1
        for start in reversed(self.kept):
            if end <= top:  # of the last stretch the forward sweep kept everything
                steps += [(True, block) for block in range(start, end - 1)]
            steps += [(False, block) for block in range(end - 1, start - 1, -1)]
            end = start
        return steps
