"""The picture: it says what was measured where, and needs no network."""

from __future__ import annotations

import re

from bench.picture import page
from tests.bench.sample_lines import full_run, sample


def test_the_page_stands_alone() -> None:
    text = page(full_run())
    assert text.count("plotly.js v") == 1, "the script must be there once"
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", text)


def test_it_says_host_commit_and_date() -> None:
    text = page([sample("emberlora-fp32", 150.0), sample("torch-eager", 200.0, commit="def5678+", quick=True)])
    for said in ("Some CPU, 2 cores, 2 threads", "abc1234, def5678+", "2026-11-22", "torch 2.13.0", "a quick run"):
        assert said in text


def test_every_case_has_its_charts_and_the_sweep_one() -> None:
    text = page(full_run())
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "Step time: llama-6, 2 × 64 tokens",
        "Step time: llama-6, 1 × 512 tokens",
        "Peak memory: llama-6, 2 × 64 tokens",
        "Peak memory: llama-6, 1 × 512 tokens",
        "What killing saves: llama-6, 2 × 64 tokens",
    ]
    assert "products: keep, mapped, 110 ms" in text
    assert "1/6 alive: keep, mapped (0.55 × all alive)" in text
    assert "1/6 alive: keep, mapped, remembered (0.20 × all alive)" in text
    assert "emberlora-fp32: keep, mapped, remembered" in text, "a single point, which has no row with all alive"


def test_one_line_without_floor_is_enough() -> None:
    text = page([sample("torch-eager", 200.0, peak_private_mb=None)])
    assert "Dashed" not in text
    assert text.count("<h2>") == 2


def test_cases_and_systems_stand_in_one_order_whatever_ran_first() -> None:
    lines = [sample("gemm-floor", 5.0), sample("torch-eager", 9.0, case="smollm2-1x256"), sample("torch-eager", 9.0)]
    lines.append(sample("emberlora-fp32", 8.0))
    text = page(lines)
    assert re.findall(r"<h2>Step time: (.*?),", text) == ["llama-6", "smollm2-135m"]
    assert re.findall(r"<td>([a-z0-9-]+)</td><td>keep", text)[:3] == ["emberlora-fp32", "torch-eager", "gemm-floor"]


def test_bare_products_alone_have_no_chart() -> None:
    assert "<h2>" not in page([sample("gemm-floor", 5.0)])


def test_what_a_host_calls_itself_is_escaped() -> None:
    line = sample("torch-eager", 200.0, host={"cpu": "<b>&", "cores": 1, "threads": 1})
    assert "&lt;b&gt;&amp;" in page([line])
