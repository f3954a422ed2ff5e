"""The plan key changes between two rounds: what is open goes on, what was signed stays valid, a kill costs nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import Device, Site, spawn, values_for
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

import cloud.backup
from cloud import audit, events, keyring
from cloud.commands import cloud as command
from cloud.config import load_config
from cloud.errors import DataError, DataMissingError, ServerRefusedError
from cloud.kept import open_kept
from cloud.keys import KEYS_FOLDER, NEXT_PLAN_KEY, PLAN_KEY, load_keys
from cloud.store import Database
from edge_runtime import wire
from edge_runtime.wire import resources

CHAIN = resources.PLAN_KEYS.format(task="tiny")


@pytest.fixture
def began() -> int:
    return int(time.time())  # commands have the real clock


@pytest.fixture
async def devices(site: Site, session: aiohttp.ClientSession) -> tuple[Device, Device]:
    return await site.device(session, "one"), await site.device(session, "two")


def keys_folder(site: Site) -> Path:
    return site.config.data_path / KEYS_FOLDER


def public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def loaded(key: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))


async def ask(site: Site, *args: str) -> Result:
    """In a thread: a command has an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, command, [*args, "--config", str(site.folder)])


async def chain(device: Device) -> tuple[wire.KeyStatement, ...]:
    answer = await device.send("GET", CHAIN)
    assert answer.status == 200
    return wire.decode_message(answer.body, wire.PlanKeyChain).statements


async def end_round(site: Site, devices: tuple[Device, Device]) -> None:
    """Both devices send; the next round begins."""
    for seed, device in enumerate(devices):
        signed = await device.plan()
        assert signed is not None
        answer = await device.put(signed, device.seal(signed, device.frame(signed, values_for(site, signed, seed))))
        assert answer.status in (200, 201), answer
    await site.tick()


def trust(key: str, devices: tuple[Device, Device]) -> None:
    for device in devices:
        device.plan_key = loaded(key)


async def test_the_open_round_keeps_its_key_and_the_next_has_the_new_one(
    site: Site, devices: tuple[Device, Device]
) -> None:
    one, two = devices
    before = await one.plan()
    assert before is not None
    sealed = one.seal(before, one.frame(before, values_for(site, before, 0)))
    assert (await one.put(before, sealed)).status == 201
    rotation = await site.operator.rotate_plan_key()
    assert (rotation.old, rotation.round, rotation.already) == (public_of(one), 1, False)
    assert site.events[-1] == events.PlanKeyChanged(rotation.new, 1)

    again = await two.plan()
    assert again is not None
    assert again.data == before.data
    assert (await two.put(again, two.seal(again, two.frame(again, values_for(site, again, 1))))).status == 201
    await site.tick()
    status = await site.operator.status()
    assert [(round_.round, round_.devices) for round_ in status.history] == [(0, 2)]

    with pytest.raises(wire.PlanSignatureError):
        await one.plan(after=0)
    assert wire.follow_keys(await chain(one), task="tiny", trusted=rotation.old) == (rotation.new,)
    trust(rotation.new, devices)
    after = await one.plan(after=0)
    assert after is not None
    assert after.plan.round == 1


def public_of(device: Device) -> str:
    return device.plan_key.public_bytes_raw().hex()


async def prove(device: Device, key: str) -> None:
    """The plan in force and the answer that it comes in are by this key."""
    target = resources.plan_target("tiny", after=-1, wait_s=0)
    head = device.head("GET", target)
    answer = await device.send("GET", target, headers=head)
    request, _ = wire.parse_authorization(head["Authorization"], method="GET", target=target)
    signed = wire.open_plan(answer.body, loaded(key))
    wire.check_answer(answer.headers[wire.PLAN_ANSWER], digest=signed.digest, request=request, key=loaded(key))


async def test_answers_are_proven_with_the_key_of_the_plan_they_bring(
    site: Site, devices: tuple[Device, Device]
) -> None:
    one, _ = devices
    rotation = await site.operator.rotate_plan_key()
    await prove(one, rotation.old)
    await end_round(site, devices)
    await prove(one, rotation.new)


