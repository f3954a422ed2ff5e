"""A manifest is read strictly, and every contradiction in it is named."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundle import TRAINING_FILES, Manifest, ManifestError, encode_manifest, parse_manifest
from edge_runtime.bundle.manifest import MAX_MANIFEST_BYTES

GOLDEN_START = b'{\n "schema": 2,\n "model": "tiny",\n "task": "classify",\n "width": 6,\n "base": "fp32",\n "embed": {'
DIGEST = "00" * 32


def changed(manifest: Manifest, path: str, value: object) -> bytes:
    """The manifest's JSON with the member at ``path`` replaced, or with one more of a list at ``path+``."""
    document = json.loads(encode_manifest(manifest))
    *parents, last = path.removesuffix("+").split("/")
    member: Any = document
    for parent in parents:
        member = member[int(parent) if isinstance(member, list) else parent]
    key: Any = int(last) if isinstance(member, list) else last
    if path.endswith("+"):
        member[key].append(value)
    else:
        member[key] = value
    return json.dumps(document).encode()


def test_round_trip(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    assert data.startswith(GOLDEN_START)
    assert parse_manifest(data) == manifest
    assert encode_manifest(parse_manifest(data)) == data


def test_file_order_does_not_change_the_digest(manifest: Manifest) -> None:
    turned = msgspec.structs.replace(manifest, files=dict(reversed(manifest.files.items())))
    assert encode_manifest(turned) == encode_manifest(manifest)


def test_kind_of(manifest: Manifest) -> None:
    assert manifest.kind_of(1) is manifest.kinds[0]
    assert manifest.module_names == (
        "encoder.0.attention.query",
        "encoder.0.output",
        "encoder.1.attention.query",
        "encoder.1.output",
    )


def test_the_block_engine_is_not_named_in_a_manifest(manifest: Manifest) -> None:
    """Devices from before there was a choice refuse unknown fields."""
    assert manifest.engine == "blocks"
    assert b"engine" not in encode_manifest(manifest)


def test_a_bundle_for_onnxruntime_training_has_its_four_files_and_no_weights(manifest: Manifest) -> None:
    with pytest.raises(ManifestError, match=r"without a digest: .*training/checkpoint.*training_model"):
        parse_manifest(changed(manifest, "engine", "ort-training"))
    files = {name: entry for name, entry in manifest.files.items() if name != "weights.safetensors"}
    files |= dict.fromkeys(TRAINING_FILES, manifest.files["tokenizer.json"])
    whole = msgspec.structs.replace(manifest, engine="ort-training", files=files)
    assert parse_manifest(encode_manifest(whole)) == whole
    with pytest.raises(ManifestError, match=r"not a manifest of schema 2: .*engine"):
        parse_manifest(changed(manifest, "engine", "another"))


BLOCK = {"kind": "layer", "prefix": "encoder.2"}
MODULE = {"name": "encoder.0.output", "block": 0, "slot": "output", "in_features": 8, "out_features": 6}
CONTRADICTIONS: list[tuple[str, object, str]] = [
    ("blocks/0/kind", "attention", r"blocks of unknown kind \['attention'\]"),
    (
        "kinds+",
        {"name": "layer", "graph": "tokenizer.json", "weights": [], "slots": [], "shared": []},
        "a block kind stands twice",
    ),
    ("blocks+", BLOCK, "modules are not the slots"),
    ("modules", [], "modules are not the slots"),
    ("modules+", MODULE, "modules are not the slots"),
    ("modules/0/in_features", 7, "modules are not the slots"),
    ("modules/2/block", -1, "modules are not the slots"),
    ("embed/shared", [], "shared tensors that embed does not make"),
    ("labels", [], "labels belong to task classify"),
    ("labels", ["a", "b", "a"], "a label stands twice"),
    ("head/module", None, "head module and head params go together"),
    ("head/params", [], "head module and head params go together"),
    ("head/params+", {"name": "bias", "shape": [3]}, "a head param stands twice"),
    ("head/vocabulary", {"graph": "graphs/head.onnx", "weights": ["w"]}, "a vocabulary belongs to task lm, and only"),
    ("head/select", "target", "task, head.select and peft.task_type"),
    ("peft/task_type", "CAUSAL_LM", "task, head.select and peft.task_type"),
    ("task", "lm", "task, head.select and peft.task_type"),
    ("head/graph", "graphs/gone.onnx", r"files without a digest: \['graphs/gone.onnx'\]"),
    ("files", {}, "files without a digest: .*tokenizer.json.*weights.safetensors"),
    ("files/tokenizer.json/sha256", "00", "64 hex digits"),
    ("files/tokenizer.json/sha256", "AA" * 32, "64 hex digits"),
    ("files/tokenizer.json/bytes", -1, "and a length"),
    ("r_max", 0, "r_max must be from 1 to 1024, got 0"),
    ("r_max", 1025, "r_max must be from 1 to 1024, got 1025"),
    ("scale", 0.0, "scale must be positive"),
    ("scale", -1, "scale must be positive"),
    ("width", 0, "width, features"),
    ("width", 10**40, "width, features"),
    ("head/params/0/shape", [3, -6], "width, features"),
    ("text/vocab_size", 0, "width, features"),
    ("text/max_tokens", 0, "width, features"),
    ("text/pad_id", 50, "must be below vocab_size"),
    ("text/prefix_ids", [-1], "must be below vocab_size"),
    ("parameters", -1, "parameters must not be negative"),
]


@pytest.mark.parametrize(("path", "value", "message"), CONTRADICTIONS)
def test_contradiction_is_named(manifest: Manifest, path: str, value: object, message: str) -> None:
    with pytest.raises(ManifestError, match=f"contradicts itself: .*{message}"):
        parse_manifest(changed(manifest, path, value))


def test_module_that_stands_twice(manifest: Manifest) -> None:
    twice = tuple(
        msgspec.structs.replace(module, name=module.name.replace("encoder.1", "encoder.0"))
        for module in manifest.modules
    )
    same = msgspec.structs.replace(manifest, modules=twice, blocks=(manifest.blocks[0],) * 2)
    with pytest.raises(ManifestError, match=r"itself: a module stands twice$"):
        parse_manifest(encode_manifest(same))


def test_all_contradictions_are_named_at_once(manifest: Manifest) -> None:
    document = json.loads(changed(manifest, "r_max", 0))
    document["labels"] = ["a", "a"]
    del document["files"]["tokenizer.json"]
    with pytest.raises(ManifestError, match=r"a label stands twice; files without a digest.*; r_max"):
        parse_manifest(json.dumps(document).encode())


UNSAFE = [
    "",
    ".",
    "..",
    "../x",
    "a/../x",
    "graphs/..",
    "/etc/passwd",
    "a//b",
    "a/",
    "./a",
    ".ssh/authorized_keys",
    "a\\b",
    "C:x",
    "C:\\x",
    "a\0b",
    "a\n",
    "a b",
    "~/x",
    "-rf",
    "ä",
    "a/b/c/d/e",
    "x" * 101,
    "manifest.json",
]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_file_name_is_refused(manifest: Manifest, name: str) -> None:
    with pytest.raises(ManifestError, match="file names that are not plain names"):
        parse_manifest(changed(manifest, f"files/{name}" if "/" not in name else "files", _files(manifest, name)))


def _files(manifest: Manifest, name: str) -> object:
    entry = {"sha256": DIGEST, "bytes": 1}
    if "/" not in name:
        return entry
    return {file: {"sha256": DIGEST, "bytes": 1} for file in manifest.files} | {name: entry}


@pytest.mark.parametrize(
    ("path", "value"),
    [("surprise", 1), ("task", "regress"), ("base", "int3"), ("width", "6"), ("text/chat", []), ("blocks/0/x", 1)],
)
def test_wrong_or_unknown_field_is_refused(manifest: Manifest, path: str, value: object) -> None:
    with pytest.raises(ManifestError, match="not a manifest of schema 2"):
        parse_manifest(changed(manifest, path, value))


@pytest.mark.parametrize("schema", [0, 1, 3, "2", None, [2]])
def test_other_schema_is_told_by_its_number(manifest: Manifest, schema: object) -> None:
    with pytest.raises(ManifestError, match="unknown schema: expected 2, got"):
        parse_manifest(changed(manifest, "schema", schema))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"schema":2}',
        b'{"schema":2,"model":"\xff"}',
        b'{"schema":2,"x":' + b"[" * 500_000,
        b"[" * 500_000,
        b'{"schema":' + b"9" * 5000 + b"}",
        b'{"schema":"' + b"9" * 5000 + b'"}',
        b'{"' + b"x" * 5000 + b'":1, "schema":2}',
    ],
    ids=lambda data: repr(data[:30]),
)
def test_garbage_is_a_manifest_error(data: bytes) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(data)
    assert len(str(caught.value)) < 400


def test_length_is_limited(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    assert parse_manifest(data.ljust(MAX_MANIFEST_BYTES)) == manifest
    with pytest.raises(ManifestError, match=f"expected at most {MAX_MANIFEST_BYTES} bytes"):
        parse_manifest(data.ljust(MAX_MANIFEST_BYTES + 1))


def test_memory_is_bounded() -> None:
    data = b'{"schema":2,"x":[' + b",".join([b"[]"] * (MAX_MANIFEST_BYTES // 3 - 20)) + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError):
            parse_manifest(data)
        assert tracemalloc.get_traced_memory()[1] < MAX_MANIFEST_BYTES
    finally:
        tracemalloc.stop()


@given(data=st.data())
def test_fuzz(manifest: Manifest, data: st.DataObject) -> None:
    whole = encode_manifest(manifest)
    start, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 20))
    for hostile in (
        whole[:start] + data.draw(st.binary(max_size=40)) + whole[start + length :],
        data.draw(st.binary(max_size=200)),
    ):
        try:
            parse_manifest(hostile)
        except ManifestError:
            continue
