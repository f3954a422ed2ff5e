"""Tensors that a device carries over from an acknowledged round to later ones, encrypted in its home, and read with
distrust all the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_runtime.at_rest import AtRestError, Purpose, Vault, WrongStorageKeyError
from edge_runtime.bundle import Array, TensorFileError, parse_tensors


def read_carried(vault: Vault, purpose: Purpose, path: Path) -> dict[str, Array]:
    """Parameters that an acknowledged round left, by tensor name; empty where there is no such file.

    Raises:
        TensorFileError: the file is damaged, another's, or holds no tensors or not of finite float32.
        WrongStorageKeyError: it was encrypted under another storage key, so it is whole and must not be given up.
    """
    tensors = read_arrays(vault, purpose, path)
    for name, array in tensors.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise TensorFileError(f"{path.name}: {name[:200]}: expected finite float32")
    return tensors


def read_arrays(vault: Vault, purpose: Purpose, path: Path) -> dict[str, Array]:
    """Arrays that an acknowledged round left, whatever they hold, by name; empty where there is no such file.

    Raises:
        TensorFileError: the file is damaged, another's, or holds no tensors.
        WrongStorageKeyError: as :func:`read_carried`.
    """
    try:
        data = vault.read(path, purpose)
    except FileNotFoundError:
        return {}
    except WrongStorageKeyError:
        raise
    except AtRestError as error:
        raise TensorFileError(str(error)) from error
    return parse_tensors(data, what=path.name)


def fitting(
    carried: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """What of it still belongs to an adapter, and the names of what does not.

    A module whose rank changed has other components than before, so what is left of the old ones means nothing.

    Args:
        carried: By tensor name.
        shapes: Of every tensor of the adapter, dead ones too.
    """
    found = {name: array for name, array in carried.items() if shapes.get(name) == array.shape}
    return found, tuple(sorted(set(carried) - set(found)))


def some(names: tuple[str, ...]) -> str:
    """The first of many names, for one line."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
