"""The pure decisions, and the small files they stand in."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import msgspec
import pytest
from device_bench import Bench

from edge_runtime.device.errors import CorruptFileError, HomeLockedError, TransportError
from edge_runtime.device.files import write_bytes
from edge_runtime.device.home import Home
from edge_runtime.device.host import Backoff, Host
from edge_runtime.device.outbox import Outbox, pending_for
from edge_runtime.device.records import DeviceState, Settings
from edge_runtime.device.state import Discard, Poll, Publish, Stop, Train, Upload, decide, done_with
from edge_runtime.wire import SignedPlan
from tests.edge.encrypted import KEY, VAULT

PENDING = pending_for("docs", 3, "a" * 64, sealed=b"sealed", weight=1)


@pytest.fixture
async def plans(bench: Bench) -> tuple[SignedPlan, SignedPlan]:
    """A training plan of round 0 and the finished plan of round 2."""
    bench.aggregator.close_round()
    bench.aggregator.close_round()
    return bench.aggregator.plans[0], bench.aggregator.plans[2]


async def test_decisions(plans: tuple[SignedPlan, SignedPlan]) -> None:
    train, finished = plans
    new = DeviceState()
    assert decide(new, None, None) == Poll(-1)
    assert decide(DeviceState(done_round=4), None, None) == Poll(4)
    assert decide(new, None, train) == Train(train)
    assert decide(DeviceState(done_round=0), None, train) == Poll(0)
    assert decide(DeviceState(done_round=1), None, finished) == Publish(finished)
    assert decide(DeviceState(finished=True), None, finished) == Stop()
    assert decide(new, PENDING, train) == Upload(PENDING)
    assert decide(DeviceState(done_round=2), PENDING, finished) == Upload(PENDING)
    assert decide(DeviceState(done_round=3, finished=True), PENDING, None) == Discard(PENDING)


def test_rounds_done_never_go_back() -> None:
    assert done_with(DeviceState(done_round=5), 3).done_round == 5
    assert done_with(DeviceState(done_round=2, counted=1), 3, counted_at=7.5) == DeviceState(
        done_round=3, counted=2, counted_at=7.5
    )


def test_waits_grow_to_the_cap_and_start_again() -> None:
    backoff = Backoff(Host(clock=lambda: 100.0, rng=random.Random(1)), base_s=1, cap_s=60)
    waits = [backoff.next_wait(TransportError("x"))[0] for _ in range(30)]
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits[:6]))
    assert all(30 <= wait <= 60 for wait in waits[6:])
    assert backoff.next_wait(TransportError("x", progress=True))[0] <= 1
    backoff.reset()
    assert backoff.next_wait(TransportError("x"))[0] <= 1


def test_a_hint_is_obeyed_within_reason() -> None:
    backoff = Backoff(Host(clock=lambda: 100.0, rng=random.Random(1)))
    assert 300 <= backoff.next_wait(TransportError("x", retry_after_s=300))[0] <= 375
    assert backoff.next_wait(TransportError("x", retry_after_s=1e9))[0] <= 1125


def test_how_long_it_has_been_is_told() -> None:
    now = [100.0]
    backoff = Backoff(Host(clock=lambda: now[0]))
    assert backoff.next_wait(TransportError("x"))[1] == 0
    now[0] = 400.0
    assert backoff.next_wait(TransportError("x"))[1] == 300


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"server": 1}', b'{"unknown": 1}', b"\xff\xfe", b"[" * 100_000, b" " * (2 << 20)]
)
@pytest.mark.parametrize("name", ["identity.json", "state.json", "settings.json"])
def test_damaged_files_are_one_clear_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    home = Home(tmp_path, KEY)
    read = {"identity.json": home.stored_identity, "state.json": home.state, "settings.json": home.settings}[name]
    with pytest.raises(CorruptFileError, match=f"{name}: damaged: ") as raised:
        read()
    assert "\n" not in str(raised.value)


async def test_a_damaged_identity_does_not_tell_its_key(bench: Bench) -> None:
    identity = bench.home.identity()
    key = identity.private_key
    bench.home.save_identity(msgspec.structs.replace(identity, private_key=key.upper() + "0"))
    with pytest.raises(CorruptFileError) as raised:
        bench.home.identity()
    assert key not in str(raised.value).lower()


def test_a_home_is_for_one_process(tmp_path: Path) -> None:
    raised = pytest.raises(HomeLockedError, match="another 'emberlora edge' process")
    with Home(tmp_path).locked(), raised, Home(tmp_path).locked():
        pass
    with Home(tmp_path).locked():
        pass


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    home.save_settings(Settings(data=("old",)))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        home.save_settings(Settings(data=("new",)))
    assert home.settings() == Settings(data=("old",))


def test_a_partial_file_of_others_does_not_lend_its_mode(tmp_path: Path) -> None:
    (tmp_path / "key.partial").touch(mode=0o666)
    write_bytes(tmp_path / "key", b"secret")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_an_update_without_its_record_is_not_there(tmp_path: Path) -> None:
    """The crash came between the two writes of the journal."""
    outbox = Outbox(tmp_path, VAULT)
    outbox.add(PENDING, b"sealed")
    assert outbox.first() == PENDING
    (tmp_path / "round-3.record").unlink()
    assert outbox.first() is None


def test_the_oldest_update_goes_first_by_number(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, VAULT)
    for round_ in (10, 9):
        outbox.add(pending_for("docs", round_, "a" * 64, sealed=b"x", weight=1), b"x")
    first = outbox.first()
    assert first is not None
    assert first.round == 9
    outbox.remove(9)
    outbox.remove(9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-10.record", "round-10.sealed"]
