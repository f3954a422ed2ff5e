"""``emberlora edge train``, ``eval`` and ``predict``: work on local data without any server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import msgspec

from edge_runtime.bundle import BundleError, open_bundle
from edge_runtime.data import DataError
from edge_runtime.device.errors import DeviceError
from edge_runtime.engine.errors import EngineError, EngineInputError, EngineMissingError
from edge_runtime.terminal import Terminal
from edge_runtime.training.alone import AloneOptions, train_alone
from edge_runtime.training.describing import measured
from edge_runtime.training.local import evaluate as score_dataset
from edge_runtime.training.predicting import Prediction, classify, continue_text
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import Products

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_ADAPTER = click.Path(exists=True, path_type=Path)
F = TypeVar("F", bound=Callable[..., Any])


class InputError(click.ClickException):
    """Bad input: one clear line, exit code 2."""

    exit_code = 2


class Source(msgspec.Struct, frozen=True):
    """Which model and adapter a command works with."""

    home: Path | None
    bundle: Path | None
    adapter: Path | None
    max_tokens: int | None
    threads: int | None

    def open(self) -> tuple[WorkingBundle, Path | None]:
        """From the device's folder (its published adapter) unless a bundle is given."""
        bundle, adapter = self.bundle, self.adapter
        if bundle is None:
            from edge_runtime.device.home import published_adapter  # the device's folder, only where it is asked for

            bundle, published = published_adapter(self.home)
            adapter = adapter or published
        return WorkingBundle(open_bundle(bundle), threads=self.threads), adapter


@contextlib.contextmanager
def _one_clear_line() -> Iterator[None]:
    """Errors of this package as one line and an exit code."""
    try:
        yield
    except (DataError, EngineInputError, EngineMissingError, BundleError, DeviceError) as error:
        raise InputError(str(error)) from error
    except (EngineError, OSError) as error:
        raise click.ClickException(str(error)) from error


@click.command(short_help="Train an adapter on local data, without any server.")
@click.option("--bundle", type=_FOLDER, required=True, help="Bundle folder made by 'emberlora export'.")
@click.option("--data", type=_FILE, multiple=True, required=True, help="JSONL or CSV file; may be repeated.")
@click.option("--eval", "evaluation", type=_FILE, multiple=True, help="Labelled file measured before and after.")
@click.option("--out", type=_FOLDER, required=True, help="Folder for the peft adapter.")
@click.option("--adapter", type=_ADAPTER, help="Start from this peft folder.  [default: the bundle's]")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the data.  [default: 3]")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps, instead of --epochs.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--max-tokens", type=click.IntRange(4), help="Truncate examples here.  [default: the model's limit]")
@click.option("--lr-a", type=float, default=5e-4, show_default=True, help="Learning rate of the A factors.")
@click.option("--lr-b", type=float, default=1e-3, show_default=True, help="Learning rate of the B factors.")
@click.option("--lr-head", type=float, default=1e-3, show_default=True, help="Learning rate of a trained head.")
@click.option(
    "--lr-schedule",
    type=click.Choice(["constant", "cosine"]),
    default="cosine",
    show_default=True,
    help="cosine: the rates fall to a tenth.",
)
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option("--clip-norm", type=float, help="Clip the gradient's global norm.  [default: no clipping]")
@click.option(
    "--local-kill",
    type=float,
    help="Stop training a module once it moves less than this share, above 0 and at most 1, of what all moved at the "
    "start.  [default: all are trained to the end]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Order of the examples.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option(
    "--memory-budget-mb",
    type=click.IntRange(0),
    help="For weights that stay in memory and activations kept for the backward pass; 0 keeps none and recomputes.  "
    "[default: 60 % of free memory]",
)
@click.option(
    "--packed-weights",
    is_flag=True,
    help="Copy the frozen weights into the order that products want, as far as the memory budget goes: a step "
    "is up to a tenth faster, the copies take twice the weights' size. For bundles of base fp32.",
)
@click.option(
    "--products",
    type=click.Choice(get_args(Products)),
    default="exact",
    show_default=True,
    help="With frozen weights. int8 is faster; its gradients are a few per cent off.",
)
@click.option(
    "--micro-tokens",
    type=click.IntRange(1),
    help="Tokens that go through the model at once; a larger batch is divided, its gradient stays the same.  "
    "[default: 4096, less for a small memory budget]",
)
@click.option("--skip-bad-lines", is_flag=True, help="Train on the usable lines of the data.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done.")
def train(as_json: bool, **options: Any) -> None:  # the rest are the fields of AloneOptions
    """Train an adapter on local data, without any server.

    Data is JSONL or CSV with 'text' and 'label' for a classifier; for a language model 'text', or 'prompt' and
    'completion', or 'messages', of which only the answers are trained. The result loads in peft. Ctrl-C writes the
    adapter as it is by then.

    \b
    emberlora edge train --bundle minilm-bundle --data mail.jsonl --eval held-out.jsonl --out my-adapter
    """
    terminal = Terminal(sys.stderr, quiet=as_json)
    with _one_clear_line():
        result = train_alone(AloneOptions(**options), terminal)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    for name, score in (("before", result.before), ("after", result.eval)):
        if score is not None:
            terminal.say(f"{name}: {score}")
    terminal.say(f"adapter written to {result.adapter}" + (" as it was when interrupted" * result.interrupted))
    if result.interrupted:
        raise SystemExit(130)


