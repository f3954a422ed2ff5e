"""Turns a torch model and a LoRA configuration into a bundle, and checks it against autograd."""

from export.api import Evaluation, evaluate_adapter, export_bundle
from export.errors import ExportError, ExportFailedError, ExportInputError
from export.options import ExportOptions, ExportReport, VerifiedCase

__all__ = [
    "Evaluation",
    "ExportError",
    "ExportFailedError",
    "ExportInputError",
    "ExportOptions",
    "ExportReport",
    "VerifiedCase",
    "evaluate_adapter",
    "export_bundle",
]