async def test_repeated_before_the_next_round_it_changes_nothing(site: Site, devices: tuple[Device, Device]) -> None:
    first = await ask(site, "rotate-plan-key", "--json")
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert told["already"] is False
    head, files = (await site.operator.status()).audit_head, (keys_folder(site) / NEXT_PLAN_KEY).read_bytes()
    for _ in range(2):
        again = await ask(site, "rotate-plan-key")
        assert again.stdout == (
            f"a new plan key, {told['new'][:12]} in place of {told['old'][:12]}, is waiting already, and nothing was "
            "changed: it signs plans from round 2 on\n"
        )
        server = await site.restart()
        while server.aggregator._leftover is not None:  # what a kill may have left undone is done by itself
            await asyncio.sleep(0.02)
        await prove(devices[0], told["old"])
    assert (await site.operator.status()).audit_head == head
    assert (keys_folder(site) / NEXT_PLAN_KEY).read_bytes() == files
    assert len(await chain(devices[0])) == 1


async def test_after_its_round_began_the_old_private_key_is_gone(site: Site, devices: tuple[Device, Device]) -> None:
    rotation = await site.operator.rotate_plan_key()
    folder = keys_folder(site)
    assert stat.S_IMODE((folder / NEXT_PLAN_KEY).stat().st_mode) == 0o600
    old = (folder / PLAN_KEY).read_bytes()
    assert public(load_keys(folder).plan) == rotation.old
    await end_round(site, devices)
    assert {path.name for path in folder.iterdir()} == {PLAN_KEY, "operator.pem"}
    assert stat.S_IMODE((folder / PLAN_KEY).stat().st_mode) == 0o600
    assert public(load_keys(folder).plan) == rotation.new
    assert not any(old in path.read_bytes() for path in site.config.data_path.rglob("*") if path.is_file())


async def run_over_three_keys(site: Site, devices: tuple[Device, Device]) -> list[str]:
    """A whole task whose key changes twice, with restarts; the last one waits for the finished state."""
    keys = [public_of(devices[0])]
    for _ in range(2):
        rotation = await site.operator.rotate_plan_key()
        await site.restart()
        await end_round(site, devices)
        await site.restart()
        trust(rotation.new, devices)
        keys.append(rotation.new)
    await end_round(site, devices)
    assert (await site.operator.status()).state == "finished"
    return keys


async def test_everything_that_was_signed_stays_valid(site: Site, devices: tuple[Device, Device]) -> None:
    keys = await run_over_three_keys(site, devices)
    async with open_kept(site.config) as (_, kept):
        assert kept.keys.public == tuple(keys)
        assert [kept.keys.signer(record.plan) for record in kept.records] == [keys[0], keys[1], keys[2], keys[2]]
    replayed = await ask(site, "replay")
    assert replayed.exit_code == 0, replayed.output
    assert replayed.stdout.count("as signed") == 3
    for reader in (("audit", "verify"), ("audit", "show"), ("plans",), ("pilot", "--json")):
        found = await ask(site, *reader)
        assert found.exit_code in ((0, 1) if reader[0] == "pilot" else (0,)), found.output  # a pilot may end in no-go
    adapter = (await site.operator.status()).adapter
    traced = await ask(site, "audit", "trace", adapter)
    assert "rounds: 3" in traced.stdout, traced.output
    with pytest.raises(ServerRefusedError, match="has ended; no plan follows"):
        await site.operator.rotate_plan_key()


async def test_the_log_says_it_and_a_deleted_or_added_statement_is_found(
    site: Site, devices: tuple[Device, Device]
) -> None:
    rotation = await site.operator.rotate_plan_key()
    async with open_kept(site.config) as (database, _):
        audited = await database.call(database.audited)
    entry = audit.decode_entry(audited.links[-1].text)
    assert entry == audit.PlanKeyChanged(rotation.old, rotation.new)
    assert audit.check_facts(audited.links, audited.facts) is None
    fact = audit.plan_key_fact(rotation.old, rotation.new)
    broken = audit.check_facts(audited.links, audited.facts - {fact})
    assert broken is not None
    assert broken.how == f"the store does not say so: {fact}"
    more = audit.check_facts(audited.links, audited.facts | {audit.plan_key_fact(rotation.new, "ab" * 32)})
    assert more is not None
    assert "no entry up to this one says" in more.how


async def test_a_statement_that_its_key_did_not_sign_is_damage(site: Site, devices: tuple[Device, Device]) -> None:
    await site.operator.rotate_plan_key()
    await site.close()
    database = Database(site.config.data_path / "emberlora.sqlite3")
    with database._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE plan_keys SET signature = ?", ("ab" * 64,))
    await database.close()
    with pytest.raises(DataMissingError, match=r"statements of plan keys are damaged: .*not signed by key"):
        await site.start()


