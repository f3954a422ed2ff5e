"""Lines of results: their form, which of them count, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.display import how, ratios, results_table, share_of_whole
from bench.errors import RequestError
from bench.results import append_line, gradient_error, read_lines
from tests.bench.sample_lines import full_run, sample

AGREED = {"case", "system", "setting", "alive", "step_ms_median", "step_ms_p95", "peak_private_mb"}
AGREED |= {"peak_total_mb", "grad_rel_err", "host", "commit", "quick"}


def test_a_line_is_one_json_object_with_the_agreed_names(tmp_path: Path) -> None:
    line = sample("emberlora-fp32", 150.0)
    text = append_line(tmp_path / "results.jsonl", line)
    assert (tmp_path / "results.jsonl").read_text() == text + "\n"
    assert set(json.loads(text)) >= AGREED
    assert read_lines(tmp_path / "results.jsonl") == [line]


def test_runs_append_and_the_last_line_of_a_kind_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    old, other, new = sample("torch-eager", 9.0), sample("torch-eager", 5.0, pattern="1/6"), sample("torch-eager", 8.0)
    for line in (old, other, new):
        append_line(path, line)
    assert len(path.read_text().splitlines()) == 3
    assert read_lines(path) == [new, other]


@pytest.mark.parametrize(("text", "said"), [("{}\n", "not a file of results"), ("no\n", "not a file of results")])
def test_another_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(RequestError, match=said):
        read_lines(tmp_path / "x.jsonl")


def test_a_case_that_is_no_longer_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_line(path, sample("torch-eager", 9.0))
    path.write_text(path.read_text().replace("2x64", "9x9"))
    with pytest.raises(RequestError, match=r"case: expected one of .*, got 9x9"):
        read_lines(path)


def test_no_file_says_that_nothing_was_measured(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing was measured yet"):
        read_lines(tmp_path / "none.jsonl")


def test_the_gradient_error_is_relative_and_over_all_tensors(tmp_path: Path) -> None:
    reference, found = tmp_path / "reference.npz", tmp_path / "found.npz"
    np.savez(reference, a=np.array([3.0, 0.0]), b=np.array([[4.0]]))
    np.savez(found, b=np.array([[4.5]]), a=np.array([3.0, 0.0]))
    assert gradient_error(found, reference) == pytest.approx(0.1)
    assert gradient_error(found, tmp_path / "none.npz") is None
    np.savez(found)
    assert gradient_error(found, reference) is None
    np.savez(found, a=np.array([3.0, 0.0]))
    with pytest.raises(RequestError, match="holds 1 gradients"):
        gradient_error(found, reference)


def test_ratios_are_over_the_same_case_and_the_same_alive_factors() -> None:
    ours, theirs = sample("emberlora-fp32", 150.0), sample("torch-compile", 200.0)
    best, floor = sample("torch-bf16", 160.0), sample("gemm-floor", 100.0)
    stray = [sample("torch-compile", 1.0, case="1x512"), sample("gemm-floor", 1.0, pattern="1/6")]
    found = ratios(ours, [ours, theirs, best, floor, *stray])
    assert found == pytest.approx((0.75, 0.9375, 1.5))
    assert ratios(ours, [ours, *stray]) == (None, None, None)


def test_the_floor_is_that_of_the_setting() -> None:
    lines = full_run()
    recomputed = sample("emberlora-int8", 280.0, setting="recompute, mapped, fast")
    kept = sample("torch-eager", 220.0)
    assert ratios(recomputed, lines)[2] == pytest.approx(2.0)  # 140 ms
    assert ratios(kept, lines)[2] == pytest.approx(2.0)  # 110 ms


def test_with_amx_off_the_peer_is_the_one_with_amx_off() -> None:
    lines = [sample("torch-bf16", 50.0, amx="on"), sample("torch-bf16", 100.0, amx="off")]
    fast = sample("emberlora-int8", 40.0, setting="keep, mapped, fast", amx="off")
    assert ratios(fast, [*lines, fast])[1] == pytest.approx(0.4)


def test_a_kill_is_compared_with_everything_alive() -> None:
    whole, part = sample("torch-eager", 200.0), sample("torch-eager", 120.0, pattern="1/6", variant="other", threads=1)
    assert share_of_whole(part, [whole, part]) == pytest.approx(0.6)
    assert share_of_whole(part, [part]) is None


def test_the_setting_in_full_names_what_was_chosen() -> None:
    line = sample("torch-bf16", 1.0, variant="bf16 weights", threads=1, amx="off")
    assert how(line) == "keep, bf16 weights, 1 thread, AMX off"
    assert how(sample("emberlora-fp32", 1.0)) == "keep, mapped"


def test_the_table_has_a_row_a_line() -> None:
    lines = full_run()
    assert results_table("2x64", "1", lines).row_count == 14
    assert results_table("2x64", "1/6", lines).row_count == 2
