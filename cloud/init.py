"""Making the folder an aggregator lives in: config, keys, data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cloud.config import CONFIG_NAME, SAMPLE_RATES, parse_config, sample_config
from cloud.errors import ConfigError, DataError
from cloud.keys import KEYS_FOLDER, make_keys
from cloud.lock import FolderLock
from edge_runtime.bundle import open_bundle

_MAX_TOKENS = {"classify": 128, "lm": 256}  # enough for most lines and paragraphs; memory grows with it

_OURS = (KEYS_FOLDER, "blobs", "adapters", "published", "emberlora.sqlite3*", "server.url", "server.sha256")


def init_folder(folder: Path, *, bundle: Path, task: str, force: bool) -> Path:
    """Write config and keys; return the config's path.

    Raises:
        ConfigError: a config is there already and ``force`` is not given, or ``task`` is not a name.
        BundleError: ``bundle`` is not a whole bundle.
        DataError: a server uses the folder, or it cannot be written.
    """
    path = folder / CONFIG_NAME
    if path.exists() and not force:
        raise ConfigError(f"{path}: is there already; --force starts over and deletes the task's keys and rounds")
    manifest = open_bundle(bundle).manifest
    text = sample_config(
        task=task,
        bundle=os.path.relpath(bundle, folder),
        max_tokens=min(_MAX_TOKENS[manifest.task], manifest.text.max_tokens),
        rank=manifest.r_max,
        rates=SAMPLE_RATES[manifest.task],
    )
    config = parse_config(text.encode(), path=path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config.data_path.exists():
            _clear(config.data_path)
        config.data_path.mkdir(mode=0o700, exist_ok=True)
        make_keys(config.data_path / KEYS_FOLDER)
        path.write_text(text)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from error
    return path


def _clear(data: Path) -> None:
    """Delete what an aggregator made in its data folder, and nothing else that may lie there."""
    lock = FolderLock(data)
    try:
        for pattern in _OURS:
            for path in data.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    finally:
        lock.release()
