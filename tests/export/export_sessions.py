"""Exports for real, keeping the graphs, so that other tests need not trace again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from edge_runtime.bundle import Bundle, open_bundle
from export import ExportOptions, ExportReport, export_bundle, pipeline

LABELS = ("cold", "hot", "mild")


@dataclass(frozen=True)
class Exported:
    """An export with what went in and came out."""

    options: ExportOptions
    report: ExportReport
    bundle: Bundle
    progress: tuple[str, ...]
    traced: pipeline.Traced


def run_export(options: ExportOptions) -> Exported:
    """Export for real, and keep the graphs."""
    lines: list[str] = []
    kept: list[pipeline.Traced] = []
    trace_model = pipeline.trace_model

    def keeping(*args: Any) -> pipeline.Traced:
        kept.append(trace_model(*args))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "trace_model", keeping)
        report = export_bundle(options, lines.append)
    return Exported(options, report, open_bundle(options.out), tuple(lines), kept[0])
