"""What a blockwise run will need."""

from __future__ import annotations

from dataclasses import dataclass

from filet.system.text import readable

__all__ = ["RunPlan"]


@dataclass(frozen=True)
class RunPlan:
    """What a run will need.

    Memory and disk are exact sums of what is allocated there, but for statistics that are to be
    saved: of these they are the most that there can be, and their time is not in it. The GPU's peak
    and the times are measured on one block and one batch (the largest) before the run.
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
            f"  host        {readable(self.host_bytes)} for block inputs and gradients",
            f"  disk        {readable(self.run_bytes)} beside the output, "
            f"{readable(self.scratch_bytes)} of scratch",
            f"  time        {sum(self.seconds.values()):,.0f} s: "
            + ", ".join(f"{name} {value:,.0f} s" for name, value in self.seconds.items()),
        ]
        if self.device_bytes:
            lines.insert(1, f"  {self.device:<11} {readable(self.device_bytes)} at the peak")
        if self.stride > 1:
            lines.append(
                f"  recomputed  {self.kept} of {reverse} boundaries are kept (k = {self.stride}), "
                f"{self.recomputed} blocks computed once more for the others: raise host_memory "
                "or give a scratch folder to avoid it"
            )
        return "\n".join(lines)
