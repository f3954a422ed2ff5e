"""Checking bundles and adapters, patching and publishing them: ``python -m edge_runtime.device.artifacts``.

This is the part of a device that needs numpy and reads large untrusted files, so it runs in a short-lived process of
its own: the resident process stays small, and a hostile file can at worst end a child. One
:class:`Request` as JSON is the input, one :class:`Reply` as JSON the output. The resident process imports this module
for those two, so edge_runtime.bundle, which brings numpy, is imported by the functions.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from edge_runtime.at_rest import Grant, Vault, WrongStorageKeyError

if TYPE_CHECKING:
    from edge_runtime.bundle import Manifest


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to do with the bundle in ``folder``, whose manifest must have ``digest``.

    manifest: read it, its files need not be there. bundle: verify every file. adapter: check the adapter's tensors
    against ``ranks``. publish: check, put over it what the device keeps for itself, write ``out`` as a peft folder.
    patch: turn ``adapter``, that of round ``since``, into the one of ``round`` with digest ``makes`` and write it to
    ``out``.
    """

    action: Literal["manifest", "bundle", "adapter", "publish", "patch"]
    folder: str
    digest: str
    adapter: str = ""
    ranks: dict[str, int] = {}
    out: str = ""
    patch: str = ""  # file
    since: int = -1
    round: int = -1
    makes: str = ""
    personal: str = ""  # file of what the device keeps for itself
    grant: Grant | None = None  # its key; None: it keeps nothing
    parts: tuple[str, ...] = ()  # what the plan says of it


class FileOf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a bundle: its path inside, SHA-256 in hex, length in bytes."""

    name: str
    sha256: str
    bytes: int


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``error`` is empty when all is well; ``files`` answers "manifest"; ``notices`` are lines for the user.

    ``home_error`` says that the artifact is good and a file of the device's own must not be read.
    """

    error: str = ""
    home_error: str = ""
    files: tuple[FileOf, ...] = ()
    notices: tuple[str, ...] = ()


def handle(request: Request) -> Reply:
    """Do what is asked; a bad artifact is an answer, not an exception."""
    from edge_runtime.bundle import BundleError, open_bundle
    from edge_runtime.wire import PatchError

    try:
        bundle = open_bundle(Path(request.folder), expected_digest=request.digest, verify=request.action == "bundle")
        if request.action == "manifest":
            files = bundle.manifest.files.items()
            return Reply(files=tuple(FileOf(name, entry.sha256, entry.bytes) for name, entry in files))
        if request.action in ("adapter", "publish"):
            return Reply(notices=_adapter(bundle.manifest, request))
        if request.action == "patch":
            _patch(bundle.manifest, request)
    except (BundleError, PatchError) as error:
        return Reply(error=str(error))
    except WrongStorageKeyError as error:
        return Reply(home_error=str(error))
    return Reply()


def _adapter(manifest: Manifest, request: Request) -> tuple[str, ...]:
    from edge_runtime.bundle import (
        TensorFileError,
        adapter_ranks,
        adapter_shapes,
        check_tensors,
        map_tensors,
        write_peft_folder,
    )
    from edge_runtime.training.personal import PersonalTensors, read_personal

    what = f"adapter {Path(request.adapter).stem[:12]}"
    tensors = map_tensors(Path(request.adapter))
    missing = [name for name in manifest.module_names if f"{name}.lora_a" not in tensors]
    if missing:
        raise TensorFileError(f"{what}: missing {missing[0]}.lora_a")
    # A plan that says "finished" need not name ranks; then the adapter's own hold.
    ranks = request.ranks or adapter_ranks(manifest, tensors)
    _check_modules(manifest, ranks, request, what)
    check_tensors(tensors, adapter_shapes(manifest, ranks), what=what)
    if request.action != "publish":
        return ()
    own = PersonalTensors()
    if request.grant is not None:
        own = read_personal(Vault(request.grant), Path(request.personal), request.parts, manifest, ranks)
    out = Path(request.out)
    shutil.rmtree(out, ignore_errors=True)
    write_peft_folder(out, manifest, tensors | own.tensors)
    return own.notices


def _patch(manifest: Manifest, request: Request) -> None:
    from edge_runtime.bundle import (
        BundleDigestError,
        adapter_shapes,
        check_tensors,
        cut_ranks,
        encode_tensors,
        map_tensors,
    )
    from edge_runtime.bundle.atomic import write_atomically
    from edge_runtime.wire import adapter_layout, decode_patch
    from edge_runtime.wire.patch_frame import OWN

    what = f"patched adapter {request.makes[:12]}"
    _check_modules(manifest, request.ranks, request, what)
    layout = adapter_layout(request.ranks, manifest.features, manifest.head_shapes)
    tensors = map_tensors(Path(request.adapter))
    if request.since == OWN:  # at the plan's ranks, so that a lower rank alone is no reason to send anything
        tensors = cut_ranks(manifest, tensors, request.ranks)
    changes = decode_patch(
        Path(request.patch).read_bytes(),
        since=request.since,
        round_=request.round,
        digest=request.makes,
        layout=layout,
        older=tensors,
    )
    shapes = dict(layout.blocks)
    tensors |= {name: change.applied(name, tensors.get(name), shapes[name]) for name, change in changes.items()}
    check_tensors(tensors, adapter_shapes(manifest, request.ranks), what=what)
    data = encode_tensors(tensors)
    found = hashlib.sha256(data).hexdigest()
    if found != request.makes:
        raise BundleDigestError(f"{what}: the patch makes {found[:12]} of what is here")
    write_atomically(Path(request.out), [data])


def _check_modules(manifest: Manifest, ranks: Mapping[str, int], request: Request, what: str) -> None:
    from edge_runtime.bundle import TensorFileError

    if set(ranks) != set(manifest.module_names):
        raise TensorFileError(f"{what}: the plan's modules are not those of bundle {request.digest[:12]}")


def main() -> int:
    """Answer one request; the exit code is 0 whatever the answer says."""
    from edge_runtime.training.held import end_with_parent, read_job

    request = msgspec.json.decode(read_job(), type=Request)
    end_with_parent()
    reply = handle(request)
    sys.stdout.buffer.write(msgspec.json.encode(reply))
    return 0


if __name__ == "__main__":
    sys.exit(main())
