"""Summing updates exactly, one at a time, applying their mean to an adapter, and changing its ranks."""

from cloud.aggregate.apply import apply_mean, largest_changes, rms_changes
from cloud.aggregate.class_means import linear_discriminant
from cloud.aggregate.factors import component_movement, module_energies, module_movement, refactor, with_ranks
from cloud.aggregate.fixed_point import UpdateSum
from cloud.aggregate.sketch import Imprint, Part, Sketcher
from cloud.aggregate.stack import ProductMean
from cloud.aggregate.tiers import RoundSum

__all__ = [
    "Imprint",
    "Part",
    "ProductMean",
    "RoundSum",
    "Sketcher",
    "UpdateSum",
    "apply_mean",
    "component_movement",
    "largest_changes",
    "linear_discriminant",
    "module_energies",
    "module_movement",
    "refactor",
    "rms_changes",
    "with_ranks",
]
