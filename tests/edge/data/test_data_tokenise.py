"""Records to ids and trained places. The oracle writes the expected ids out by hand (see the ids in conftest)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from edge_runtime.bundle import Chat, ChatRole, Text
from edge_runtime.data import UNLABELLED, EncoderError, Example, TextEncoder
from edge_runtime.data.records import Conversation, LabelledText, Message, PlainText, PromptCompletion, Record

MakeEncoder = Callable[..., TextEncoder]

UNK, CLS, SEP, BOS, EOS, START, END, SYSTEM, USER, ASSISTANT = range(1, 11)
FIRST_WORD = 11


def words(*numbers: int) -> str:
    """The text ``w3 w5`` for 3, 5."""
    return " ".join(f"w{number}" for number in numbers)


def ids_of(*numbers: int) -> list[int]:
    return [FIRST_WORD + number for number in numbers]


def one(encoder: TextEncoder, record: Record) -> Example:
    (example,) = encoder.encode([record])
    assert example is not None
    assert example.ids.dtype == np.int32
    return example


def talk(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns))


def trained_ids(example: Example) -> list[int]:
    assert isinstance(example.targets, np.ndarray)
    assert example.targets.dtype == np.bool_
    assert example.targets.shape == example.ids.shape
    return example.ids[example.targets].tolist()


def test_classify_wraps_the_text_and_targets_the_label(classifier: MakeEncoder) -> None:
    example = one(classifier(), LabelledText("w1 w2 [MASK]", "calm"))
    assert example.ids.tolist() == [CLS, *ids_of(1, 2), UNK, UNK, UNK, SEP]
    assert (example.targets, example.truncated, example.weight) == (2, False, 1)
    assert (example.rows.tolist(), example.labels.tolist()) == ([0], [2])


def test_classify_without_a_label(classifier: MakeEncoder) -> None:
    example = one(classifier(), PlainText("w1"))
    assert (example.targets, example.labels.tolist()) == (UNLABELLED, [-1])


def test_classify_cuts_the_text_and_keeps_the_suffix(classifier: MakeEncoder) -> None:
    fits, cut = classifier(5).encode([LabelledText(words(1, 2, 3), "joy"), LabelledText(words(1, 2, 3, 4), "joy")])
    assert fits is not None
    assert cut is not None
    assert fits.ids.tolist() == cut.ids.tolist() == [CLS, *ids_of(1, 2, 3), SEP]
    assert (fits.truncated, cut.truncated) == (False, True)


def test_what_the_tokenizer_file_says_of_padding_truncation_and_templates_is_not_used(
    tokenizer_file: Path, classifier: MakeEncoder
) -> None:
    assert Tokenizer.from_file(str(tokenizer_file)).encode("w1").ids != [FIRST_WORD + 1]
    examples = classifier().encode([PlainText("w1"), PlainText(words(*range(10)))])
    assert [len(example.ids) for example in examples if example] == [3, 12]


def test_a_text_is_trained_but_for_its_prefix(writer: MakeEncoder) -> None:
    example = one(writer(), PlainText(words(1, 2)))
    assert example.ids.tolist() == [BOS, *ids_of(1, 2), EOS]
    assert trained_ids(example) == example.labels.tolist() == [*ids_of(1, 2), EOS]
    assert example.rows.tolist() == [0, 1, 2]
    assert example.weight == 3


def test_the_first_token_is_never_trained(writer: MakeEncoder) -> None:
    encoder = writer(prefix=(), suffix=())
    assert trained_ids(one(encoder, PlainText(words(1, 2)))) == ids_of(2)
    assert encoder.encode([PlainText("w1"), PlainText("w1 w2")])[0] is None


def test_a_long_text_loses_its_end_and_the_suffix_first(writer: MakeEncoder) -> None:
    example = one(writer(4), PlainText(words(1, 2, 3)))
    assert example.ids.tolist() == [BOS, *ids_of(1, 2, 3)]
    assert example.truncated


def test_only_the_completion_and_the_suffix_are_trained(writer: MakeEncoder) -> None:
    example = one(writer(), PromptCompletion(words(1, 2), words(3, 4)))
    assert example.ids.tolist() == [BOS, *ids_of(1, 2, 3, 4), EOS]
    assert trained_ids(example) == [*ids_of(3, 4), EOS]
    assert example.rows.tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("prompt", "completion", "kept_prompt", "kept_completion"),
    [
        (range(4), range(20, 22), range(4), [20, 21, "end"]),  # 1 + 4 + 3 = 8: fits
        (range(9), range(20, 22), range(5, 9), [20, 21, "end"]),  # a short completion leaves more to the prompt
        (range(9), range(20, 29), range(6, 9), [20, 21, 22, 23]),  # both long: half for the completion
        (range(2), range(20, 29), range(2), [20, 21, 22, 23, 24]),  # a short prompt leaves more to the completion
    ],
)
def test_a_prompt_keeps_its_end_and_a_completion_at_least_half(
    writer: MakeEncoder, prompt: range, completion: range, kept_prompt: range, kept_completion: Sequence[int | str]
) -> None:
    example = one(writer(8), PromptCompletion(words(*prompt), words(*completion)))
    answer = [EOS if each == "end" else FIRST_WORD + int(each) for each in kept_completion]
    assert example.ids.tolist() == [BOS, *ids_of(*kept_prompt), *answer]
    assert trained_ids(example) == answer
    assert example.truncated == (len(prompt) + len(completion) + 2 > 8)


def test_an_odd_limit_gives_the_completion_the_larger_half(writer: MakeEncoder) -> None:
    example = one(writer(7), PromptCompletion(words(*range(9)), words(*range(20, 29))))
    assert trained_ids(example) == ids_of(20, 21, 22, 23)


PREAMBLE = [START, SYSTEM, FIRST_WORD + 99, END]


def test_a_conversation_is_wrapped_and_only_answers_and_what_follows_them_are_trained(writer: MakeEncoder) -> None:
    record = talk(("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5"))
    example = one(writer(suffix=()), record)
    first = [START, USER, *ids_of(1), END, START, ASSISTANT, *ids_of(2), END]
    second = [START, USER, *ids_of(3), END, START, ASSISTANT, *ids_of(4, 5), END]
    assert example.ids.tolist() == [BOS, *PREAMBLE, *first, *second]
    assert trained_ids(example) == [*ids_of(2), END, *ids_of(4, 5), END]


def test_a_conversation_that_begins_with_a_system_message_gets_no_preamble(writer: MakeEncoder) -> None:
    record = talk(("system", "w0"), ("user", "w1"), ("assistant", "w2"))
    head = [BOS, START, SYSTEM, *ids_of(0), END, START, USER, *ids_of(1), END, START, ASSISTANT]
    example = one(writer(), record)
    assert example.ids.tolist() == [*head, *ids_of(2), END, EOS]
    assert trained_ids(example) == [*ids_of(2), END, EOS]


def test_a_suffix_after_a_question_is_not_trained(writer: MakeEncoder) -> None:
    example = one(writer(), talk(("assistant", "w2"), ("user", "w1")))
    assert example.ids[-1] == EOS
    assert trained_ids(example) == [*ids_of(2), END]


def test_a_template_that_writes_the_prefix_and_the_suffix_itself_gets_none_twice(writer: MakeEncoder) -> None:
    roles = {"user": ChatRole("user ", " "), "assistant": ChatRole("assistant ", "</s>")}
    encoder = writer(chat=Chat(roles, preamble="<s>"))
    example = one(encoder, talk(("user", "w1"), ("assistant", "w2")))
    assert example.ids.tolist() == [BOS, USER, *ids_of(1), ASSISTANT, *ids_of(2), EOS]
    assert trained_ids(example) == [*ids_of(2), EOS]


def test_a_long_conversation_loses_its_end_and_is_dropped_when_no_answer_is_left(writer: MakeEncoder) -> None:
    early = talk(("assistant", "w1"), ("user", words(*range(40))))
    late = talk(("user", words(*range(40))), ("assistant", "w1"))
    kept, dropped = writer().encode([early, late])
    assert kept is not None
    assert (len(kept.ids), kept.truncated, trained_ids(kept)) == (40, True, [*ids_of(1), END])
    assert dropped is None


def test_a_conversation_without_a_template_cannot_be_encoded(writer: MakeEncoder) -> None:
    with pytest.raises(EncoderError, match="conversation: no chat template: expected one in the bundle, got none"):
        writer(chat=None).encode([talk(("assistant", "w1"))])


def test_what_the_bundle_accepts(classifier: MakeEncoder, writer: MakeEncoder) -> None:
    assert classifier().accepted("predict").labels == {"joy", "anger", "calm"}
    assert writer().accepted("train").roles == {"system", "user", "assistant"}
    assert writer(chat=None).accepted("train").roles is None


def test_no_records_make_no_examples(writer: MakeEncoder) -> None:
    assert writer().encode([]) == []


def test_a_text_without_a_single_token(tmp_path: Path) -> None:
    """A tokenizer without an unknown token can make nothing of a text."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({"a": 0}, [])).save(str(path))
    text = Text(max_tokens=4, vocab_size=1, pad_id=0)
    assert TextEncoder(path, text, task="lm").encode([PlainText("bb"), PromptCompletion("a", "b")]) == [None, None]
    bare = TextEncoder(path, text, task="classify", labels=("x",)).encode([PlainText("b"), PlainText("ba")])
    assert bare[0] is None
    assert bare[1] is not None
    assert bare[1].ids.tolist() == [0]


