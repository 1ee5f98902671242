"""bitsandbytes as on a CPU without AVX512-BF16, on every CPU.

With it a forward in eval mode repacks a 4-bit weight. That takes no layer narrower than a block of
64 and none whose outputs 32 does not divide, as of small models, and one with a bias does not train
afterwards, in plain PEFT either (bitsandbytes 0.50). What FILet does with a weight that was
repacked is tested on all CPUs, by weights that the tests repack themselves (tests/quantised).
"""

from __future__ import annotations

import contextlib

__all__ = ["alike"]


def alike() -> None:
    """Called before layers are made, in each process that makes some."""
    with contextlib.suppress(ImportError):
        from bitsandbytes.nn import modules

        modules.has_avx512bf16 = lambda: False
