"""What a plan says of a device's bytes, without a model."""

from __future__ import annotations

from dataclasses import replace

from filet import DevicePlan, Plan

GIB = 2**30


def test_needs_of_a_device() -> None:
    on = DevicePlan("cuda:0", 80 * GIB, 60 * GIB, 16 * GIB, 20 * GIB, {1: 20 * GIB, 4: 5 * GIB},
                    GIB, 2 * GIB, GIB)  # fmt: skip
    assert on.needed(8, 1) == 37 * GIB and on.needed(8, 4) == 22 * GIB
    assert on.needed(0, 1) == 21 * GIB  # the selection beside all moments
    assert on.largest_batch(1) == 19 and on.largest_batch(4) == 27


def test_smaller_batches_that_save_passes_are_named() -> None:
    """Llama-3-8B in 4 bits on 24 GiB: 17.1 free, 18.25 of moments, 2 of each sample."""
    at_a_time = {passes: 18 * GIB // passes for passes in range(1, 33)}
    on = DevicePlan("cuda:0", 24 * GIB, 17 * GIB, 6 * GIB, 18 * GIB, at_a_time, 0, 2 * GIB, GIB)

    def planned(size: int, passes: int) -> Plan:
        return Plan((on,), {}, {}, 512, size, passes, 320, None, None)

    assert on.largest_batch(17) < 8 == on.largest_batch(18)
    of_eight = planned(8, 18)
    assert of_eight.sooner.startswith("batches of 4 would take 2, gradient checkpointing")
    assert dict(line.split(maxsplit=1) for line in str(of_eight).splitlines())["passes"] == (
        f"18 ({of_eight.sooner})"
    )
    assert planned(4, 2).sooner == ""  # single samples would take 2 as well
    one = replace(on, moments_at_a_time={18: GIB})  # as it was asked for
    assert replace(of_eight, devices=(one,)).sooner == ""
    full = replace(on, free=5 * GIB)
    assert replace(planned(2, 18), devices=(on, full)).sooner.startswith("single samples would ta")