async def test_keys_of_another_time_are_a_line(site: Site, devices: tuple[Device, Device], tmp_path: Path) -> None:
    """The old file put back after the change: the server cannot sign, and says so."""
    shutil.copytree(keys_folder(site), tmp_path / "old")
    await site.operator.rotate_plan_key()
    await end_round(site, devices)
    await site.close()
    shutil.copy(tmp_path / "old" / PLAN_KEY, keys_folder(site) / PLAN_KEY)
    with pytest.raises(DataMissingError, match=r"private half of plan key .* is not there"):
        await site.start()
    (keys_folder(site) / PLAN_KEY).unlink()
    keyring.write_new(keys_folder(site) / PLAN_KEY, Ed25519PrivateKey.generate())
    with pytest.raises(DataMissingError, match="is none of this task's keys"):
        await site.start()


class TestKills:
    """What each write leaves behind when it is the last; ``restart`` stands for the next start after a kill."""

    @staticmethod
    def fail(monkeypatch: pytest.MonkeyPatch, *, stored: bool) -> None:
        """The next statement's request fails, after it was stored or before."""
        add = Database.add_key_statement

        def broken(self: Database, *args: object) -> None:
            monkeypatch.setattr(Database, "add_key_statement", add)
            if stored:
                add(self, *args)  # type: ignore[arg-type]
            raise DataError("a kill")

        monkeypatch.setattr(Database, "add_key_statement", broken)

    @pytest.mark.parametrize("restarted", [True, False])
    async def test_a_file_without_a_statement_is_nothing(
        self, site: Site, devices: tuple[Device, Device], monkeypatch: pytest.MonkeyPatch, restarted: bool
    ) -> None:
        self.fail(monkeypatch, stored=False)
        with pytest.raises(ServerRefusedError):
            await site.operator.rotate_plan_key()
        assert (keys_folder(site) / NEXT_PLAN_KEY).exists()
        if restarted:
            await site.restart()
            assert not (keys_folder(site) / NEXT_PLAN_KEY).exists()
        await end_round(site, devices)
        assert await devices[0].plan(after=0) is not None  # by the key that is trusted
        assert await chain(devices[0]) == ()
        rotation = await site.operator.rotate_plan_key()
        assert (rotation.old, rotation.already) == (public_of(devices[0]), False)
        await end_round(site, devices)
        trust(rotation.new, devices)
        assert await devices[0].plan(after=1) is not None

    @pytest.mark.parametrize("restarted", [True, False])
    async def test_a_statement_whose_answer_was_lost_counts(
        self, site: Site, devices: tuple[Device, Device], monkeypatch: pytest.MonkeyPatch, restarted: bool
    ) -> None:
        self.fail(monkeypatch, stored=True)
        with pytest.raises(ServerRefusedError):
            await site.operator.rotate_plan_key()
        if restarted:
            await site.restart()
        rotation = await site.operator.rotate_plan_key()
        assert rotation.already
        await end_round(site, devices)
        trust(rotation.new, devices)
        assert await devices[0].plan(after=0) is not None

    @pytest.mark.parametrize("restarted", [True, False])
    @pytest.mark.parametrize("renamed", [True, False])
    async def test_a_round_whose_old_key_is_still_there(
        self,
        site: Site,
        devices: tuple[Device, Device],
        monkeypatch: pytest.MonkeyPatch,
        restarted: bool,
        renamed: bool,
    ) -> None:
        """It goes at the next start or tick, and no further change overwrites the key in force."""
        replace: Callable[[Path, Path], None] = keyring._replace

        def broken(source: Path, target: Path) -> None:
            if renamed:
                replace(source, target)
            raise OSError(errno.ENOSPC, "No space left on device")

        rotation = await site.operator.rotate_plan_key()
        with monkeypatch.context() as full:
            full.setattr(keyring, "_replace", broken)
            await end_round(site, devices)
            trust(rotation.new, devices)
            await prove(devices[0], rotation.new)
            with pytest.raises(ServerRefusedError, match="disk is full"):
                await site.operator.rotate_plan_key()
            if restarted:
                await site.close()
        if restarted:
            await site.start()
            await prove(devices[0], rotation.new)
        second = await site.operator.rotate_plan_key()
        assert (second.old, second.already) == (rotation.new, False)
        assert public(load_keys(keys_folder(site)).plan) == rotation.new
        await end_round(site, devices)
        trust(second.new, devices)
        assert await devices[0].plan(after=1) is not None
        assert public(load_keys(keys_folder(site)).plan) == second.new


