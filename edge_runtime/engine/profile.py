"""Time by operator type, summed over every session that is opened while a profile is taken.

Sessions are opened deep inside the engine and late, when they are first needed. So profiling is asked for around them,
``with profiled(folder) as profile:``, and holds in the calling context only: without it nothing is recorded.

Every run of an operator counts with the median of that operator's runs, so that what disturbs the machine once does not
stand in the profile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from statistics import median

import msgspec
import onnxruntime as ort

_taken: ContextVar[Profile | None] = ContextVar("profile", default=None)


class _Event(msgspec.Struct, frozen=True):
    """What is read of an event; a trace has others without a duration."""

    name: str
    cat: str = ""
    dur: int = 0  # microseconds
    args: dict[str, object] = {}


class Profile:
    """The sessions opened so far, and what their operators took."""

    def __init__(self, folder: Path) -> None:
        """ONNX Runtime writes its traces to ``folder``, some hundred kilobytes a session."""
        self._folder = folder
        self._sessions: list[ort.InferenceSession] = []

    def ask(self, options: ort.SessionOptions) -> None:
        """Have the session that is opened with these options record its operators."""
        options.enable_profiling = True
        # Without an arena the records, which stay, lie between the tensors, which go: the heap grew by 28 MB a step,
        # every tensor came to lie in fresh pages, and operators seemed up to ten times slower.
        options.enable_cpu_mem_arena = True
        # The runtime adds a time in milliseconds, which two sessions may share.
        options.profile_file_prefix = str(self._folder / f"session-{len(self._sessions)}")

    def add(self, session: ort.InferenceSession) -> None:
        """Take note of the session that was opened after :meth:`ask`."""
        self._sessions.append(session)

    def finish(self, *, skip: float = 0.0) -> dict[str, float]:
        """End the recording and add up.

        Args:
            skip: Share of each session's runs, from the first on, that does not count: the first step reads weights
                from disk and allocates.

        Returns:
            Milliseconds by operator type, the largest first.
        """
        total = defaultdict[str, float](float)
        for session in self._sessions:
            for name, us in operator_us(Path(session.end_profiling()).read_bytes(), skip=skip).items():
                total[name] += us
        self._sessions.clear()
        return {name: total[name] / 1e3 for name in sorted(total, key=lambda name: -total[name])}


def operator_us(trace: bytes, *, skip: float = 0.0) -> dict[str, float]:
    """Microseconds by operator type in one session's trace; ``skip`` as in :meth:`Profile.finish`."""
    events = msgspec.json.decode(trace, type=list[_Event])
    first = int(sum(event.name == "model_run" for event in events) * skip)
    runs, taken = 0, defaultdict[tuple[str, str], list[int]](list)
    for event in events:  # a run's operators stand before the event of the run itself
        if event.name == "model_run":
            runs += 1
        elif runs >= first and event.cat == "Node" and event.name.endswith("_kernel_time"):
            taken[event.name, str(event.args["op_name"])].append(event.dur)
    found = defaultdict[str, float](float)
    for (_, operator), times in taken.items():
        found[operator] += median(times) * len(times)
    return dict(found)


@contextmanager
def profiled(folder: Path) -> Iterator[Profile]:
    """Profile every session opened in the block; ``folder`` must last until :meth:`Profile.finish`."""
    profile = Profile(folder)
    before = _taken.set(profile)
    try:
        yield profile
    finally:
        _taken.reset(before)


def current_profile() -> Profile | None:
    """The profile that is being taken, if any."""
    return _taken.get()
