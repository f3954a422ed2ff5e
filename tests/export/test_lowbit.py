"""Frozen weights in fewer bits: what is stored, how graphs read it, and that gradients are those of these weights."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import export_models
import numpy as np
import onnx
import pytest
from export_sessions import LABELS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime.bundle import Array, Base, open_bundle
from export import ExportOptions, export_bundle
from export.lowbit import lower, with_scales
from export.quiet import quiet
from export.runner import open_session
from export.storage import GROUP, restored, storage_of, stored
from export.templates.builder import GraphBuilder
from export.tracing import Input
from export.verify import TOLERANCE

LOW: tuple[Base, ...] = ("fp16", "int8", "int4")
MATRICES = hnp.arrays(
    np.float32,
    st.sampled_from([(8, 64), (3, 192), (16, 40)]),
    elements=st.floats(-100, 100, width=32),
)


@settings(deadline=None)
@given(values=MATRICES, base=st.sampled_from(LOW))
def test_stored_values_are_near(values: Array, base: Base) -> None:
    """int8 to half a step of the row's scale, int4 to one of the group's (the far end is cut), fp16 to 2^-11."""
    tensors = stored("w", values, base)
    found = restored("w", tensors)
    storage = storage_of(values.shape, base)
    assert found.dtype == np.float32
    if storage == "int8":
        bound = np.abs(values).max(axis=1, keepdims=True) / 127 * 0.5001
    elif storage == "int4":
        groups = np.abs(values.reshape(len(values), -1, GROUP))
        bound = np.repeat(groups.max(axis=2) / 8 * 1.01, GROUP, axis=1)
    else:
        bound = np.abs(values) * 2**-11
    assert (np.abs(found - values) <= bound + 1e-6).all()


def test_zero_rows_and_groups_stay_zero() -> None:
    """No division by a zero scale."""
    values = np.zeros((8, 64), np.float32)
    values[3, 40] = 5
    for base in LOW:
        np.testing.assert_allclose(restored("w", stored("w", values, base)), values, rtol=1e-3)


def test_what_is_not_a_large_matrix_stays_float32() -> None:
    """Vectors and small matrices; and rows that int4 cannot halve into groups are int8."""
    assert [storage_of(shape, "int4") for shape in ((4096,), (2, 64), (64, 96), (64, 128))] == [
        "fp32",
        "fp32",
        "int8",
        "int4",
    ]


@pytest.mark.parametrize("base", LOW)
def test_graphs_read_what_is_stored(base: Base) -> None:
    """A product both ways and a lookup of rows give what the restored weight gives."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 64)).astype(np.float32)
    x, ids = rng.normal(size=(5, 64)).astype(np.float32), np.array([[3, 0, 23], [7, 7, 1]])
    g = GraphBuilder()
    y = g.product("x", "w:table", transB=1)
    g.result(y, "out")
    g.result(g.product(y, "w:table"), "d_x")
    g.result(g.op("Gather", "w:table", "ids", axis=0), "rows")
    model = g.model(
        [_input("x", x), Input("ids", _tensor(ids), {0: "batch", 1: "seq"}), Input("w:table", _tensor(weight))],
        ["out", "d_x", "rows"],
    )
    for value in model.graph.output:  # all are said to have the first input's shape
        value.type.tensor_type.ClearField("shape")
    lower(model, {"w:table": base})
    tensors = stored("table", weight, base)
    assert with_scales(("table",), {"w:table": base}) == tuple(tensors)
    session = open_session(model.SerializeToString())
    out, d_x, rows = session.run(
        ["out", "d_x", "rows"], {"x": x, "ids": ids, **{f"w:{name}": array for name, array in tensors.items()}}
    )
    wanted = restored("table", tensors)
    np.testing.assert_allclose(out, x @ wanted.T, atol=1e-4)
    np.testing.assert_allclose(d_x, x @ wanted.T @ wanted, atol=1e-3)
    np.testing.assert_allclose(rows, wanted[ids], atol=1e-6)


def _input(name: str, array: Array) -> Input:
    return Input(name, _tensor(array), {0: "rows"})


def _tensor(array: Array) -> object:
    import torch

    return torch.from_numpy(array)


@pytest.mark.parametrize("task", ["lm", "classify"])
@pytest.mark.parametrize("base", LOW)
def test_bundles_of_every_base_are_verified(tmp_path: Path, base: Base, task: str) -> None:
    """Against autograd on the restored weights; each restored weight is read by one operator only, but in the chunks of
    a vocabulary, where it is restored once for all of them.
    """
    with quiet():
        make = export_models.llama if task == "lm" else export_models.bert
        make(tmp_path / "model", layers=1, width=64)
    labels = LABELS if task == "classify" else None
    out = tmp_path / "bundle"
    report = export_bundle(ExportOptions(str(tmp_path / "model"), task, out, rank=3, base=base, labels=labels))  # type: ignore[arg-type] # parametrised
    assert 0 < report.max_rel_err <= TOLERANCE
    bundle = open_bundle(out)
    assert bundle.manifest.base == base
    kinds = {array.dtype for array in bundle.weights().values() if array.ndim == 2 and array.size > 512}
    assert {"fp16": np.float16, "int8": np.int8, "int4": np.uint8}[base] in {kind.type for kind in kinds}
    for name in {kind.graph for kind in bundle.manifest.kinds}:
        graph = onnx.load(bundle.path(name)).graph
        readers = [item for node in graph.node for item in node.input]
        made = [node.output[0] for node in graph.node if node.output[0].startswith("w:")]
        assert all(readers.count(item) == 1 for item in made), name
    if bundle.manifest.head.vocabulary is not None:
        graph = onnx.load(bundle.path(bundle.manifest.head.vocabulary.graph)).graph
        weight = f"w:{bundle.manifest.head.vocabulary.weights[0]}"
        reading = [node for node in graph.node if weight in node.input and node.op_type != "Gather"]
        assert len({node.op_type for node in reading}) == len(reading), [node.op_type for node in reading]


def test_every_base_is_a_choice_of_the_command() -> None:
    """The manifest's bases are those that can be asked for."""
    assert set(get_args(Base)) == {"fp32", *LOW}
