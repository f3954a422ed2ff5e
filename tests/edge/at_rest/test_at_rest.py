"""Encrypted files: their bytes, every way to be wrong by name, and that none of it opens in another's place."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.at_rest import (
    NO_ROUND,
    OVERHEAD_BYTES,
    AlteredError,
    AtRestError,
    Grant,
    MisplacedError,
    NotEncryptedError,
    Purpose,
    StorageKey,
    StorageKeyFormatError,
    TruncatedError,
    Vault,
    WrongStorageKeyError,
    is_encrypted,
)
from tests.edge.encrypted import KEY, PURPOSES, VAULT, vault_of

PLAIN = b"what was learned"
FILE = VAULT.encrypt(PLAIN, "personal", round_=3)

# Where the header's fields begin, and what an attacker may write there.
PLACES = {"key id": 8, "purpose": 16, "round": 32, "owner": 36, "length": 44, "nonce": 52, "encrypted": 64}


def open_(data: bytes, purpose: Purpose = "personal", vault: Vault = VAULT, round_: int | None = 3) -> bytes:
    return vault.open(data, purpose, what="mine", round_=round_)


def test_the_golden_bytes() -> None:
    """Made again with nothing but the cipher, HKDF and the layout of the module's docstring."""
    vault = Vault(VAULT.grant("personal"), entropy=lambda count: bytes(range(count)))
    data = vault.encrypt(PLAIN, "personal", round_=3)
    assert data[:64].hex() == (
        "656d627265737431"  # magic "embrest1"
        + KEY.id  # id of the storage key
        + "706572736f6e616c0000000000000000"  # "personal"
        + "00000003"  # round
        + "aac082fdd3edb29e"  # owner
        + "0000000000000010"  # 16 plain bytes
        + "000102030405060708090a0b"  # nonce
    )
    key = HKDF(SHA256(), 32, None, b"emberlora at rest 1 file personal").derive(bytes(range(32)))
    bound = data[:64] + struct.pack(">I", 6) + b"pi-1\0t"
    assert data[64:] == ChaCha20Poly1305(key).encrypt(bytes(range(12)), PLAIN, bound)
    assert KEY.id == HKDF(SHA256(), 8, None, b"emberlora at rest 1 id").derive(bytes(range(32))).hex()


@given(data=st.binary(max_size=300), purpose=st.sampled_from(PURPOSES), round_=st.integers(0, NO_ROUND))
def test_what_is_encrypted_opens(data: bytes, purpose: Purpose, round_: int) -> None:
    made = VAULT.encrypt(data, purpose, round_=round_)
    assert is_encrypted(made)
    assert len(made) == len(data) + OVERHEAD_BYTES
    assert open_(made, purpose, round_=round_) == open_(made, purpose, round_=None) == data


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Also by :meth:`Vault.read`, which looks at the header first."""
    path = tmp_path / "mine"
    for place in range(len(FILE)):
        for bit in range(8):
            changed = bytearray(FILE)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            for opens in (lambda data=bytes(changed): open_(data), lambda: VAULT.read(path, "personal", round_=3)):
                with pytest.raises(AtRestError) as raised:
                    opens()
                assert str(raised.value).count("\n") == 0
                if place >= PLACES["nonce"]:
                    assert type(raised.value) is AlteredError


@pytest.mark.parametrize("length", range(len(FILE)))
def test_every_truncation_is_named(tmp_path: Path, length: int) -> None:
    expected = NotEncryptedError if length < 8 else TruncatedError
    with pytest.raises(expected, match=r"mine: (not an encrypted file|truncated)"):
        open_(FILE[:length])
    (tmp_path / "mine").write_bytes(FILE[:length])
    with pytest.raises(expected):
        VAULT.read(tmp_path / "mine", "personal")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"embrest2" + FILE[8:], b"\xff" * 200, b'{"private_key": "' + b"a" * 64]
)
def test_other_files_are_named(content: bytes) -> None:
    assert not is_encrypted(content)
    with pytest.raises(NotEncryptedError, match="mine: not an encrypted file"):
        open_(content)


def test_what_hangs_on_is_refused() -> None:
    with pytest.raises(TruncatedError, match="expected 96 bytes, got 97"):
        open_(FILE + b"\0")


def test_a_length_that_no_file_has_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte whose header agrees with it."""
    size = 1 << 40
    with (tmp_path / "mine").open("wb") as file:
        file.write(FILE[:44] + struct.pack(">Q", size - OVERHEAD_BYTES) + FILE[52:])
        file.truncate(size)
    with pytest.raises(TruncatedError):
        VAULT.read(tmp_path / "mine", "personal")


