"""Everything that reads bytes of others: good samples of them, what reads them, and how it may refuse.

A parser that reads hostile bytes without a word must have read something lawful, so each one is followed by its law:
what it gave can be written and read again, or keeps to the bounds that stand in its docstring.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloud.config import parse_config
from cloud.errors import ConfigError
from edge_runtime import wire
from edge_runtime.at_rest import NO_ROUND, AtRestError, StorageKey
from edge_runtime.bundle import (
    BundleError,
    adapter_shapes,
    encode_manifest,
    parse_manifest,
    parse_tensors,
)
from edge_runtime.bundle.adapter import adapter_ranks, cut_ranks
from edge_runtime.bundle.tensors import encode_tensors
from edge_runtime.device.errors import CorruptFileError, LocalError
from edge_runtime.device.files import read_record
from edge_runtime.device.home import Home
from edge_runtime.device.records import DeviceState, Identity, Pending, Settings
from edge_runtime.engine.hidden_file import KEY_BYTES, Ground, HiddenFile, Secret
from edge_runtime.wire.patch import change_of
from edge_runtime.wire.patch_frame import DEFLATED, DIFFERENCES, parse_patch
from tests.edge.encrypted import KEY, VAULT
from tests.edge.tiny_manifest import tiny_manifest

_PLAN_CONTEXT = b"emberlora plan 1\0"
_DIGEST = "ad" * 32
_FEATURES = {"layer.0.query": (3, 2), "layer.1.query": (3, 2)}
_PLACES = {"layer.0.query": 0, "layer.1.query": 1}
_HEAD = {"classifier.bias": (2,)}
_TIERS = (wire.Tier(0, max_rank=1, memory_mib=2048, step_s=1.5), wire.Tier(1, max_rank=1, memory_mib=512))


@dataclass(frozen=True)
class Parser:
    """What is tried.

    Attributes:
        name: For people.
        corpus: Good samples; ``read`` takes each of them.
        read: Reads, and raises AssertionError where what it read breaks its law.
        refusals: What it may raise; anything else is a fault.
    """

    name: str
    corpus: tuple[bytes, ...]
    read: Callable[[bytes], None]
    refusals: type[Exception]


def fault(parser: Parser, data: bytes) -> str | None:
    """What is wrong with how a parser took the bytes; None: it read them lawfully, or refused them by name."""
    try:
        parser.read(data)
    except parser.refusals as error:
        return _unreadable(str(error))
    except Exception as error:  # noqa: BLE001 - whatever else comes out is what is looked for
        return f"{type(error).__name__}: {error}"
    return None


def _unreadable(message: str) -> str | None:
    """A refusal goes to logs and answers, so it must be short, and can be written as UTF-8."""
    if len(message) > 4_000:
        return f"its message has {len(message)} characters: {message[:80]}"
    try:
        message.encode()
    except UnicodeEncodeError as error:
        return f"its message cannot be written: {error}"
    return None


def _plan(**changes: object) -> wire.Plan:
    plan = wire.Plan(
        schema=1,
        task="sst2",
        round=7,
        rounds=20,
        state="train",
        bundle="b0" * 32,
        adapter=_DIGEST,
        adapter_bytes=1234,
        modules=(wire.ModulePlan("layer.0.query", 2, "AB"), wire.ModulePlan("layer.1.query", 1, "B")),
        head_alive=True,
        training=wire.Training(batch_size=8, max_tokens=128, lr_a=2e-4, lr_b=1e-3, lr_head=1e-3, epochs=1),
        update=wire.UpdateRules(),
        seed=42,
        deadline=1.8e9,
        round_key=_ROUND_KEY.public_key().public_bytes_raw().hex(),
    )
    return msgspec.structs.replace(plan, **changes)


_SIGNING_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_ROUND_KEY = X25519PrivateKey.from_private_bytes(bytes(range(32, 64)))
_QUANTISED = wire.Quantisation(4, (7.0, 7.0, 7.0, 7.0))  # codes are whole numbers
_TERNARY = wire.Quantisation(2, (1.0, 1.0, 1.0, 1.0))
_MIXED = (wire.ModulePlan("layer.0.query", 2, "A", (1,)), wire.ModulePlan("layer.1.query", 1, ""))
_PLANS = (
    _plan(),
    _plan(quantisation=_QUANTISED),
    _plan(quantisation=msgspec.structs.replace(_QUANTISED, density=0.3)),
    _plan(quantisation=_TERNARY),
    _plan(tiers=_TIERS),
    _plan(modules=_MIXED, head_alive=False, personal=("head", "B")),
)
_METRICS = wire.LocalMetrics(38, 100, 61, 0.6875, 0.5, 0.625, 12.5, None, 640.0)


def _signed_text(text: bytes) -> bytes:
    return _SIGNING_KEY.sign(_PLAN_CONTEXT + text) + text


def _read_plan(text: bytes) -> None:
    """Rightly signed, so that the text is read: a server may be taken over."""
    signed = wire.open_plan(_signed_text(text), _SIGNING_KEY.public_key())
    again = wire.sign_plan(signed.plan, _SIGNING_KEY)
    assert wire.open_plan(again.data, _SIGNING_KEY.public_key()).plan == signed.plan, "its plan is another when written"


def _read_signature(data: bytes) -> None:
    signed = wire.open_plan(data, _SIGNING_KEY.public_key())
    assert signed.plan in _PLANS, "a plan that nobody has signed"


def _updates(plan: wire.Plan, tier: int = 0) -> Parser:
    signed = wire.sign_plan(plan, _SIGNING_KEY)
    layouts = wire.tier_layouts(plan, features=_FEATURES, places=_PLACES, head=_HEAD)
    samples = []
    for layout in layouts:
        values = np.arange(layout.count, dtype=np.float32) % 8  # also as codes of four bits
        if layout.quantisation and layout.quantisation.bits == 2:
            values = values % 3 - 1
        values[layout.held :] = 0
        metrics = wire.LocalMetrics(38, 100, 61, 0.6875, 0.5, 0.625, 12.5, None, 640.0, tier=layout.tier)
        samples.append(wire.encode_update(wire.Update(values, 300, metrics), signed_plan=signed, layout=layout))

    def read(data: bytes) -> None:
        layout = wire.layout_for(data, layouts)
        update = wire.decode_update(data, signed_plan=signed, layout=layout)
        assert update.values.shape == (layout.count,), "another number of values than its layout's"
        assert np.isfinite(update.values).all(), "not finite"
        assert float(np.abs(update.values).max(initial=0)) <= plan.update.max_abs, "over the plan's bound"
        assert update.weight >= 1, "of no weight"

    return Parser(f"update, {_kind(plan)}", tuple(samples), read, wire.UpdateError)


def _kind(plan: wire.Plan) -> str:
    """What is peculiar to its updates."""
    if not plan.quantisation:
        return "tiers" if plan.tiers else "float32"
    if plan.quantisation.bits == 2:
        return "ternary codes"
    return "codes" if plan.quantisation.density is msgspec.UNSET else "some codes"


def _measurements() -> Parser:
    plan = _plan(state="measure", modules=(), head_alive=False, update=wire.UpdateRules(weight_cap=1, max_abs=1024.0))
    signed, layout = wire.sign_plan(plan, _SIGNING_KEY), wire.measurement_layout(2, 3)
    values = np.array([1, 2, 3, 4, 5, 6, 2, 3, 1, 0, 0, 1, 0, 1], np.float32)
    frame = wire.encode_update(wire.Update(values, 5, _METRICS), signed_plan=signed, layout=layout)

    def read(data: bytes) -> None:
        wire.check_measurement(wire.decode_update(data, signed_plan=signed, layout=layout), layout)

    return Parser("measurement", (frame,), read, wire.UpdateError)


def _patches() -> Parser:
    layout = wire.adapter_layout({"layer.0.query": 2, "layer.1.query": 1}, _FEATURES, _HEAD)
    some = np.array([[127, -4], [64, 127]], np.float32) * np.array([0.5, 0.25], np.float32)
    four = np.array([[7, -1], [-6, 7]], np.float32) * np.array([0.5, 0.25], np.float32)
    bias = change_of("classifier.bias", np.array([2, -2.25], np.float32), (0, 1))
    name = "layer.0.query.lora_b"
    samples = [
        wire.encode_patch(wire.PatchHead(4, 7, _DIGEST, bits), changes, layout)
        for bits, changes in (
            (32, {name: change_of(name, some, (0, 1)), "classifier.bias": bias}),
            (8, {name: change_of(name, some, (0, 1)), "classifier.bias": bias}),
            (4, {name: change_of(name, four, (0, 1))}),
        )
    ]
    plain = parse_patch(samples[1], since=4, round_=7, digest=_DIGEST, layout=layout)
    parts = {**plain.parts, name: replace(plain.parts[name], exact=bytes([126, 125]))}  # exponents of the same scales
    for coding in (DEFLATED, DIFFERENCES):
        samples.append(replace(plain, head=replace(plain.head, coding=coding), parts=parts).encode())
    older = {name: -some}

    def read(data: bytes) -> None:
        changes = wire.decode_patch(data, since=4, round_=7, digest=_DIGEST, layout=layout, older=older)
        for change in changes.values():
            assert np.isfinite(change.values).all(), "not finite"

    return Parser("patch", tuple(samples), read, wire.PatchError)


def _envelopes() -> Parser:
    signed = wire.sign_plan(_plan(), _SIGNING_KEY)
    context = wire.EnvelopeContext.of(signed, "pi-4")
    sealed = wire.seal(b"x" * 200, round_key=signed.plan.round_key, context=context)

    def read(data: bytes) -> None:
        opened = wire.unseal(data, round_key=_ROUND_KEY, context=context)
        assert (data, opened) == (sealed, b"x" * 200), "opens what nobody has sealed"

    return Parser("envelope", (sealed,), read, wire.EnvelopeError)


def _requests() -> Parser:
    request = wire.SignedRequest(
        "pi-4", "PUT", "/v1/tasks/sst2/plan?after=1&wait=2", "2d" * 32, 1_800_000_000, "0f" * 16
    )
    header = wire.authorization(request, _SIGNING_KEY)

    def read(data: bytes) -> None:
        found, signature = wire.parse_authorization(data.decode("latin-1"), method="PUT", target=request.target)
        assert len(signature) == 64, "no Ed25519 signature"
        assert found.text(), "has no text"

    return Parser("authorization", (header.encode(),), read, wire.RequestFormatError)


_MESSAGES: tuple[msgspec.Struct, ...] = (
    wire.Enrolment("0f" * 16, "pi-4", "2d" * 32),
    wire.Enrolled("pi-4", "sst2", "2d" * 32),
    wire.TokenRequest("pi-4", 900),
    wire.Revocation("pi-4"),
    wire.new_key("pi-4", _SIGNING_KEY),
    wire.UpdateReceipt("pi-4", 7, _DIGEST, 300),
    wire.Capability("aarch64", 4, 4096, 2048, step_s=1.5),
    wire.TaskStatus("sst2", "training", 7, 20, "accuracy", 1, 5, 1.8e9, _DIGEST, 10, 20),
)


def _messages() -> Parser:
    def read(data: bytes) -> None:
        last: wire.RequestFormatError | None = None
        taken = False
        for kind in map(type, _MESSAGES):
            try:
                message = wire.decode_message(data, kind)
            except wire.RequestFormatError as error:
                last = error
            else:
                taken = True
                assert wire.decode_message(wire.encode_message(message), kind) == message, "is another when written"
        if last is not None and not taken:
            raise last

    return Parser("message", tuple(map(wire.encode_message, _MESSAGES)), read, wire.RequestFormatError)


def _tokens() -> Parser:
    def read(data: bytes) -> None:
        token = wire.Token.parse(data.decode("latin-1"))
        assert wire.Token.parse(str(token)) == token, "is another when written"

    return Parser("token", (str(wire.Token("0f" * 16, "2d" * 32)).encode(),), read, wire.RequestFormatError)


def _problems() -> Parser:
    def read(data: bytes) -> None:
        assert isinstance(wire.decode_problem(data, status=503), wire.WireError), "no error of the wire"

    sample = wire.encode_problem(wire.TokenError("token: used"))
    return Parser("problem", (sample,), read, wire.WireError)


def _manifests() -> Parser:
    def read(data: bytes) -> None:
        manifest = parse_manifest(data)
        assert parse_manifest(encode_manifest(manifest)) == manifest, "is another when written"

    compact = json.dumps(json.loads(encode_manifest(tiny_manifest()))).encode()
    return Parser("manifest", (encode_manifest(tiny_manifest()), compact), read, BundleError)


def _tensor_files() -> Parser:
    manifest = tiny_manifest()
    ranks = dict(zip(manifest.module_names, (1, 2, 3, 4), strict=True))
    shapes = adapter_shapes(manifest, ranks)
    adapter = encode_tensors({name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    mixed = encode_tensors({"a": np.ones((2, 3), np.float16), "b": np.ones(3, np.int8), "c": np.ones((0, 4), np.uint8)})

    def read(data: bytes) -> None:
        tensors = parse_tensors(data, what="adapter.safetensors")
        assert sum(array.nbytes for array in tensors.values()) <= len(data), "more values than bytes"
        cut_ranks(manifest, tensors, adapter_ranks(manifest, tensors))

    def read_any(data: bytes) -> None:
        try:
            read(data)
        except BundleError:
            parse_tensors(data, what="adapter.safetensors")  # it must have been the adapter that was refused
            if data not in (adapter, mixed):
                raise

    return Parser("safetensors", (adapter, mixed), read_any, BundleError)


def _configs() -> Parser:
    sample = (
        '[task]\nname = "sst2"\nbundle = "bundle"\nrounds = 20\npolicy = "annealed-kill-revive"\npersonal = ["head"]\n'
        '[training]\nlr_a = 5e-4\nsteps = 20\n[annealing]\ncurve = "cubic"\nbytes_per_device_per_round = 43000\n'
        '[tiers]\nenabled = true\n[server]\nport = 8440\nhost = "127.0.0.1"\n'
    )

    def read(data: bytes) -> None:
        parse_config(data, path=Path("emberlora.toml"))

    return Parser("config", (sample.encode(),), read, ConfigError)


def _records(folder: Path) -> Parser:
    """What a device finds in its home after a crash of its disk."""
    samples = (
        Identity("https://host:8440", "pi-4", "2d" * 32, "sst2", "2d" * 32),
        DeviceState(seen_round=7, done_round=6, plan=_DIGEST, counted=3),
        Pending("sst2", 7, _DIGEST, _DIGEST, 1234, 300),
        Settings(("/data/a.jsonl",)),
    )
    path = folder / "record.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        refusals = []
        for kind in map(type, samples):
            try:
                read_record(path, kind)
            except CorruptFileError as error:
                refusals.append(error)
        if len(refusals) == len(samples):
            raise refusals[0]

    return Parser("record", tuple(map(msgspec.json.encode, samples)), read, CorruptFileError)


def _encrypted_files(folder: Path) -> tuple[Parser, Parser]:
    """Whatever opens is what was encrypted, byte for byte."""
    contents = {b"": NO_ROUND, b"what was learned": 7, bytes(range(256)): 8}
    path = folder / "encrypted"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = VAULT.read(path, "residual")
        assert found in contents
        assert found == VAULT.open(data, "residual", what="fuzz", round_=contents[found])

    def read_key(data: bytes) -> None:
        assert StorageKey.parse(data.decode("utf-8", "replace")).text() == data.decode().strip().lower()

    made = tuple(VAULT.encrypt(plain, "residual", round_=round_) for plain, round_ in contents.items())
    keys = (KEY.text().encode(), KEY.text().upper().encode() + b"\n")
    return Parser("encrypted file", made, read, AtRestError), Parser("storage key", keys, read_key, AtRestError)


def _identities(folder: Path) -> Parser:
    """Nothing of identity.json can be changed but its spelling as JSON."""
    home, identity = Home(folder, KEY), Identity("https://host:8440", "pi-4", "2d" * 32, "sst2", "2d" * 32)
    home.save_identity(identity)
    path = folder / "identity.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        assert home.stored_identity() == identity

    return Parser("identity", (path.read_bytes(),), read, LocalError)


def _hidden_files(folder: Path) -> Parser:
    """A record gives what was remembered, or nothing."""
    path, secret = folder / "hidden", Secret(bytes(32))
    rows = {bytes([count]) * KEY_BYTES: np.full((count, 4), count, np.float32) for count in (1, 2, 5)}
    with contextlib.closing(HiddenFile.create(Ground(2, bytes(32)), secret, folder=folder, path=path)) as made:
        for key, values in rows.items():
            made.append(key, values)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        file = HiddenFile.open(path, secret)
        if file is None:
            return
        with contextlib.closing(file):
            for key, values in rows.items():
                found = file.read(key) if key in file else None
                assert found is None or np.array_equal(found, values)

    return Parser("hidden states", (path.read_bytes(),), read, OSError)


def make_parsers(folder: Path | None = None) -> tuple[Parser, ...]:
    """All of them; those that need a file have it in ``folder``."""
    folder = folder or Path(tempfile.mkdtemp())
    plans = tuple(wire.sign_plan(plan, _SIGNING_KEY).data for plan in _PLANS)
    return (
        Parser("plan", tuple(data[64:] for data in plans), _read_plan, wire.PlanError),
        Parser("plan, signature", plans, _read_signature, wire.PlanError),
        *map(_updates, _PLANS[:5]),
        _measurements(),
        _patches(),
        _envelopes(),
        _requests(),
        _messages(),
        _tokens(),
        _problems(),
        _manifests(),
        _tensor_files(),
        _configs(),
        _records(folder),
        *_encrypted_files(folder),
        _identities(folder),
        _hidden_files(folder),
    )


def names(parsers: Sequence[Parser]) -> tuple[str, ...]:
    """Of all of them."""
    return tuple(parser.name for parser in parsers)
