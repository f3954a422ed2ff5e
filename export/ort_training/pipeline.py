"""An export for the engine ``ort-training``: trace the forward pass here, have artifacts made of it, verify them.

Differs from :mod:`export.pipeline` in what is traced (forward passes, not joint ones), in the files written, and in
that making and checking them runs in the environment that has onnxruntime-training.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edge_runtime.bundle import (
    EVALUATION_MODEL,
    MANIFEST_NAME,
    TRAINING_FILES,
    Array,
    Bundle,
    BundleError,
    Head,
    Manifest,
    Param,
    Task,
    encode_manifest,
    file_entry,
    open_bundle,
    write_tensors,
)
from export.attention import traceable_attention
from export.blocks import study
from export.clean import clean
from export.errors import ExportFailedError, OutputError
from export.graphs import BlockGraph, embed_graph, forward_graph
from export.heads import projection
from export.options import ExportOptions, ExportReport, VerifiedCase
from export.ort_training.child import run_child
from export.ort_training.compose import evaluation_model
from export.pipeline import Plan, Progress, Traced, bundle_contents, bundle_report, find_sites, make_plan
from export.quiet import quiet
from export.sources import find_source, load
from export.tracing import ROWS, SIZES, Input, trace
from export.verify import Case, autograd, make_cases, relative_errors, verified
from export.writer import Contents, check_place, staged


def run(options: ExportOptions, progress: Progress) -> ExportReport:
    """Make one bundle; see :func:`export.pipeline.run`.

    Raises:
        ExportError: see :mod:`export.errors`; nothing is left at ``options.out`` then.
    """
    began = time.monotonic()
    check_place(options.out, force=options.force)
    plan = make_plan(options)
    source = find_source(plan.base)
    progress(f"loading {source.name}")
    loaded = load(source, plan.task, len(plan.labels))
    traced = trace_forward(loaded.model, plan, progress)
    contents = bundle_contents(loaded, plan, traced, options)
    contents = replace(contents, manifest=_one_graph(contents.manifest))
    with staged(options.out) as folder:
        progress("making training artifacts")
        bundle = write(folder, contents, options.ort_training_python)
        progress("verifying against autograd")
        cases = verify(bundle, loaded.model, options)
        report = bundle_report(bundle, contents, cases, options.out)
    progress(f"verified: worst relative error {report.max_rel_err:.1e}")
    makers = {kind.entry.name: kind.maker for kind in traced.kinds}
    return replace(report, makers=makers, export_s=round(time.monotonic() - began, 2))


def trace_forward(model: Any, plan: Plan, progress: Progress) -> Traced:
    """Trace the forward pass of every kind of block once, and of what stands before and after the blocks.

    The result's ``graphs`` are named "embed", as the kinds, and "head".

    Raises:
        ModelError, TargetError, TraceError: as :func:`export.pipeline.trace_model`.
    """
    projection(model, plan.task)  # refuse early
    width = model.config.hidden_size
    with traceable_attention(model):
        shared, calls = study(model)
        sites = find_sites(model, calls, plan)
        kinds: list[BlockGraph] = []
        for site in sites:
            if site.kind == len(kinds):
                progress(f"{site.prefix}: tracing kind {site.kind + 1} of {max(item.kind for item in sites) + 1}")
                kinds.append(forward_graph(site, shared, width, f"block{site.kind or ''}"))
        progress("tracing embedding and head")
        used = [name for name in shared if any(name in kind.entry.shared for kind in kinds)]
        embed, embed_model = embed_graph(model, used)
        head, head_model = _head(model, plan.task, width)
    graphs = {kind.entry.name: kind.model for kind in kinds} | {"embed": embed_model, "head": head_model}
    return Traced(sites, tuple(kinds), embed, head, graphs)


def _head(model: Any, task: Task, width: int) -> tuple[Head, Any]:
    """The head's manifest entry and its forward pass, ``rows`` (n, width) to ``logits`` (n, classes)."""
    head = projection(model, task)
    tensors = dict(model.named_parameters())
    params = {name: name.removeprefix(f"{head.module}.") for name in head.trained}
    inputs = [
        Input("rows", torch.randn(SIZES[ROWS], width), {0: ROWS}),
        *(Input(f"w:{name}", tensors[name]) for name in head.frozen),
        *(Input(f"p:{param}", tensors[name]) for name, param in params.items()),
    ]

    def logits(rows: Any, *values: Any) -> tuple[Any]:
        with torch.no_grad():
            return (head.project(rows, dict(zip((*head.frozen, *head.trained), values, strict=True))),)

    entry = Head(
        graph=EVALUATION_MODEL,
        select="first" if task == "classify" else "target",
        weights=head.frozen,
        module=head.module,
        params=tuple(Param(param, tuple(tensors[name].shape)) for name, param in params.items()),
    )
    return entry, clean(trace(logits, inputs, ["logits"]))


