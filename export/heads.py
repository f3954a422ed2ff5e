"""The head graph: selected rows of the last hidden state to loss, metrics and gradients.

The cross-entropy is written out, so that one exponential serves the loss and its gradient and no one-hot matrix is
made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edge_runtime.bundle import Head, Param, Task
from export.clean import clean
from export.errors import ModelError
from export.tracing import ROWS, SIZES, Input, trace


@dataclass(frozen=True)
class Projection:
    """From rows (n, width) to logits (n, classes): the modules used and how.

    ``frozen`` and ``trained`` map names used by ``project`` to full parameter names.
    """

    project: Callable[[Any, dict[str, Any]], Any]
    frozen: tuple[str, ...]
    trained: tuple[str, ...] = ()
    module: str | None = None


def projection(model: Any, task: Task) -> Projection:
    """Find the head of a model.

    Raises:
        ModelError: the model has no head of the known form for this task.
    """
    return _classifier(model) if task == "classify" else _language_model(model)


def _classifier(model: Any) -> Projection:
    pooler, classifier = getattr(model.base_model, "pooler", None), getattr(model, "classifier", None)
    if getattr(model.config, "is_decoder", False) or pooler is None or not isinstance(classifier, nn.Linear):
        raise ModelError(
            f"{type(model).__name__}: task classify needs a BERT-like encoder with a pooler and a linear classifier"
        )
    prefix = _path_of(model, pooler)

    def project(rows: Any, tensors: dict[str, Any]) -> Any:
        inner = {
            name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")
        }
        pooled = torch.func.functional_call(pooler, inner, (rows[:, None, :],))
        return nn.functional.linear(pooled, tensors["classifier.weight"], tensors["classifier.bias"])

    frozen = tuple(f"{prefix}.{name}" for name, _ in pooler.named_parameters())
    return Projection(project, frozen, ("classifier.weight", "classifier.bias"), "classifier")


def _language_model(model: Any) -> Projection:
    norm, output = getattr(model.base_model, "norm", None), model.get_output_embeddings()
    if norm is None or not isinstance(output, nn.Linear):
        raise ModelError(f"{type(model).__name__}: task lm needs a decoder with a final norm and a linear output layer")
    prefix = _path_of(model, norm)
    # A tied output layer has the embedding's weight, which is stored once under the embedding's name.
    first = {id(value): name for name, value in reversed(list(model.named_parameters()))}
    weight = first[id(output.weight)]
    bias = None if output.bias is None else first[id(output.bias)]

    def project(rows: Any, tensors: dict[str, Any]) -> Any:
        inner = {
            name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")
        }
        normed = torch.func.functional_call(norm, inner, (rows,))
        return nn.functional.linear(normed, tensors[weight], None if bias is None else tensors[bias])

    frozen = [f"{prefix}.{name}" for name, _ in norm.named_parameters()] + [weight] + ([bias] if bias else [])
    return Projection(project, tuple(frozen))


def _path_of(model: Any, wanted: Any) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def head_graph(model: Any, task: Task, width: int) -> tuple[Head, Any]:
    """Trace the head.

    Raises:
        ModelError: the model has no head of the known form for this task.
        TraceError: it cannot be traced.
    """
    head = projection(model, task)
    tensors = dict(model.named_parameters())
    params = tuple(name.removeprefix(f"{head.module}.") for name in head.trained)
    inputs = [
        Input("rows", torch.randn(SIZES[ROWS], width), {0: ROWS}),
        Input("labels", torch.zeros(SIZES[ROWS], dtype=torch.int64), {0: ROWS}),
        Input("grad_scale", torch.tensor(1.0)),
        *(Input(f"w:{name}", tensors[name]) for name in head.frozen),
        *(Input(f"p:{param}", tensors[name]) for param, name in zip(params, head.trained, strict=True)),
    ]
    outputs = ["logits", "loss_sum", "correct", "d_rows", *(f"d_p:{param}" for param in params)]
    graph = clean(trace(_loss(head), inputs, outputs))
    entry = Head(
        graph="graphs/head.onnx",
        select="first" if task == "classify" else "target",
        weights=head.frozen,
        module=head.module,
        params=tuple(
            Param(param, tuple(tensors[name].shape)) for param, name in zip(params, head.trained, strict=True)
        ),
    )
    return entry, graph


def _loss(head: Projection) -> Callable[..., tuple[Any, ...]]:
    """The function (rows, labels, grad_scale, weights…) -> (logits, loss_sum, correct, d_rows, d_params…)."""
    names: Sequence[str] = (*head.frozen, *head.trained)

    def loss(rows: Any, labels: Any, grad_scale: Any, *values: Any) -> tuple[Any, ...]:
        tensors = dict(zip(names, values, strict=True))
        rows = rows.detach().requires_grad_()
        for name in head.trained:
            tensors[name] = tensors[name].detach().requires_grad_()
        with torch.enable_grad():
            logits = head.project(rows, tensors)
        fixed, gold = logits.detach(), labels[:, None]  # (n, classes), (n, 1)
        top = fixed.amax(dim=1, keepdim=True)
        powers = torch.exp(fixed - top)
        total = powers.sum(dim=1, keepdim=True)
        loss_sum = (top + torch.log(total) - fixed.gather(1, gold)).sum()
        correct = (fixed.argmax(dim=1) == labels).to(torch.int64).sum()
        probabilities = powers * (grad_scale / total)
        d_logits = probabilities.scatter(1, gold, probabilities.gather(1, gold) - grad_scale)
        grads = torch.autograd.grad(logits, [rows, *(tensors[name] for name in head.trained)], d_logits)
        return fixed, loss_sum, correct, *grads

    return loss