def test_a_token_the_model_does_not_have_is_refused(tokenizer_file: Path) -> None:
    encoder = TextEncoder(tokenizer_file, Text(max_tokens=9, vocab_size=20, pad_id=0), task="lm")
    assert encoder.encode([PlainText("w1 w2")]) != [None]
    with pytest.raises(EncoderError, match="outside the model's vocabulary: expected below 20, got 61"):
        encoder.encode([PlainText("w1 w50")])


@pytest.mark.parametrize("special", [{"pad_id": 111}, {"prefix_ids": (-1,)}, {"suffix_ids": (3, 111)}])
def test_a_special_id_the_model_does_not_have_is_refused(tokenizer_file: Path, special: dict[str, object]) -> None:
    text = Text(**({"max_tokens": 9, "vocab_size": 111, "pad_id": 0} | special))  # type: ignore[arg-type]
    with pytest.raises(EncoderError, match="outside the model's vocabulary: expected below 111, got "):
        TextEncoder(tokenizer_file, text, task="lm")


def test_the_limit_is_within_the_bundles(classifier: MakeEncoder, writer: MakeEncoder) -> None:
    for wrong in (2, 13):
        with pytest.raises(EncoderError, match=f"max_tokens: out of range: expected from 3 to .* 12, got {wrong}"):
            classifier(wrong)
    for wrong in (1, 41):
        with pytest.raises(EncoderError, match=f"max_tokens: out of range: expected from 2 to .* 40, got {wrong}"):
            writer(wrong)
    assert (classifier(3).max_tokens, classifier().max_tokens, writer(2).max_tokens) == (3, 12, 2)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    text = Text(max_tokens=4, vocab_size=1, pad_id=0)
    path = tmp_path / "tokenizer.json"
    with pytest.raises(EncoderError, match=r"tokenizer\.json: cannot be read: expected a tokenizer\.json, got: "):
        TextEncoder(path, text, task="lm")
    path.write_bytes(b'{"a": 1}')
    with pytest.raises(EncoderError, match=r"tokenizer\.json: not a tokenizer: expected a tokenizer\.json, got: "):
        TextEncoder(path, text, task="lm")
    path.write_bytes(b"\xff")
    with pytest.raises(EncoderError, match=r"tokenizer\.json: cannot be read: "):
        TextEncoder(path, text, task="lm")