def _one_graph(manifest: Manifest) -> Manifest:
    """The manifest of a bundle for this engine: one graph holds all parts."""
    change = msgspec.structs.replace
    return change(
        manifest,
        engine="ort-training",
        embed=change(manifest.embed, graph=EVALUATION_MODEL),
        kinds=tuple(change(kind, graph=EVALUATION_MODEL) for kind in manifest.kinds),
        head=change(manifest.head, graph=EVALUATION_MODEL),
    )


def write(folder: Path, contents: Contents, python: Path | None) -> Bundle:
    """Write every file of the bundle into the empty ``folder``, the manifest last, and open it.

    Raises:
        ExtraMissingError, TraceError: as :func:`export.ort_training.child.run_child`.
        OutputError: the files cannot be written.
    """
    model = evaluation_model(contents.manifest, contents.graphs, contents.weights)
    names = ["adapter.safetensors", "tokenizer.json"]
    try:
        write_tensors(folder / "adapter.safetensors", contents.adapter)
        (folder / "tokenizer.json").write_text(contents.tokenizer, encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=folder) as making:
            (Path(making) / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
            write_tensors(Path(making) / "weights.safetensors", contents.weights)
            run_child(python, "build", Path(making) / "model.onnx", Path(making) / "weights.safetensors", folder)
        files = {name: file_entry(folder / name) for name in sorted((*TRAINING_FILES, *names))}
        manifest = msgspec.structs.replace(contents.manifest, files=files)
        (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
        return open_bundle(folder)
    except OSError as error:
        raise OutputError(f"the bundle cannot be written: {error}") from error
    except BundleError as error:
        raise ExportFailedError(f"the bundle as written cannot be opened: {error}") from error


def verify(bundle: Bundle, model: Any, options: ExportOptions) -> tuple[VerifiedCase, ...]:
    """Compare the artifacts with autograd: as exported, and made again for other ranks and a third of the factors dead.

    Raises:
        VerificationError: a relative error above :data:`export.verify.TOLERANCE`.
        TraceError: the engine cannot run the artifacts.
    """
    cases = [
        replace(case, scales=dict.fromkeys(case.scales, bundle.manifest.scale)) for case in _cases(bundle, options)
    ]
    found = _gradients(bundle, cases, options.ort_training_python)
    made = []
    for case, result in zip(cases, found, strict=True):
        with quiet():
            loss, every = autograd(model, bundle.manifest, case)
        expected = {f"grad:{name}": every[name] for name in _alive(case)}
        mean = loss / len(case.batch.targets()[1])
        error = abs(float(result.pop("loss")) - mean) / abs(mean)
        del result["logits"]
        made.append(verified(case, relative_errors(result, expected) | {"loss": error}))
    return tuple(made)


def _cases(bundle: Bundle, options: ExportOptions) -> Iterator[Case]:
    return make_cases(bundle.manifest, np.random.default_rng(options.seed))


def _alive(case: Case) -> list[str]:
    """All tensors at full ranks; else two of three."""
    return [name for index, name in enumerate(case.adapter) if "full" in case.name or index % 3]


def _gradients(bundle: Bundle, cases: Sequence[Case], python: Path | None) -> list[dict[str, Array]]:
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            (examples, positions), labels = case.batch.targets()
            arrays: dict[str, Any] = {"input_ids": case.batch.ids, "attention_mask": case.batch.mask, "labels": labels}
            arrays |= {"rows": examples * case.batch.ids.shape[1] + positions, "alive": np.asarray(_alive(case))}
            arrays |= {f"adapter:{name}": array for name, array in case.adapter.items()}
            np.savez(Path(folder) / f"{number}.case.npz", **arrays)
        run_child(python, "gradients", bundle.folder, folder)
        return [_arrays(Path(folder) / f"{number}.result.npz") for number in range(len(cases))]


def _arrays(path: Path) -> dict[str, Array]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}
