"""What stands on the screen after each call, read as a terminal would show it."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios

from edge_runtime.terminal import Terminal


class Screen(io.TextIOWrapper):
    """A stream that says it is a terminal; ``lines`` is what it shows, trailing blanks cut."""

    def __init__(self, *, tty: bool = True, encoding: str = "utf-8") -> None:
        self._bytes = io.BytesIO()
        self._tty = tty
        super().__init__(self._bytes, encoding=encoding)

    def isatty(self) -> bool:
        return self._tty

    @property
    def lines(self) -> list[str]:
        shown = []
        for line in self._bytes.getvalue().decode(self.encoding).split("\n"):
            cells: list[str] = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            shown.append("".join(cells).rstrip())
        return shown


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_one_line_that_gives_way() -> None:
    """Text, bar, steps and the time that the rest takes at the pace so far."""
    screen, clock = Screen(), Clock()
    terminal = Terminal(screen, clock=clock)
    terminal.progress(1, 12, "loss 2.500")
    assert screen.lines == ["loss 2.500 " + "█" * 2 + "░" * 22 + " 1/12 -:--"]
    clock.now = 12.0
    terminal.progress(3, 12, "loss 2.4")
    assert screen.lines == ["loss 2.4 " + "█" * 6 + "░" * 18 + " 3/12 0:54"]
    terminal.say("a notice")
    assert screen.lines == ["a notice", ""]
    clock.now = 18.0
    terminal.progress(4, 12, "loss 2.3")
    assert screen.lines == ["a notice", "loss 2.3 " + "█" * 8 + "░" * 16 + " 4/12 0:48"]
    terminal.close()
    assert screen.lines == ["a notice", ""]


def test_it_is_not_drawn_at_every_step() -> None:
    """Ten times a second at most; the last step always."""
    screen, clock = Screen(), Clock()
    terminal = Terminal(screen, clock=clock)
    for step in range(1, 4):
        terminal.progress(step, 4, "x")
        clock.now += 0.04
    assert " 1/4 " in screen.lines[0]
    terminal.progress(4, 4, "x")
    assert " 4/4 0:00" in screen.lines[0]


def test_a_second_progress_has_its_own_pace() -> None:
    """Time between two trainings is not counted."""
    screen, clock = Screen(), Clock()
    terminal = Terminal(screen, clock=clock)
    terminal.progress(1, 3, "x")
    terminal.close()
    clock.now = 1000.0
    terminal.progress(1, 3, "x")
    assert screen.lines[0].endswith("1/3 -:--")


def test_away_from_a_terminal_there_are_only_lines() -> None:
    screen = Screen(tty=False)
    terminal = Terminal(screen)
    terminal.progress(1, 3, "x")
    terminal.say("done")
    terminal.close()
    assert screen.lines == ["done", ""]


def test_quiet_writes_nothing() -> None:
    screen = Screen()
    terminal = Terminal(screen, quiet=True)
    terminal.progress(1, 3, "x")
    terminal.say("done")
    terminal.close()
    assert screen.lines == [""]


def test_a_terminal_without_block_characters() -> None:
    screen = Screen(encoding="latin-1")
    Terminal(screen).progress(1, 2, "x")
    assert screen.lines[0].startswith("x ############------------ 1/2")


def test_a_narrow_terminal_is_not_overrun() -> None:
    """A line that wraps could not be written over."""
    leader, follower = pty.openpty()
    try:
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
        with os.fdopen(follower, "w", encoding="utf-8") as stream:
            Terminal(stream).progress(1, 2, "loss 2.500")
            written = os.read(leader, 1000).decode()
    finally:
        os.close(leader)
    assert written == "\rloss 2.500 " + "█" * 8
