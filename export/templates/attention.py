"""Softmax attention with grouped key/value heads and rotary positions, forward and backward.

The query heads of one group are stacked along the sequence, so that keys and values are never repeated, and the sums
over a group that their gradients need are part of the product. The softmax's gradient uses
rowsum(P ∘ dP) = rowsum(dO ∘ O) (Dao et al., arXiv 2205.14135), which reads no (seq, seq) tensor.

Where no position sees a later one, queries may be taken in chunks, each of which meets only the keys up to its own end:
of four chunks' products and probabilities 5/8 are left. The operators are four times as many, so it pays for long
sequences only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from export.templates.builder import GraphBuilder
from export.tracing import HIDDEN

# d_mixed (tokens, heads · dim) to the gradients of query, key and value, shaped like them.
AttentionBackward = Callable[[str], tuple[str, str, str]]


@dataclass(frozen=True)
class Rotary:
    """Rotary positions from the shared tables ``cos`` and ``sin`` (1, seq, dim), whose two halves are equal."""

    cos: str
    sin: str

    def tables(self, g: GraphBuilder, dim: int, *, back: bool) -> tuple[str, str]:
        """Both tables as the operator wants them, (seq, dim / 2); ``back`` turns the other way."""
        cos, sin = (self._half(g, name, dim) for name in (self.cos, self.sin))
        return cos, g.op("Neg", sin) if back else sin

    def _half(self, g: GraphBuilder, name: str, dim: int) -> str:
        half = g.op("Slice", name, g.sizes(0), g.sizes(dim // 2), g.sizes(2))
        return g.reshape(half, -1, dim // 2)


@dataclass(frozen=True)
class _Span:
    """The positions from ``first`` to before ``end``, int64 (1,) each; all of them where nothing is said."""

    first: str | None = None
    end: str | None = None

    def of(self, g: GraphBuilder, x: str) -> str:
        """These positions of x (batch, ·, seq, ·)."""
        return x if self.first is None else g.op("Slice", x, self.first, str(self.end), g.sizes(2))

    def before_end(self, g: GraphBuilder, x: str, axis: int = 2) -> str:
        """The positions of x that these see: all before the end."""
        return x if self.end is None else g.op("Slice", x, g.sizes(0), self.end, g.sizes(axis))

    def summed(self, g: GraphBuilder, shorter: str | None, x: str) -> str:
        """Gradients of what these positions see, x (batch, ·, end, ·), plus those from the positions before them."""
        if shorter is None:
            return x
        more = g.op("Concat", g.sizes(0), g.op("Sub", str(self.end), str(self.first)), axis=0)
        return g.op("Add", x, g.op("Pad", shorter, more, "", g.sizes(2)))


@dataclass(frozen=True)
class Attention:
    """Attention of ``heads`` query heads over ``groups`` key/value heads of size ``dim``.

    ``mask`` is additive, (batch, 1, 1, seq), or with ``square`` (batch, 1, seq, seq). With several ``chunks`` it must
    be square and close every later position.
    """

    heads: int
    groups: int
    dim: int
    scaling: float
    mask: str
    square: bool
    rotary: Rotary | None = None
    chunks: int = 1

    def forward(self, g: GraphBuilder, query: str, key: str, value: str) -> tuple[str, AttentionBackward]:
        """Attend; query (tokens, heads · dim), key and value (tokens, groups · dim).

        Returns:
            The result, shaped like query, and what appends the backward pass.
        """
        q, k = self._turn(g, (self._split(g, query, self.heads), self._split(g, key, self.groups)), back=False)
        v = self._split(g, value, self.groups)
        spans = self._spans(g)
        probabilities = [self._probabilities(g, span, q, k) for span in spans]
        parts = [
            self._unstack(g, g.op("FusedMatMul", p, span.before_end(g, v)))
            for span, p in zip(spans, probabilities, strict=True)
        ]
        mixed = self._join(g, _concat(g, parts), self.heads)

        def backward(d_mixed: str) -> tuple[str, str, str]:
            d_o, inner = self._split(g, d_mixed, self.heads), self._inner(g, d_mixed, mixed)
            d_qs: list[str] = []
            d_k: str | None = None
            d_v: str | None = None
            for span, p in zip(spans, probabilities, strict=True):
                d_part = self._stack(g, span.of(g, d_o))
                d_p = g.op("FusedMatMul", d_part, span.before_end(g, v), transB=1)
                d_s = g.op("Mul", g.op("Sub", d_p, self._stack(g, span.of(g, inner), size=1)), p)
                q_part, k_part = self._stack(g, span.of(g, q)), span.before_end(g, k)
                d_qs.append(self._unstack(g, g.op("FusedMatMul", d_s, k_part, alpha=self.scaling)))
                d_k = span.summed(g, d_k, g.op("FusedMatMul", d_s, q_part, transA=1, alpha=self.scaling))
                d_v = span.summed(g, d_v, g.op("FusedMatMul", p, d_part, transA=1))
            d_q, d_k = self._turn(g, (_concat(g, d_qs), str(d_k)), back=True)
            return self._join(g, d_q, self.heads), self._join(g, d_k, self.groups), self._join(g, str(d_v), self.groups)

        return mixed, backward

    def _spans(self, g: GraphBuilder) -> list[_Span]:
        """The chunks of the queries."""
        if self.chunks == 1:
            return [_Span()]
        size = g.op("Shape", HIDDEN, start=1, end=2)
        ends = [g.op("Div", g.op("Mul", size, g.sizes(n)), g.sizes(self.chunks)) for n in range(1, self.chunks)]
        return [_Span(*pair) for pair in zip([g.sizes(0), *ends], [*ends, size], strict=True)]

    def _probabilities(self, g: GraphBuilder, span: _Span, query: str, key: str) -> str:
        """(batch, groups, heads / groups · positions, seen positions)."""
        rows = self._stack(g, span.of(g, query))
        scores = g.op("FusedMatMul", rows, span.before_end(g, key), transB=1, alpha=self.scaling)
        mask = span.before_end(g, span.of(g, self.mask), axis=3)
        if not self.square or self.heads == self.groups:
            return g.op("Softmax", g.op("Add", scores, mask), axis=-1)
        by_head = g.reshape(scores, 0, self.heads, -1, 0)  # a square mask has a row per position, not per stacked row
        return g.reshape(g.op("Softmax", g.op("Add", by_head, mask), axis=-1), 0, self.groups, -1, 0)

    def _inner(self, g: GraphBuilder, d_mixed: str, mixed: str) -> str:
        """rowsum(dO ∘ O), (batch, heads, seq, 1)."""
        by_head = g.by_position(g.op("Mul", d_mixed, mixed), self.heads, self.dim)
        return g.op("Transpose", g.op("ReduceSum", by_head, g.sizes(3), keepdims=1), perm=[0, 2, 1, 3])

    def _turn(self, g: GraphBuilder, pair: tuple[str, str], *, back: bool) -> tuple[str, str]:
        if self.rotary is None:
            return pair
        tables = self.rotary.tables(g, self.dim, back=back)
        query, key = (g.op("RotaryEmbedding", x, g.sizes(0), *tables) for x in pair)
        return query, key

    def _split(self, g: GraphBuilder, x: str, heads: int) -> str:
        """(tokens, heads · dim) to (batch, heads, seq, dim)."""
        return g.op("Transpose", g.by_position(x, heads, self.dim), perm=[0, 2, 1, 3])

    def _join(self, g: GraphBuilder, x: str, heads: int) -> str:
        """(batch, heads, seq, dim) to (tokens, heads · dim)."""
        return g.reshape(g.op("Transpose", x, perm=[0, 2, 1, 3]), -1, heads * self.dim)

    def _stack(self, g: GraphBuilder, x: str, size: int | None = None) -> str:
        """(batch, heads, positions, size) to (batch, groups, heads / groups · positions, size)."""
        return x if self.heads == self.groups else g.reshape(x, 0, self.groups, -1, size or self.dim)

    def _unstack(self, g: GraphBuilder, x: str) -> str:
        return x if self.heads == self.groups else g.reshape(x, 0, self.heads, -1, self.dim)


def _concat(g: GraphBuilder, parts: Sequence[str]) -> str:
    """Positions one part after the other."""
    return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=2)
