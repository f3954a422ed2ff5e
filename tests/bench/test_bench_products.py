"""The floor's list of products against a formula, and against the graph that the engine runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from bench.alive import parse_alive
from bench.floor_step import stage_model
from bench.products import Block, Product, step_stages
from bench.shapes import DOWN, GATE, KEY, MIXED, MODELS, QUERY, RANK, SLOTS, UP, VALUE, Shape
from edge_runtime.bundle import Array
from export.runner import open_session

BATCH, TOKENS = 2, 5
TINY = Shape("llama", 3, 32, 56, 4, 2, 43)  # that of the fixture llama_bundle


def flops(products: Iterable[Product], *roles: str) -> int:
    return sum(product.flops for product in products if not roles or product.role in roles)


def step_flops(
    name: str, alive: str, *, recompute: bool = False, remembered: bool = False, tokens: int = 64
) -> dict[str, int]:
    shape = MODELS[name]
    (choice,) = parse_alive(alive, shape.modules)
    products = [
        product
        for stage in step_stages(shape, BATCH, tokens, choice.factors, recompute=recompute, remembered=remembered)
        for product in stage.products
    ]
    return {role: flops(products, role) for role in ("frozen", "lora", "attention", "head")}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_step_is_what_the_formula_says(name: str) -> None:
    """2·T·(in·out) a frozen product, twice, but not back through the lowest block's first layers; LoRA six a layer."""
    shape, rows, tokens = MODELS[name], BATCH * 64, 64
    block = sum(inside * outside for inside, outside in map(shape.features, SLOTS))
    thin = sum(RANK * (inside + outside) for inside, outside in map(shape.features, SLOTS))
    first = [shape.features(slot) for slot in (QUERY, KEY, VALUE)]
    found = step_flops(name, "1")
    assert found["frozen"] == 2 * rows * (2 * shape.layers * block - sum(i * o for i, o in first))
    assert found["lora"] == 2 * rows * (3 * shape.layers * thin - sum(i * RANK for i, _ in first))
    assert found["attention"] == 6 * shape.layers * 2 * rows * tokens * shape.heads * shape.head_dim
    assert found["head"] == 2 * 2 * BATCH * (tokens - 1) * shape.width * shape.vocabulary


def test_recomputing_repeats_everything_but_the_last_layer() -> None:
    """``down`` makes the block's output, which the backward pass does not read; its h it does."""
    shape, rows = MODELS["llama-6"], BATCH * 64
    kept, again = step_flops("llama-6", "1"), step_flops("llama-6", "1", recompute=True)
    sizes = {slot: shape.features(slot) for slot in SLOTS}
    block = sum(inside * outside for slot, (inside, outside) in sizes.items() if slot != DOWN)
    thin = sum(RANK * (inside + outside) for inside, outside in sizes.values()) - RANK * sizes[DOWN][1]
    assert again["frozen"] - kept["frozen"] == 2 * rows * shape.layers * block
    assert again["lora"] - kept["lora"] == 2 * rows * shape.layers * thin
    assert again["attention"] * 6 == kept["attention"] * 8
    assert again["head"] == kept["head"]


def test_below_the_lowest_alive_block_there_is_only_the_forward_pass() -> None:
    """The last sixth alive: six forward blocks, one backward without its first layers."""
    shape, rows = MODELS["llama-6"], BATCH * 64
    block = sum(inside * outside for inside, outside in map(shape.features, SLOTS))
    first = sum(i * o for i, o in map(shape.features, (QUERY, KEY, VALUE)))
    assert step_flops("llama-6", "1/6")["frozen"] == 2 * rows * (7 * block - first)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_remembered_is_not_multiplied(recompute: bool) -> None:
    """The last sixth alive: the forward pass of five blocks is gone, and nothing else; all alive, nothing is."""
    shape, rows = MODELS["llama-6"], BATCH * 64
    block = sum(inside * outside for inside, outside in map(shape.features, SLOTS))
    computed, remembered = (step_flops("llama-6", "1/6", recompute=recompute, remembered=way) for way in (False, True))
    assert computed["frozen"] - remembered["frozen"] == 2 * rows * 5 * block
    assert computed["head"] == remembered["head"]
    assert step_flops("llama-6", "1", remembered=True) == step_flops("llama-6", "1")


def test_a_dead_factor_costs_nothing_of_its_own() -> None:
    """Only B alive: no dA anywhere, and in the lowest block's first layers no dh either."""
    shape, rows = MODELS["llama-6"], BATCH * 64
    dropped = shape.layers * sum(RANK * inside for inside, _ in map(shape.features, SLOTS))
    dropped += sum(RANK * outside for _, outside in map(shape.features, (QUERY, KEY, VALUE)))
    assert step_flops("llama-6", "1")["lora"] - step_flops("llama-6", "B")["lora"] == 2 * rows * dropped


