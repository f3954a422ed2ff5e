"""A bundle is used only when every byte of it is the promised one."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle import (
    BundleDigestError,
    BundleMissingError,
    FileEntry,
    Manifest,
    ManifestError,
    file_entry,
    open_bundle,
    parse_manifest,
    verify_file,
)
from edge_runtime.bundle.manifest import MAX_MANIFEST_BYTES

EVERY_FILE = [
    "graphs/embed.onnx",
    "graphs/block.onnx",
    "graphs/head.onnx",
    "tokenizer.json",
    "weights.safetensors",
    "adapter.safetensors",
]


def test_opens_and_maps(bundle_folder: Path, manifest: Manifest) -> None:
    data = (bundle_folder / "manifest.json").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    bundle = open_bundle(bundle_folder, expected_digest=digest)
    assert (bundle.digest, bundle.manifest) == (digest, parse_manifest(data))
    assert bundle.path("graphs/embed.onnx").read_bytes() == b"embed"
    np.testing.assert_array_equal(bundle.weights()["encoder.0.attention.query.weight"], np.ones((4, 6)))
    assert len(bundle.initial_adapter()) == 2 * len(manifest.modules) + 2


@pytest.mark.parametrize("name", EVERY_FILE)
def test_missing_file(bundle_folder: Path, name: str) -> None:
    path = bundle_folder / name
    path.unlink()
    with pytest.raises(BundleMissingError, match=f"{name}: no such file"):
        open_bundle(bundle_folder)
    path.mkdir()
    with pytest.raises(BundleMissingError, match=f"{name}: no such file"):
        open_bundle(bundle_folder)
    assert open_bundle(bundle_folder, verify=False).manifest


def test_file_in_place_of_a_folder(bundle_folder: Path) -> None:
    shutil.rmtree(bundle_folder / "graphs")
    (bundle_folder / "graphs").write_bytes(b"")
    with pytest.raises(BundleMissingError, match="graphs/"):
        open_bundle(bundle_folder)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_changed_byte(bundle_folder: Path, name: str) -> None:
    path = bundle_folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    for wrong in (bytes(data), bytes(data[:-1]), bytes(data) + b"\0", b""):
        path.write_bytes(wrong)
        with pytest.raises(BundleDigestError, match=f"{name}: expected {len(data)} bytes .* got {len(wrong)} with"):
            open_bundle(bundle_folder)


def test_another_manifest(bundle_folder: Path) -> None:
    path = bundle_folder / "manifest.json"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"\n")
    assert open_bundle(bundle_folder)
    with pytest.raises(BundleDigestError, match=f"expected digest {digest}, got "):
        open_bundle(bundle_folder, expected_digest=digest)


def test_digest_is_checked_before_the_manifest_is_read(bundle_folder: Path) -> None:
    (bundle_folder / "manifest.json").write_bytes(b"{")
    with pytest.raises(BundleDigestError):
        open_bundle(bundle_folder, expected_digest="00" * 32)
    with pytest.raises(ManifestError):
        open_bundle(bundle_folder)


def test_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "odd" / "manifest.json").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "gone", tmp_path / "file", tmp_path / "odd"):
        with pytest.raises(BundleMissingError, match=r"not a bundle: it has no manifest\.json"):
            open_bundle(folder)


def test_oversized_manifest_is_not_read(bundle_folder: Path) -> None:
    with (bundle_folder / "manifest.json").open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ManifestError, match=f"larger than {MAX_MANIFEST_BYTES} bytes"):
        open_bundle(bundle_folder)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_file_entry(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    data = bytes(range(256)) * (size // 256 + 1)
    path.write_bytes(data[:size])
    entry = FileEntry(hashlib.sha256(data[:size]).hexdigest(), size)
    assert file_entry(path) == entry
    verify_file(path, entry)
