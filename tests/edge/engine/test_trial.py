"""The child that tries ONNX Runtime: its model is the product it claims to be, and a wrong product is noticed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edge_runtime.engine import trial


def test_the_model_is_one_product() -> None:
    """Its bytes are what the onnx package writes."""
    inputs = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("a", "mk"), ("b", "kn"))]
    output = helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, "mn")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "g", inputs, [output])
    wanted = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    assert onnx.load_from_string(trial.MODEL) == wanted
    onnx.checker.check_model(wanted)


def test_the_product_is_right_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert trial.main() == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert json.loads(told.out)["calibration_s"] > 0


@pytest.mark.parametrize("factor", [1.001, np.nan])
def test_a_wrong_product_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    class Wrong:
        def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
            return [feed["a"] @ feed["b"] * np.float32(factor)]

    monkeypatch.setattr(trial, "open_session", lambda _: Wrong())
    assert trial.main() == 1
    assert "a product of two matrices is off by" in capsys.readouterr().err
