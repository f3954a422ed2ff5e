"""Lines of results: their form, which of them count, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench.display import how, measured, ratios, results_table, share_of_whole
from bench.errors import RequestError
from bench.jsonl import append_line
from bench.results import gradient_error, read_lines
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


def test_a_setting_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_line(path, sample("torch-eager", 9.0))
    path.write_text(path.read_text().replace('"keep"', '"sloppy"'))
    with pytest.raises(RequestError, match=r"setting: expected words of .*, got 'sloppy'"):
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
    tight = sample("emberlora-fp32", 280.0, setting="tight, mapped")
    assert ratios(tight, lines)[2] == pytest.approx(2.0)  # those of recomputing


def test_what_is_remembered_is_measured_against_its_own_products() -> None:
    """Without them there is no ratio: the products of a whole forward pass are no floor for it."""
    ours = sample("emberlora-fp32", 60.0, pattern="1/6", setting="recompute, mapped, remembered")
    floor = sample("gemm-floor", 30.0, pattern="1/6", setting="keep, mapped, remembered")
    stray = sample("gemm-floor", 50.0, pattern="1/6")
    assert ratios(ours, [ours, floor, stray])[2] == pytest.approx(2.0)
    assert ratios(ours, [ours, stray])[2] is None


def test_with_amx_off_the_peer_is_the_one_with_amx_off() -> None:
    lines = [sample("torch-bf16", 50.0, amx="on"), sample("torch-bf16", 100.0, amx="off")]
    fast = sample("emberlora-int8", 40.0, setting="keep, mapped, fast", amx="off")
    assert ratios(fast, [*lines, fast])[1] == pytest.approx(0.4)


def test_a_kill_is_compared_with_everything_alive() -> None:
    whole, part = sample("torch-eager", 200.0), sample("torch-eager", 120.0, pattern="1/6", variant="other", threads=1)
    assert share_of_whole(part, [whole, part]) == pytest.approx(0.6)
    assert share_of_whole(part, [part]) is None


def test_what_is_remembered_is_compared_with_computing_everything() -> None:
    whole = sample("emberlora-int8", 200.0, setting="keep, mapped, fast")
    part = sample("emberlora-int8", 40.0, pattern="1/6", setting="keep, mapped, fast, remembered")
    exact = sample("emberlora-int8", 300.0)
    assert share_of_whole(part, [exact, whole, part]) == pytest.approx(0.2)


def test_the_setting_in_full_names_what_was_chosen() -> None:
    line = sample("torch-bf16", 1.0, variant="bf16 weights", threads=1, amx="off")
    assert how(line) == "keep, bf16 weights, 1 thread, AMX off"
    assert how(sample("emberlora-fp32", 1.0)) == "keep, mapped"


def test_the_table_has_a_row_a_line() -> None:
    lines = full_run()
    assert results_table("2x64", "1", lines).row_count == 14
    assert results_table("2x64", "1/6", lines).row_count == 3


def test_the_inside_of_a_step_is_shown_as_shares() -> None:
    inside = {"runtime_ms_median": 140.0, "optimizer_ms_median": 3.0, "other_ms_median": 6.0}
    ours = measured(sample("emberlora-fp32", 150.0, **inside, kept_mb=43.21))
    assert (ours[2], ours[5]) == ("2.0 + 4.0 %", "43")
    theirs = measured(sample("torch-eager", 150.0))
    assert (theirs[2], theirs[5]) == ("–", "–")


def test_lines_without_the_inside_of_a_step_are_read(tmp_path: Path) -> None:
    """As they were written before it was measured."""
    path = tmp_path / "results.jsonl"
    line = sample("emberlora-fp32", 150.0)
    fields = {name: value for name, value in msgspec.to_builtins(line).items() if not name.endswith("_ms_median")}
    path.write_text(json.dumps({**fields, "step_ms_median": 150.0}) + "\n")
    assert read_lines(path) == [line]
