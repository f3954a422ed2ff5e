"""Which systems there are, in which settings, and what is tried of each."""

from __future__ import annotations

import errno
import importlib
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench.alive import parse_alive
from bench.contestant import MAKERS
from bench.entries import Entry, Request, can_remember, fewer_threads, variants, way, with_amx_off
from bench.shapes import MODELS
from bench.systems import (
    SETTINGS,
    SYSTEM_NAMES,
    VARIANTS,
    Setting,
    Setup,
    System,
    chosen_settings,
    label,
    parse_setting,
)

ROOT = Path(__file__).parents[2]
WAYS = ("keep", "recompute", "tight")
FP32 = [*(f"{way}, mapped" for way in WAYS), "keep, packed", "keep, mapped, remembered"]
LOW_BIT_QUICK = [f"keep, mapped{fast}{more}" for fast in ("", ", fast") for more in ("", ", remembered")]


def setup(system: System, setting: Setting | None = None, threads: int = 2) -> Setup:
    (alive,) = parse_alive("1", MODELS["tiny"].modules)
    variant = VARIANTS.get(system, ("",))[0]
    paths = ("model", "bundle", "adapter")
    return Setup(
        system, setting or Setting(), variant, "tiny", *paths, 2, 16, alive.factors, threads, True, "work/g.npz"
    )


def test_every_system_has_a_maker_and_settings() -> None:
    assert set(MAKERS) == set(SETTINGS) == set(SYSTEM_NAMES)
    for place in MAKERS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_our_contestant_loads_nothing_of_torch() -> None:
    """Its memory is meant to be a device's."""
    code = "import sys, bench.contestant, bench.engine_step; print([n for n in sys.argv[1:] if n in sys.modules])"
    heavy = ("torch", "transformers", "peft", "plotly", "rich", "onnxscript")
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("system", "words", "quick", "expected"),
    [
        ("emberlora-fp32", (), False, [*FP32, "recompute, mapped, remembered"]),
        ("emberlora-fp32", (), True, [setting for setting in FP32 if setting != "tight, mapped"]),
        ("emberlora-fp32", ("tight",), True, ["tight, mapped"]),
        ("emberlora-fp32", ("recompute", "computed"), True, ["recompute, mapped"]),
        ("emberlora-int8", ("fast", "computed"), False, [f"{way}, mapped, fast" for way in WAYS]),
        ("emberlora-int8", ("fast", "remembered"), False, ["keep, mapped, fast, remembered"]),
        ("emberlora-int8", ("exact",), True, [*(f"{way}, mapped" for way in WAYS), "keep, mapped, remembered"]),
        ("emberlora-int8", (), True, LOW_BIT_QUICK),
        ("emberlora-int4", ("fast",), False, []),
        ("torch-eager", ("packed",), False, ["keep, mapped"]),
    ],
)
def test_settings_are_chosen_by_their_words(
    system: System, words: tuple[str, ...], quick: bool, expected: list[str]
) -> None:
    assert [str(setting) for setting in chosen_settings(system, words, quick=quick)] == expected


@pytest.mark.parametrize("system", SYSTEM_NAMES)
def test_what_a_line_says_is_read_back(system: System) -> None:
    """Of a peer it says less, because it has no choice."""
    for setting in SETTINGS[system]:
        assert parse_setting(label(system, setting)) == setting


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"setting: expected words of keep, .*, got 'sloppy'"):
        parse_setting("keep, sloppy")


@pytest.mark.parametrize(
    ("setting", "needed"),
    [
        (Setting(products="fast"), Setting()),
        (Setting("tight"), Setting("recompute")),
        (Setting("tight", lower="remembered"), Setting("recompute", lower="remembered")),
        (Setting("keep", "packed"), Setting("keep", "packed")),
    ],
)
def test_the_products_that_a_setting_needs(setting: Setting, needed: Setting) -> None:
    """Giving memory back multiplies nothing, and the floor has no int8."""
    assert setting.needed == needed


def test_nothing_is_remembered_where_every_block_is_trained() -> None:
    whole, part = parse_alive("1,1/3", MODELS["tiny"].modules)
    assert [can_remember(Setting(lower="remembered"), alive) for alive in (whole, part)] == [False, True]
    assert can_remember(Setting(), whole)


def test_peers_are_tried_in_every_way_and_we_in_one() -> None:
    assert [way(each) for each in variants(setup("torch-compile"))] == [
        "default, 2 threads",
        "max-autotune-no-cudagraphs, 2 threads",
    ]
    assert [way(each) for each in fewer_threads(setup("torch-eager", threads=6))] == ["3 threads", "1 thread"]
    ours = setup("emberlora-fp32", threads=6)
    assert variants(ours) == [ours]
    assert fewer_threads(ours) == []


@pytest.mark.parametrize(
    ("system", "setting", "rows"),
    [
        ("torch-bf16", Setting(), 2),
        ("emberlora-int8", Setting(products="fast"), 2),
        ("emberlora-int8", Setting(), 1),
        ("torch-eager", Setting(), 1),
    ],
)
def test_what_amx_helps_is_also_measured_without(system: System, setting: Setting, rows: int) -> None:
    (alive,) = parse_alive("1", MODELS["tiny"].modules)
    entry = Entry("tiny", alive, setup(system, setting), "on", Path("reference.npz"))
    found = list(with_amx_off(entry))
    assert len(found) == rows
    assert [(each.amx, each.setup.amx) for each in found[1:]] == [("off", False)] * (rows - 1)
    assert len({each.setup.gradients for each in found}) == rows, "two rows must not share a file"
    assert list(with_amx_off(replace(entry, amx="absent"))) == [replace(entry, amx="absent")]


def test_turns_follow_the_case_unless_given() -> None:
    request = Request(Path("out"), SYSTEM_NAMES)
    assert (request.turns_of("2x64"), request.turns_of("1b-1x256")) == (12, 3)
    assert (replace(request, quick=True).turns_of("2x64"), replace(request, turns=5).turns_of("2x64")) == (3, 5)


def test_a_setup_survives_its_file() -> None:
    given = setup("emberlora-int8", Setting(products="fast"))
    assert msgspec.json.decode(msgspec.json.encode(given), type=Setup) == given


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="AMX is asked for like this on Linux only"
)
def test_without_amx_the_request_for_it_is_refused() -> None:
    """In a process of its own, since it is for life; everything else stays allowed."""
    code = (
        "import ctypes; from bench.amx import forbid_amx; forbid_amx(); libc = ctypes.CDLL(None, use_errno=True);"
        "asked = libc.syscall(158, 0x1023, 18), ctypes.get_errno(); print(*asked); open('/dev/null').close()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if "takes no filter" in done.stderr:
        pytest.skip("this system takes no seccomp filter")
    assert done.stdout.split() == ["-1", str(errno.EPERM)], done.stderr
