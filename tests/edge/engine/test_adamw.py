"""The optimizer against torch's, and what it must not have: state for dead factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.engine.adamw import AdamW
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.wire import Layout, Training

SHAPES = {"m.lora_a": (3, 7), "m.lora_b": (5, 3), "head.weight": (4, 5)}


def adapter(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def settings(**changes: float) -> Training:
    base = {"batch_size": 1, "max_tokens": 8, "steps": 1, "lr_a": 1e-2, "lr_b": 3e-2, "lr_head": 2e-2}
    return Training(**{**base, **changes})  # type: ignore[arg-type]


def random_steps(rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """Gradients of ten steps."""
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(10)]


def torch_steps(path: Path, changes: dict[str, float]) -> None:
    """Where torch.optim.AdamW ends, each parameter with its own learning rate."""
    import torch

    rng = np.random.default_rng(0)
    training = settings(**changes)
    tensors = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in adapter(rng).items()}
    rates = {"m.lora_a": training.lr_a, "m.lora_b": training.lr_b, "head.weight": training.lr_head}
    oracle = torch.optim.AdamW(
        [{"params": [tensors[name]], "lr": rates[name]} for name in SHAPES],
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        weight_decay=training.weight_decay,
    )
    for gradients in random_steps(rng):
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        if training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), training.clip_norm)
        oracle.step()
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.detach().numpy() for name, tensor in tensors.items()})


@pytest.fixture(
    params=[{}, {"weight_decay": 0.1}, {"clip_norm": 0.5}, {"beta1": 0.5, "eps": 1e-3}],
    ids=["plain", "decay", "clipped", "momentum"],
)
def changes(request: pytest.FixtureRequest) -> dict[str, float]:
    """What differs from the default settings."""
    return request.param  # type: ignore[no-any-return]  # pytest types it Any


@pytest.fixture
def oracle(made: Any, changes: dict[str, float]) -> dict[str, np.ndarray]:
    """Torch's answer, which may come from a machine that has torch."""
    name = "-".join(["adamw", *(f"{key}={value}" for key, value in changes.items())])
    with np.load(made(f"{name}.npz", lambda path: torch_steps(path, changes))) as stored:
        return dict(stored)


def test_ten_steps_equal_torch(changes: dict[str, float], oracle: dict[str, np.ndarray]) -> None:
    """Ten steps with three learning rates end where torch.optim.AdamW ends."""
    rng = np.random.default_rng(0)
    parameters = AdapterParameters(adapter(rng), Layout(tuple(SHAPES.items())))
    optimizer = AdamW(parameters, settings(**changes))
    for gradients in random_steps(rng):
        optimizer.step(gradients)
    for name, wanted in oracle.items():
        np.testing.assert_allclose(parameters.tensors[name], wanted, rtol=2e-5, atol=2e-6)


def test_pieces_of_any_size_take_the_same_steps(
    changes: dict[str, float], oracle: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece may hold several tensors, and a tensor several pieces."""
    monkeypatch.setattr("edge_runtime.engine.adamw._CHUNK", 8)
    test_ten_steps_equal_torch(changes, oracle)


def test_proximal_term_pulls_towards_the_start() -> None:
    """With gradient zero, FedProx's term alone moves a displaced parameter back to where the round began."""
    parameters = AdapterParameters({"m.lora_a": np.zeros((1, 4), np.float32)}, Layout((("m.lora_a", (1, 4)),)))
    parameters.flat += 1.0
    optimizer = AdamW(parameters, settings(mu=0.3))
    for _ in range(50):
        optimizer.step({"m.lora_a": np.zeros((1, 4), np.float32)})
    assert np.all(np.abs(parameters.change()) < 0.7)


def test_dead_factor_has_no_state_and_does_not_move() -> None:
    """Only alive values are in the optimizer's arrays; a dead tensor stays bit-identical and is not copied."""
    start = adapter(np.random.default_rng(1))
    parameters = AdapterParameters(start, Layout((("m.lora_b", (5, 3)),)))
    optimizer = AdamW(parameters, settings())
    assert optimizer.first.size == optimizer.second.size == parameters.flat.size == 15
    optimizer.step({"m.lora_b": np.ones((5, 3), np.float32)})
    assert parameters.tensors["m.lora_a"] is start["m.lora_a"]
    assert not np.array_equal(parameters.tensors["m.lora_b"], start["m.lora_b"])


def test_change_is_what_training_added() -> None:
    """The update is the difference to the start, in layout order."""
    start = adapter(np.random.default_rng(2))
    parameters = AdapterParameters(start, Layout((("m.lora_b", (5, 3)), ("m.lora_a", (3, 7)))))
    parameters.tensors["m.lora_a"][0, 0] += 2.0
    expected = np.zeros(36, np.float32)
    expected[15] = 2.0
    np.testing.assert_allclose(parameters.change(), expected, atol=1e-6)


@pytest.mark.parametrize("chunk", [8, 1 << 16])
def test_trained_components_move_as_if_they_were_all(
    changes: dict[str, float], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """As an adapter of these components alone would; the others stay bit-identical, and so does what was given."""
    monkeypatch.setattr("edge_runtime.engine.adamw._CHUNK", chunk)
    rng = np.random.default_rng(4)
    start, steps = adapter(rng), random_steps(rng)
    given = {name: array.copy() for name, array in start.items()}
    part = {"m.lora_a": np.s_[[0, 2], :], "m.lora_b": np.s_[:, [1]], "head.weight": np.s_[:, :]}
    blocks = tuple((name, start[name][where].shape) for name, where in part.items())
    parameters = AdapterParameters(start, Layout(blocks, None, {"m.lora_a": (0, 2), "m.lora_b": (1,)}))
    alone = AdapterParameters({name: start[name][where].copy() for name, where in part.items()}, Layout(blocks))
    training = settings(**changes, mu=0.1)
    optimizer, oracle = AdamW(parameters, training), AdamW(alone, training)
    for gradients in steps:
        norm = optimizer.step(gradients)
        assert norm == oracle.step({name: gradients[name][where] for name, where in part.items()})
    for name, where in part.items():
        expected = given[name].copy()
        expected[where] = alone.tensors[name]
        np.testing.assert_array_equal(parameters.tensors[name], expected)
        assert not np.array_equal(expected, given[name])
        np.testing.assert_array_equal(start[name], given[name])
        assert parameters.tensors[name].flags.c_contiguous
    np.testing.assert_array_equal(parameters.change(), alone.change())


def test_a_missing_gradient_is_an_error() -> None:
    """Every alive tensor must have a gradient; nothing is silently left untrained."""
    parameters = AdapterParameters(adapter(np.random.default_rng(3)), Layout(tuple(SHAPES.items())))
    with pytest.raises(KeyError):
        AdamW(parameters, settings()).step({"m.lora_a": np.zeros((3, 7), np.float32)})
