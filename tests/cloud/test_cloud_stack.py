"""Aggregation by stacking: the best factors of the mean of the products, whatever the order and the restarts."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from cloud_fleet import Site, make_bundle, values_for
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloud.aggregate import ProductMean, apply_mean
from cloud.errors import DataMissingError
from cloud.work import open_stored, start_work
from edge_runtime.bundle import Array, parse_tensors
from edge_runtime.wire import Layout, SignedPlan

Shapes = st.tuples(st.integers(1, 4), st.integers(1, 30), st.integers(1, 40))  # rank, out, in


def module(rank: int, out: int, inner: int, rng: np.random.Generator) -> tuple[dict[str, Array], Layout]:
    adapter = {
        "m.lora_a": rng.normal(size=(rank, inner)).astype(np.float32),
        "m.lora_b": rng.normal(size=(out, rank)).astype(np.float32),
        "head.bias": np.ones(2, np.float32),
    }
    return adapter, Layout(tuple((name, array.shape) for name, array in adapter.items()))


def product(adapter: dict[str, Array]) -> np.ndarray:
    return adapter["m.lora_b"].astype(np.float64) @ adapter["m.lora_a"].astype(np.float64)


def stacked(adapter: dict[str, Array], layout: Layout, changes: list[np.ndarray], shares: list[float]):
    mean = ProductMean(adapter, layout)
    for change, share in zip(changes, shares, strict=True):
        mean.add(change, share)
    return mean.factors()


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def size_of(adapter: dict[str, Array]) -> float:
    """What float32 rounding of the factors is relative to: the product itself may cancel."""
    return float(np.linalg.norm(adapter["m.lora_b"]) * np.linalg.norm(adapter["m.lora_a"]))


def norms(lora_a: Array) -> float:
    return float(np.sqrt(np.mean(np.sum(np.square(lora_a, dtype=np.float64), axis=1))))


@given(Shapes, st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_the_mean_of_products_is_kept_best(shape: tuple[int, int, int], weights: list[int], seed: int) -> None:
    """The oracle forms every dense matrix; few devices are held as factors, many as a matrix."""
    rng = np.random.default_rng(seed)
    adapter, layout = module(*shape, rng)
    changes = [rng.normal(scale=0.3, size=layout.count).astype(np.float32) for _ in weights]
    shares = [weight / sum(weights) for weight in weights]
    found = stacked(adapter, layout, changes, shares)
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        name: (adapter[name].shape, np.dtype(np.float32)) for name in ("m.lora_a", "m.lora_b")
    }
    size_a, size_b = adapter["m.lora_a"].size, adapter["m.lora_b"].size
    dense = np.zeros((shape[1], shape[2]))
    for change, share in zip(changes, shares, strict=True):
        a = adapter["m.lora_a"].astype(np.float64) + change[:size_a].reshape(shape[0], shape[2])
        b = adapter["m.lora_b"].astype(np.float64) + change[size_a : size_a + size_b].reshape(shape[1], shape[0])
        dense += share * (b @ a)
    least = np.linalg.norm(dense - best(dense, shape[0]))  # two values may be near, so compare what is lost
    assert np.linalg.norm(product(found) - dense) <= least + 1e-6 * np.linalg.norm(dense)
    if shape[0] <= min(shape[1:]):
        assert norms(found["m.lora_a"]) == pytest.approx(norms(adapter["m.lora_a"]), rel=1e-4)


@given(Shapes, st.integers(0, 2**32 - 1))
def test_one_device_is_its_own_product(shape: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    adapter, layout = module(*shape, rng)
    change = rng.normal(scale=0.3, size=layout.count).astype(np.float32)
    own = apply_mean(adapter, layout, change.astype(np.float64))
    found = product(stacked(adapter, layout, [change], [1.0]))
    assert np.linalg.norm(found - product(own)) <= 1e-6 * size_of(own)


@given(Shapes, st.integers(0, 2**32 - 1), st.sampled_from("ab"))
def test_where_one_factor_is_equal_it_is_the_factors_mean(shape: tuple[int, int, int], seed: int, moves: str) -> None:
    """What alternate gives: with equal A the mean of products is mean(B)·A."""
    rng = np.random.default_rng(seed)
    adapter, layout = module(*shape, rng)
    changes = [rng.normal(scale=0.3, size=layout.count).astype(np.float32) for _ in range(3)]
    for change in changes:
        layout.split(change)["m.lora_b" if moves == "a" else "m.lora_a"][...] = 0
    shares = [0.2, 0.3, 0.5]
    mean = np.average(np.stack(changes).astype(np.float64), axis=0, weights=shares)
    expected = apply_mean(adapter, layout, mean)
    found = product(stacked(adapter, layout, changes, shares))
    assert np.linalg.norm(found - product(expected)) <= 1e-6 * size_of(expected)


@pytest.mark.parametrize("still", ["m.lora_a", "m.lora_b"])
def test_only_modules_that_train_both_factors_are_stacked(still: str) -> None:
    adapter, layout = module(2, 5, 7, np.random.default_rng(0))
    one = Layout(tuple(block for block in layout.blocks if block[0] != still))
    assert stacked(adapter, one, [np.ones(one.count, np.float32)], [1.0]) == {}


def test_without_energy_the_rows_stay() -> None:
    """B is zero and no device moved it: A is what it was, row by row."""
    adapter, layout = module(3, 8, 40, np.random.default_rng(0))
    adapter["m.lora_b"][...] = 0
    found = stacked(adapter, layout, [np.zeros(layout.count, np.float32)] * 2, [0.25, 0.75])
    np.testing.assert_array_equal(found["m.lora_a"], adapter["m.lora_a"])
    assert not found["m.lora_b"].any()


def test_components_that_are_not_trained_count_as_they_are() -> None:
    """Of rank 2 the second component is trained; the first stays in every device's product."""
    adapter, _ = module(2, 13, 7, np.random.default_rng(0))
    names = ("m.lora_a", "m.lora_b")
    layout = Layout(((names[0], (1, 7)), (names[1], (13, 1))), components=dict.fromkeys(names, (1,)))
    change = np.random.default_rng(1).normal(size=20).astype(np.float32)
    a, b = (adapter[name].astype(np.float64) for name in names)
    wanted = np.outer(b[:, 0], a[0]) + np.outer(b[:, 1] + change[7:], a[1] + change[:7])
    found = product(stacked(adapter, layout, [change], [1.0]))
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_memory_stops_growing_with_devices() -> None:
    """What is held is no more than the stacked factors, and no more than the matrix."""
    rank, out, inner = 4, 96, 160
    layout = Layout((("m.lora_a", (rank, inner)), ("m.lora_b", (out, rank))))
    adapter = {name: np.ones(shape, np.float32) for name, shape in layout.blocks}
    change = np.ones(layout.count, np.float32)
    tracemalloc.start()
    try:
        mean = ProductMean(adapter, layout)
        before = tracemalloc.get_traced_memory()[0]
        for devices in range(1, 101):
            mean.add(change, 0.01)
            held = tracemalloc.get_traced_memory()[0] - before
            assert held <= 8 * min(devices * rank * (out + inner), out * inner) + 8192
    finally:
        tracemalloc.stop()


