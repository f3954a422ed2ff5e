"""Files to a dataset: what is kept, what is refused, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edge_runtime.data import (
    BadRecordError,
    DataFileError,
    DatasetReport,
    TextEncoder,
    TextError,
    dataset,
    dataset_of_texts,
    load_dataset,
)

MakeEncoder = Callable[..., TextEncoder]
WriteFile = Callable[..., Path]


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_clean_file(write: WriteFile, classifier: MakeEncoder) -> None:
    path = write("a.csv", "id,text,label\n1,w1,joy\n2,w1 w2 w3 w4,joy\n3,w5,anger\n")
    data = load_dataset(path, classifier(5))
    assert len(data) == data.weight == data.report.examples == 3
    assert [example.targets for example in data.examples] == [0, 0, 1]
    assert (data.pad_id, data.max_tokens) == (0, 5)
    assert data.report.label_counts == {"joy": 2, "anger": 1, "calm": 0}
    assert (data.report.tokens, data.report.trained_tokens) == (3 + 5 + 3, 0)
    assert data.report.sentences() == (
        "3 examples, 1 truncated at 5 tokens",
        "labels: joy 2, anger 1, calm 0",
        "ignored fields: 'id'",
    )


def test_the_weight_of_a_language_model_is_its_trained_tokens(write: WriteFile, writer: MakeEncoder) -> None:
    path = write("a.jsonl", lines({"text": "w1 w2"}, {"prompt": "w1 w2 w3", "completion": "w4"}))
    data = load_dataset(path, writer())
    assert data.weight == data.report.trained_tokens == 3 + 2
    assert data.report.label_counts == {}
    assert data.report.sentences() == ("2 examples", "10 tokens, 5 of them trained")


def test_several_files_are_one_dataset_in_order(write: WriteFile, classifier: MakeEncoder) -> None:
    first = write("a.jsonl", lines({"text": "w1", "label": "joy", "b": 0}))
    second = write("b.tsv", "text\tlabel\ta\nw2\tcalm\t\n")
    data = load_dataset([second, first], classifier())
    assert [example.ids[1] for example in data.examples] == [13, 12]
    assert data.report.files == (str(second), str(first))
    assert data.report.ignored_fields == ("a", "b")


def test_bad_lines_of_all_files_are_refused_together(write: WriteFile, classifier: MakeEncoder) -> None:
    first = write("a.jsonl", "{\n" + lines({"text": "w1", "label": "joy"}, {"text": "w1", "label": "sad"}))
    second = write("b.csv", "text,label\nw1,\n")
    with pytest.raises(BadRecordError) as caught:
        load_dataset([first, second], classifier())
    assert str(caught.value) == (
        "3 bad lines (--skip-bad-lines trains on the rest):\n"
        f"  {first}:1: invalid JSON: expected one object a line, got: Input data was truncated\n"
        f"  {first}:3: unknown label: expected one of the 3 labels the bundle knows, got 'sad'\n"
        f"  {second}:2: label is empty: expected some text, got an empty string"
    )
    assert caught.value.count == len(caught.value.lines) == 3


def test_many_bad_lines_are_counted_and_the_first_are_shown(write: WriteFile, classifier: MakeEncoder) -> None:
    with pytest.raises(BadRecordError) as caught:
        load_dataset(write("a.jsonl", "[]\n" * 250), classifier())
    shown = str(caught.value).splitlines()
    assert shown[0] == "250 bad lines (--skip-bad-lines trains on the rest):"
    assert len(shown) == 7
    assert shown[-1] == "  and 245 more"
    assert (caught.value.count, len(caught.value.lines)) == (250, 100)


def test_one_bad_line_is_singular() -> None:
    assert str(BadRecordError([], 1)).startswith("1 bad line (")


def test_after_the_first_bad_line_nothing_is_tokenised(
    write: WriteFile, classifier: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "PIECE_RECORDS", 1)
    encoder = classifier()
    encoded = []
    monkeypatch.setattr(encoder, "encode", lambda piece: encoded.extend(piece) or [])
    good = {"text": "w1", "label": "joy"}
    with pytest.raises(BadRecordError):
        load_dataset(write("a.jsonl", lines(good, [], good, good)), encoder)
    assert len(encoded) == 1


def test_skipping_bad_lines_trains_on_the_rest_and_says_so(write: WriteFile, classifier: MakeEncoder) -> None:
    path = write("a.jsonl", lines([], {"text": "w1", "label": "joy"}, {"text": "w1"}))
    data = load_dataset(path, classifier(), skip_bad=True)
    assert len(data) == 1
    assert (data.report.bad_count, [line.line for line in data.report.bad_lines]) == (2, [1, 3])
    problem = "not an object: expected an object, got an array"
    assert f"2 bad lines skipped, the first: {path}:1: {problem}" in data.report.sentences()


def test_dropped_examples_are_counted(write: WriteFile, writer: MakeEncoder) -> None:
    long = {"messages": [{"role": "user", "content": "w1 " * 50}, {"role": "assistant", "content": "w2"}]}
    data = load_dataset(write("a.jsonl", lines(long, {"text": "w1"})), writer())
    assert (len(data), data.report.dropped, data.report.truncated) == (1, 1, 0)
    assert "1 example dropped: nothing to train on within 40 tokens" in data.report.sentences()


def test_no_usable_examples(write: WriteFile, classifier: MakeEncoder, writer: MakeEncoder) -> None:
    path = write("a.jsonl", "[]\n{}\n")
    with pytest.raises(DataFileError) as caught:
        load_dataset(path, classifier(), skip_bad=True)
    assert str(caught.value) == (
        f"{path}: no usable examples: expected at least one, got 0 dropped at 12 tokens, 2 bad lines, "
        f"the first: {path}:1: not an object: expected an object, got an array"
    )
    with pytest.raises(DataFileError, match=r"got 1 dropped at 40 tokens, 0 bad lines$"):
        load_dataset(write("b.jsonl", lines({"text": "w1"})), writer(prefix=(), suffix=()))


def test_an_unusable_file_is_refused_even_when_bad_lines_are_skipped(write: WriteFile, classifier: MakeEncoder) -> None:
    good = write("a.jsonl", lines({"text": "w1", "label": "joy"}))
    with pytest.raises(DataFileError, match=r"b\.csv: empty file"):
        load_dataset([good, write("b.csv", "")], classifier(), skip_bad=True)


def test_texts_without_labels_are_for_prediction_only(write: WriteFile, classifier: MakeEncoder) -> None:
    path = write("a.jsonl", lines({"text": "w1"}, {"text": "w2", "label": "no label of ours"}))
    with pytest.raises(BadRecordError):
        load_dataset(path, classifier())
    data = load_dataset(path, classifier(), purpose="predict")
    assert [example.targets for example in data.examples] == [-1, -1]
    assert data.report.sentences() == ("2 examples", "ignored fields: 'label'")


def test_texts_in_no_file(classifier: MakeEncoder, writer: MakeEncoder) -> None:
    data = dataset_of_texts(["w1", "w2 w3"], classifier())
    assert [example.ids.tolist() for example in data.examples] == [[2, 12, 3], [2, 13, 14, 3]]
    assert [example.targets for example in data.examples] == [-1, -1]
    assert data.report.sentences() == ("2 examples",)
    assert dataset_of_texts(["w1"], writer()).weight == 2


def test_a_text_in_no_file_is_refused_by_its_number(classifier: MakeEncoder, writer: MakeEncoder) -> None:
    with pytest.raises(TextError, match=r"^text 2: text is empty: expected some text, got only white space$"):
        dataset_of_texts(["w1", " "], classifier())
    with pytest.raises(TextError, match=r"^text 2: too short: expected at least one token to use, got none$"):
        dataset_of_texts(["w1 w2", "w1"], writer(prefix=(), suffix=()))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((512, 1 << 20), [7]), ((3, 1 << 20), [3, 3, 1]), ((512, 1), [1] * 7), ((512, 4), [2, 2, 2, 1])],
)
def test_texts_are_tokenised_in_bounded_pieces_that_change_nothing(
    write: WriteFile, writer: MakeEncoder, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: list[int]
) -> None:
    monkeypatch.setattr(dataset, "PIECE_RECORDS", limits[0])
    monkeypatch.setattr(dataset, "PIECE_CHARS", limits[1])
    turns = [{"role": "assistant", "content": "w3 w4"}]
    records = [{"text": f"w{n}"} for n in range(5)] + [{"prompt": "w1", "completion": "w2"}, {"messages": turns}]
    encoder = writer()
    sizes = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda piece: sizes.append(len(piece)) or encode(piece))
    data = load_dataset(write("a.jsonl", lines(*records)), encoder)
    assert sizes == expected
    assert [example.ids[1] for example in data.examples] == [11, 12, 13, 14, 15, 12, 6]


def test_many_labels_are_summarised_and_the_report_is_json() -> None:
    report = DatasetReport(
        files=("a.csv",),
        task="classify",
        max_tokens=64,
        examples=1412,
        tokens=9,
        trained_tokens=0,
        truncated=1003,
        dropped=0,
        bad_count=0,
        bad_lines=(),
        ignored_fields=(),
        label_counts={f"label {n}": n * 500 for n in range(9)},
    )
    assert report.sentences() == (
        "1,412 examples, 1,003 truncated at 64 tokens",
        "labels: 8 of 9 have examples, from 500 to 4,000 each",
    )
    assert msgspec.json.decode(msgspec.json.encode(report), type=DatasetReport) == report
