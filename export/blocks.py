"""The blocks of a model: where they are, what they are called with, and which of them are alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edge_runtime.bundle import Slot
from export.errors import ModelError
from export.tracing import BATCH, SEQ, SIZES

_OTHER_SIZES = {BATCH: 5, SEQ: 11}  # a second example: an axis that follows neither is a constant


@dataclass(frozen=True)
class Shared:
    """A tensor that the model computes once and hands to its blocks; ``dims`` are its symbolic axes."""

    name: str
    example: Any
    dims: dict[int, str]


@dataclass(frozen=True)
class Call:
    """How one block is called: leaves of (args, kwargs), a ``str`` standing for the shared tensor of that name.

    Leaf 0 is the hidden state and is always None here.
    """

    leaves: tuple[Any, ...]
    spec: Any

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the shared tensors, in the order in which they are first used."""
        return tuple(dict.fromkeys(leaf.name for leaf in self.leaves if isinstance(leaf, Ref)))

    def arguments(self, hidden: Any, shared: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for the block."""
        leaves = [shared[leaf.name] if isinstance(leaf, Ref) else leaf for leaf in self.leaves]
        leaves[0] = hidden
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)


@dataclass(frozen=True)
class Ref:
    """Stands for a shared tensor among the leaves of a call."""

    name: str


@dataclass(frozen=True)
class Site:
    """One block in its place: ``kind`` numbers the distinct kinds from 0."""

    prefix: str
    module: Any
    call: Call
    slots: tuple[Slot, ...]
    kind: int


def find_blocks(model: Any) -> tuple[str, Any]:
    """Path and ``ModuleList`` of the model's blocks.

    Raises:
        ModelError: there is no list of ``config.num_hidden_layers`` modules.
    """
    depth = getattr(model.config, "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return path, module
    raise ModelError(f"{type(model).__name__}: no blocks found: expected a ModuleList of {depth} modules, got none")


class _AllBlocksSeen(Exception):  # noqa: N818 - a signal, not an error
    """Raised by the last recorder: what follows the blocks need not run."""


class _Recorder(nn.Module):
    """Stands in for a block: notes its arguments and hands the hidden state on."""

    def __init__(self, seen: list[tuple[Any, Any]], last: bool) -> None:
        super().__init__()
        self.seen, self.last = seen, last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call; return the hidden state unchanged."""
        self.seen.append((args, kwargs))
        if self.last:
            raise _AllBlocksSeen
        return args[0]


@contextmanager
def _recorded(blocks: Any) -> Iterator[list[tuple[Any, Any]]]:
    seen: list[tuple[Any, Any]] = []
    saved = list(blocks)
    try:
        for index in range(len(saved)):
            recorder = _Recorder(seen, index == len(saved) - 1)
            # transformers reads flags such as the attention type from the block itself.
            for name, value in vars(saved[index]).items():
                if not name.startswith("_"):
                    recorder.__dict__.setdefault(name, value)
            blocks[index] = recorder
        yield seen
    finally:
        for index, block in enumerate(saved):
            blocks[index] = block


def record_calls(model: Any, ids: Any, mask: Any, weights: dict[str, Any] | None = None) -> list[tuple[Any, Any]]:
    """Arguments (args, kwargs) of every block when the model runs on ``ids`` and ``mask``, both (batch, seq).

    The blocks themselves do not run, so every hidden state among the arguments is the first one.

    Args:
        model: The Hugging Face model.
        ids: Token ids, int64.
        mask: 1 for a token, 0 for padding, int64.
        weights: Tensors to use in place of the model's own, by full name.

    Raises:
        ModelError: a block gets its hidden state by keyword, or the blocks do not run one after the other.
    """
    _, blocks = find_blocks(model)
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in inspect.signature(type(model).forward).parameters:
        # Stated, so that the graph needs no integer buffers of the model.
        options["token_type_ids"] = torch.zeros_like(ids)
        options["position_ids"] = torch.arange(ids.shape[1])[None, :]
    else:
        options["use_cache"] = False
    with _recorded(blocks) as seen, suppress(_AllBlocksSeen):
        torch.func.functional_call(model, weights or {}, kwargs=options)
    if len(seen) != len(blocks) or any(not args or not isinstance(args[0], torch.Tensor) for args, _ in seen):
        raise ModelError(f"{type(model).__name__}: expected blocks that run in turn with the hidden state first")
    return seen


def frozen_names(model: Any) -> tuple[str, ...]:
    """Full names of the parameters and buffers outside the blocks, shared ones once."""
    prefix = find_blocks(model)[0] + "."
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return tuple(name for name, _ in tensors if not name.startswith(prefix))


def shared_tensors(seen: Sequence[tuple[Any, Any]]) -> tuple[dict[str, Any], list[Call]]:
    """What the blocks share, by name, and each block's call with names in place of those tensors."""
    table: dict[int, str] = {}
    values: dict[str, Any] = {}
    calls = []
    for args, kwargs in seen:
        pairs, spec = pytree.tree_flatten_with_path((args, kwargs))
        leaves: list[Any] = [None]
        for path, leaf in pairs[1:]:
            if not isinstance(leaf, torch.Tensor):
                leaves.append(leaf)
                continue
            if id(leaf) not in table:
                name = _leaf_name(path, values)
                table[id(leaf)], values[name] = name, leaf
            leaves.append(Ref(table[id(leaf)]))
        calls.append(Call(tuple(leaves), spec))
    return values, calls


def _leaf_name(path: Any, taken: dict[str, Any]) -> str:
    words = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in path[1:]]
    name = base = "mask" if words[0] in ("1", "attention_mask") else ".".join(words)
    number = 1
    while name in taken:
        number += 1
        name = f"{base}.{number}"
    return name


def study(model: Any) -> tuple[dict[str, Shared], list[Call]]:
    """Run the model up to its blocks on two example sizes: what they share, and how each is called."""
    try:
        with torch.no_grad():
            values, calls = shared_tensors(record_calls(model, *_example(SIZES)))
            others, _ = shared_tensors(record_calls(model, *_example(_OTHER_SIZES)))
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        raise ModelError(f"{type(model).__name__}: cannot be run up to its blocks: {error!r:.200}") from error
    shared = {}
    for name, value in values.items():
        dims = {}
        for axis, (size, other) in enumerate(zip(value.shape, others[name].shape, strict=True)):
            matches = [key for key in (BATCH, SEQ) if size == SIZES[key] and other == _OTHER_SIZES[key]]
            if matches:
                dims[axis] = matches[0]
            elif size != other:
                raise ModelError(
                    f"{type(model).__name__}: shared tensor {name}: axis {axis} follows neither batch nor sequence"
                )
        shared[name] = Shared(name, value.detach(), dims)
    return shared, calls


def _example(sizes: dict[str, int]) -> tuple[Any, Any]:
    shape = (sizes[BATCH], sizes[SEQ])
    return torch.ones(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)


def signature(block: Any, call: Call, slots: tuple[Slot, ...]) -> tuple[Any, ...]:
    """Equal for two blocks exactly when one graph serves both.

    Holds class, tensor shapes, slots, call and every plain setting of the block's modules except its number.
    """
    settings = [
        (path, type(module).__name__, name, value)
        for path, module in block.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and name not in {"layer_idx", "training"}
    ]
    tensors = [(name, tuple(value.shape)) for name, value in [*block.named_parameters(), *block.named_buffers()]]
    return type(block), tuple(settings), tuple(tensors), slots, repr(call.leaves), str(call.spec)
