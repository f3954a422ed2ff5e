"""What is read of ONNX Runtime's traces."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from edge_runtime.engine.profile import current_profile, operator_us, profiled
from edge_runtime.engine.runtime import open_session


def run(microseconds: int) -> list[dict[str, object]]:
    """The events of one run: two operators and the run itself."""
    names = {"first": "Gemm", "second": "Gemm", "third": "Mul"}
    nodes = [
        {"name": f"{name}_kernel_time", "cat": "Node", "dur": microseconds, "args": {"op_name": operator}}
        for name, operator in names.items()
    ]
    executor = {"name": "SequentialExecutor::Execute", "cat": "Session", "dur": 9_999, "args": {}}
    return [*nodes, executor, {"name": "model_run", "cat": "Session", "dur": 9_999, "args": {}}]


def test_operators_are_summed_by_type() -> None:
    trace = json.dumps([{"name": "session_initialization", "cat": "Session", "dur": 5}, *run(10), *run(20)]).encode()
    assert operator_us(trace) == {"Gemm": 60, "Mul": 30}


def test_the_first_runs_are_skipped() -> None:
    """A share of the runs: a session that runs twice a step has twice as many to skip."""
    trace = json.dumps([*run(1000), *run(1000), *run(10), *run(20)]).encode()
    assert operator_us(trace, skip=1 / 2) == {"Gemm": 60, "Mul": 30}


def test_what_disturbs_one_run_does_not_count() -> None:
    """Each operator's median stands for every run."""
    trace = json.dumps([*run(10), *run(90_000), *run(30)]).encode()
    assert operator_us(trace) == {"Gemm": 180, "Mul": 90}


def test_only_sessions_opened_inside_are_profiled(tmp_path: Path) -> None:
    """And each has a trace of its own, however fast they are opened. Only they have an arena."""
    import numpy as np

    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "x"], ["y"])],
            "graph",
            [value("x", TensorProto.FLOAT, [4, 4])],
            [value("y", TensorProto.FLOAT, [4, 4])],
        ),
        ir_version=9,
        opset_imports=[helper.make_opsetid("", 18)],
    )
    onnx.checker.check_model(model)
    data, given = model.SerializeToString(), {"x": np.ones((4, 4), np.float32)}
    with profiled(tmp_path) as profile:
        sessions = [open_session(data) for _ in range(3)]
    assert current_profile() is None
    sessions.append(open_session(data))
    for session in sessions:
        session.run(None, given)
    found = profile.finish()
    assert list(found) == ["MatMul"]
    assert sorted(path.name[:10] for path in tmp_path.iterdir()) == ["session-0_", "session-1_", "session-2_"]
    options = [session.get_session_options() for session in sessions]
    assert [option.enable_profiling for option in options] == [True, True, True, False]
    assert [option.enable_cpu_mem_arena for option in options] == [True, True, True, False]
