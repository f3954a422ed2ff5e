"""Parameters that never leave a device: trained with the shared ones, kept in its home, put over the published adapter.

What is personal is named by the plan: the trained head, or factor B of the modules (FedSA-LoRA, arXiv 2410.01463,
shares A and keeps B). No update, patch or log has any of it. A personal tensor is kept once the round it was trained in
has been acknowledged, as the shared change is: a round that does not count leaves neither. One that no longer fits the
adapter starts again from the published one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.at_rest import Vault
from edge_runtime.bundle import Array, Manifest, TensorFileError, adapter_shapes
from edge_runtime.training.carried import fitting, read_carried, some


@dataclass(frozen=True)
class PersonalTensors:
    """A device's own tensors.

    Attributes:
        names: Of every tensor that is personal.
        tensors: Those that this device has trained, float32 by name.
        notices: Lines for the user about what it has lost.
    """

    names: frozenset[str] = frozenset()
    tensors: dict[str, Array] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def read_personal(
    vault: Vault, file: Path | None, parts: Collection[str], manifest: Manifest, ranks: Mapping[str, int]
) -> PersonalTensors:
    """A device's own tensors for an adapter of these ranks.

    Args:
        vault: The device's, for what is personal.
        file: Where they are kept; None, or no such file: it has none yet.
        parts: What a plan says is personal, "head" and "B".
        manifest: The bundle's.
        ranks: Of every module.

    Raises:
        WrongStorageKeyError: they were encrypted under another storage key.
    """
    names = _names(parts, manifest)
    if not names or file is None:
        return PersonalTensors(names)
    try:
        stored = read_carried(vault, "personal", file)
    except TensorFileError as error:  # a device that never trained again would lose the shared part as well
        return PersonalTensors(names, notices=(f"what this device kept for itself is lost and starts again: {error}",))
    tensors, others = fitting(stored, adapter_shapes(manifest, ranks))
    notice = f"what this device kept for itself starts again where shapes changed: {some(others)}"
    mine = {name: array for name, array in tensors.items() if name in names}
    return PersonalTensors(names, mine, (notice,) if others else ())


def trained_personal(
    personal: PersonalTensors, tensors: Mapping[str, Array], trained: Collection[str]
) -> dict[str, Array]:
    """What is to be kept after a training: of the tensors ``trained`` their new values, of the others the old ones."""
    return personal.tensors | {name: tensors[name] for name in trained if name in personal.names}


def _names(parts: Collection[str], manifest: Manifest) -> frozenset[str]:
    head = manifest.head_shapes if "head" in parts else {}
    factors = [f"{module}.lora_b" for module in manifest.module_names] if "B" in parts else []
    return frozenset((*factors, *head))
