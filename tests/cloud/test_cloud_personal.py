"""A task that leaves parameters to its devices: its plans say so, its adapter keeps them as they began."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import numpy as np
import pytest
from click.testing import CliRunner
from cloud_fleet import Site, make_bundle, values_for
from test_cloud_replay import replay

from cloud.budgeting import with_budget
from cloud.commands import cloud
from cloud.config import parse_config
from cloud.errors import ConfigError
from cloud.planning import check_fit, plan_layout
from edge_runtime import wire
from edge_runtime.bundle import Array, parse_tensors

OWN_B = {"personal": ["head", "B"], "aggregation": "a-only"}
HEAD = ("classifier.weight", "classifier.bias")


async def play(site: Site, session: aiohttp.ClientSession) -> tuple[list[wire.Plan], list[dict[str, Array]]]:
    """Let two devices send random changes in every round; every plan and its adapter, the finished one last."""
    await site.start()
    devices = [await site.device(session, name) for name in ("one", "two")]
    plans, adapters = [], []
    signed = await devices[0].plan()
    while signed is not None:
        plans.append(signed.plan)
        adapters.append(parse_tensors((await devices[0].blob(signed.plan.adapter)).body, what="adapter"))
        if signed.plan.state == "finished":
            break
        for number, device in enumerate(devices):
            values = values_for(site, signed, signed.plan.round + number)
            if signed.plan.state == "measure":
                values = measured(site, signed)
            sealed = device.seal(signed, device.frame(signed, values))
            assert (await device.put(signed, sealed)).status == 201
        signed = await devices[0].plan(after=signed.plan.round)
    return plans, adapters


def measured(site: Site, signed: wire.SignedPlan) -> np.ndarray:
    """Sums over ten examples, five of each class."""
    layout = plan_layout(site.bundle, signed.plan)
    values = np.zeros(layout.count, np.float32)
    parts = layout.split(values)
    rng = np.random.default_rng(3)
    examples = rng.normal(size=(10, 6)) + np.repeat([[0.0], [2.0]], 5, axis=0)
    parts[wire.CLASS_SUMS][...] = [examples[:5].sum(axis=0), examples[5:].sum(axis=0)]
    parts[wire.CLASS_COUNTS][...] = 5
    parts[wire.SECOND_MOMENTS][...] = wire.pack_triangle(examples.T @ examples)
    return values


async def test_only_a_is_shared_where_b_is_personal(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """In every round, and of the head as well nothing is; every plan is made again as it was signed."""
    site = Site.make(tmp_path, **OWN_B)
    plans, adapters = await play(site, session)
    assert [plan.personal for plan in plans] == [("head", "B")] * 4
    assert [plan.state for plan in plans] == ["train"] * 3 + ["finished"]
    for plan in plans[:-1]:
        assert {module.alive for module in plan.modules} == {"A"}
        assert not plan.head_alive
        assert all(name.endswith(".lora_a") for name, _ in plan_layout(site.bundle, plan).blocks)
    for name, array in adapters[0].items():
        moved = (adapters[-1][name] != array).any()
        assert moved == name.endswith(".lora_a")
    found = await replay(site)
    assert (found.exit_code, found.stdout.count("as signed")) == (0, 3)
    copied = CliRunner().invoke(cloud, ["adapter", "--config", str(site.folder), "--out", str(tmp_path / "out")])
    assert copied.stderr == "personal (head, B) is as before training in it: each device keeps its own\n"
    path = site.folder / "emberlora.toml"
    text = path.read_text()
    path.write_text(text.replace('personal = ["head", "B"]', 'personal = ["B"]'))
    found = await replay(site)
    assert found.exit_code == 1
    assert "round 0: " in found.stdout
    assert "head: signed dead, replayed alive" in found.stdout
    await site.close()


async def test_a_personal_head_goes_with_any_policy(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """It is measured first here: that changes the published one once, and no round after it does."""
    site = Site.make(
        tmp_path,
        bundle=make_bundle(tmp_path / "bundle", r_max=3),
        personal=["head"],
        policy="annealed-kill-revive",
        head_init="class-means",
        rounds=5,
        annealing={"budget_end": 0.4, "initiating_rounds": 2, "final_rounds": 1},
    )
    plans, adapters = await play(site, session)
    assert [plan.state for plan in plans] == ["measure"] + ["train"] * 5 + ["finished"]
    assert [plan.personal_parts for plan in plans] == [()] + [("head",)] * 6
    assert not any(plan.head_alive for plan in plans)
    for name in HEAD:
        assert (adapters[1][name] != adapters[0][name]).any()
        for later in adapters[2:]:
            np.testing.assert_array_equal(later[name], adapters[1][name])
    assert any(not module.alive for plan in plans[1:-1] for module in plan.modules)
    assert (await replay(site)).exit_code == 0
    await site.close()


async def test_replay_names_what_was_to_be_kept(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """A head that is frozen instead of personal is sent as little; only this field tells."""
    site = Site.make(tmp_path, personal=["head"])
    await play(site, session)
    await site.close()
    path = site.folder / "emberlora.toml"
    path.write_text(path.read_text().replace('personal = ["head"]', 'head = "frozen"'))
    found = await replay(site)
    assert found.exit_code == 1
    assert "round 0: " in found.stdout
    assert found.stdout.splitlines()[0].endswith("differs: personal: signed head, replayed nothing")


def test_a_model_without_a_head_has_none_to_keep(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", task="lm")
    text = '[task]\nname = "t"\nbundle = "b"\npersonal = ["head"]'
    config = parse_config(text.encode(), path=tmp_path / "emberlora.toml")
    with pytest.raises(ConfigError, match=r"task.personal has the head, and the bundle's model has none"):
        check_fit(config, bundle)
    check_fit(config, make_bundle(tmp_path / "other"))


def test_a_budget_in_bytes_leaves_out_the_personal_head(tmp_path: Path) -> None:
    """What is never sent needs no bytes: more is left for the factors."""
    bundle = make_bundle(tmp_path / "bundle", r_max=3)
    shares = []
    for more in ("", 'personal = ["head"]\n', 'head = "frozen"\n'):
        text = f'[task]\nname = "t"\nbundle = "b"\npolicy = "anneal"\n{more}'
        text += "[annealing]\nbytes_per_device_per_round = 2200\n"
        config = parse_config(text.encode(), path=tmp_path / "emberlora.toml")
        shares.append(with_budget(config, bundle.manifest).annealing.budget_end)
    assert shares[0] < shares[1] == shares[2]