async def test_a_stored_update_that_does_not_open_is_named(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(tmp_path, aggregation="stack")
    await site.start()
    signed = await (await site.device(session, "one")).plan()
    await site.close()
    work = start_work(site.bundle, signed, key=X25519PrivateKey.generate(), opened=0.0)
    with pytest.raises(DataMissingError, match="stored update of one for round 0: cannot be opened"):
        list(open_stored(work, [("one", bytes(work.sealed_bytes[0]))]))


async def run_task(site: Site, session: aiohttp.ClientSession, order: list[int], *, restart: bool) -> dict[str, Array]:
    """Three devices, two rounds; the last adapter. Checks every round against the dense oracle."""
    await site.start()
    names = ["one", "three", "two"]
    devices = [await site.device(session, name) for name in names]
    signed = await devices[0].plan()
    for round_ in range(2):
        assert {m.alive for m in signed.plan.modules} == {"AB"}
        before = parse_tensors((await devices[0].blob(signed.plan.adapter)).body, what="adapter")
        changes = [values_for(site, signed, 10 * round_ + number) for number in range(3)]
        for number in order:
            site.clock.now += 1  # updates are kept by when they came
            frame = devices[number].frame(signed, changes[number], weight=10 * (number + 1))
            assert (await devices[number].put(signed, devices[number].seal(signed, frame))).status == 201
            if restart:
                await site.restart()
                await site.tick()
        ended, signed = signed, await devices[0].plan(after=round_)
        after = parse_tensors((await devices[0].blob(signed.plan.adapter)).body, what="adapter")
        _check(ended, before, after, changes, [1 / 6, 2 / 6, 3 / 6])
    assert signed.plan.state == "finished"
    assert not [name for name in site.files() if name.startswith("updates/")]
    await site.close()
    return after


def _check(signed: SignedPlan, before, after, changes: list[np.ndarray], shares: list[float]) -> None:
    """By hand: A then B of every module, then the head."""
    start = 0
    for m in signed.plan.modules:
        a, b = (before[f"{m.name}.lora_{factor}"].astype(np.float64) for factor in "ab")
        end = start + a.size + b.size
        dense = sum(
            share
            * (b + change[start + a.size : end].reshape(b.shape))
            @ (a + change[start : start + a.size].reshape(a.shape))
            for change, share in zip(changes, shares, strict=True)
        )
        found = after[f"{m.name}.lora_b"].astype(np.float64) @ after[f"{m.name}.lora_a"]
        assert np.linalg.norm(found - best(dense, m.rank)) <= 1e-5 * np.linalg.norm(dense)
        start = end
    mean = np.average(np.stack(changes).astype(np.float64), axis=0, weights=shares)[start:]
    moved = np.concatenate([(after[n] - before[n]).ravel() for n in ("classifier.weight", "classifier.bias")])
    np.testing.assert_allclose(moved, mean, atol=1e-6)


async def test_a_task_is_the_same_whatever_the_order_and_restarts(
    tmp_path: Path, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding to float32 hides most differences between orders, so the order of the sums is watched as well."""
    found: list[dict[str, Array]] = []
    shares: dict[ProductMean, list[float]] = {}
    add = ProductMean.add

    def watched(mean: ProductMean, values: np.ndarray, share: float) -> None:
        shares.setdefault(mean, []).append(share)
        add(mean, values, share)

    monkeypatch.setattr(ProductMean, "add", watched)
    for number, order in enumerate(([0, 1, 2], [2, 0, 1])):
        folder = tmp_path / str(number)
        site = Site.make(
            folder, bundle=make_bundle(folder / "bundle", r_max=2), aggregation="stack", rounds=2, devices_per_round=3
        )
        found.append(await run_task(site, session, order, restart=number == 1))
    by_name = [1 / 6, 2 / 6, 3 / 6]
    assert all(given == by_name[: len(given)] for given in shares.values())  # a restart may cut one short
    assert sum(given == by_name for given in shares.values()) >= 4  # two rounds of two tasks
    assert set(found[0]) == set(found[1])
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name])
