"""What every ``emberlora cloud`` command shares: its config, its options, and how a failure is told."""

from __future__ import annotations

import asyncio
import functools
import secrets
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from cloud.config import CONFIG_NAME, Config, load_config
from cloud.errors import CloudError, ServerAbsentError
from cloud.operator import OperatorClient
from edge_runtime import wire
from edge_runtime.bundle import BundleError

P = ParamSpec("P")
R = TypeVar("R")
config_option = click.option(
    "--config",
    "config_path",
    default=CONFIG_NAME,
    show_default=True,
    type=click.Path(path_type=Path),
    help="The aggregator's config file, or the folder it lies in.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON to standard output.")


def one_line_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Turn our exceptions into one line and an exit status."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (CloudError, BundleError, wire.RequestError, wire.PlanError) as error:
            click.echo(f"emberlora cloud: {error}", err=True)
            bad_input = not isinstance(error, ServerAbsentError)
            sys.exit(2 if bad_input else 1)
        except ModuleNotFoundError as error:
            line = f"needs the package {error.name!r}, which is not installed: pip install 'emberlora[cloud]'"
            click.echo(f"emberlora cloud: {line}", err=True)
            sys.exit(1)

    return wrapped


def load(path: Path, **server: object) -> Config:
    """The config of a file or of the folder it lies in; ``server`` replaces keys of its table of that name.

    Raises:
        ConfigError: it cannot be read or is wrong.
    """
    return load_config(path / CONFIG_NAME if path.is_dir() else path, server=server)


def ask(config_path: Path, question: Callable[[OperatorClient], Coroutine[Any, Any, R]]) -> R:
    """What the server that runs on a config's data folder answers the operator.

    Raises:
        ConfigError, DataMissingError: see :func:`load`, and the folder has no keys.
        ServerError: no server answers, or it answers no.
    """
    data = load(config_path).data_path
    client = OperatorClient.of_folder(data, clock=time.time, entropy=secrets.token_bytes)
    return asyncio.run(question(client))
