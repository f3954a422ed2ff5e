"""Lines of results as a measurement would write them, for the parts that only read them."""

from __future__ import annotations

from typing import Any

import msgspec

from bench.results import Line

_HOST = {"cpu": "Some CPU", "cores": 2, "threads": 2, "onnxruntime": "1.31.1", "torch": "2.13.0", "python": "3.11.7"}


def sample(system: str, ms: float, **more: Any) -> Line:
    """A line of case 2x64 with everything alive; ``more`` replaces fields."""
    fields: dict[str, Any] = {
        "case": "2x64",
        "system": system,
        "setting": "keep, mapped" if system.startswith(("emberlora", "gemm")) else "keep",
        "alive": 1.0,
        "step_ms_median": ms,
        "step_ms_p95": 1.1 * ms,
        "peak_private_mb": 3 * ms,
        "peak_total_mb": 4 * ms,
        "grad_rel_err": None if system == "gemm-floor" else 1e-6,
        "host": _HOST,
        "commit": "abc1234",
        "quick": False,
        "model": "llama-6",
        "pattern": "1",
        "threads": 2,
        "variant": "",
        "amx": "absent",
        "steps": 48,
        "tried": {},
        "when": "2026-11-22T10:00:00+00:00",
    }
    return msgspec.convert({**fields, **more}, type=Line)


def full_run() -> list[Line]:
    """Every system on two cases, and a sweep of what is alive."""
    lines = []
    for case, size in (("2x64", 1.0), ("1x512", 4.0)):
        for system, ms in (("emberlora-fp32", 150), ("emberlora-int8", 160), ("emberlora-int4", 170)):
            lines.append(sample(system, ms * size, case=case))
            lines.append(sample(system, 1.25 * ms * size, case=case, setting="recompute, mapped"))
        lines.append(sample("emberlora-fp32", 130 * size, case=case, setting="keep, packed"))
        lines.append(sample("emberlora-int8", 90 * size, case=case, setting="keep, mapped, fast"))
        lines.append(sample("torch-eager", 233 * size, case=case))
        lines.append(sample("torch-compile", 206 * size, case=case, variant="default"))
        lines.append(sample("torch-bf16", 162 * size, case=case, variant="fp32 weights", threads=1))
        lines.append(sample("ort-training", 700 * size, case=case))
        lines.append(sample("gemm-floor", 110 * size, case=case))
        lines.append(sample("gemm-floor", 140 * size, case=case, setting="recompute, mapped"))
    for system, ms in (("emberlora-fp32", 150), ("torch-compile", 206)):
        for pattern, alive, share in (
            ("3/4", 0.762, 0.9),
            ("1/2", 0.5, 0.72),
            ("1/4", 0.262, 0.6),
            ("1/6", 0.167, 0.55),
            ("scattered", 0.5, 0.85),
            ("B", 0.5, 0.93),
        ):
            lines.append(sample(system, ms * share, pattern=pattern, alive=alive))
    mark = {"setting": "keep, mapped, remembered", "pattern": "1/6", "alive": 0.167, "kept_mb": 1.5}
    lines.append(sample("emberlora-fp32", 30, **mark))
    return lines
