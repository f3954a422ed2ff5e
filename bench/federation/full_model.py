"""``fedavg-full``: every parameter of the model is trained by PyTorch, sent and averaged (FedAvg, arXiv 1602.05629).

The yardstick that low-rank methods are measured by. It has the same data, cohorts, order of examples and head as the
other methods, and the head stays as it is here too. Nothing of it goes through the aggregator but the head's round;
bytes are those of float32 values without any header.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from bench.federation.compute import Texts, full_flop
from bench.federation.course import Course
from bench.federation.lines import RoundLine
from bench.federation.site import Site
from edge_runtime.bundle import Array, Manifest
from edge_runtime.data import Batch, Dataset, evaluation_batches, steps_per_epoch, training_batches
from edge_runtime.wire import Plan, Training, rate_share

_MEASURED_AT_ONCE = 64


@dataclass(frozen=True)
class Local:
    """What one device's training made: its parameters, in float32 by name, and their weight."""

    state: dict[str, Any]
    weight: int


class FullModel:
    """The model as all devices hold it between rounds."""

    def __init__(self, manifest: Manifest, head: Mapping[str, Array], model: str, threads: int) -> None:
        """Load a preset or folder and give it the head that was measured.

        Args:
            manifest: Of the bundle made from this model.
            head: Its trained head's tensors by adapter name.
            model: Preset or Hugging Face folder.
            threads: PyTorch's.
        """
        import torch

        from export.quiet import quiet
        from export.sources import find_source, load

        torch.set_num_threads(threads)
        with quiet():
            self._model: Any = load(find_source(model), "classify", len(manifest.labels)).model.eval()
        state = self._model.state_dict()
        for name, array in head.items():
            state[name].copy_(torch.tensor(array))
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad = name not in head
        self._manifest = manifest

    @property
    def parameters(self) -> int:
        """How many a device trains and sends."""
        return sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)

    def train(self, data: Dataset, training: Training, rng: np.random.Generator) -> Local:
        """One device's part of a round, from the common parameters; they are as before afterwards."""
        import torch

        common = {name: value.clone() for name, value in self._trained().items()}
        rates = {"lr": training.lr_b, "weight_decay": training.weight_decay, "eps": training.eps}
        chosen = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(chosen, betas=(training.beta1, training.beta2), **rates)
        steps = training.steps or (training.epochs or 1) * steps_per_epoch(data, training.batch_size)
        for batch in training_batches(data, training.batch_size, steps=steps, rng=rng):
            loss = torch.nn.functional.cross_entropy(self._logits(batch), torch.tensor(batch.labels))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        made = {name: value.clone() for name, value in self._trained().items()}
        self._set(common)
        return Local(made, data.weight)

    def average(self, parts: list[Local]) -> None:
        """Make the weighted mean of the parts common."""
        import torch

        total = sum(part.weight for part in parts)
        for name, value in self._trained().items():
            mean = sum(part.state[name].double() * (part.weight / total) for part in parts)
            with torch.no_grad():
                value.copy_(mean)

    def accuracy(self, texts: Dataset) -> float:
        """Share of the texts that the common model classifies right."""
        import torch

        right = 0
        with torch.no_grad():
            for batch in evaluation_batches(texts, _MEASURED_AT_ONCE):
                right += int((self._logits(batch).argmax(dim=1) == torch.tensor(batch.labels)).sum())
        return right / len(texts)

    def flop(self, texts: Texts) -> int:
        """Operations of one pass over a device's texts."""
        return full_flop(self._manifest, texts)

    def _trained(self) -> dict[str, Any]:
        named = self._model.named_parameters()
        return {name: parameter.data for name, parameter in named if parameter.requires_grad}

    def _set(self, state: Mapping[str, Any]) -> None:
        for name, value in self._trained().items():
            value.copy_(state[name])

    def _logits(self, batch: Batch) -> Any:
        import torch

        ids, mask = torch.tensor(batch.input_ids), torch.tensor(batch.attention_mask)
        return self._model(input_ids=ids, attention_mask=mask).logits


async def full_course(site: Site) -> Course:
    """All rounds, with the head that was measured."""
    return await asyncio.to_thread(_rounds, site, await site.adapter(), (await site.plan()).plan)


def _rounds(site: Site, adapter: Mapping[str, Array], plan: Plan) -> Course:
    setup, manifest = site.setup, site.work.bundle.manifest
    head = {name: adapter[name] for name in manifest.head_shapes}
    model = FullModel(manifest, head, setup.model or site.workload.model, setup.threads)
    start = model.accuracy(site.glimpse)
    curve = [_round(site, model, plan.training, round_) for round_ in range(setup.sizes.rounds)]
    return Course(start, curve, model.accuracy(site.held_out))


def _round(site: Site, model: FullModel, training: Training, round_: int) -> RoundLine:
    sizes, cohort, rates = site.setup.sizes, site.cohort(round_), site.config.training
    share = rate_share(rates.lr_schedule, round_ / max(sizes.rounds - 1, 1))
    training = msgspec.structs.replace(training, lr_b=rates.lr_b * share)
    began = time.perf_counter()
    seed = [site.setup.key.seed, round_]
    parts = [model.train(site.data[name], training, np.random.default_rng(seed)) for name in cohort]
    model.average(parts)
    train_s = time.perf_counter() - began
    values = len(parts) * model.parameters
    made = RoundLine(
        accuracy=model.accuracy(site.glimpse) if sizes.measured(round_) else None,
        bytes_up=4 * values,
        bytes_down=4 * values,
        params_up=values,
        params_down=values,
        gflop=round(sum(model.flop(site.texts(name)) for name in cohort) / 1e9, 1),
        drift=None,
        alive=1.0,
        rank=0.0,
        train_s=round(train_s, 2),
    )
    site.fetched.update(cohort)
    site.say(f"round {round_ + 1}/{sizes.rounds}: accuracy {made.accuracy or '–'}")
    return made