@pytest.mark.parametrize(
    ("vault", "purpose", "round_", "message"),
    [
        (VAULT, "residual", 3, "mine: in another file's place: expected 'residual', got 'personal'"),
        (VAULT, "personal", 4, "mine: of another round: expected 4, got 3"),
        (VAULT, "personal", NO_ROUND, "mine: of another round: expected none, got 3"),
        (vault_of("pi-2"), "personal", 3, "mine: of another device or task than pi-2 in t"),
        (vault_of(task="u"), "personal", 3, "mine: of another device or task than pi-1 in u"),
        (vault_of("pi-1\0t", ""), "personal", 3, "mine: of another device or task"),
    ],
)
def test_swapped_files_are_named(vault: Vault, purpose: Purpose, round_: int, message: str) -> None:
    with pytest.raises(MisplacedError, match="^" + message):
        open_(FILE, purpose, vault, round_)


def test_another_storage_key_is_named_and_is_no_damage() -> None:
    other = StorageKey(bytes(32))
    with pytest.raises(WrongStorageKeyError, match=f"mine: .* it needs {KEY.id}, this is {other.id}"):
        open_(FILE, vault=vault_of(key=other))


@pytest.mark.parametrize(
    ("field", "vault", "purpose", "round_"),
    [
        ("purpose", VAULT, "residual", 3),
        ("round", VAULT, "personal", 4),
        ("owner", vault_of("pi-2"), "personal", 3),
        ("owner", vault_of(task="u"), "personal", 3),
        ("key id", vault_of(key=StorageKey(bytes(32))), "personal", 3),
    ],
)
def test_a_header_made_to_fit_does_not_help(field: str, vault: Vault, purpose: Purpose, round_: int) -> None:
    """Whoever swaps files may as well write what the header should say; the tag is what counts."""
    wanted = vault.encrypt(PLAIN, purpose, round_=round_)
    begin = PLACES[field]
    end = min(place for place in PLACES.values() if place > begin)
    forged = FILE[:begin] + wanted[begin:end] + FILE[end:]
    with pytest.raises(AlteredError, match="mine: altered"):
        open_(forged, purpose, vault, round_)


def test_what_is_bound_must_be_the_same() -> None:
    data = VAULT.encrypt(PLAIN, "identity", bound=b"https://one")
    assert VAULT.open(data, "identity", what="mine", bound=b"https://one") == PLAIN
    with pytest.raises(AlteredError):
        VAULT.open(data, "identity", what="mine", bound=b"https://two")


def test_equal_bytes_are_never_encrypted_equally() -> None:
    made = {VAULT.encrypt(PLAIN, "personal", round_=3)[PLACES["nonce"] :] for _ in range(100)}
    assert len(made) == 100


def test_a_grant_opens_its_own_files_and_no_others() -> None:
    """What a training child is given lets it neither read the device's key nor find the storage key."""
    grant = VAULT.grant("personal", "frame")
    sent = msgspec.json.encode(grant)
    child = Vault(msgspec.json.decode(sent, type=Grant))
    assert open_(FILE, vault=child) == PLAIN
    assert KEY.text().encode() not in sent
    others = [KEY.key_of(purpose).hex() for purpose in PURPOSES if purpose not in ("personal", "frame")]
    assert len(others) == len(PURPOSES) - 2
    assert not [key for key in others if key.encode() in sent]
    assert len({KEY.key_of(purpose) for purpose in PURPOSES} | {KEY.secret}) == len(PURPOSES) + 1


def test_secrets_are_in_no_repr() -> None:
    keys = [KEY.text(), *(KEY.key_of(purpose).hex() for purpose in PURPOSES)]
    said = f"{KEY!r} {VAULT!r} {VAULT.grant('frame')!r}"
    assert not [key for key in keys if key in said or key.upper() in said]
    assert KEY.id in said


def test_a_storage_key_is_64_digits() -> None:
    assert StorageKey.parse(f"  {KEY.text().upper()}\r\n") == KEY
    assert StorageKey.parse(KEY.text()) == KEY


@pytest.mark.parametrize(
    "text", ["", "ab" * 31, "ab" * 33, "zz" * 32, "ab" * 16 + " " + "ab" * 16, "\u0661" * 64, "\0" * 64]
)
def test_what_is_no_storage_key_is_not_repeated(text: str) -> None:
    with pytest.raises(StorageKeyFormatError, match="expected 64 hexadecimal digits") as raised:
        StorageKey.parse(text)
    assert not text.strip() or text not in str(raised.value)
    with pytest.raises(StorageKeyFormatError, match="expected 32 bytes, got 31"):
        StorageKey(bytes(31))
