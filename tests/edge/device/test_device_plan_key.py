"""A device follows the plan key by the statements of the keys before it, and by nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from device_bench import Bench
from device_server import TASK, Aggregator

from edge_runtime import wire
from edge_runtime.device import events
from edge_runtime.device.display import TerminalDisplay
from edge_runtime.device.enrolment import enrol
from edge_runtime.device.errors import NotEnrolledError, PinMismatchError
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from tests.edge.encrypted import KEY

FOREIGN = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)


def public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def asked(aggregator: Aggregator) -> int:
    """How often statements were asked for."""
    return sum(path.endswith("/plan-keys") for _, path, _, _ in aggregator.requests)


async def refused(bench: Bench) -> events.Waiting:
    """Run until something is refused; it is as it was then."""
    before, state = bench.home.identity(), bench.home.state().seen_round
    bench.seen.clear()
    bench.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    bench.on_event = None
    assert bench.home.identity() == before
    assert bench.home.state().seen_round == state
    assert bench.of(events.PlanKeyChanged) == []
    event: events.Waiting = bench.of(events.Waiting)[-1]
    return event


async def test_a_running_device_goes_on_with_the_new_key(bench: Bench) -> None:
    """The open round ends by the old one; every plan after it, the finished one too, is by the new one."""
    aggregator, jobs = bench.aggregator, []
    bench.trainer.before = lambda job: jobs.append(job.plan_key)
    old = public(aggregator.key)
    aggregator.rotate()
    await bench.run()
    new = public(aggregator.key)
    assert jobs == [old, new]
    assert [(event.plan_key) for event in bench.of(events.PlanKeyChanged)] == [new]
    assert bench.home.identity().plan_key == new
    assert bench.home.state().finished
    assert asked(aggregator) == 1
    assert bench.of(events.Waiting) == []


@pytest.fixture
async def slept(bench: Bench) -> Bench:
    """A device that was away while the key changed twice, with a round between; it has ended round 0."""
    bench.aggregator.rounds = 4
    await bench.run(once=True)
    for _ in range(2):
        bench.aggregator.rotate()
        bench.aggregator.close_round()
    bench.seen.clear()
    return bench


async def test_a_device_that_slept_through_both_follows_both(slept: Bench) -> None:
    await slept.run()
    assert [event.plan_key for event in slept.of(events.PlanKeyChanged)] == [public(slept.aggregator.key)]
    assert slept.home.state().finished
    assert asked(slept.aggregator) == 1


async def test_a_plan_by_a_key_on_the_way_is_enough(slept: Bench) -> None:
    """A further change waits for its round: the newest key has signed nothing yet."""
    in_force = public(slept.aggregator.key)
    slept.aggregator.rotate()
    await slept.run(once=True)
    assert [event.plan_key for event in slept.of(events.PlanKeyChanged)] == [in_force]


async def test_the_private_keys_are_bound_to_the_new_key(bench: Bench) -> None:
    key = bench.home.identity().private_key
    bench.aggregator.rotate()
    await bench.run()
    assert bench.home.identity().private_key == key
    record = bench.home.folder / "identity.json"
    text = record.read_text()
    assert public(bench.aggregator.key) in text
    record.write_text(text.replace(public(bench.aggregator.key), public(FOREIGN)))
    with pytest.raises(Exception, match="identity"):
        bench.home.identity()


Chain = list[wire.KeyStatement]


def by_foreign(chain: Chain) -> Chain:
    forged = wire.state_key(TASK, FOREIGN, FOREIGN.public_key())
    return [msgspec.structs.replace(chain[0], signature=forged.signature), *chain[1:]]


def of_another_task(chain: Chain) -> Chain:
    return [msgspec.structs.replace(chain[0], task="other"), *chain[1:]]


def back_again(chain: Chain) -> Chain:
    return [chain[0], msgspec.structs.replace(chain[1], new=chain[0].old)]


def looping(chain: Chain) -> Chain:
    """The old key's own private half is what an attacker has: it states itself again and again."""
    own = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    return [wire.state_key(TASK, own, own.public_key()), *chain]


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (by_foreign, "statement 0: not signed by key"),
        (of_another_task, "statement 0: expected task docs, got other"),
        (lambda chain: chain[1:], "no statement is by the key that is trusted"),
        (lambda chain: [chain[0], chain[0]], "statement 1: expected one by key"),
        (back_again, "statement 1: not signed by key"),
        (looping, "statement 0: leads back to key"),
    ],
)
async def test_a_forged_chain_is_refused(slept: Bench, forge: Callable[[Chain], Chain], message: str) -> None:
    """And the honest one still counts afterwards."""
    honest = slept.aggregator.statements
    assert honest is not None
    slept.aggregator.statements = forge(honest)
    event = await refused(slept)
    assert event.error == "PlanKeyError"
    assert message in event.detail
    slept.aggregator.statements = honest
    await slept.run()
    assert slept.home.state().finished