some_words = st.lists(st.integers(0, 99), min_size=1, max_size=60).map(lambda numbers: words(*numbers))
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), some_words), min_size=1, max_size=4)
lm_records = st.one_of(
    some_words.map(PlainText),
    st.builds(PromptCompletion, some_words, some_words),
    turns.map(lambda each: talk(*each, ("assistant", "w1"))),
)


@given(
    records=st.lists(lm_records, max_size=5), limit=st.integers(2, 40), marks=st.tuples(st.booleans(), st.booleans())
)
def test_no_lm_example_exceeds_the_limit_and_each_has_something_to_train(
    writer: MakeEncoder, records: list[Record], limit: int, marks: tuple[bool, bool]
) -> None:
    encoder = writer(limit, prefix=(4,) * marks[0], suffix=(5,) * marks[1])
    examples = encoder.encode(records)
    assert len(examples) == len(records)
    for record, example in zip(records, examples, strict=True):
        lone = isinstance(record, PlainText) and record.text.count("w") == 1 and not any(marks)
        assert example is not None or isinstance(record, Conversation) or lone
        if example is not None:
            assert isinstance(example.targets, np.ndarray)
            assert len(example.ids) <= limit
            assert not example.targets[0]
            assert example.weight == len(example.rows) == len(example.labels) >= 1
            assert example.labels.tolist() == example.ids[example.rows + 1].tolist()
            assert len(example.ids) == limit or not example.truncated


@given(texts=st.lists(some_words, max_size=5), limit=st.integers(3, 12))
def test_no_classify_example_exceeds_the_limit(classifier: MakeEncoder, texts: list[str], limit: int) -> None:
    for text, example in zip(texts, classifier(limit).encode([PlainText(text) for text in texts]), strict=True):
        assert example is not None
        assert len(example.ids) == min(limit, text.count("w") + 2)
        assert example.truncated == (text.count("w") + 2 > limit)
        assert (example.ids[0], example.ids[-1]) == (CLS, SEP)