async def test_a_backup_has_the_keys_of_its_moment(site: Site, devices: tuple[Device, Device], tmp_path: Path) -> None:
    rotation = await site.operator.rotate_plan_key()
    await cloud.backup.back_up(site.config, site.folder / "emberlora.toml", tmp_path / "backup")
    shutil.copytree(tmp_path / "backup", tmp_path / "again")
    again = Site(tmp_path / "again", site.bundle, load_config(tmp_path / "again" / "emberlora.toml"), site.clock)
    await again.start()
    there = tuple(Device(again, device.session, device.name, device.key) for device in devices)
    trust(rotation.old, there)
    await end_round(again, there)
    trust(rotation.new, there)
    assert await there[0].plan(after=0) is not None
    await again.close()


def foreign(keys: Path) -> None:
    """As if another change, and its round, had come just now."""
    (keys / PLAN_KEY).unlink()
    keyring.write_new(keys / PLAN_KEY, Ed25519PrivateKey.generate())


def torn(keys: Path) -> None:
    """As if the old file had been read, and the new one was not there any more."""
    (keys / NEXT_PLAN_KEY).unlink()


def later(keys: Path) -> None:
    """As if the round of the change had begun just now: the database's copy is of the one before."""
    (keys / NEXT_PLAN_KEY).replace(keys / PLAN_KEY)


@pytest.mark.parametrize("changed", [foreign, torn, later])
async def test_a_key_that_changes_during_a_backup_means_once_more(
    site: Site,
    devices: tuple[Device, Device],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: Callable[[Path], None],
) -> None:
    """Between the database's copy and that of the keys."""
    copy_keys, sources = cloud.backup._copy_keys, []

    def meanwhile(source: Path, target: Path) -> None:
        sources.append(source)
        if len(sources) == 1:
            source = Path(shutil.copytree(source, tmp_path / "keys"))
            changed(source)
        copy_keys(source, target)

    monkeypatch.setattr(cloud.backup, "_copy_keys", meanwhile)
    await site.operator.rotate_plan_key()
    await cloud.backup.back_up(site.config, site.folder / "emberlora.toml", tmp_path / "backup")
    assert len(sources) == 2
    copied = tmp_path / "backup" / "data" / KEYS_FOLDER
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in keys_folder(site).iterdir()
    }


async def test_who_may_ask(site: Site, devices: tuple[Device, Device]) -> None:
    one, _ = devices
    answer = await one.send("POST", resources.OPERATOR_PLAN_KEY)
    assert (answer.status, answer.problem()) == (403, "NotPermittedError")
    assert (await one.send("GET", resources.PLAN_KEYS.format(task="other"))).problem() == "NotFoundError"
    assert (await one.send("GET", CHAIN, headers={})).problem() == "RequestFormatError"
    assert await chain(one) == ()


async def test_tokens_name_the_key_of_the_plan_in_force(
    site: Site, devices: tuple[Device, Device], session: aiohttp.ClientSession
) -> None:
    rotation = await site.operator.rotate_plan_key()
    early = await site.device(session, "early")  # its round is still the old one
    assert public_of(early) == rotation.old
    await end_round(site, devices)
    late = await site.device(session, "late")
    assert public_of(late) == rotation.new


async def test_no_chain_grows_beyond_a_message(
    site: Site, devices: tuple[Device, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "MAX_STATEMENTS", 1)
    await site.operator.rotate_plan_key()
    await end_round(site, devices)
    with pytest.raises(ServerRefusedError, match="has changed 1 times; begin a new task"):
        await site.operator.rotate_plan_key()


async def test_a_killed_server_goes_on_with_the_right_key(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """``kill -9`` while the new key waits, and again just after its round began."""
    site = Site.make(tmp_path)
    site.clock.now = int(time.time())
    process = spawn(site)
    try:
        devices = await site.device(session, "one"), await site.device(session, "two")
        rotation = await site.operator.rotate_plan_key()
        for key, after in ((rotation.old, -1), (rotation.new, 0)):
            process.kill()
            process.communicate()
            process = spawn(site)
            await prove(devices[0], key)
            trust(key, devices)
            for seed, device in enumerate(devices):
                signed = await device.plan(after=after)
                assert signed is not None
                sealed = device.seal(signed, device.frame(signed, values_for(site, signed, seed)))
                assert (await device.put(signed, sealed)).status == 201
            trust(rotation.new, devices)
            assert await devices[0].plan(after=after + 1) is not None
    finally:
        process.kill()
        process.communicate()
    assert (await ask(site, "audit", "verify")).exit_code == 0
    replayed = await ask(site, "replay")
    assert replayed.stdout.count("as signed") == 3, replayed.output
