"""The HTML page and the terminal's table, from made-up results."""

from __future__ import annotations

from html.parser import HTMLParser

import msgspec

from edge_runtime.benchmark.page import page
from edge_runtime.benchmark.report import Case, Length, Verdict, lines
from tests.edge.benchmark.bench_reports import OPERATORS, case, measured, report

FULL, THRIFTY = case("full", ms=900, mb=400), case("full", ms=1200, mb=250, memory="recompute")
FAILED = Case(case("upper half", ms=1, mb=1).setting, None, "the process was ended by SIGKILL <oom>")
VERDICT = Verdict("full", THRIFTY.setting, 300, tried=False, sentence="It fits <well> & runs.")
FOUND = measured((FULL, THRIFTY, FAILED), VERDICT, lengths=(Length(128, 200.0), Length(256, 460.0)))


class Reader(HTMLParser):
    """Collects text, and what would be fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.foreign: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.foreign += [name for name, _ in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_says_it_all_and_needs_nothing() -> None:
    """Device, verdict, figures, a failed setting and the shares, escaped; no script and nothing from elsewhere."""
    reader = Reader(page(report(FOUND)))
    text = " ".join(reader.text)
    for wanted in (
        "Board <4>",
        "org/model <b>",
        "It fits <well> & runs.",
        "1,200",
        "SIGKILL <oom>",
        "Gemm 60.0%",
        "budget",
    ):
        assert wanted in text
    assert "70% of the operators' time is matrix products." in text
    assert reader.tags.count("svg") == 2
    assert reader.foreign == []
    assert not {"script", "b", "oom", "well"} & set(reader.tags)


def test_bundles_stand_side_by_side() -> None:
    """Several are compared in one table first; one alone is not."""
    none = Verdict(None, None, None, tried=False, sentence="No tier fits.")
    text = " ".join(Reader(page(report(FOUND, measured((FULL,), none)))).text)
    assert "Side by side" in text
    assert "no tier fits" in text
    assert "Side by side" not in page(report(FOUND))


def test_the_verdicts_row_is_marked() -> None:
    rows = page(report(FOUND)).split("<tr ")
    assert [row.startswith("class='chosen'") for row in rows[1:]] == [False, True, False]


def test_a_page_without_profile_lengths_and_verdict() -> None:
    none = Verdict(None, None, None, tried=False, sentence="No tier fits.")
    plain = msgspec.structs.replace(measured((FULL,), none), operators=None, matrix_share=None)
    made = page(report(plain))
    assert "<svg" not in made
    assert "verdict none" in made


def test_the_table_lines_up() -> None:
    """Columns stand below their headings, and a setting that failed says why in its row."""
    table = list(lines(report(FOUND)))
    head = next(line for line in table if line.startswith("alive"))
    rows = table[table.index(head) + 1 :][:3]
    for row in rows[:2]:
        assert len(row) == len(head)
    assert head.index("activations") == rows[1].index("recomputed")
    assert "failed: the process was ended by SIGKILL" in rows[2]
    assert OPERATORS.matrix_share == 0.7
    assert "It fits <well> & runs." in table
