"""How large a change of each tensor a code of a quantised update has to be able to say. Pure.

Ranges stand in the plan, the same for all devices, and come from what the server knows: the mean changes of the rounds
before. A range that is too small costs time, as a device keeps what did not fit for its next update; one that is too
large costs precision, as the codes lie farther apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from cloud.planner.scores import PastRound
from edge_runtime.wire import Training

# Largest change of one device over that of the mean. Devices with different data move an element differently, and a
# mean is smaller than its terms; what was left of earlier rounds is added, too. It also lets a range grow: clipped
# means reach the range, so 2.5 times as much fits in the tensor's next round. And it lets one fall: where nothing but
# rounding is left, means are a code or two of int4, 2.5/7 or 5/7 of the range. Not measured on real data yet.
HEADROOM = 2.5
STEPS_AN_EPOCH = 16  # assumed: a server does not know how many examples a device has
SMALLEST = 1e-6  # where learning rates are 0 and nothing moves; a range of 0 would say nothing at all

# The step of three levels that costs a normally distributed value least, 0.19 of its variance (Max 1960). Values beyond
# half a step are sent, 54 % of them.
TERNARY_STEP = 1.224  # standard deviations
_SENT = 0.54


def update_ranges(
    names: Iterable[str], training: Training, past: Sequence[PastRound], *, max_abs: float
) -> tuple[float, ...]:
    """The range of every tensor.

    A tensor that was moved before gets HEADROOM times the largest absolute mean change of the last round that moved
    it, in proportion to the learning rates of then and now. AdamW moves a parameter by about the learning rate a step,
    so steps times that rate bounds it where the steps are known; it is the range of a tensor that has never moved. One
    step is the least, because AdamW's first step moves by the whole rate whatever the gradient.

    Args:
        names: Of the tensors, in layout order: factors end in ``.lora_a`` or ``.lora_b``, others are the head's.
        training: How devices train in the round.
        past: Every applied round, in order.
        max_abs: No change may be larger.

    Returns:
        One range a name, more than 0, at most ``max_abs``, of three digits so that plans stay small.
    """
    return tuple(_written(_range(name, training, past), max_abs) for name in names)


def ternary_ranges(
    names: Iterable[str], training: Training, past: Sequence[PastRound], *, max_abs: float, devices: int
) -> tuple[float, ...]:
    """The range of every tensor where a code says no more than whether a value rises, falls or stays.

    It should be TERNARY_STEP times what one device's changes usually are, of which a server that knows sums alone has
    only the mean: ``devices`` unrelated changes have one of 1/√devices their size. Where devices agree the range is
    too large by up to √devices, and there the mean of many codes, of which each says little, says it as well. Ternary
    codes hold 0.9 of a change's size, so the range would shrink by itself: that is made up for, and share _SENT of the
    codes is where it settles, from above and from below.

    A tensor that has never moved gets what unrelated steps of AdamW would add up to.

    Args:
        names, training, past, max_abs: See :func:`update_ranges`.
        devices: Whose updates make a mean.

    Returns:
        One range a name, more than 0, at most ``max_abs``, of three digits so that plans stay small.
    """
    found = []
    for name in names:
        rate = _rate(name, training)
        rms = _scaled(name, rate, past, lambda round_, name: round_.rms.get(name, 0.0))
        unrelated = TERNARY_STEP * rate * math.sqrt(_steps(training))
        found.append(unrelated if rms is None else rms * math.sqrt(devices / _SENT))
    return tuple(_written(max(range_, SMALLEST), max_abs) for range_ in found)


def _written(range_: float, max_abs: float) -> float:
    """As it stands in a plan."""
    return min(float(f"{range_:.3g}"), max_abs)


def _steps(training: Training) -> int:
    """Of a device in a round."""
    return training.steps or (training.epochs or 1) * STEPS_AN_EPOCH


def _range(name: str, training: Training, past: Sequence[PastRound]) -> float:
    rate = _rate(name, training)
    most = rate * _steps(training)
    largest = _scaled(name, rate, past, lambda round_, name: round_.largest.get(name, 0.0))
    wanted = None if largest is None else HEADROOM * largest
    if wanted is None or (training.steps is not None and wanted > most):
        wanted = most
    return max(wanted, rate, SMALLEST)


def _scaled(
    name: str, rate: float, past: Sequence[PastRound], change: Callable[[PastRound, str], float]
) -> float | None:
    """What a tensor's change was in the last round that moved it, in proportion to the rates of then and now."""
    for round_ in reversed(past):
        moved = change(round_, name)
        if moved > 0 and round_.training is not None:
            then = _rate(name, round_.training)
            return moved * rate / then if then > 0 else None
    return None


def _rate(name: str, training: Training) -> float:
    if name.endswith(".lora_a"):
        return training.lr_a
    return training.lr_b if name.endswith(".lora_b") else training.lr_head
