"""Which modules stand still within a device's own epochs, so that it may stop training them for the round. Pure.

The steps are divided into windows of a quarter of an epoch. A module's movement in a window is the root mean square,
over its trained parameters, of what the window changed in net, in units of the learning rate and per step. AdamW moves
a parameter by about its rate a step, so one that goes one way moves by 1, one that only trembles by about 1/√steps, one
without a gradient by 0, whichever factors a module trains. A module stands still when it moves less than a share of
what all modules moved on average in the first window, in which all are trained: so the measure does not rise as others
stop, and neither does a falling learning rate look like standing still.

The head goes on as long as it is alive, because its gradient costs next to nothing. Where it is not, the module that
moves most goes on, so that there is something to train.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from edge_runtime.engine.adamw import learning_rate
from edge_runtime.engine.parameters import AdapterParameters, Flat
from edge_runtime.wire import Layout, Training

MIN_WINDOW = 4  # steps; the net change of fewer says little of a direction


def window_steps(steps_an_epoch: int) -> int:
    """Steps of a window: a quarter of an epoch, at least ``MIN_WINDOW``."""
    return max(MIN_WINDOW, -(-steps_an_epoch // 4))


@dataclass(frozen=True)
class Watched:
    """What :class:`Stillness` has seen so far: with it, another one of the same training goes on.

    Attributes:
        still: As there.
        skipped: As there.
        before: The values at the window's beginning, shape (layout.count,); None where nothing is watched.
        shares: Of the learning rates, of the steps in this window.
        usual: Mean movement in the first window, once that is over.
    """

    still: frozenset[str] = frozenset()
    skipped: int = 0
    before: Flat | None = None
    shares: tuple[float, ...] = ()
    usual: float | None = None


class Stillness:
    """Watches one training. It holds a copy of what is trained, and nothing where the settings have no ``local_kill``.

    Attributes:
        still: Modules that were found to stand still; one that was is not found again.
        skipped: How many steps of modules were left out since.
    """

    def __init__(self, parameters: AdapterParameters, training: Training, *, window: int) -> None:
        """Begin to watch, before the first step.

        Args:
            parameters: Looked at, never changed.
            training: Its learning rates, and ``local_kill``: the share below which a module stands still.
            window: Steps after which it is looked again.
        """
        self.still: frozenset[str] = frozenset()
        self.skipped = 0
        self._parameters = parameters
        self._threshold = training.local_kill or 0.0
        self._window = window
        self._rates = {name: learning_rate(name, training) for name, _ in parameters.layout.blocks}
        self._modules = modules_of(parameters.layout)
        self._head_alive = sum(map(len, self._modules.values())) < len(self._rates)
        self._before: Flat | None = parameters.flat.copy() if self._threshold else None
        self._shares: list[float] = []  # of the learning rates, of the steps in this window
        self._usual: float | None = None  # mean movement in the first window

    def after_step(self, share: float) -> frozenset[str]:
        """Count a step, and at the end of a window say which modules stand still from now on.

        Args:
            share: Of the learning rates that the step took.
        """
        self.skipped += len(self.still)
        self._shares.append(share)
        if self._before is None or len(self._shares) < self._window:
            return frozenset()
        reach = {name: rate * sum(self._shares) for name, rate in self._rates.items()}
        moved = movement(self._parameters.layout, self._before, self._parameters.flat, reach)
        self._before, self._shares = self._parameters.flat.copy(), []
        if self._usual is None:
            self._usual = sum(moved.values()) / max(len(moved), 1)
        going = {name: much for name, much in moved.items() if name not in self.still}
        found = stands_still(going, self._threshold * self._usual, spare_one=not self._head_alive)
        self.still |= found
        return found

    def watched(self) -> Watched:
        """What was seen so far; its array is not copied."""
        return Watched(self.still, self.skipped, self._before, tuple(self._shares), self._usual)

    def resume(self, watched: Watched) -> None:
        """Go on from what was seen of the same training before it was interrupted."""
        self.still, self.skipped = watched.still, watched.skipped
        self._shares, self._usual = list(watched.shares), watched.usual
        if self._before is not None and watched.before is not None:
            self._before = np.array(watched.before)

    def tensors(self, modules: Collection[str]) -> frozenset[str]:
        """The trained tensors of modules."""
        return frozenset(tensor for module in modules for tensor in self._modules[module])


def stands_still(moved: Mapping[str, float], least: float, *, spare_one: bool) -> frozenset[str]:
    """The modules that moved less than ``least``; with ``spare_one`` never all of them, but for the fastest."""
    found = {name for name, much in moved.items() if much < least}
    if spare_one and found and len(found) == len(moved):
        found.remove(max(moved, key=lambda name: moved[name]))
    return frozenset(found)


def movement(layout: Layout, before: Flat, after: Flat, reach: Mapping[str, float]) -> dict[str, float]:
    """What every module moved, from 0 for not at all to about 1 for as far as its learning rates reach.

    Args:
        layout: Of what is trained.
        before: Shape (layout.count,).
        after: The same.
        reach: By tensor, learning rate times steps; a tensor whose reach is 0 does not move.
    """
    changes = layout.split(after - before)
    found = {}
    for module, tensors in modules_of(layout).items():
        squares = sum(
            float(np.sum(np.square(changes[name], dtype=np.float64))) / reach[name] ** 2
            for name in tensors
            if reach[name] > 0
        )
        found[module] = math.sqrt(squares / sum(changes[name].size for name in tensors))
    return found


def modules_of(layout: Layout) -> dict[str, tuple[str, ...]]:
    """The trained tensors of every module; the head is none."""
    found: dict[str, tuple[str, ...]] = {}
    for name, _ in layout.blocks:
        module, factor, _ = name.rpartition(".lora_")
        if factor:
            found[module] = (*found.get(module, ()), name)
    return found
