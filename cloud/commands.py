"""``emberlora cloud …``: the operator's commands.

Exit status 0: done; 2: bad usage or input; 1: the work failed. Either failure is one line on standard error.
"""

from __future__ import annotations

import asyncio
import functools
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.live import Live

from cloud.audit_commands import audit
from cloud.backup_command import backup
from cloud.commandline import ask, config_option, json_option, load, one_line_errors
from cloud.config import Config
from cloud.console import json_reporter, status_view, text_reporter
from cloud.errors import ConfigError
from cloud.init import init_folder
from cloud.operator import OperatorClient
from cloud.operator_key_command import rotate_operator_key
from cloud.plan_key_command import rotate_plan_key
from cloud.publish import copy_published
from cloud.revoke_command import revoke
from edge_runtime import wire

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_WATCH_S = 1.0


@click.group()
def cloud() -> None:
    """The aggregator: collects sealed updates, averages them, publishes the adapter.

    \b
    emberlora cloud init server --bundle bundle --task docs
    emberlora cloud serve --config server
    emberlora cloud token --config server --device laptop-1
    emberlora cloud status --config server --watch
    """


@cloud.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path, file_okay=False))
@click.option("--bundle", required=True, type=click.Path(path_type=Path), help="Folder made by `emberlora export`.")
@click.option("--task", default="task", show_default=True, help="Name of the task; it stands in URLs.")
@click.option("--force", is_flag=True, help="Start over: replaces config, keys and all data in FOLDER.")
@one_line_errors
def init(folder: Path, bundle: Path, task: str, force: bool) -> None:
    """Write a commented config and new keys into FOLDER.

    \b
    Example:
      emberlora cloud init server --bundle bundle --task docs
    """
    path = init_folder(folder, bundle=bundle, task=task, force=force)
    click.echo(f"wrote {path}; next: emberlora cloud serve --config {path}")


@cloud.command()
@config_option
@click.option("--host", help="Listen on this address instead of the config's.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen on this port instead of the config's; 0: any.")
@click.option(
    "--tls-cert",
    type=click.Path(path_type=Path),
    help="Speak https with this certificate (PEM, then those between it and its CA) instead of the config's.",
)
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key (PEM, without a password).")
@click.option("--insecure-http", is_flag=True, help="Allow plain HTTP on other addresses than loopback.")
@json_option
@one_line_errors
def serve(
    config_path: Path,
    tls_cert: Path | None,
    tls_key: Path | None,
    insecure_http: bool,
    as_json: bool,
    **address: str | int | None,
) -> None:
    """Run the aggregator until it is interrupted; it goes on where it left off.

    \b
    Example:
      emberlora cloud serve --config server
      emberlora cloud serve --config server --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    With --json every event is one JSON object on a line of standard output.
    """
    config = load(
        config_path,
        **address,
        tls_cert=None if tls_cert is None else str(tls_cert.resolve()),
        tls_key=None if tls_key is None else str(tls_key.resolve()),
        allow_plain_http=True if insecure_http else None,
    )
    console = Console(stderr=True, highlight=False)
    report = json_reporter(functools.partial(print, flush=True)) if as_json else text_reporter(console)
    asyncio.run(_serve(config, report))


async def _serve(config: Config, report: Callable[[Any], None]) -> None:
    # Imported here: the other commands need neither the database nor the server.
    from cloud.heap import share_heap
    from cloud.http.server import Server
    from cloud.service import Surroundings

    share_heap()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    server = await Server.start(config, Surroundings(time.time, secrets.token_bytes, report))
    try:
        await stop.wait()
    finally:
        await server.close()


@cloud.command()
@config_option
@click.option("--device", "--name", "device", required=True, help="Name of the device that may enrol with it.")
@click.option("--ttl", default="15m", show_default=True, help="How long it can be used: 30s, 15m, 2h, 1d.")
@one_line_errors
def token(config_path: Path, device: str, ttl: str) -> None:
    """Print a token with which one device of this name can enrol once.

    \b
    Example:
      TOKEN=$(emberlora cloud token --config server --device laptop-1)
      emberlora edge enroll --server URL --name laptop-1 --token "$TOKEN"
    """
    ttl_s = _seconds(ttl)
    wire.check_name(device, what="device")
    answer = ask(config_path, lambda client: client.make_token(device, ttl_s))
    click.echo(answer.token)


@cloud.command()
@config_option
@json_option
@click.option("--watch", is_flag=True, help="Keep showing it until the task is finished.")
@one_line_errors
def status(config_path: Path, as_json: bool, watch: bool) -> None:
    """Show rounds, devices, metric and bytes.

    \b
    Example:
      emberlora cloud status --config server --watch
    """
    found = ask(config_path, OperatorClient.status)
    if as_json:
        _echo_json(found)
        while watch and found.state != "finished":
            time.sleep(_WATCH_S)
            found = ask(config_path, OperatorClient.status)
            _echo_json(found)
        return
    if not watch:
        Console().print(status_view(found, now=time.time()))
        return
    with Live(status_view(found, now=time.time()), auto_refresh=False) as live:
        while found.state != "finished":
            time.sleep(_WATCH_S)
            found = ask(config_path, OperatorClient.status)
            live.update(status_view(found, now=time.time()), refresh=True)


