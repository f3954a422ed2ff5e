"""The demo's folder: what it replaces, what it refuses, and what it gives each device."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cloud.demo.command import demo
from cloud.demo.corpus import Example, Split
from cloud.demo.errors import DemoInputError
from cloud.demo.folder import DemoFolder
from cloud.demo.recipe import CLASSIFY, LM


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    DemoFolder.prepare(tmp_path / "demo")
    (tmp_path / "demo" / "report.json").write_text("{}")
    folder = DemoFolder.prepare(tmp_path / "demo")
    assert sorted(path.name for path in folder.root.iterdir()) == ["data", "demo.marker", "logs"]


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DemoInputError, match="holds something else than an earlier demo"):
        DemoFolder.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_command_refuses_it_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = CliRunner().invoke(demo, ["--out", str(tmp_path)])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(DemoInputError, match="is not a folder"):
        DemoFolder.prepare(tmp_path / "demo")


@pytest.fixture
def texts() -> Split:
    train = tuple(Example(f"text {label} {number}", label) for label in "abcdefgh" for number in range(40))
    heldout = tuple(Example(f"held out {label} {number}", label) for label in "abcdefgh" for number in range(7))
    return Split(train, heldout)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_held_out_text_is_on_one_device(tmp_path: Path, texts: Split) -> None:
    folder = DemoFolder.prepare(tmp_path / "demo")
    counts = folder.write_texts(texts, CLASSIFY, np.random.default_rng(0))
    held = [line["text"] for device in counts for line in lines(folder.texts(device, "heldout"))]
    assert sorted(held) == sorted(example.text for example in texts.heldout)
    assert held != [line["text"] for line in lines(folder.heldout)]
    trained = [line for device in counts for line in lines(folder.texts(device, "train"))]
    assert sorted(line["text"] for line in trained) == sorted(line["text"] for line in lines(folder.pooled))
    assert sum(sum(held.values()) for held in counts.values()) == len(texts.train)


def test_a_language_models_lines_have_no_label(tmp_path: Path, texts: Split) -> None:
    folder = DemoFolder.prepare(tmp_path / "demo")
    folder.write_texts(texts, msgspec.structs.replace(LM, devices=2), np.random.default_rng(0))
    assert set(lines(folder.pooled)[0]) == {"text"}
