"""Summing updates exactly, one at a time, and applying their mean to an adapter."""

from cloud.aggregate.apply import apply_mean
from cloud.aggregate.fixed_point import UpdateSum

__all__ = ["UpdateSum", "apply_mean"]
