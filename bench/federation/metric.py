"""What a run is judged by, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from edge_runtime.engine.interface import Score

_NEARLY = 0.95


@dataclass(frozen=True)
class Metric:
    """A number about held-out examples.

    Attributes:
        name: Its field in the results.
        title: With its unit, for people.
        sign: 1 where more is better, -1 where less is.
        origin: From where learning is counted; None: from what there is before the first round.
    """

    name: Literal["accuracy", "loss"]
    title: str
    sign: Literal[1, -1]
    origin: float | None

    def of(self, score: Score) -> float:
        """Of the examples that were scored."""
        return score.correct / score.rows if self.name == "accuracy" else score.loss

    def fields(self, value: float | None) -> tuple[float | None, float | None]:
        """(accuracy, loss) of a line of results: the value in its own place, None in the other."""
        return (value, None) if self.name == "accuracy" else (None, value)

    def best(self, values: Iterable[float | None]) -> float:
        """Of those that were measured, one or more."""
        return self.sign * max(self.sign * value for value in values if value is not None)

    def nearly(self, start: float, values: Iterable[float | None]) -> float:
        """95 % of the way from the origin to the best of the values; ``start`` is before the first round."""
        origin = start if self.origin is None else self.origin
        return origin + _NEARLY * (self.best(values) - origin)

    def reached(self, value: float | None, target: float) -> bool:
        """Whether something as good was measured."""
        return value is not None and self.sign * (value - target) >= 0

    def rounds_until(self, target: float, values: Sequence[float | None]) -> int | None:
        """The first round, counted from 1, whose value is as good; None without one."""
        return next((n for n, value in enumerate(values, start=1) if self.reached(value, target)), None)


ACCURACY = Metric("accuracy", "accuracy", 1, 0.0)
LOSS = Metric("loss", "held-out loss, nats a token", -1, None)
