"""The audit log's chain: its bytes, and the law that no change of it goes unnoticed."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud import audit
from cloud.audit import Broken, Link, check_chain, check_facts, follow
from cloud.errors import AuditEntryError

ONE, TWO = "11" * 32, "22" * 32
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
NAMES = st.sampled_from(["one", "two", "pi-4"])
ROUNDS = st.integers(0, 2**32 - 1)
ENTRIES = st.one_of(
    st.builds(audit.UpdateCounted, ROUNDS, NAMES, DIGESTS, st.integers(0, 2**40)),
    st.builds(audit.UpdateRefused, ROUNDS, NAMES, st.sampled_from(["envelope", "update-value"])),
    st.builds(audit.DeviceEnrolled, NAMES, DIGESTS, DIGESTS),
    st.builds(audit.PlanSigned, ROUNDS, DIGESTS, DIGESTS, st.booleans()),
)
TIMES = st.integers(0, 2**41).map(lambda ms: ms / 1000)


def chain(*entries: audit.Entry, now: float = 1_700_000_000.25) -> list[Link]:
    links: list[Link] = []
    for entry in (audit.LogBegun("tiny", ONE), *entries):
        links.append(follow(links[-1] if links else None, now=now, entry=entry))
    return links


@st.composite
def chains(draw: st.DrawFn, *, least: int = 1) -> list[Link]:
    links = chain()
    for entry in draw(st.lists(ENTRIES, min_size=least, max_size=8)):
        links.append(follow(links[-1], now=draw(TIMES), entry=entry))
    return links


def forged(link: Link, **changes: object) -> Link:
    """A link changed by somebody who knows how digests are made."""
    changed = replace(link, **changes)
    return replace(changed, digest=audit.link_digest(changed.number, changed.time_ms, changed.previous, changed.text))


def test_golden_bytes() -> None:
    first, second = chain(audit.UpdateCounted(3, "pi-4", TWO, 10))
    text = '{"kind":"update-counted","round":3,"device":"pi-4","digest":"' + TWO + '","weight":10}'
    assert first.text == '{"kind":"log-begun","task":"tiny","bundle":"' + ONE + '"}'
    assert second.text == text
    hashed = (
        bytes.fromhex("656d6265726c6f7261206175646974203100")  # "emberlora audit 1", 0
        + bytes.fromhex("0100000000000000")  # number
        + bytes.fromhex("fa68e5cf8b010000")  # milliseconds
        + bytes.fromhex(first.digest)
        + text.encode()
    )
    assert second.digest == hashlib.sha256(hashed).hexdigest()
    assert first.previous == "00" * 32
    assert first.digest == "7a9e3d7411303155525a28b744051acc3279f587522e9401bde164fb9e5c62aa"
    assert second.digest == "f2f6a8d111c7081520e935529dd3d9de9b552b53f0d878ce2519582e58871e94"


GOLDEN_TEXTS = [
    (audit.LogTakenUp("tiny", ONE, 2, TWO), '"log-taken-up","task":"tiny","bundle":"11…","facts":2,"found":"22…"'),
    (audit.TokenMade("one", ONE, 9), '"token-made","device":"one","token":"11…","expires":9'),
    (audit.DeviceEnrolled("one", ONE, TWO), '"device-enrolled","device":"one","token":"11…","signing_key":"22…"'),
    (audit.DeviceRekeyed("one", TWO), '"device-rekeyed","device":"one","signing_key":"22…"'),
    (audit.DeviceLeft("one", "operator"), '"device-left","device":"one","by":"operator"'),
    (audit.DeviceRevoked("one", ONE), '"device-revoked","device":"one","signing_key":"11…"'),
    (audit.PlanKeyChanged(ONE, TWO), '"plan-key-changed","old":"11…","new":"22…"'),
    (audit.OperatorKeyChanged(ONE, TWO), '"operator-key-changed","old":"11…","new":"22…"'),
    (audit.PlanSigned(0, ONE, TWO, False), '"plan-signed","round":0,"plan":"11…","adapter":"22…","finished":false'),
    (audit.UpdateRefused(0, "one", "envelope"), '"update-refused","round":0,"device":"one","problem":"envelope"'),
    (
        audit.OutlierSetAside(0, "one", "direction", -413, -100, 20, 0),
        '"outlier-set-aside","round":0,"device":"one","rule":"direction","measured_milli":-413,"bound_milli":-100,'
        '"devices":20,"tier":0',
    ),
    (
        audit.OutlierKept(0, "one", "norm", 98_230, 10_000, 20, 1),
        '"outlier-kept","round":0,"device":"one","rule":"norm","measured_milli":98230,"bound_milli":10000,'
        '"devices":20,"tier":1',
    ),
    (audit.RoundApplied(0, 2, 20, ONE), '"round-applied","round":0,"devices":2,"weight":20,"adapter":"11…"'),
    (audit.RoundDiscarded(0, 1), '"round-discarded","round":0,"updates":1'),
    (audit.StopAsked(0), '"stop-asked","round":0'),
]


@pytest.mark.parametrize(("entry", "short"), GOLDEN_TEXTS)
def test_golden_texts(entry: audit.Entry, short: str) -> None:
    text = '{"kind":' + short.replace("11…", ONE).replace("22…", TWO) + "}"
    assert audit.encode_entry(entry) == text
    assert audit.decode_entry(text) == entry


def test_every_kind_has_golden_bytes() -> None:
    tested = {type(entry).__struct_config__.tag for entry, _ in GOLDEN_TEXTS} | {"log-begun", "update-counted"}
    assert tested == set(audit.KINDS)


@pytest.mark.parametrize(
    "text",
    [
        '{"kind":"stop-asked","round":0,"why":""}',  # unknown field
        '{"kind":"stopped","round":0}',  # unknown kind
        '{"kind":"stop-asked","round":-1}',
        '{"kind":"stop-asked", "round":0}',  # other spelling
        '{"round":0,"kind":"stop-asked"}',
        '{"kind":"device-left","device":"A B","by":"operator"}',
        "[" * 100_000,
        "",
    ],
)
def test_other_texts_are_no_entries(text: str) -> None:
    with pytest.raises(AuditEntryError, match=r"is no entry|is not written"):
        audit.decode_entry(text)
    first = chain()[0]
    link = forged(Link(1, 0, first.digest, "", text))
    assert check_chain([first, link]).number == 1


@given(chains())
def test_a_chain_as_it_was_written_is_whole(links: list[Link]) -> None:
    assert check_chain(links) is None


@given(chains(), st.data())
def test_an_edit_is_found_at_its_entry(links: list[Link], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(links) - 1))
    entry = data.draw(ENTRIES.filter(lambda entry: audit.encode_entry(entry) != links[at].text))
    changes = data.draw(
        st.sampled_from(
            [
                {"text": audit.encode_entry(entry)},
                {"time_ms": links[at].time_ms + 1},
                {"digest": "ab" * 32},
            ]
        )
    )
    links[at] = replace(links[at], **changes)
    found = check_chain(links)
    assert found.number == at
    assert found.how.startswith("edited")


@given(chains(least=2), st.data())
def test_an_edit_with_a_forged_digest_is_found_at_the_entry_after_it(links: list[Link], data: st.DataObject) -> None:
    at = data.draw(st.integers(1, len(links) - 2))
    links[at] = forged(links[at], time_ms=links[at].time_ms + 1)
    found = check_chain(links)
    assert found == Broken(
        at + 1, f"does not follow entry {at}: that one was put there or edited, and its digest forged"
    )


@given(chains(least=2), st.data())
def test_a_removal_is_found_where_the_entry_was(links: list[Link], data: st.DataObject) -> None:
    """Whether or not those after it are numbered anew; what is cut off at the end no chain shows."""
    at = data.draw(st.integers(0, len(links) - 2))
    left = links[:at] + links[at + 1 :]
    assert check_chain(left) == Broken(at, f"removed: the next entry has number {at + 1}")
    found = check_chain([replace(link, number=number) for number, link in enumerate(left)])
    assert found.number == at
    assert found.how.startswith("out of place")
    assert check_chain(links[:-1]) is None


@given(chains(least=2), st.data())
def test_a_swap_is_found_at_the_first_of_the_two(links: list[Link], data: st.DataObject) -> None:
    one, two = sorted(data.draw(st.lists(st.integers(0, len(links) - 1), min_size=2, max_size=2, unique=True)))
    links[one], links[two] = links[two], links[one]
    found = check_chain([replace(link, number=number) for number, link in enumerate(links)])
    assert found.number == one
    assert found.how.startswith("out of place")


@given(chains(), ENTRIES, st.data())
def test_an_insertion_is_found_at_the_entry_after_it(
    links: list[Link], entry: audit.Entry, data: st.DataObject
) -> None:
    """An entry that follows from those before it, with those after it numbered anew, even with forged digests."""
    at = data.draw(st.integers(1, len(links) - 1))
    put = [*links[:at], follow(links[at - 1], now=1.0, entry=entry), *links[at:]]
    moved = [replace(link, number=number) for number, link in enumerate(put)]
    assert check_chain(moved).number == at + 1
    moved[at + 1 :] = [forged(link) for link in moved[at + 1 :]]
    assert check_chain(moved).number == at + 1


def test_a_log_begins_with_its_first_entry_and_only_with_it() -> None:
    stop = follow(None, now=0.0, entry=audit.StopAsked(0))
    assert check_chain([stop]) == Broken(0, "forged: a log begins with its first entry, and only with it")
    assert check_chain(chain(audit.LogBegun("tiny", ONE))).number == 1
    later = forged(chain()[0], previous=TWO)
    assert check_chain([later]) == Broken(0, "forged: the first entry follows another one")
    assert check_chain([]).how.startswith("missing: the log is empty")


def test_hostile_columns_are_a_broken_entry() -> None:
    first = chain()[0]
    for changes in ({"time_ms": -1}, {"digest": ""}, {"time_ms": 2**64}):
        assert check_chain([replace(first, **changes)]).how.startswith("edited")
    assert check_chain([replace(first, previous="zz")]).how.startswith("out of place")


TASK = audit.task_fact("tiny", ONE)


def test_entries_and_facts_must_agree() -> None:
    counted = audit.UpdateCounted(0, "one", TWO, 10)
    links, fact = chain(counted), audit.update_fact(0, "one", TWO, 10)
    assert check_facts(links, [TASK, fact]) is None
    assert check_facts(links, [TASK]) == Broken(1, f"the store does not say so: {fact}")
    assert check_facts(links, [audit.task_fact("tiny", TWO), fact]).number == 0
    other = audit.update_fact(0, "one", ONE, 10)
    assert check_facts(links, [TASK, other]) == Broken(1, f"the store does not say so: {fact}")
    unsaid = Broken(1, f"no entry up to this one says what the store does: {other}")
    assert check_facts(links, [TASK, fact, other]) == unsaid
    assert check_facts(chain(counted, counted), [TASK, fact]).number == 2


def test_what_was_there_before_the_log_must_stay_as_it_was() -> None:
    old, new = audit.plan_fact(0, ONE), audit.plan_fact(1, TWO)
    first = follow(None, now=0.0, entry=audit.LogTakenUp("tiny", ONE, 1, audit.found_digest([old])))
    links = [first, follow(first, now=0.0, entry=audit.PlanSigned(1, TWO, ONE, False))]
    assert check_chain(links) is None
    assert check_facts(links, [TASK, new, old]) is None
    for facts in ([new], [new, audit.plan_fact(0, TWO)], [new, old, audit.plan_fact(2, TWO)]):
        found = check_facts(links, [TASK, *facts])
        assert found == Broken(0, "what the store held before the log, 1 facts, is not as it was found")


def test_entries_are_frozen() -> None:
    entry = audit.StopAsked(0)
    with pytest.raises(AttributeError, match="immutable"):
        entry.round = 1  # type: ignore[misc]
    assert msgspec.structs.replace(entry, round=1).round == 1