async def test_too_long_a_chain_is_refused(slept: Bench) -> None:
    assert slept.aggregator.statements is not None
    slept.aggregator.statements = slept.aggregator.statements * 65
    assert (await refused(slept)).error == "TransportError"


async def test_an_older_aggregator_has_no_statements(slept: Bench) -> None:
    slept.aggregator.statements = None
    event = await refused(slept)
    assert event.error == "PlanSignatureError"
    assert asked(slept.aggregator) == 1


async def test_a_good_chain_does_not_help_a_foreign_plan(slept: Bench) -> None:
    slept.aggregator.faults.plan = wire.sign_plan(slept.aggregator.plans[-1].plan, FOREIGN).data
    assert (await refused(slept)).error == "PlanSignatureError"


async def test_a_statement_without_a_fresh_answer_moves_nobody(slept: Bench) -> None:
    """The plan is by the new key, and is given again: the proof is an older answer's."""
    slept.aggregator.faults.proof = slept.aggregator.proofs[-1]
    assert (await refused(slept)).error == "PlanStaleError"


async def test_the_old_key_is_worth_nothing_afterwards(slept: Bench) -> None:
    """Who gets it later can sign plans, and statements to keys of his own, and is not followed."""
    old = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    await slept.run(once=True)
    slept.aggregator.faults.plan = wire.sign_plan(slept.aggregator.next_plan(), old).data
    assert (await refused(slept)).error == "PlanSignatureError"
    slept.aggregator.statements = [wire.state_key(TASK, old, FOREIGN.public_key())]
    slept.aggregator.faults.plan = wire.sign_plan(slept.aggregator.next_plan(), FOREIGN).data
    assert (await refused(slept)).error == "PlanKeyError"


@pytest.mark.parametrize("changes", [1, 2])
async def test_a_token_from_before_a_change_still_enrols(aggregator: Aggregator, tmp_path: Path, changes: int) -> None:
    token, home = aggregator.token("pi-1"), Home(tmp_path / "home", KEY)
    for _ in range(changes):
        aggregator.rotate()
        aggregator.close_round()
    await enrol(home, server=aggregator.url, token=token, device="pi-1", host=Host())
    assert home.identity().plan_key == public(aggregator.key)


@pytest.mark.parametrize("forge", [by_foreign, of_another_task, lambda chain: chain[1:], lambda _: []])
async def test_a_token_is_held_against_the_whole_chain(
    aggregator: Aggregator, tmp_path: Path, forge: Callable[[Chain], Chain]
) -> None:
    token, home = aggregator.token("pi-1"), Home(tmp_path / "home", KEY)
    for _ in range(2):
        aggregator.rotate()
        aggregator.close_round()
    aggregator.statements = forge(aggregator.statements or [])
    with pytest.raises(PinMismatchError, match="nothing was enrolled"):
        await enrol(home, server=aggregator.url, token=token, device="pi-1", host=Host())
    with pytest.raises(NotEnrolledError):
        home.membership()


async def test_a_chain_that_leads_elsewhere_enrols_nobody(aggregator: Aggregator, tmp_path: Path) -> None:
    """The token's key has made a statement, and not to the key that the server answers with."""
    token, home = aggregator.token("pi-1"), Home(tmp_path / "home", KEY)
    aggregator.statements = [wire.state_key(TASK, aggregator.key, FOREIGN.public_key())]
    aggregator.key = Ed25519PrivateKey.generate()
    with pytest.raises(PinMismatchError):
        await enrol(home, server=aggregator.url, token=token, device="pi-1", host=Host())


def test_one_line_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    display = TerminalDisplay()
    display.show(events.PlanKeyChanged("ab" * 32))
    display.close()
    assert capsys.readouterr().out == "plans are signed with a new key now, abababababab; the one before has said so\n"


async def test_a_damaged_plan_is_refused_as_before(bench: Bench) -> None:
    """With a chain that leads nowhere, as any aggregator has whose key has not changed."""
    bench.aggregator.statements = []
    bench.aggregator.faults.plan = wire.sign_plan(bench.aggregator.plans[0].plan, FOREIGN).data
    assert (await refused(bench)).error == "PlanSignatureError"
