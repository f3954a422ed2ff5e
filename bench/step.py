"""One training step, ours beside PyTorch's on the same work: ``python -m bench.step``.

Every system runs in a process of its own and they take turns, a few steps each, so that what disturbs the machine
disturbs all of them; the figures are medians over all turns. Model: a Llama of six layers and width 576 with random
weights (time and memory do not depend on values), LoRA of rank 8 on all linear layers. One JSON line a case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import numpy as np

from bench.contestant import Setup, System
from bench.host import commit, describe_host

LAYERS = 6
CASES = {"2x64": (2, 64), "1x512": (1, 512)}
_NUMPY_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # set on some machines; they would handicap numpy


class Contestant:
    """A running system."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup = setup
        self.times: list[float] = []
        self.last: dict[str, Any] = {}
        path = folder / f"{setup.system}-{setup.setting}.json"
        path.write_bytes(msgspec.json.encode(setup))
        environment = {name: value for name, value in os.environ.items() if name not in _NUMPY_SETTINGS}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "bench.contestant", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._answer()

    def run(self, steps: int) -> None:
        """Take some steps and remember their times."""
        assert self._process.stdin is not None  # it was opened as a pipe
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.last = self._answer()
        self.times += self.last["step_ms"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # it was opened as a pipe
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"{self.setup.system}: ended without an answer; run bench.contestant by hand")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def prepared(folder: Path, rank: int = 8) -> Iterator[tuple[Path, Path, Path]]:
    """The model's folder, its bundle and a peft adapter with random B, made once and kept."""
    model, bundle, adapter = folder / "model", folder / "bundle", folder / "adapter"
    if not model.exists():
        _make_model(model)
    if not bundle.exists():
        command = [sys.executable, "-m", "edge_runtime.cli", "export", "--model", str(model), "--task", "lm"]
        subprocess.run([*command, "--rank", str(rank), "--out", str(bundle)], check=True)
    if not adapter.exists():
        _make_adapter(bundle, adapter)
    yield model, bundle, adapter


def _make_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "[UNK]": 2, **{f"word{i}": 3 + i for i in range(50)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def _make_adapter(bundle: Path, folder: Path) -> None:
    from edge_runtime.bundle import open_bundle, write_peft_folder

    opened = open_bundle(bundle, verify=False)
    rng = np.random.default_rng(1)
    tensors = {name: np.array(array) for name, array in opened.initial_adapter().items()}
    for name, array in tensors.items():
        if name.endswith("lora_b"):
            array[...] = rng.normal(scale=0.02, size=array.shape)
    write_peft_folder(folder, opened.manifest, tensors)


def _gradient_error(path: Path, reference: Path) -> float:
    """Relative error of all gradients together, ‖g − g*‖ / ‖g*‖."""
    with np.load(path) as found, np.load(reference) as wanted:
        names = sorted(wanted.files)
        got = np.concatenate([found[name].ravel() for name in names])
        expected = np.concatenate([wanted[name].ravel() for name in names])
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _line(contestant: Contestant, case: str, reference: Path, quick: bool) -> dict[str, object]:
    setup = contestant.setup
    return {
        "case": case,
        "system": setup.system,
        "setting": f"{setup.setting}, mapped" if setup.system.startswith("emberlora") else "keep",
        "alive": round((LAYERS - setup.alive_from) / LAYERS, 4),
        "step_ms_median": round(float(np.median(contestant.times)), 2),
        "step_ms_p95": round(float(np.percentile(contestant.times, 95)), 2),
        "peak_private_mb": contestant.last["peak_private_mb"],
        "peak_total_mb": contestant.last["peak_total_mb"],
        "grad_rel_err": _gradient_error(Path(setup.gradients), reference),
        "host": describe_host(setup.threads),
        "commit": commit(),
        "quick": quick,
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench-step"), show_default=True)
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="[default: all]")
@click.option("--system", "systems", type=click.Choice(get_args(System)), multiple=True, help="[default: all]")
@click.option("--alive-from", type=click.IntRange(0, LAYERS - 1), default=0, show_default=True, help="Lowest block.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--turns", type=click.IntRange(1), default=12, show_default=True, help="Turns of four steps each.")
@click.option("--quick", is_flag=True, help="Three turns.")
def main(
    out: Path,
    cases: tuple[str, ...],
    systems: tuple[System, ...],
    alive_from: int,
    threads: int,
    turns: int,
    quick: bool,
) -> None:
    """Time one training step of every system, interleaved; append a JSON line a case to OUT/results.jsonl.

    torch-eager always runs: its gradients are what the others are compared with.
    """
    out.mkdir(parents=True, exist_ok=True)
    chosen = dict.fromkeys(("torch-eager", *(systems or get_args(System))))
    with prepared(out) as (model, bundle, adapter):
        for case in cases or CASES:
            batch, tokens = CASES[case]
            with ExitStack() as stack:
                contestants = []
                for system in chosen:
                    for setting in ("keep", "recompute") if system.startswith("emberlora") else ("keep",):
                        gradients = out / f"{system}-{setting}.npz"
                        setup = Setup(
                            system,
                            setting,
                            str(model),
                            str(bundle),
                            str(adapter),
                            batch,
                            tokens,
                            alive_from,
                            threads,
                            str(gradients),
                        )
                        contestants.append(Contestant(setup, out))
                        stack.callback(contestants[-1].close)
                for _ in range(3 if quick else turns):
                    for contestant in contestants:
                        contestant.run(4)
                for contestant in contestants:
                    line = json.dumps(_line(contestant, case, out / "torch-eager-keep.npz", quick))
                    click.echo(line)
                    with (out / "results.jsonl").open("a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
