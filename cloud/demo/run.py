"""One run of the demo from corpus to report."""

from __future__ import annotations

import platform
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cloud.demo import measure
from cloud.demo.corpus import Split, collect, split
from cloud.demo.fleet import Fleet, Outcome
from cloud.demo.folder import DemoFolder
from cloud.demo.page import write_page
from cloud.demo.processes import Processes
from cloud.demo.progress import Show
from cloud.demo.recipe import Recipe
from cloud.demo.record import Report
from edge_runtime.bundle import Bundle, open_bundle

_TOOLS = ("emberlora", "onnxruntime", "numpy", "torch", "transformers", "peft")


def run_demo(folder: DemoFolder, recipe: Recipe, show: Show, *, quick: bool) -> Report:
    """Do all of it and write the report.

    Raises:
        DemoError: this Python has too little text, or a command failed.
    """
    began = time.perf_counter()
    rng = np.random.default_rng(recipe.seed)
    with Processes(folder.logs) as processes:
        with show.phase("corpus", "Reading the standard library's texts"):
            texts = make_texts(recipe, rng)
            held = folder.write_texts(texts, recipe, rng)
        show.say(f"  {len(texts.train)} to train, {len(texts.heldout)} held out, from {', '.join(texts.labels)}")
        with show.phase("export", f"Exporting {recipe.model} to a bundle, checked against torch"):
            _export(folder, recipe, processes)
        fleet = Fleet(folder, recipe, processes)
        with show.phase("enrol", f"Starting the aggregator, enrolling {recipe.devices} devices"):
            fleet.enrol()
        outcome = fleet.run(show)
        with show.phase("devices", "Measuring the published adapter on the devices"):
            after = measure.on_devices(folder, recipe, processes)
        with show.phase("peft", "Measuring it with torch and peft"):
            peft_after = measure.by_peft(folder, recipe, processes)
        with show.phase("central", f"Training on the pooled texts, {recipe.all_steps} steps, for comparison"):
            central = measure.central(folder, recipe, processes)
    tfidf = None
    if recipe.task == "classify":
        with show.phase("tfidf", "tf-idf with logistic regression, for comparison"):
            tfidf = _tfidf(texts)
    report = msgspec.structs.replace(
        _gather(recipe, outcome, open_bundle(folder.bundle)),
        after=after,
        curve=(*(entry["metric"] for entry in outcome.status["history"]), after),
        peft_after=peft_after,
        central=central,
        tfidf=tfidf,
        run_s=round(time.perf_counter() - began, 2),
        adapter=folder.adapter.relative_to(folder.root).as_posix(),
        edge_examples=held,
        train_examples=len(texts.train),
        heldout_examples=len(texts.heldout),
        quick=quick,
        phase_s=show.phase_s,
    )
    (folder.root / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    write_page(folder.root / "report.html", report)
    return report


def make_texts(recipe: Recipe, rng: np.random.Generator) -> Split:
    """This Python's texts, split; the held-out part cut to the recipe's limit."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = collect(stdlib, task=recipe.task, packages=recipe.packages)
    texts = split(found, heldout_share=recipe.heldout_share, rng=rng)
    return texts._replace(heldout=texts.heldout[: recipe.max_heldout])


def _export(folder: DemoFolder, recipe: Recipe, processes: Processes) -> None:
    labels = ("--labels-from", folder.pooled) if recipe.task == "classify" else ()
    options = ("--rank", str(recipe.rank), "--max-tokens", str(recipe.max_tokens), "--seed", str(recipe.seed))
    model = ("--model", recipe.model, "--task", recipe.task)
    processes.call("export", "export", *model, *options, *labels, "--out", folder.bundle)


def _tfidf(texts: Split) -> float:
    # Imported here: scikit-learn takes seconds to load, and only this needs it.
    from cloud.demo.baseline import tfidf_accuracy

    return tfidf_accuracy(texts)


def _gather(recipe: Recipe, outcome: Outcome, bundle: Bundle) -> Report:
    """What the aggregator and the bundle tell; what is measured afterwards stands at zero."""
    status, manifest = outcome.status, bundle.manifest
    history = status["history"]
    devices = sorted(status["devices"], key=lambda device: str(device["name"]))
    return Report(
        model=recipe.model,
        task=recipe.task,
        devices=len(devices),
        rounds=len(history),
        metric=recipe.metric,
        before=history[0]["metric"],
        after=0.0,
        central=0.0,
        peft_after=0.0,
        tfidf=None,
        bytes_up=status["bytes_up"],
        bytes_down=status["bytes_down"],
        bytes_full_fedavg=2 * len(history) * len(devices) * 4 * manifest.parameters,
        run_s=0.0,
        round_s=tuple(round(entry["seconds"], 3) for entry in history),
        edge_peak_private_mb=_each(devices, "peak_private_mb"),
        edge_peak_rss_mb=_each(devices, "peak_total_mb"),
        edge_train_s=_each(devices, "train_s"),
        adapter="",
        bundle_digest=bundle.digest,
        round_bytes_up=tuple(entry["bytes_up"] for entry in history),
        round_bytes_down=outcome.round_bytes_down,
        parameters=manifest.parameters,
        bundle_bytes=sum(entry.bytes for entry in manifest.files.values()),
        local_steps=recipe.steps,
        seed=recipe.seed,
        plans=outcome.plans,
        versions={"python": platform.python_version(), **{tool: version(tool) for tool in _TOOLS}},
    )


def _each(devices: list[dict[str, Any]], name: str) -> tuple[float, ...]:
    """One figure of every device; 0 where the device could not measure it."""
    return tuple(round(device[name] or 0.0, 2) for device in devices)
