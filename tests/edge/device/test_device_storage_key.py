"""Where the storage key comes from, and that one which cannot be had is a line and changes nothing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from edge_runtime.at_rest import StorageKey
from edge_runtime.device.commands import enroll, leave, rotate_key, run, status, trust
from edge_runtime.device.errors import CorruptFileError, StorageKeyError
from edge_runtime.device.files import write_bytes
from edge_runtime.device.home import Home
from edge_runtime.device.records import Identity
from edge_runtime.device.storage_key import CREDENTIAL, KeyChoice, SystemKeyStore, default_file, find_key
from tests.edge.encrypted import KEY

IDENTITY = Identity("https://ember.example", "pi-1", "ab" * 32, "docs", "cd" * 32)
OTHER = StorageKey(b"\1" * 32)


class Store(dict[str, str]):
    """The system's key store, in memory; a forgetful one keeps nothing."""

    forgetful = False

    def get(self, name: str) -> str | None:  # type: ignore[override]
        return super().get(name)

    def set(self, name: str, text: str) -> None:
        if not self.forgetful:
            self[name] = text


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def find(home: Home, choice: KeyChoice = KeyChoice(), *, store: Store | None = None) -> StorageKey:  # noqa: B008  # frozen
    return find_key(home, choice, store=Store() if store is None else store, entropy=lambda count: KEY.secret[:count])


