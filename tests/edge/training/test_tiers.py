"""A round of a device that carries a tier: what it trains, what it computes, and what it sends."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import Array, Bundle, encode_tensors, open_bundle
from edge_runtime.engine.block import BlockVariants
from edge_runtime.training.job import RESIDUAL_NAME, Done
from edge_runtime.training.round import run_round, working_bundle
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import Plan, Quantisation, Tier, decode_update
from tests.edge.encrypted import tensors_in, write_tensors_to
from tests.edge.training.test_round import make_job, make_plan

TIERS = (Tier(0, max_rank=3), Tier(1, max_rank=3), Tier(1, max_rank=2))
LOWEST = (0, 0, 1, 1)


@pytest.fixture
def bundle(bert_bundle: Path) -> Bundle:
    return open_bundle(bert_bundle)


def tiered(bundle: Bundle, alive: str, **training: float) -> Plan:
    return msgspec.structs.replace(make_plan(bundle, alive, **training), tiers=TIERS)


def random_adapter(bundle: Bundle) -> dict[str, Array]:
    """With B that is not zero, so that A has a gradient."""
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(scale=0.1, size=a.shape).astype(np.float32) for name, a in bundle.initial_adapter().items()
    }


def train(
    bundle: Bundle, folder: Path, plan: Plan, tier: int, residual: Path | None = None
) -> tuple[dict[str, Array], Done, WorkingBundle]:
    """What a device of a tier sends, by tensor."""
    folder.mkdir()
    job, signed = make_job(folder, bundle, plan)
    Path(job.adapter).write_bytes(encode_tensors(random_adapter(bundle)))
    job = msgspec.structs.replace(job, tier=tier, residual=str(residual) if residual else None)
    opened = working_bundle(bundle, plan, job)
    frame, done = run_round(job, lambda event: None, lambda *_: opened)
    layout = opened.plan_layout(plan, tier)
    update = decode_update(frame, signed_plan=signed, layout=layout)
    assert done.metrics.tier == update.metrics.tier == tier
    return layout.split(update.values), done, opened  # type: ignore[return-value]  # float32


@pytest.mark.parametrize("alive", ["A", "B", "AB"])
def test_a_tier_trains_the_first_components_of_the_later_blocks(bundle: Bundle, tmp_path: Path, alive: str) -> None:
    """After one step these have moved as in a round that trains all; nothing else is sent."""
    plan = tiered(bundle, alive, steps=1)
    everything, _, _ = train(bundle, tmp_path / "0", plan, 0)
    places = bundle.manifest.places
    for tier in (1, 2, 3):
        some, _, _ = train(bundle, tmp_path / str(tier), plan, tier)
        rank = TIERS[tier - 1].rank_bound
        factors = {name for name in everything if ".lora_" in name}
        kept = {name for name in factors if places[name.rpartition(".")[0]] >= LOWEST[tier]}
        assert some.keys() == kept | (everything.keys() - factors)
        for name, part in some.items():
            wanted = everything[name]
            if name in factors:
                wanted = wanted[:rank] if name.endswith("_a") else wanted[:, :rank]
            np.testing.assert_allclose(part, wanted, atol=1e-7)
            assert part.any()


def test_no_backward_pass_runs_below_the_lowest_block(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there are blocks in tier 0, one less in a tier from block 1, in every step."""
    passes = []
    backward = BlockVariants.backward
    monkeypatch.setattr(
        BlockVariants, "backward", lambda self, variant: (passes.append(variant), backward(self, variant))[1]
    )
    counts = []
    for tier in (0, 1, 2, 3):
        passes.clear()
        _, done, opened = train(bundle, tmp_path / str(tier), tiered(bundle, "AB"), tier)
        counts.append(len(passes) / done.metrics.steps)
        assert opened.engine.lowest_alive == LOWEST[tier]
    blocks = len(bundle.manifest.blocks)
    assert counts == [blocks, blocks, blocks - 1, blocks - 1]


def test_what_a_tier_leaves_out_of_codes_is_kept(bundle: Bundle, tmp_path: Path) -> None:
    """Of a tensor that it carries in part, and of one that it carries not at all, nothing that is owed is lost."""
    range_ = 0.02
    plan = tiered(bundle, "B", lr_a=0.0, lr_b=0.0, lr_head=0.0)  # nothing moves: what is sent was owed
    blocks = len(WorkingBundle(bundle).plan_layout(plan).blocks)
    plan = msgspec.structs.replace(plan, quantisation=Quantisation(8, (range_,) * blocks))
    adapter = random_adapter(bundle)
    owed = {name: np.full(a.shape, range_, np.float32) for name, a in adapter.items() if name.endswith(".lora_b")}
    old = tmp_path / "old.safetensors"
    write_tensors_to(old, "residual", owed)
    sent, _, _ = train(bundle, tmp_path / "3", plan, 3, residual=old)
    left = tensors_in(tmp_path / "3" / RESIDUAL_NAME, "residual")
    places = bundle.manifest.places
    for name, before in owed.items():
        carried = 2 if places[name.rpartition(".")[0]] >= 1 else 0
        assert (name in sent) == bool(carried)
        np.testing.assert_allclose(left[name][:, carried:], before[:, carried:])
        np.testing.assert_allclose(left[name][:, :carried], 0.0, atol=1e-7)
        if carried:
            np.testing.assert_allclose(sent[name], range_, rtol=1e-6)
