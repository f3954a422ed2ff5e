"""Lines of files to records: formats, line numbers, and everything that is not a record."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.data import DataFileError, files
from edge_runtime.data.files import KEPT_BAD_LINES, KEPT_FIELD_NAMES, ReadLog, read_records
from edge_runtime.data.records import Accepted, LabelledText, PlainText, PromptCompletion, Record

WriteFile = Callable[..., Path]

CLASSIFY = Accepted("classify", "train", frozenset({"joy", "anger"}))
LM = Accepted("lm", "train")


def read(path: Path, accepted: Accepted = CLASSIFY) -> tuple[list[Record], list[str], ReadLog]:
    """Records, bad lines as they are shown (without the folder), and the log."""
    log = ReadLog()
    records = list(read_records(path, accepted, log))
    return records, [str(line).removeprefix(f"{path.parent}/") for line in log.bad_lines], log


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_json_lines(write: WriteFile, name: str, mark: bytes, end: bytes) -> None:
    lines = [b'{"text": "\xc3\xa4", "label": "joy"}', b"", b"  ", b'{"text": "b\\n", "label": "anger", "id": 7}']
    records, bad, log = read(write(name, mark + end.join(lines)))
    assert records == [LabelledText("ä", "joy"), LabelledText("b\n", "anger")]
    assert bad == []
    assert list(log.ignored_fields) == ["id"]


@pytest.mark.parametrize(("name", "comma"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables(write: WriteFile, name: str, comma: str, mark: str) -> None:
    table = 'id,label,text\r\n1,joy,"a, ""b""\nc"\r\n\r\n2,anger,é'
    records, bad, log = read(write(name, mark + table.replace(",", comma)))
    assert records == [LabelledText(f'a{comma} "b"\nc', "joy"), LabelledText("é", "anger")]
    assert bad == []
    assert list(log.ignored_fields) == ["id"]


def test_a_table_of_prompts_and_a_column_of_messages_it_cannot_hold(write: WriteFile) -> None:
    records, bad, log = read(write("a.csv", "prompt,completion,messages\na,b,c\n"), LM)
    assert (records, bad, list(log.ignored_fields)) == ([PromptCompletion("a", "b")], [], ["messages"])


@given(
    st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)))
)
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows) -> None:
    """Any text survives a table, whatever quotes, commas and line ends it holds."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("text",), *rows, ("last",)])
    path = tmp_path_factory.getbasetemp() / "round-trip.csv"
    path.write_bytes(buffer.getvalue().encode())
    records, bad, _ = read(path, LM)
    assert records == [PlainText(text) for (text,) in [*rows, ("last",)]]
    assert bad == []


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip), min_size=1)
)
def test_what_json_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode({"text": text}) for text in texts))
    assert read(path, LM)[:2] == ([PlainText(text) for text in texts], [])


GOOD = '{"text": "a", "label": "joy"}\n'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{text: a}", "invalid JSON: expected one object a line, got: JSON is malformed: "),
        ('{"text": "a"', "invalid JSON: expected one object a line, got: Input data was truncated"),
        ('{"text": "\\ud800 lone", "label": "joy"}', "invalid JSON: "),
        ("[" * 100_000, "invalid JSON: "),
        ('{"text": 1e999}', "invalid JSON: "),
        ('["text"]', "not an object: expected an object, got an array"),
        ("null", "not an object: expected an object, got null"),
        ('{"text": "a\0", "label": "joy"}', "NUL byte: expected text, got a byte 0x00"),
        ('{"text": "a\\u0000", "label": "joy"}', "text holds a NUL character: "),
        ('{"text": "", "label": "joy"}', "text is empty: "),
        ('{"text": 1, "label": "joy"}', "text has a wrong type: "),
        ('{"text": "a"}', "missing field: "),
        ('{"text": "a", "label": "sad"}', "unknown label: expected one of the 2 labels the bundle knows, got 'sad'"),
    ],
)
def test_a_bad_json_line_is_noted_with_file_and_line_and_reading_goes_on(
    write: WriteFile, line: str, problem: str
) -> None:
    records, bad, log = read(write("a.jsonl", f"{GOOD}\n{line}\n{GOOD}"))
    assert len(records) == 2
    assert log.bad_count == len(bad) == 1
    assert bad[0].startswith(f"a.jsonl:3: {problem}")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("joy", "wrong number of fields: expected 2 as in the header, got 1"),
        ("joy,a,b", "wrong number of fields: expected 2 as in the header, got 3"),
        ('joy,"a"b', "broken row: expected fields split by ',', got: ',' expected after '\"'"),
        ("joy,a\rb", "broken row: expected fields split by ',', got: new-line character"),
        ("joy," + "a" * 200_000, "broken row: expected fields split by ',', got: field larger than field limit"),
        ("joy,a\0", "NUL byte: expected text, got a byte 0x00"),
        ("\0", "NUL byte: expected text, got a byte 0x00"),
        ('joy,"a\n\0\nb"', "NUL byte: expected text, got a byte 0x00"),
        ("joy,", "text is empty: expected some text, got an empty string"),
        ("sad,a", "unknown label: expected one of the 2 labels the bundle knows, got 'sad'"),
    ],
)
def test_a_bad_row_is_noted_at_the_physical_line_it_begins_on(write: WriteFile, row: str, problem: str) -> None:
    records, bad, log = read(write("a.csv", f'label,text\njoy,"two\n\nlines"\n\n{row}\njoy,c\n'))
    assert records == [LabelledText("two\n\nlines", "joy"), LabelledText("c", "joy")]
    assert log.bad_count == len(bad) == 1
    assert bad[0].startswith(f"a.csv:6: {problem}")


