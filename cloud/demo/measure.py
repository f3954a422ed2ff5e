"""Measuring the published adapter, and the runs it is compared with."""

from __future__ import annotations

from cloud.demo.folder import DemoFolder, device_names
from cloud.demo.processes import Processes
from cloud.demo.recipe import Recipe


def on_devices(folder: DemoFolder, recipe: Recipe, processes: Processes) -> float:
    """The published adapter on all held-out texts, each measured by the device that holds it."""
    total, examples = 0.0, 0
    for device in device_names(recipe):
        files = ("--home", folder.home(device), "--data", folder.texts(device, "heldout"))
        found = processes.call_json(f"{device}-eval", "edge", "eval", *files)
        total += found["correct"] if recipe.metric == "accuracy" else found["loss"] * found["examples"]
        examples += found["examples"]
    return total / examples


def by_peft(folder: DemoFolder, recipe: Recipe, processes: Processes) -> float:
    """The published adapter on all held-out texts, by torch and peft."""
    files = ("--adapter", folder.adapter, "--data", folder.heldout)
    limit = ("--max-tokens", str(recipe.max_tokens))
    found = processes.call_json("peft-eval", "peft-eval", "--model", recipe.model, *files, *limit)
    return float(found["value"] if recipe.metric == "accuracy" else found["loss"])


def central(folder: DemoFolder, recipe: Recipe, processes: Processes) -> float:
    """The same model trained on the pooled texts for as many steps as all devices took together."""
    rates = recipe.central
    files = ("--data", folder.pooled, "--eval", folder.heldout, "--out", folder.central)
    amounts = {
        "--steps": recipe.all_steps,
        "--batch-size": recipe.batch_size,
        "--max-tokens": recipe.max_tokens,
        "--lr-a": rates.a,
        "--lr-b": rates.b,
        "--lr-head": rates.head,
        "--lr-schedule": "cosine",
        "--seed": recipe.seed,
    }
    options = [str(part) for option in amounts.items() for part in option]
    found = processes.call_json("central", "edge", "train", "--bundle", folder.bundle, *files, *options)
    return float(found["eval"]["value"])
