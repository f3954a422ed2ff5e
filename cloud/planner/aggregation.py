"""Which factors of a living module are trained in a round, and so what averaging them gives.

A device k of weight p_k holds the product B_k·A_k at the end of a round; the aim is the mean of these products.

- ``alternate`` (RoLoRA): B, then A, and so on; the other factor is the same on every device. Exact, and half the bytes.
- ``b-only`` (FFA-LoRA, arXiv 2403.12313): B always. Exact; A stays as it began.
- ``a-only`` (FedSA-LoRA, arXiv 2410.01463): A always, while each device trains a B of its own that it keeps. Exact for
  A; a mean of the products is not asked for.
- ``both`` (FedIT, arXiv 2305.05644): both factors, each averaged by itself. **Inexact**: mean(B)·mean(A) lacks
  Σ p_k (B_k − B̄)(A_k − Ā). It is here to be compared with.
- ``stack`` (FLoRA, FlexLoRA): both factors, and the mean of the products, cut to the module's rank; see
  :mod:`cloud.aggregate.stack`. Exact up to the cut. Updates have to be opened one by one, and components are new after
  every round.
"""

from __future__ import annotations

from typing import Literal

Alive = Literal["A", "B", "AB"]

# What a module trains in its first living round, its second, and so on; then again from the start. A is random and B
# zero at the start, so B has to move first: with B = 0 a round of A has no gradient.
AGGREGATIONS: dict[str, tuple[Alive, ...]] = {
    "alternate": ("B", "A"),
    "b-only": ("B",),
    "a-only": ("A",),
    "both": ("AB",),
    "stack": ("AB",),
}