def _source_options(command: F) -> F:
    """The options that say which model and adapter to use: the fields of :class:`Source`."""
    for option in (
        click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]"),
        click.option("--max-tokens", type=click.IntRange(4), help="Truncate here.  [default: the model's limit]"),
        click.option("--adapter", type=_ADAPTER, help="A peft folder."),
        click.option("--bundle", type=_FOLDER, help="Bundle folder; without it, the device's published adapter."),
        click.option("--home", type=_FOLDER, envvar="EMBERLORA_HOME", help="The device's folder."),
    ):
        command = option(command)
    return command


def _source(options: dict[str, Any]) -> Source:
    return Source(**{name: options[name] for name in Source.__struct_fields__})


@click.command("eval", short_help="Measure an adapter on labelled data.")
@_source_options
@click.option("--data", type=_FILE, multiple=True, required=True, help="JSONL or CSV file; may be repeated.")
@click.option("--skip-bad-lines", is_flag=True, help="Measure on the usable lines.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(data: tuple[Path, ...], skip_bad_lines: bool, as_json: bool, **source: Any) -> None:
    """Measure an adapter: accuracy (a fraction) for a classifier, mean next-token loss (nats) for a language model.

    \b
    emberlora edge eval --data held-out.jsonl                                  the adapter this device received
    emberlora edge eval --bundle B --adapter my-adapter --data held-out.jsonl
    """
    with _one_clear_line():
        chosen = _source(source)
        work, adapter = chosen.open()
        dataset = work.dataset(data, max_tokens=chosen.max_tokens, skip_bad=skip_bad_lines)
        work.engine.use(work.none_alive(work.adapter(adapter)))
        result = measured(score_dataset(work.engine, dataset), work.bundle.manifest.task)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
        return
    for sentence in dataset.report.sentences():
        click.echo(sentence, err=True)
    click.echo(str(result))


@click.command(short_help="Classify texts, or continue them.")
@_source_options
@click.option("--text", "texts", multiple=True, help="A text; may be repeated.")
@click.option("--data", type=_FILE, help="JSONL or CSV with a 'text' field; classifiers only.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=40, show_default=True, help="Language models only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def predict(texts: tuple[str, ...], data: Path | None, max_new_tokens: int, as_json: bool, **source: Any) -> None:
    """Classify texts with their probabilities, or continue them greedily with a language model.

    \b
    emberlora edge predict --text "reads and writes ZIP files"
    emberlora edge predict --bundle B --adapter my-adapter --data new.jsonl --json
    """
    with _one_clear_line():
        if bool(texts) == bool(data):
            raise EngineInputError("--text and --data: give one of them")
        chosen = _source(source)
        work, adapter = chosen.open()
        if data and work.bundle.manifest.task == "lm":
            raise EngineInputError("--data: a language model continues --text")
        work.engine.use(work.none_alive(work.adapter(adapter)))
        for prediction in _predictions(work, texts, data, chosen.max_tokens, max_new_tokens):
            click.echo(msgspec.json.encode(prediction).decode() if as_json else str(prediction))


def _predictions(
    work: WorkingBundle, texts: tuple[str, ...], data: Path | None, max_tokens: int | None, max_new_tokens: int
) -> Iterator[Prediction]:
    if work.bundle.manifest.task == "classify":
        return classify(work, texts, data, max_tokens=max_tokens)
    return (continue_text(work, text, max_new_tokens=max_new_tokens) for text in texts)
