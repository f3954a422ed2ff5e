"""A chain of key statements is followed from the trusted key, or refused by name."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.wire import (
    KeyStatement,
    PlanKeyChain,
    PlanKeyError,
    RequestFormatError,
    decode_message,
    encode_message,
    follow_keys,
    state_key,
)
from edge_runtime.wire.messages import MAX_MESSAGE_BYTES
from edge_runtime.wire.plankeys import MAX_STATEMENTS

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(5)]
PUBLIC = [key.public_key().public_bytes_raw().hex() for key in KEYS]

OLD = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"  # of the private key 00 01 … 1f
STATEMENT = (
    # task, the old key, the new one, signature of b"emberlora plan key 1\n{task}\n{old}\n{new}\n"
    b'{"task":"sst2",'
    b'"old":"03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8",'
    b'"new":"8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c",'
    b'"signature":"42f18b2d10937b40248f37073d47da05080aa895220d613ec382432fa06edb5ad23bb7f13180280ff5e813dcc76a3c85d95cbeee9707d83d44377e06f2cbe109"}'
)


def stated(old: int, new: int, *, task: str = "docs", by: int | None = None) -> KeyStatement:
    """The statement of key ``old``; with ``by`` another one has signed it."""
    statement = state_key(task, KEYS[old if by is None else by], KEYS[new].public_key())
    return msgspec.structs.replace(statement, old=PUBLIC[old])


def test_golden_statement() -> None:
    old = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    made = state_key("sst2", old, Ed25519PrivateKey.from_private_bytes(b"\1" * 32).public_key())
    assert encode_message(made) == STATEMENT
    assert follow_keys([decode_message(STATEMENT, KeyStatement)], task="sst2", trusted=OLD) == (made.new,)


def test_a_chain_is_followed_from_the_trusted_key() -> None:
    chain = [stated(0, 1), stated(1, 2), stated(2, 3)]
    assert follow_keys(chain, task="docs", trusted=PUBLIC[0]) == tuple(PUBLIC[1:4])
    assert follow_keys(chain, task="docs", trusted=PUBLIC[2]) == (PUBLIC[3],)
    assert follow_keys(chain, task="docs", trusted=PUBLIC[3]) == ()
    assert follow_keys([], task="docs", trusted=PUBLIC[0]) == ()


def test_what_stands_before_the_trusted_key_does_not_matter() -> None:
    """A device that enrolled late cannot judge it, and needs not."""
    assert follow_keys([stated(0, 1, by=4), stated(1, 2)], task="docs", trusted=PUBLIC[1]) == (PUBLIC[2],)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([stated(1, 2)], "no statement is by the key that is trusted"),
        ([stated(0, 1, by=1)], "statement 0: not signed by key"),
        ([stated(0, 1), stated(1, 2, by=0)], "statement 1: not signed by key"),
        ([stated(0, 1), stated(0, 2)], "statement 1: expected one by key"),
        ([stated(0, 1), stated(2, 3)], "statement 1: expected one by key"),
        ([stated(0, 1, task="other")], "statement 0: expected task docs, got other"),
        ([msgspec.structs.replace(stated(0, 1, task="other"), task="docs")], "statement 0: not signed by key"),
        ([msgspec.structs.replace(stated(0, 1), new=PUBLIC[2])], "statement 0: not signed by key"),
        ([stated(0, 1), stated(1, 0), stated(0, 2)], "statement 1: leads back to key"),
        ([stated(0, 1), stated(1, 2), stated(2, 1)], "statement 2: leads back to key"),
        ([stated(0, 1), stated(1, 0)], "statement 1: leads back to key"),
        ([stated(0, 0), stated(0, 1)], "statement 0: leads back to key"),
        ([stated(0, 1)] * (MAX_STATEMENTS + 1), f"too many: expected at most {MAX_STATEMENTS} statements"),
    ],
)
def test_a_chain_that_must_not_be_followed(chain: list[KeyStatement], message: str) -> None:
    with pytest.raises(PlanKeyError, match=message):
        follow_keys(chain, task="docs", trusted=PUBLIC[0])


def test_the_longest_chain_fits_into_a_message_and_no_longer_one_is_read() -> None:
    longest = PlanKeyChain((stated(0, 1, task="t" * 63),) * MAX_STATEMENTS)
    data = encode_message(longest)
    assert len(data) <= MAX_MESSAGE_BYTES
    assert decode_message(data, PlanKeyChain) == longest
    with pytest.raises(RequestFormatError, match="not a PlanKeyChain"):
        decode_message(encode_message(PlanKeyChain((stated(0, 1),) * (MAX_STATEMENTS + 1))), PlanKeyChain)
