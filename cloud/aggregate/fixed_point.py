"""A weighted sum of updates in 64-bit fixed point: exact, whatever the order, in memory that does not grow.

An update's value v with weight w enters as ``round(v · 2**fraction_bits) · w``. The plan's bounds keep the sum of
``max_devices`` such terms inside 63 bits, so nothing overflows and integer addition loses nothing: adding is
associative and commutative, and an empty sum is its identity. Only the rounding of each value, at most
2**-(fraction_bits + 1), is lost.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_runtime.wire import UpdateRules

_CHUNK = 1 << 16  # values rounded at once: 512 kB of temporary float64, whatever the update's size


class UpdateSum:
    """Sum of weighted updates of one layout, shape (count,)."""

    def __init__(self, count: int, rules: UpdateRules) -> None:
        self._total: npt.NDArray[np.int64] = np.zeros(count, np.int64)
        self._rules = rules
        self._scale = float(2**rules.fraction_bits)
        self.weight = 0
        self.devices = 0

    def capped(self, weight: int) -> int:
        """The weight as it counts."""
        return min(weight, self._rules.weight_cap)

    def add(self, values: npt.NDArray[np.float32], weight: int) -> None:
        """Add one update.

        Args:
            values: The change, shape (count,), already checked against the plan's rules.
            weight: The device's weight before the cap, at least 1.

        Raises:
            ValueError: another shape, or more devices than the rules leave room for; nothing was added then.
        """
        if values.shape != self._total.shape:
            raise ValueError(f"sum: expected values of shape {self._total.shape}, got {values.shape}")
        self._take_room(1)
        factor = self.capped(weight)
        buffer = np.empty(min(_CHUNK, len(values)), np.float64)
        for start in range(0, len(values), _CHUNK):
            part = values[start : start + _CHUNK]
            scaled = buffer[: len(part)]
            np.multiply(part, self._scale, out=scaled, dtype=np.float64)
            np.rint(scaled, out=scaled)
            # Exact: |value|·2**fraction_bits has at most 53 significant bits before it becomes an integer.
            terms = scaled.astype(np.int64)
            terms *= factor
            self._total[start : start + _CHUNK] += terms
        self.weight += factor

    def merge(self, other: UpdateSum) -> None:
        """Add everything another sum of the same layout holds.

        Raises:
            ValueError: another shape, or too many devices together; nothing was added then.
        """
        if other._total.shape != self._total.shape:
            raise ValueError(f"sum: expected shape {self._total.shape}, got {other._total.shape}")
        self._take_room(other.devices)
        self._total += other._total
        self.weight += other.weight

    def minus(self, other: UpdateSum) -> UpdateSum:
        """The sum without what another sum of the same layout holds; exactly the sum of the rest if all of that is in
        this one. Neither of the two changes.

        Raises:
            ValueError: another shape, or more devices or weight than there are here.
        """
        if other._total.shape != self._total.shape:
            raise ValueError(f"sum: expected shape {self._total.shape}, got {other._total.shape}")
        if other.devices > self.devices or other.weight > self.weight:
            raise ValueError(f"sum: holds {self.devices} devices of weight {self.weight}: cannot take away more")
        rest = UpdateSum(len(self._total), self._rules)
        np.subtract(self._total, other._total, out=rest._total)
        rest.devices, rest.weight = self.devices - other.devices, self.weight - other.weight
        return rest

    @property
    def total(self) -> npt.NDArray[np.int64]:
        """The sum as it is kept, shape (count,): the weighted sum times ``2**fraction_bits``; not to be written to."""
        return self._total

    def sums(self) -> npt.NDArray[np.float64]:
        """The weighted sum, shape (count,), float64."""
        return self._total / self._scale

    def mean(self) -> npt.NDArray[np.float64]:
        """The weighted mean, shape (count,), float64; zeros for an empty sum."""
        return self._total / (self._scale * max(self.weight, 1))

    def _take_room(self, devices: int) -> None:
        if self.devices + devices > self._rules.max_devices:
            raise ValueError(f"sum: room for {self._rules.max_devices} devices, got {self.devices + devices}")
        self.devices += devices
