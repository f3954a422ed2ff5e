"""Keeps torch, transformers and the ONNX exporter from writing to the terminal; nothing here hides an error."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, log lines below ERROR and warnings of the libraries called inside."""
    from transformers.utils import logging as hf_logging  # heavy: only where torch is needed anyway

    level, bars, disabled = (
        hf_logging.get_verbosity(),
        hf_logging.is_progress_bar_enabled(),
        logging.root.manager.disable,
    )
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
