"""Softmax attention with grouped key/value heads and rotary positions, forward and backward.

The query heads of one group are stacked along the sequence, so that keys and values are never repeated, and the sums
over a group that their gradients need are part of the product. The softmax's gradient uses
rowsum(P ∘ dP) = rowsum(dO ∘ O) (Dao et al., arXiv 2205.14135), which reads no (seq, seq) tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.templates.builder import GraphBuilder


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
class Attended:
    """What the forward pass leaves.

    mixed (tokens, heads · dim) is the result. For the backward pass: query and stacked result (batch, groups,
    heads / groups · seq, dim), key and value (batch, groups, seq, dim), probabilities (batch, groups,
    heads / groups · seq, seq).
    """

    mixed: str
    query: str
    key: str
    value: str
    probabilities: str
    stacked: str


@dataclass(frozen=True)
class Attention:
    """Attention of ``heads`` query heads over ``groups`` key/value heads of size ``dim``.

    ``mask`` is additive, (batch, 1, 1, seq), or with ``square`` (batch, 1, seq, seq).
    """

    heads: int
    groups: int
    dim: int
    scaling: float
    mask: str
    square: bool
    rotary: Rotary | None = None

    def forward(self, g: GraphBuilder, query: str, key: str, value: str) -> Attended:
        """Attend; query (tokens, heads · dim), key and value (tokens, groups · dim)."""
        q, k = self._split(g, query, self.heads), self._split(g, key, self.groups)
        q, k = self._turn(g, (q, k), back=False)
        q, v = self._stack(g, q), self._split(g, value, self.groups)
        scores = g.op("FusedMatMul", q, k, transB=1, alpha=self.scaling)
        probabilities = self._softmax(g, scores)
        stacked = g.op("FusedMatMul", probabilities, v)
        mixed = self._join(g, self._unstack(g, stacked), self.heads)
        return Attended(mixed, q, k, v, probabilities, stacked)

    def backward(self, g: GraphBuilder, d_mixed: str, made: Attended) -> tuple[str, str, str]:
        """Gradients of query, key and value, shaped like them, from that of the result."""
        d_o = self._stack(g, self._split(g, d_mixed, self.heads))
        d_v = g.op("FusedMatMul", made.probabilities, d_o, transA=1)
        d_p = g.op("FusedMatMul", d_o, made.value, transB=1)
        inner = g.op("ReduceSum", g.op("Mul", d_o, made.stacked), g.sizes(3), keepdims=1)
        d_s = g.op("Mul", g.op("Sub", d_p, inner), made.probabilities)
        d_q = self._unstack(g, g.op("FusedMatMul", d_s, made.key, alpha=self.scaling))
        d_k = g.op("FusedMatMul", d_s, made.query, transA=1, alpha=self.scaling)
        d_q, d_k = self._turn(g, (d_q, d_k), back=True)
        return self._join(g, d_q, self.heads), self._join(g, d_k, self.groups), self._join(g, d_v, self.groups)

    def _turn(self, g: GraphBuilder, pair: tuple[str, str], *, back: bool) -> tuple[str, str]:
        if self.rotary is None:
            return pair
        tables = self.rotary.tables(g, self.dim, back=back)
        query, key = (g.op("RotaryEmbedding", x, g.sizes(0), *tables) for x in pair)
        return query, key

    def _softmax(self, g: GraphBuilder, scores: str) -> str:
        if not self.square or self.heads == self.groups:
            return g.op("Softmax", g.op("Add", scores, self.mask), axis=-1)
        by_head = g.reshape(scores, 0, self.heads, -1, 0)  # a square mask has a row per position, not per stacked row
        return g.reshape(g.op("Softmax", g.op("Add", by_head, self.mask), axis=-1), 0, self.groups, -1, 0)

    def _split(self, g: GraphBuilder, x: str, heads: int) -> str:
        """(tokens, heads · dim) to (batch, heads, seq, dim)."""
        return g.op("Transpose", g.by_position(x, heads, self.dim), perm=[0, 2, 1, 3])

    def _join(self, g: GraphBuilder, x: str, heads: int) -> str:
        """(batch, heads, seq, dim) to (tokens, heads · dim)."""
        return g.reshape(g.op("Transpose", x, perm=[0, 2, 1, 3]), -1, heads * self.dim)

    def _stack(self, g: GraphBuilder, x: str) -> str:
        return x if self.heads == self.groups else g.reshape(x, 0, self.groups, -1, self.dim)

    def _unstack(self, g: GraphBuilder, x: str) -> str:
        return x if self.heads == self.groups else g.reshape(x, 0, self.heads, -1, self.dim)
