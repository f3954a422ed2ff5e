"""The data sets, each with all that is peculiar to it: which model learns what, how it is divided and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.federation.data import labels_of, share_texts
from bench.federation.lines import Key
from bench.federation.methods import CORE, FULL_MODEL, Table
from bench.federation.metric import ACCURACY, LOSS, Metric
from bench.federation.shares import Shares, Sizes
from bench.federation.speakers import share_speeches
from edge_runtime.bundle import Task

NATURAL = "natural"  # the split that a data set has of itself
MAX_TOKENS = 64


@dataclass(frozen=True)
class Workload:
    """One data set.

    Attributes:
        model: The preset that learns.
        task: What it learns.
        metric: What runs are judged by.
        reference_bytes: What ``lora-r8`` sends and fetches, a device and round.
        sizes: Of a run.
        quick: The same for ``--quick``.
        alphas: Splits that are made unless others are asked for; None is the natural one.
        natural: Whether there is a natural split.
        seeds: That are run unless others are asked for.
        share: (folder of data sets, sizes, alpha, seed) to examples.
        labels: Folder of data sets to the classes; none for a language model.
        tables: Keys of a config that all methods share.
        rates: Of a method and its size, keys of [training] that suit this data set better than the method's own.
    """

    model: str
    task: Task
    metric: Metric
    reference_bytes: int
    sizes: Sizes
    quick: Sizes
    alphas: tuple[float | None, ...]
    natural: bool
    seeds: tuple[int, ...]
    share: Callable[[Path, Sizes, float | None, int], Shares]
    labels: Callable[[Path], tuple[str, ...]]
    tables: Callable[[Sizes], Mapping[str, Table]]
    rates: Mapping[tuple[str, str], Table] = field(default_factory=dict)

    def core(self, key: Key) -> bool:
        """Whether a run belongs to the core table: the methods as they are, on the splits that have all seeds."""
        return key.method in CORE and not key.without and key.alpha in self.alphas

    def refusal(self, method: str, alpha: float | None) -> str:
        """Why there can be no such run; "" if there can."""
        if alpha is None and not self.natural:
            return "has no natural split"
        if alpha is not None and self.alphas == (None,):
            return f"has only its natural split: expected --alpha {NATURAL}, got {alpha:g}"
        if method == FULL_MODEL and self.task != "classify":
            return f"{FULL_MODEL} trains classifiers only"
        return ""


def _classifier(name: str, *, natural: bool) -> Workload:
    """MiniLM learns classes of short texts, with a head that is made of class means and stays as it is."""
    return Workload(
        model="minilm",
        task="classify",
        metric=ACCURACY,
        reference_bytes=2_600_000,
        sizes=Sizes(devices=20, cohort=5, rounds=30, examples=4_000, glimpse=400, every=2),
        quick=Sizes(devices=20, cohort=5, rounds=12, examples=4_000, glimpse=400, every=2),
        alphas=(0.5, 0.1),
        natural=natural,
        seeds=(0, 1, 2),
        share=partial(share_texts, name),
        labels=partial(labels_of, name),
        tables=_classifier_tables,
    )


def _classifier_tables(sizes: Sizes) -> Mapping[str, Table]:
    head = {"head_init": "class-means", "head_init_devices": sizes.devices, "head": "frozen"}
    return {"task": head, "training": {"batch_size": 16, "epochs": 1, "max_tokens": MAX_TOKENS}}


def _decoder_tables(_sizes: Sizes) -> Mapping[str, Table]:
    """Nothing of a language model's head is trained, so there is nothing to say of it."""
    return {"training": {"batch_size": 4, "epochs": 1, "max_tokens": MAX_TOKENS}}


# Where other rates than a method's own were better in whole runs (docs/adr/0022).
_DECODER_RATES: Mapping[tuple[str, str], Table] = {
    ("lora-r8", ""): {"lr_a": 2e-3, "lr_b": 2e-3},
    ("rolora-r8", ""): {"lr_a": 4e-3, "lr_b": 8e-3},
    ("lora-a2", ""): {"lr_a": 8e-3, "lr_b": 4e-2},
    ("annealed-kill-revive", "half"): {"batch_size": 2},  # half of the others' here, too
}

# Speakers are measured after every round: what others had learned at equal bytes is asked for after their first or
# second, and without a value of its own such a round would count as if nothing had been learned in it.
WORKLOADS: dict[str, Workload] = {
    "clinc150": _classifier("clinc150", natural=True),
    "banking77": _classifier("banking77", natural=False),
    "shakespeare": Workload(
        model="smollm2",
        task="lm",
        metric=LOSS,
        reference_bytes=19_500_000,
        sizes=Sizes(devices=20, cohort=5, rounds=12, examples=400, glimpse=80, every=1),
        quick=Sizes(devices=20, cohort=5, rounds=6, examples=160, glimpse=40, every=1),
        alphas=(None,),
        natural=True,
        seeds=(0,),
        share=share_speeches,
        labels=lambda _data: (),
        tables=_decoder_tables,
        rates=_DECODER_RATES,
    ),
}