ALIVE_SETS = {
    "all": dict.fromkeys(SLOTS, "AB"),
    "none": dict.fromkeys(SLOTS, ""),
    "only B": dict.fromkeys(SLOTS, "B"),
    **{f"only {slot}": {**dict.fromkeys(SLOTS, ""), slot: "AB"} for slot in SLOTS},
    "B of down": {**dict.fromkeys(SLOTS, ""), DOWN: "B"},
    "A of up, B of gate": {**dict.fromkeys(SLOTS, ""), UP: "A", GATE: "B"},
    "key and mixed": {**dict.fromkeys(SLOTS, ""), KEY: "A", MIXED: "B"},
}


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("factors", ALIVE_SETS.values(), ids=ALIVE_SETS)
def test_the_products_are_those_of_the_engines_graph(llama_bundle: Path, factors: dict[str, str], below: bool) -> None:
    """Frozen and LoRA products of the block graph as pruned for these factors, forward, and back with recomputing."""
    wanted = [f"d_lora_{factor.lower()}:{slot}" for slot in SLOTS for factor in factors[slot]]
    wanted += ["d_hidden"] if below else []
    if not wanted:
        pytest.skip("nothing alive and nothing below: the engine runs no backward pass")
    model = onnx.load_model(llama_bundle / "graphs" / "block.onnx")
    block = Block(TINY, BATCH, TOKENS, factors, below)
    forward = graph_flops(model, ["out"])
    assert forward["Gemm"] == flops(block.forward(), "frozen", "lora")
    assert forward["FusedMatMul"] == flops(block.forward(), "attention")
    backward = graph_flops(model, wanted)
    listed = block.repeated() + block.backward()
    assert backward["Gemm"] == flops(listed, "frozen", "lora")
    assert backward["FusedMatMul"] == flops(listed, "attention")


def graph_flops(model: Any, outputs: list[str]) -> dict[str, int]:
    """FLOPs of the products that ``outputs`` need, by operator; every operand's shape is seen by running them."""
    producer = {name: node for node in model.graph.node for name in node.output}
    needed: dict[str, Any] = {}
    pending = list(outputs)
    while pending:
        node = producer.get(pending.pop())
        if node is not None and node.name not in needed:
            needed[node.name] = node
            pending += [name for name in node.input if name]
    products = [node for node in needed.values() if node.op_type in ("Gemm", "MatMul", "FusedMatMul")]
    shapes = operand_shapes(model, {name for node in products for name in (node.input[0], node.output[0])})
    found = {"Gemm": 0, "FusedMatMul": 0}
    for node in products:
        flipped = any(item.name == "transA" and item.i for item in node.attribute)
        inner = shapes[node.input[0]][-2 if flipped else -1]
        kind = "FusedMatMul" if node.op_type == "MatMul" else node.op_type
        found[kind] += 2 * inner * int(np.prod(shapes[node.output[0]]))
    return found


def operand_shapes(model: Any, names: set[str]) -> dict[str, tuple[int, ...]]:
    """The shape of tensors of the graph on the test's batch, at the floor's rank."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    made = {name for node in copy.graph.node for name in node.output}
    del copy.graph.output[:]
    copy.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted(names & made)
    )
    session = open_session(copy.SerializeToString())
    feeds = {value.name: filled(value.shape) for value in session.get_inputs()}
    made_values = session.run(None, feeds)
    shapes = {value.name: array.shape for value, array in zip(session.get_outputs(), made_values, strict=True)}
    return shapes | {name: array.shape for name, array in feeds.items()}


def filled(shape: list[int | str]) -> Array:
    sizes = {"batch": BATCH, "seq": TOKENS}
    return np.ones([size if isinstance(size, int) else sizes.get(size, RANK) for size in shape], np.float32)


def test_every_product_of_a_graph_is_the_product_it_says() -> None:
    """Flipped operands, weights, heads in groups and packed constants, against numpy."""
    products = [
        Product("frozen", (3, 4, 5), flip_right=True, weight="w"),
        Product("frozen", (3, 5, 4), weight="w"),
        Product("lora", (5, 3, 2), flip_left=True),
        Product("attention", (6, 4, 3), (2, 2), flip_right=True),
        Product("attention", (3, 6, 4), (2, 2), flip_left=True),
    ]
    rng = np.random.default_rng(0)
    lefts = [rng.standard_normal(product.left, dtype=np.float32) for product in products]
    rights = [rng.standard_normal(product.right, dtype=np.float32) for product in products]
    feeds = {f"l{n}": left for n, left in enumerate(lefts)} | {f"w{n}": right for n, right in enumerate(rights)}
    session = open_session(stage_model(products, {"w1": feeds.pop("w1")}).SerializeToString())
    results = session.run([f"o{place}" for place in range(len(products))], feeds)
    for product, left, right, result in zip(products, lefts, rights, results, strict=True):
        a = left.swapaxes(-1, -2) if product.flip_left else left
        b = right.swapaxes(-1, -2) if product.flip_right else right
        assert result.shape == product.out
        assert np.allclose(result, a @ b, atol=1e-5)
        assert product.flops == 2 * a.shape[-1] * result.size
