"""The product that tells whether int8 products saturate: its model is what it claims to be, and it sees the fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_runtime.engine import saturation


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    saturation.saturates.cache_clear()
    yield
    saturation.saturates.cache_clear()


def test_the_model_is_one_product() -> None:
    """Its bytes are what the onnx package writes."""
    kinds = {"a": (TensorProto.FLOAT, "mk"), "b": (TensorProto.INT8, "kn"), "s": (TensorProto.FLOAT, "n")}
    inputs = [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    output = helper.make_tensor_value_info("c", TensorProto.FLOAT, "mn")
    node = helper.make_node("DynamicQuantizeMatMul", list("abs"), ["c"], domain="com.microsoft")
    graph = helper.make_graph([node], "g", inputs, [output])
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    assert onnx.load_from_string(saturation.MODEL) == helper.make_model(graph, opset_imports=sets, ir_version=9)


@pytest.mark.parametrize("saturating", [False, True])
def test_saturated_sums_are_noticed(monkeypatch: pytest.MonkeyPatch, saturating: bool) -> None:
    """The fake adds pairs of products in 16 bits, as the instruction vpmaddubsw does, or does not."""

    class Kernel:
        def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
            scale = feed["a"].max() / 255
            left, right = np.rint(feed["a"] / scale).astype(np.int64), feed["b"].astype(np.int64)
            pairs = [left[:, i : i + 2] @ right[i : i + 2] for i in range(0, left.shape[1], 2)]
            cut = [np.clip(pair, -(2**15), 2**15 - 1) if saturating else pair for pair in pairs]
            return [(sum(cut) * scale * feed["s"]).astype(np.float32)]

    monkeypatch.setattr(saturation, "open_session", lambda _: Kernel())
    assert saturation.saturates() == saturating


def test_this_processor_is_asked() -> None:
    """Whatever it says, it is an answer of the real kernel."""
    assert saturation.saturates() in (True, False)
