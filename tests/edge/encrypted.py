"""Encrypted files as tests write and read them: under one key, of one device in one task."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.at_rest import NO_ROUND, Purpose, StorageKey, Vault
from edge_runtime.bundle import Array, encode_tensors, parse_tensors
from edge_runtime.training.job import JOB_PURPOSES

KEY = StorageKey(bytes(range(32)))
PURPOSES: tuple[Purpose, ...] = ("identity", "record", "update", *JOB_PURPOSES)


def vault_of(device: str = "pi-1", task: str = "t", *, key: StorageKey = KEY) -> Vault:
    return Vault.of(key, PURPOSES, device=device, task=task)


VAULT = vault_of()


def tensors_in(path: Path, purpose: Purpose, vault: Vault = VAULT) -> dict[str, Array]:
    return parse_tensors(vault.read(path, purpose), what=path.name)


def write_tensors_to(path: Path, purpose: Purpose, tensors: dict[str, Array] | bytes, vault: Vault = VAULT) -> None:
    data = tensors if isinstance(tensors, bytes) else encode_tensors(tensors)
    path.write_bytes(vault.encrypt(data, purpose, round_=NO_ROUND))
