"""The head graphs: selected rows of the last hidden state to loss, metrics and gradients.

A classifier is one traced graph; its cross-entropy is written out, so that one exponential serves the loss and its
gradient and no one-hot matrix is made. A language model has its final norm traced and its output projection written
by :mod:`export.templates.vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edge_runtime.bundle import Head, Param, Task, Vocabulary
from export.clean import clean
from export.errors import ModelError
from export.templates.vocabulary import vocabulary_graph
from export.tracing import ROWS, SIZES, Input, trace

_HEAD, _VOCABULARY = "graphs/head.onnx", "graphs/vocabulary.onnx"


@dataclass(frozen=True)
class HeadGraphs:
    """The head's entry in the manifest and its graphs by file name."""

    entry: Head
    models: dict[str, Any]


@dataclass(frozen=True)
class Projection:
    """From rows (n, width) to logits (n, classes): the modules used and how.

    ``frozen`` and ``trained`` map names used by ``project`` to full parameter names.
    """

    project: Callable[[Any, dict[str, Any]], Any]
    frozen: tuple[str, ...]
    trained: tuple[str, ...] = ()
    module: str | None = None


@dataclass(frozen=True)
class LanguageHead:
    """A final norm and the output projection; names are full parameter names."""

    norm: Any
    path: str  # of the norm
    weight: str
    bias: str | None


def find_head(model: Any, task: Task) -> Projection | LanguageHead:
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


def _language_model(model: Any) -> LanguageHead:
    norm, output = getattr(model.base_model, "norm", None), model.get_output_embeddings()
    if norm is None or not isinstance(output, nn.Linear):
        raise ModelError(f"{type(model).__name__}: task lm needs a decoder with a final norm and a linear output layer")
    # A tied output layer has the embedding's weight, which is stored once under the embedding's name.
    first = {id(value): name for name, value in reversed(list(model.named_parameters()))}
    bias = None if output.bias is None else first[id(output.bias)]
    return LanguageHead(norm, _path_of(model, norm), first[id(output.weight)], bias)


def projection(model: Any, task: Task) -> Projection:
    """The whole head as one function from rows to logits, for a language model too.

    Raises:
        ModelError: the model has no head of the known form for this task.
    """
    head = find_head(model, task)
    if isinstance(head, Projection):
        return head
    leaves = {name: f"{head.path}.{name}" for name, _ in head.norm.named_parameters()}

    def project(rows: Any, tensors: dict[str, Any]) -> Any:
        normed = torch.func.functional_call(head.norm, {leaf: tensors[name] for leaf, name in leaves.items()}, (rows,))
        return nn.functional.linear(normed, tensors[head.weight], tensors[head.bias] if head.bias else None)

    return Projection(project, (*leaves.values(), head.weight, *([head.bias] if head.bias else [])))


def _path_of(model: Any, wanted: Any) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def head_graphs(model: Any, task: Task, width: int) -> HeadGraphs:
    """Make the head's graphs.

    Raises:
        ModelError: the model has no head of the known form for this task.
        TraceError: one cannot be traced.
    """
    head = find_head(model, task)
    if isinstance(head, Projection):
        return _classifier_graph(head, dict(model.named_parameters()), width)
    return _language_graphs(head, width)


def _classifier_graph(head: Projection, tensors: dict[str, Any], width: int) -> HeadGraphs:
    params = tuple(name.removeprefix(f"{head.module}.") for name in head.trained)
    inputs = [
        Input("rows", torch.randn(SIZES[ROWS], width), {0: ROWS}),
        Input("labels", torch.zeros(SIZES[ROWS], dtype=torch.int64), {0: ROWS}),
        Input("grad_scale", torch.tensor(1.0)),
        *(Input(f"w:{name}", tensors[name]) for name in head.frozen),
        *(Input(f"p:{param}", tensors[name]) for param, name in zip(params, head.trained, strict=True)),
    ]
    outputs = ["logits", "loss_sum", "correct", "d_rows", *(f"d_p:{param}" for param in params)]
    entry = Head(
        graph=_HEAD,
        select="first",
        weights=head.frozen,
        module=head.module,
        params=tuple(
            Param(param, tuple(tensors[name].shape)) for param, name in zip(params, head.trained, strict=True)
        ),
    )
    return HeadGraphs(entry, {_HEAD: clean(trace(_loss(head), inputs, outputs))})


def _language_graphs(head: LanguageHead, width: int) -> HeadGraphs:
    names = [name for name, _ in head.norm.named_parameters()]
    example = torch.randn(SIZES[ROWS], width)

    def norm(rows: Any, *rest: Any) -> tuple[Any, Any]:
        *values, d_normed = rest
        rows = rows.detach().requires_grad_()
        with torch.enable_grad():
            normed = torch.func.functional_call(head.norm, dict(zip(names, values, strict=True)), (rows,))
        return normed.detach(), *torch.autograd.grad(normed, [rows], d_normed)

    inputs = [
        Input("rows", example, {0: ROWS}),
        *(Input(f"w:{head.path}.{name}", head.norm.get_parameter(name)) for name in names),
        Input("d_normed", example.clone(), {0: ROWS}),
    ]
    weights = (head.weight, head.bias) if head.bias else (head.weight,)
    entry = Head(
        graph=_HEAD,
        select="target",
        weights=tuple(f"{head.path}.{name}" for name in names),
        vocabulary=Vocabulary(_VOCABULARY, weights),
    )
    models = {
        _HEAD: clean(trace(norm, inputs, ["normed", "d_rows"])),
        _VOCABULARY: vocabulary_graph(head.weight, head.bias, width),
    }
    return HeadGraphs(entry, models)


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