def enrolled(home: Home, choice: KeyChoice = KeyChoice(), *, store: Store | None = None) -> StorageKey:  # noqa: B008
    """A home that is encrypted under its key."""
    key = find(home, choice, store=store)
    Home(home.folder, key).save_identity(IDENTITY)
    return key


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_home_gets_a_key_beside_it_that_is_found_again(home: Home) -> None:
    key = enrolled(home)
    path = home.folder.with_name("home.storage-key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == key.text() + "\n"
    assert not list(home.folder.rglob("*storage-key*"))
    place = home.key_place()
    assert place is not None
    assert (place.kind, place.where, place.key_id) == ("file", str(path), key.id)
    assert find(home) == key
    assert Home(home.folder, find(home)).identity() == IDENTITY


def test_it_may_lie_on_another_medium_and_the_home_remembers_where(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "medium" / "key"
    key = enrolled(home, KeyChoice(path))
    assert StorageKey.parse(path.read_text()) == key
    assert not default_file(home.folder).exists()
    assert find(home) == key
    moved = path.rename(tmp_path / "elsewhere")
    assert find(home, KeyChoice(moved)) == key
    assert find(home) == key, "the new place was not remembered"


def test_two_homes_may_share_a_key_and_none_overwrites_it(tmp_path: Path) -> None:
    first, second = Home(tmp_path / "one"), Home(tmp_path / "two")
    path = tmp_path / "key"
    write_bytes(path, OTHER.text().encode())
    assert find(first, KeyChoice(path)) == find(second, KeyChoice(path)) == OTHER
    assert path.read_text() == OTHER.text()


@pytest.mark.parametrize("volume", ["mounted", "not ours"])
def test_where_nothing_can_be_kept_beside_it_the_key_is_inside(
    home: Home, monkeypatch: pytest.MonkeyPatch, volume: str
) -> None:
    home.folder.mkdir()
    if volume == "mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == home.folder)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: path != home.folder.parent)
    key = enrolled(home)
    assert StorageKey.parse((home.folder / "storage-key").read_text()) == key
    monkeypatch.undo()
    assert find(home) == key


def test_a_full_disk_leaves_no_half_key(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be in the way of a whole one when there is room."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageKeyError, match="a storage key cannot be made here: No space left"):
            find(home)
    assert not default_file(home.folder).exists()
    assert find(home) == KEY


def test_the_systems_key_store(home: Home) -> None:
    store = Store()
    key = enrolled(home, KeyChoice(keyring=True), store=store)
    assert store == {str(home.folder): key.text()}
    assert find(home, store=store) == key
    assert not default_file(home.folder).exists()
    assert key.text().encode() not in b"".join(everything(home.folder).values())
    with pytest.raises(StorageKeyError, match=r"key store, entry .*/home: no storage key there: .* is encrypted under"):
        find(home, store=Store())


def test_a_key_store_that_forgets_is_found_out_before_anything_is_encrypted(home: Home) -> None:
    store = Store()
    store.forgetful = True
    with pytest.raises(StorageKeyError, match="did not keep the storage key: use --storage-key-file"):
        find(home, KeyChoice(keyring=True), store=store)
    assert home.key_place() is None


def test_without_the_package_the_key_store_is_one_line(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "keyring", None)
    monkeypatch.setitem(sys.modules, "keyring.errors", None)
    with pytest.raises(StorageKeyError, match=r"needs the package 'keyring'.*pip install 'emberlora\[keyring\]'"):
        find_key(home, KeyChoice(keyring=True))


def test_the_package_itself(home: Home) -> None:
    """With a backend in memory, and with none, as on a machine without a desktop."""
    keyring = pytest.importorskip("keyring", reason="the extra 'keyring' is not installed")
    from keyring.backends.fail import Keyring as NoKeyring

    class InMemory(keyring.backend.KeyringBackend):  # type: ignore[name-defined,misc]
        priority = 1
        kept: dict[tuple[str, str], str] = {}  # noqa: RUF012

        def get_password(self, service: str, username: str) -> str | None:
            return self.kept.get((service, username))

        def set_password(self, service: str, username: str, password: str) -> None:
            self.kept[service, username] = password

    before = keyring.get_keyring()
    try:
        keyring.set_keyring(InMemory())
        key = find_key(home, KeyChoice(keyring=True))
        assert InMemory.kept == {("emberlora", str(home.folder)): key.text()}
        assert find_key(home, KeyChoice()) == key
        keyring.set_keyring(NoKeyring())
        with pytest.raises(StorageKeyError, match=r"key store: cannot be used: .*--storage-key-file"):
            SystemKeyStore().get("x")
    finally:
        keyring.set_keyring(before)


@pytest.mark.parametrize(
    ("said", "shown"), [("Prompt dismissed..", "Prompt dismissed"), ("", "KeyringLocked"), ("a.b", "a.b")]
)
def test_a_locked_key_store_says_why(home: Home, monkeypatch: pytest.MonkeyPatch, said: str, shown: str) -> None:
    """The first is what gnome-keyring answers where nobody can be asked for the password."""
    keyring = pytest.importorskip("keyring", reason="the extra 'keyring' is not installed")
    from keyring.errors import KeyringLocked

    def locked(service: str, username: str) -> str:
        raise KeyringLocked(said)

    monkeypatch.setattr(keyring, "get_password", locked)
    with pytest.raises(StorageKeyError, match=f"cannot be used: {shown}: unlock it, or keep"):
        find_key(home, KeyChoice(keyring=True))
    assert home.key_place() is None


def test_a_credential_of_systemd(home: Home, tmp_path: Path) -> None:
    """It is taken where it is, whatever else is there, and named when it is not; systemd alone can make one."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "tls-key").write_text("for others")
    assert find(Home(tmp_path / "another"), KeyChoice(credentials=folder)) == KEY, "a folder without ours is no matter"
    (folder / CREDENTIAL).write_text(OTHER.text() + "\n")
    (folder / CREDENTIAL).chmod(0o440)  # an access list shows like this
    assert enrolled(home, KeyChoice(credentials=folder)) == OTHER
    with pytest.raises(StorageKeyError, match=rf"credential {CREDENTIAL}: no storage key there: .*LoadCredential"):
        find(home)
    (folder / CREDENTIAL).unlink()
    with pytest.raises(StorageKeyError, match="LoadCredential"):
        find(home, KeyChoice(credentials=folder))


def test_a_key_that_was_in_a_file_may_become_a_credential(home: Home, tmp_path: Path) -> None:
    key = enrolled(home)
    folder = tmp_path / "credentials"
    folder.mkdir()
    default_file(home.folder).rename(folder / CREDENTIAL)
    assert find(home, KeyChoice(credentials=folder)) == key
    place = home.key_place()
    assert place is not None
    assert place.kind == "credential"


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0o600, r"no storage key there: .*/home is encrypted under key [0-9a-f]{16}: put it back or mount it"),
        (OTHER.text().encode(), 0o600, "another storage key than the one .*/home is encrypted under: expected key"),
        (b"", 0o600, "no storage key: expected 64 hexadecimal digits"),
        (KEY.text().encode()[:-1], 0o600, "no storage key: expected 64 hexadecimal digits"),
        (KEY.secret, 0o600, "no storage key: expected 64 hexadecimal digits"),
        (b"a" * (1 << 20), 0o600, "no storage key: expected 64 hexadecimal digits"),
        (KEY.text().encode(), 0o640, r"others may read this storage key \(mode 0640\): chmod 600 it"),
        (KEY.text().encode(), 0o604, r"others may read this storage key \(mode 0604\)"),
    ],
)
def test_a_key_that_cannot_be_had_is_a_line_and_nothing_changes(
    home: Home, content: bytes | None, mode: int, message: str
) -> None:
    enrolled(home)
    path = default_file(home.folder)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    before = everything(home.folder.parent)
    with pytest.raises(StorageKeyError, match=message) as raised:
        find(home)
    said = str(raised.value)
    assert str(path) in said
    assert "\n" not in said
    assert KEY.text()[:-1] not in said
    assert everything(home.folder.parent) == before


def test_a_folder_in_the_keys_place(home: Home) -> None:
    default_file(home.folder).mkdir(parents=True)
    with pytest.raises(StorageKeyError, match="the storage key cannot be read: Is a directory"):
        find(home)


def test_a_home_that_lost_its_record_does_not_get_a_new_key(home: Home) -> None:
    """What it is encrypted under is somewhere; a new key would hide that for good."""
    key = enrolled(home)
    (home.folder / "storage.json").unlink()
    assert find(home) == key  # where it would be by default
    (home.folder / "storage.json").unlink()
    default_file(home.folder).unlink()
    with pytest.raises(StorageKeyError, match="no storage key there"):
        find(home)
    assert not default_file(home.folder).exists()
    write_bytes(default_file(home.folder), OTHER.text().encode())
    with pytest.raises(StorageKeyError, match="encrypted under another storage key"):
        Home(home.folder, find(home)).identity()


def test_who_has_left_may_start_with_another_key(home: Home, tmp_path: Path) -> None:
    enrolled(home)
    Home(home.folder, KEY).forget()
    default_file(home.folder).unlink()
    assert find(home, KeyChoice(tmp_path / "new")) == KEY  # the generator's; from a file that was made just now
    assert (tmp_path / "new").exists()


def test_an_identity_that_was_changed_is_noticed(home: Home) -> None:
    """The private keys are bound to server, CA and plan key: whoever can write the file cannot redirect the device."""
    key = enrolled(home)
    path = home.folder / "identity.json"
    whole = path.read_bytes()
    for old, new in (("ember.example", "evil.example"), ("cd" * 32, "ce" * 32), ('"docs"', '"dogs"')):
        assert old.encode() in whole
        path.write_bytes(whole.replace(old.encode(), new.encode()))
        with pytest.raises(CorruptFileError, match=r"identity.json: (altered|of another device or task)"):
            Home(home.folder, key).identity()
    path.write_bytes(whole)
    assert Home(home.folder, key).identity() == IDENTITY


def types(command: object, *options: object, **environ: str) -> Result:
    return CliRunner().invoke(command, [str(option) for option in options], env=environ)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", [run, leave, rotate_key, trust])
def test_commands_say_what_is_missing_and_where(home: Home, command: object) -> None:
    """Exit code 2, one line; and status goes without."""
    enrolled(home)
    default_file(home.folder).unlink()
    before = everything(home.folder)
    more = ("--system-ca",) if command is trust else ()
    result = types(command, "--home", home.folder, *more)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: file {default_file(home.folder)}: no storage key there: ")
    assert "--storage-key-file" in line
    assert {name: data for name, data in everything(home.folder).items() if not name.endswith("lock")} == before
    shown = types(status, "--home", home.folder)
    assert shown.exit_code == 0
    assert f"storage key file {default_file(home.folder)}" in shown.stdout


def test_the_options_and_the_environment_reach_it(home: Home, tmp_path: Path) -> None:
    enrolled(home, KeyChoice(tmp_path / "key"))
    moved = (tmp_path / "key").rename(tmp_path / "moved")
    command = (trust, "--home", home.folder, "--system-ca")
    assert types(*command).exit_code == 2
    both = types(*command, "--storage-key-file", moved, "--storage-keyring")
    assert (both.exit_code, "give one of them" in both.stderr) == (2, True)
    assert types(*command, EMBERLORA_STORAGE_KEY_FILE=str(moved)).exit_code == 0
    folder = tmp_path / "credentials"
    folder.mkdir()
    moved.rename(folder / CREDENTIAL)
    assert types(*command).exit_code == 2
    assert types(*command, CREDENTIALS_DIRECTORY=str(folder)).exit_code == 0
    found = msgspec.json.decode(types(status, "--home", home.folder, "--json").stdout)
    assert found["storage_key"] == f"credential {CREDENTIAL}"


def test_the_help_says_where_the_key_is() -> None:
    for command in (enroll, run):
        assert "HOME.storage-key" in types(command, "--help").stdout
