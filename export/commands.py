"""The commands ``emberlora export`` and ``emberlora peft-eval``.

Exit codes: 0 done, 2 bad usage or input with one line on stderr, 1 the work itself failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from edge_runtime.bundle import Base
from export.api import evaluate_adapter, export_bundle
from export.errors import DataError, ExportError, ExportInputError
from export.options import ExportOptions, ExportReport
from export.records import read_labels

_MODEL_HELP = "minilm, smollm2, or a Hugging Face folder."


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn this package's errors into one line on stderr and an exit code."""
    try:
        yield
    except ExportError as error:
        line = " ".join(str(error).split())
        click.echo(f"Error: {line}", err=True)
        raise SystemExit(2 if isinstance(error, ExportInputError) else 1) from error


def _progress(as_json: bool) -> Callable[[str], None]:
    """Progress lines on stderr, so that stdout holds the result alone; none with ``--json``."""

    def show(line: str) -> None:
        if not as_json:
            click.echo(f"  {line}", err=True)

    return show


def _split(context: Any, param: Any, value: str | None) -> tuple[str, ...] | None:  # noqa: ARG001 - click's signature
    return None if value is None else tuple(part.strip() for part in value.split(","))


@click.command()
@click.option(
    "--model", required=True, help=f"{_MODEL_HELP[:-1]}, or a peft adapter folder, which becomes the initial adapter."
)
@click.option(
    "--task",
    type=click.Choice(["classify", "lm"]),
    required=True,
    help="Text classification, or next-token prediction.",
)
@click.option("--rank", type=int, help="Largest LoRA rank of any module. [default: 16]")
@click.option("--alpha", type=float, help="LoRA alpha at full rank; the scale is alpha / rank. [default: 2 x rank]")
@click.option(
    "--targets", callback=_split, help="Names of linear layers, comma-separated, or all-linear. [default: all-linear]"
)
@click.option("--labels", callback=_split, help="Class labels, comma-separated, for task classify.")
@click.option(
    "--labels-from", type=click.Path(path_type=Path), help="Take the distinct `label` values of a .jsonl or .csv file."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle's folder.")
@click.option(
    "--max-tokens", type=int, default=512, show_default=True, help="Cap on a text's tokens; the model's own limit wins."
)
@click.option(
    "--base",
    type=click.Choice(get_args(Base)),
    default="fp32",
    show_default=True,
    help="How frozen weights are stored. int8 takes a quarter of the memory and download, int4 about a seventh; both "
    "cost some time a step.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the initial adapter.")
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@click.option(
    "--engine",
    type=click.Choice(["blocks", "ort-training"]),
    default="blocks",
    show_default=True,
    help="What will train the bundle: stock ONNX Runtime, or onnxruntime-training.",
)
@click.option(
    "--ort-training-python",
    type=click.Path(path_type=Path),
    help="Interpreter of an environment with onnxruntime-training.  [default: this one]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and no progress.")
def export(labels_from: Path | None, as_json: bool, **given: Any) -> None:
    """Make a bundle from a model: what devices download once and train.

    The bundle is checked against torch autograd before it appears at --out; when the check fails, nothing is left.

    \b
    Examples:
      emberlora export --model minilm --task classify --labels-from train.jsonl --out bundles/intents
      emberlora export --model smollm2 --task lm --rank 8 --targets q_proj,v_proj --out bundles/chat
      emberlora export --model runs/my-peft-adapter --task lm --out bundles/continued
      emberlora export --model smollm2 --task lm --out b --engine ort-training --ort-training-python ort/bin/python
    """
    with _exit_codes():
        if labels_from is not None:
            if given["labels"] is not None:
                raise DataError("--labels and --labels-from: expected one of them, got both")
            given["labels"] = read_labels(labels_from)
        report = export_bundle(ExportOptions(**given), _progress(as_json))
    click.echo(json.dumps(_as_json(report)) if as_json else _as_text(report))


def _as_json(report: ExportReport) -> dict[str, object]:
    fields = asdict(report)
    fields["verify"] = {"max_rel_err": report.max_rel_err, "cases": fields.pop("cases")}
    return fields


def _as_text(report: ExportReport) -> str:
    return "\n".join(
        [
            f"{report.bundle}: {report.bytes / 1e6:.1f} MB in {report.export_s:.1f} s",
            f"digest {report.digest}",
            f"{report.modules} LoRA modules, {report.trainable:,} trainable of {report.parameters:,} parameters",
            f"worst relative error against autograd {report.max_rel_err:.1e} in {len(report.cases)} cases",
        ]
    )


@click.command("peft-eval")
@click.option("--model", required=True, help=_MODEL_HELP)
@click.option("--adapter", type=click.Path(path_type=Path), required=True, help="A peft adapter folder.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Held-out records, .jsonl or .csv.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Cap on a text's tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def peft_eval(model: str, adapter: Path, data: Path, max_tokens: int, as_json: bool) -> None:
    """Evaluate a peft adapter with torch and peft: an opinion independent of the devices' engine.

    Records are {"text", "label"} when the adapter folder has labels.json (accuracy), else {"text"} (mean loss).

    \b
    Example:
      emberlora peft-eval --model minilm --adapter result/peft --data test.jsonl
    """
    with _exit_codes():
        found = evaluate_adapter(model, adapter, data, max_tokens=max_tokens)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        click.echo(f"{found.metric} {found.value:.4f}, mean loss {found.loss:.4f} nats, {found.examples} examples")
