"""Kernels and mathematics of FILet, one layer at a time. Needs torch alone."""

from filet_kernels.contrast import contrast_directions
from filet_kernels.cross_entropy import cross_entropy_
from filet_kernels.energy import fisher_energies
from filet_kernels.lora import lora_factors, residual_weight, residual_weight_, select
from filet_kernels.moments import Moments, SecondMoment
from filet_kernels.quadform import quadform_diag
from filet_kernels.syrk import syrk_, syrk_ragged_

__all__ = [
    "Moments",
    "SecondMoment",
    "contrast_directions",
    "cross_entropy_",
    "fisher_energies",
    "lora_factors",
    "quadform_diag",
    "residual_weight",
    "residual_weight_",
    "select",
    "syrk_",
    "syrk_ragged_",
]
__version__ = "0.1.0"