@cloud.command()
@config_option
@json_option
@one_line_errors
def devices(config_path: Path, as_json: bool) -> None:
    """Show every device: when it enrolled and was seen, rounds counted, what it measured of itself, bytes.

    Figures of a device are its own word. With --json, an object a line. The server may run.

    \b
    Example:
      emberlora cloud devices --config server
    """
    from cloud.devices_command import show_devices

    for line in asyncio.run(show_devices(load(config_path), as_json=as_json, now=time.time())):
        click.echo(line)


@cloud.command()
@config_option
@json_option
@one_line_errors
def stop(config_path: Path, as_json: bool) -> None:
    """End the task: publish the last adapter and tell every device that it is over.

    Updates of a round that is still open are discarded. The server keeps running, so that devices can fetch the
    adapter; end it with Ctrl-C or SIGTERM.

    \b
    Example:
      emberlora cloud stop --config server
    """
    found = ask(config_path, OperatorClient.stop)
    if as_json:
        _echo_json(found)
    else:
        published = load(config_path).data_path / "published"
        click.echo(f"{found.task}: finished after {len(found.history)} rounds; adapter in {published}")


@cloud.command()
@config_option
@json_option
@one_line_errors
def replay(config_path: Path, as_json: bool) -> None:
    """Make every plan of the task again from what was kept, and compare it with the one that was signed.

    A plan follows from the config, the bundle, the rounds before it and what was known of the adapter. Ends with 1
    when a plan differs, for example because the config was changed meanwhile. The server may run.

    \b
    Example:
      emberlora cloud replay --config server
    """
    from cloud.replay import replay as replay_plans

    rounds = asyncio.run(replay_plans(load(config_path)))
    for found in rounds:
        if as_json:
            _echo_json(found)
            continue
        ranks = f"rank {found.lowest_rank}" + (
            f" to {found.highest_rank}" if found.highest_rank > found.lowest_rank else ""
        )
        alive = "measures class means" if found.state == "measure" else f"{found.parameters:,} parameters alive"
        click.echo(f"round {found.round}: {alive}, {ranks}: " + _verdict(found.differences))
    if any(found.differences for found in rounds):
        sys.exit(1)


@cloud.command()
@config_option
@click.option("--round", "wanted", type=int, help="Every module of this round.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a page with pictures, modules × rounds.")
@json_option
@one_line_errors
def plans(config_path: Path, wanted: int | None, page: Path | None, as_json: bool) -> None:
    """Show what every round trained and why: alive or dead, rank, score, what it cost and how much it moved.

    \b
    Examples:
      emberlora cloud plans --config server --html plans.html
      emberlora cloud plans --config server --round 7
    """
    from cloud.plans_command import show_plans

    for line in asyncio.run(show_plans(load(config_path), wanted, page, as_json=as_json)):
        click.echo(line)


@cloud.command()
@config_option
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a page with tables and bars by device.")
@click.option(
    "--devices", type=click.IntRange(min=1), help="How many will take part.  [default: as many as in the pilot]"
)
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds to train.  [default: the config's, 12 or more]")
@click.option(
    "--rounds-per-day",
    type=click.FloatRange(min=0, min_open=True),
    help="For the month's figures.  [default: 24, fewer where deadlines are longer than an hour]",
)
@click.option("--examples", type=click.IntRange(min=1), help="Of one device.  [default: those of the pilot]")
@click.option(
    "--round-minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Longest that a round may take.  [default: twice what nine of ten answers took in the pilot]",
)
@json_option
@one_line_errors
def pilot(config_path: Path, page: Path | None, as_json: bool, **wishes: float | None) -> None:
    """Judge a short trial: each device's link, speed, memory and grade; a budget and a schedule; go or no-go.

    Run the task for two to six rounds with a few devices of every kind that will take part, then ask this; the server
    may run. Suggested are lines for the config of the real task, which begins in a folder of its own. Nothing is
    changed here. Ends with 0 for go, 1 for no-go, 2 for bad usage or input.

    \b
    Examples:
      emberlora cloud pilot --config server --html pilot.html
      emberlora cloud pilot --config server --devices 200 --examples 500 --rounds-per-day 2
    """
    from cloud.pilot import Wish
    from cloud.pilot.command import find, lines

    minutes = wishes.pop("round_minutes")
    wish = msgspec.convert({**wishes, "round_s": None if minutes is None else 60 * minutes}, Wish)
    found = asyncio.run(find(load(config_path), wish, page))
    for line in lines(found, as_json=as_json):
        click.echo(line)
    if not found.go:
        sys.exit(1)


cloud.add_command(audit)
cloud.add_command(backup)
cloud.add_command(revoke)
cloud.add_command(rotate_operator_key)
cloud.add_command(rotate_plan_key)


def _verdict(differences: tuple[str, ...]) -> str:
    if not differences:
        return "as signed"
    more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
    return f"differs: {differences[0]}{more}"


@cloud.command()
@config_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; new or empty.")
@one_line_errors
def adapter(config_path: Path, out: Path) -> None:
    """Copy the last adapter as a folder that peft loads; the server need not run.

    \b
    Example:
      emberlora cloud adapter --config server --out adapter
    """
    config = load(config_path)
    copy_published(config.data_path, out)
    click.echo(str(out))
    if config.task.personal:
        own = ", ".join(config.task.personal)
        click.echo(f"personal ({own}) is as before training in it: each device keeps its own", err=True)


def _echo_json(message: msgspec.Struct) -> None:
    click.echo(msgspec.json.encode(message).decode())


def _seconds(text: str) -> int:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if not match:
        raise ConfigError(f"--ttl {text!r}: expected a number with s, m, h or d, for example 15m")
    return int(match[1]) * _UNITS_S[match[2]]