def test_an_open_quote_is_reported_where_it_opens(write: WriteFile) -> None:
    records, bad, _ = read(write("a.csv", 'label,text\njoy,a\njoy,"b\njoy,c\n'))
    assert len(records) == 1
    assert bad == ["a.csv:3: broken row: expected fields split by ',', got: unexpected end of data"]


@pytest.mark.parametrize(("name", "header"), [("a.jsonl", ""), ("a.csv", "label,text\n")])
def test_a_line_over_the_cap_is_bad_and_the_next_one_is_read(
    write: WriteFile, monkeypatch: pytest.MonkeyPatch, name: str, header: str
) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 32)
    good = GOOD if name == "a.jsonl" else "joy,a\n"
    fits = good.rstrip("\n").ljust(31) + "\n"
    records, bad, _ = read(write(name, header + fits + "x" * 32 + "\n" + "x" * 200 + "\n" + good))
    assert len(records) == 2
    first = 2 if header else 1
    problem = "line too long: expected at most 32 bytes, got more"
    assert bad == [f"{name}:{first + 1}: {problem}", f"{name}:{first + 2}: {problem}"]


def test_a_line_over_the_cap_at_the_end_of_the_file(write: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 32)
    records, bad, _ = read(write("a.jsonl", GOOD + "x" * 64))
    assert len(records) == 1
    assert len(bad) == 1


def test_notes_are_bounded_and_the_count_is_full(write: WriteFile) -> None:
    many = "".join(f'{{"text": "a", "f{index}": 0}}\n[]\n' for index in range(KEPT_BAD_LINES + 50))
    records, bad, log = read(write("a.jsonl", many), LM)
    assert len(records) == log.bad_count == KEPT_BAD_LINES + 50
    assert len(bad) == KEPT_BAD_LINES
    assert list(log.ignored_fields) == [f"f{index}" for index in range(KEPT_FIELD_NAMES)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a", "a.txt: unknown extension: expected .jsonl, .ndjson, .csv, .tsv, got '.txt'"),
        ("a", "a", "a: unknown extension: expected .jsonl, .ndjson, .csv, .tsv, got none"),
        ("a.jsonl", "", "a.jsonl: empty file: expected at least one record, got none"),
        ("a.jsonl", "\ufeff\n \n", "a.jsonl: empty file: expected at least one record, got none"),
        ("a.csv", "", "a.csv: empty file: expected at least one record, got none"),
        ("a.csv", "label,text\n\n", "a.csv: empty file: expected at least one record, got none"),
        ("a.jsonl", b"\n{\xff", "a.jsonl:2: not UTF-8: expected UTF-8 text, got byte 0xff in column 2"),
        ("a.csv", "a".encode("utf-16"), "a.csv:1: not UTF-8: expected UTF-8 text, got byte 0xff in column 1"),
        (
            "a.csv",
            "\nid,body\n1,a\n",
            "a.csv:2: unusable header: missing field: expected text and label, got 'id', 'body'",
        ),
        (
            "a.csv",
            "text;label\na;joy\n",
            "a.csv:1: unusable header: missing field: expected text and label, got 'text;label'",
        ),
        ("a.csv", "text,label,x,x\n", "a.csv:1: unusable header: expected every column once, got ['x'] more than once"),
        ("a.csv", "text,label,\0\n", "a.csv:1: unusable header: NUL byte: "),
        ("a.csv", 'text,"label\n', "a.csv:1: unusable header: broken row: "),
    ],
)
def test_a_file_unusable_as_a_whole(write: WriteFile, name: str, content: str | bytes, message: str) -> None:
    path = write(name, content)
    with pytest.raises(DataFileError) as caught:
        read(path)
    assert str(caught.value).removeprefix(f"{path.parent}/").startswith(message)


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"no\.jsonl: cannot be read: expected a file, got: No such file"):
        read(tmp_path / "no.jsonl")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataFileError, match=r"folder\.csv: cannot be read: expected a file, got: Is a directory"):
        read(tmp_path / "folder.csv")
