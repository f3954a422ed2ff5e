"""What the exporter asks of an environment with onnxruntime-training: ``python -m edge_runtime.engine.ort_training``.

The exporter needs torch and may run where stock ONNX Runtime is; this process needs neither. Exit codes: 0 done, 2 no
onnxruntime-training here, 1 the work failed; one line on standard error.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array, BundleError, map_tensors, open_bundle
from edge_runtime.engine.errors import EngineError, EngineMissingError
from edge_runtime.engine.ort_training.artifacts import write_artifacts
from edge_runtime.engine.ort_training.bindings import load_bindings
from edge_runtime.engine.ort_training.model import OrtTrainingEngine
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.wire import Layout

Ids = npt.NDArray[np.int64]
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True)
class _Batch:
    """See :class:`edge_runtime.engine.interface.TokenBatch`."""

    input_ids: Ids
    attention_mask: Ids
    rows: Ids
    labels: Ids

    @property
    def examples(self) -> Ids:
        """They are not remembered, so their order will do."""
        return np.arange(len(self.input_ids))


@click.group()
def main() -> None:
    """Make and check training artifacts."""


@main.command()
def probe() -> None:
    """Say whether this environment has onnxruntime-training."""
    load_bindings()


@main.command()
@click.argument("model", type=_FILE)
@click.argument("weights", type=_FILE)
@click.argument("bundle", type=_FOLDER)
def build(model: Path, weights: Path, bundle: Path) -> None:
    """Write the four files of BUNDLE, where its adapter is, from an evaluation model and its frozen WEIGHTS."""
    import onnx

    adapter = map_tensors(bundle / "adapter.safetensors")
    write_artifacts(bundle, onnx.load_model(model), adapter, map_tensors(weights))


@main.command()
@click.argument("bundle", type=_FOLDER)
@click.argument("cases", type=_FOLDER)
def gradients(bundle: Path, cases: Path) -> None:
    """Take one step for every *.case.npz in CASES and write its result beside it as *.result.npz.

    A case holds the arrays of a batch (input_ids, attention_mask, rows, labels), an adapter as adapter:{tensor}, and
    alive, the names of the alive tensors. A result holds loss, the mean in nats, logits (n, classes), and
    grad:{tensor}.
    """
    engine = OrtTrainingEngine(open_bundle(bundle, verify=False))
    for path in sorted(cases.glob("*.case.npz")):
        with np.load(path) as case:
            arrays = {name: case[name] for name in case.files}
        result = _step(engine, arrays)
        np.savez(path.with_name(path.name.replace(".case.", ".result.")), **result)  # type: ignore[arg-type]  # mypy reads the names as options of savez


def _step(engine: OrtTrainingEngine, arrays: dict[str, Array]) -> dict[str, Array]:
    adapter = {name.removeprefix("adapter:"): array for name, array in arrays.items() if name.startswith("adapter:")}
    alive = tuple((name, adapter[name].shape) for name in arrays["alive"].tolist())
    batch = _Batch(*(arrays[name] for name in ("input_ids", "attention_mask", "rows", "labels")))
    engine.use(AdapterParameters(adapter, Layout(alive)))
    found = engine.gradients(batch)
    result = {f"grad:{name}": gradient for name, gradient in found.tensors.items()}
    return {**result, "loss": np.asarray(found.score.loss), "logits": engine.logits(batch)}


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except EngineMissingError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except (EngineError, BundleError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
