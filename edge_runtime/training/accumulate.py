"""The gradient of a batch in pieces that fit: its mean over all rows, however it is divided.

A batch is divided by length, so that short examples are not padded to the longest. The result is the same up to the
rounding of float32 sums, which is what makes dividing a free choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.bundle import WEIGHTS_FILE, Array, Manifest
from edge_runtime.data import Batch, bucket_length
from edge_runtime.engine.budget import share_out
from edge_runtime.engine.interface import Engine, Gradients, Ids, Score

MICRO_TOKENS = 4096  # a matrix product is as fast as it gets long before; beyond, only memory grows
_MIN_MICRO_TOKENS = 256  # below, every pass reads all weights for little work
# Dividing what fits must save this share of the padded tokens, and as many tokens as one more pass over the weights is
# worth: with fewer rows than about a hundred a product waits for its weights.
_SAVED_SHARE = 0.2
_SAVED_TOKENS = 128


def default_micro_tokens(manifest: Manifest, memory_budget_mb: float | None) -> int:
    """Tokens, padding included, that go through the model at once when the user has not said.

    Whatever else is kept or recomputed, the input of every block of every token is held until its backward pass. It
    may take half of what the budget leaves for activations.

    Args:
        manifest: Of the bundle that is trained.
        memory_budget_mb: For weights and activations, in MiB, see :mod:`edge_runtime.engine.budget`; None stands for
            60 % of the free memory.
    """
    weights = manifest.files.get(WEIGHTS_FILE)  # none for the engine ort-training, whose artifacts hold them
    left = share_out(memory_budget_mb, weights.bytes if weights else 0).activations
    token_bytes = 4 * manifest.width * len(manifest.blocks)
    return min(max(left // 2 // token_bytes, _MIN_MICRO_TOKENS), MICRO_TOKENS)


def accumulate(engine: Engine, batch: Batch, max_tokens: int) -> Gradients:
    """Loss and gradient of the batch's mean loss, in pieces of ``max_tokens`` with padding at most.

    Besides the sum, only the gradients of one piece are held.

    Args:
        engine: With an adapter in use.
        batch: Every example of it has a row.
        max_tokens: A single example may have more.
    """
    parts = micro_batches(batch, max_tokens)
    if len(parts) == 1:
        return engine.gradients(batch)
    score = Score()
    sums: dict[str, Array] = {}
    importance: list[Array | None] = []
    for part in parts:
        more, own = _add(sums, engine.gradients(part), np.float32(part.weight / batch.weight))
        score += more
        importance.append(own)
    return Gradients(score, sums, _joined(batch, parts, importance))


def _add(sums: dict[str, Array], made: Gradients, share: np.float32) -> tuple[Score, Array | None]:
    """Add a piece's share; a function, so that its gradients are gone before the next piece makes its own."""
    for name, gradient in made.tensors.items():
        if name in sums:
            sums[name] += share * gradient
        else:
            sums[name] = share * gradient
    return made.score, made.importance


def _joined(batch: Batch, parts: Sequence[Batch], importance: Sequence[Array | None]) -> Array | None:
    """The pieces' importance in the batch's order, which that of every piece follows; None where a piece has none."""
    found = np.empty(len(batch.examples), np.float32)
    for part, mine in zip(parts, importance, strict=True):
        if mine is None:
            return None
        found[np.isin(batch.examples, part.examples)] = mine
    return found


def micro_batches(batch: Batch, max_tokens: int) -> list[Batch]:
    """The batch in pieces of like lengths, each padded to its own bucket; the batch itself when that is best.

    A piece is divided, and its parts again, where that saves a fifth of its padded tokens and at least 128, and while
    it has more than ``max_tokens``. One example is never divided, whatever its length.
    """
    lengths = batch.attention_mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    width = batch.input_ids.shape[1]
    widths = np.array([bucket_length(int(length), width) for length in lengths[order]])
    pieces = _pieces(widths, max_tokens)
    if len(pieces) == 1:
        return [batch]
    return [_part(batch, np.sort(order[piece]), int(widths[piece][-1])) for piece in pieces]


def _pieces(widths: Ids, max_tokens: int) -> list[slice]:
    """Neighbours among the examples in order of length; those with the longest come first and need most memory."""
    pending, pieces = [slice(0, len(widths))], []
    while pending:
        piece = pending.pop()
        cut = piece.start + _cut(widths[piece], max_tokens)
        if cut == piece.stop:
            pieces.append(piece)
        else:
            pending += [slice(piece.start, cut), slice(cut, piece.stop)]
    return pieces


def _cut(widths: Ids, max_tokens: int) -> int:
    """How many of the shorter examples to part from the longer ones; all of them when none should be."""
    count, widest = len(widths), int(widths[-1])
    padded = count * widest
    saved = np.arange(1, count) * (widest - widths[:-1])
    if count > 1 and saved.max() >= max(_SAVED_SHARE * padded, _SAVED_TOKENS):
        return int(saved.argmax()) + 1
    fitting = max(1, max_tokens // widest)
    pieces = -(-count // fitting)
    return count if pieces == 1 else count - -(-count // pieces)


def _part(batch: Batch, chosen: Ids, width: int) -> Batch:
    """These examples of the batch, ascending, padded to ``width`` tokens."""
    number = np.full(len(batch.examples), -1)
    number[chosen] = np.arange(len(chosen))
    owner, place = np.divmod(batch.rows, batch.input_ids.shape[1])
    mine = number[owner] >= 0
    return Batch(
        input_ids=np.ascontiguousarray(batch.input_ids[chosen, :width]),
        attention_mask=np.ascontiguousarray(batch.attention_mask[chosen, :width]),
        rows=number[owner[mine]] * width + place[mine],
        labels=batch.labels[mine],
        examples=batch.examples[chosen],
    )
