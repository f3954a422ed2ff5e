"""The commands of a resident device: enroll, run, status, leave, rotate-key, trust.

Exit codes: 0 success (for ``run``: the task is finished), 1 the work failed, 2 bad usage or input, 130 after Ctrl-C and
143 after SIGTERM. A failure is one line on standard error. What is heavy is imported inside the commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from edge_runtime.device.errors import DeviceError, InputError
from edge_runtime.device.events import DeviceEvent, Encrypted
from edge_runtime.device.home import Home, default_home
from edge_runtime.device.opening import opened, storage_options
from edge_runtime.device.records import DeviceState, Settings
from edge_runtime.device.storage_key import KeyChoice
from edge_runtime.wire import DeviceRevokedError, RequestFormatError, UnknownDeviceError, WireError


class Failure(click.ClickException):
    """One line on standard error, exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InputFailure(Failure):
    """One line on standard error, exit code 2."""

    exit_code = 2


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
home_option = click.option(
    "--home",
    type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
    envvar="EMBERLORA_HOME",
    default=lambda: default_home(os.environ, sys.platform),
    show_default="the user's data folder",
    help="The device's folder: identity, downloads, unsent updates. Also from EMBERLORA_HOME.",
)
_data_option = click.option(
    "--data", type=_FILE, multiple=True, help="Training data, JSONL or CSV; may be repeated. Remembered."
)
_eval_option = click.option(
    "--eval",
    "evaluation",
    type=_FILE,
    multiple=True,
    help="Held-out data, evaluated before each round; may be repeated. Remembered.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn what a user must be told into one line and an exit code."""
    try:
        yield
    except InputError as error:
        raise InputFailure(str(error)) from error
    except UnknownDeviceError as error:
        line = f"{error}: this device has left: run 'emberlora edge leave', then enroll with a new token"
        raise Failure(line) from error
    except DeviceRevokedError as error:
        raise Failure(
            f"{error}: its key is refused for good, and nothing is tried again: ask the operator; with a token for "
            "another name, run 'emberlora edge leave' and enroll"
        ) from error
    except (DeviceError, WireError, OSError) as error:
        raise Failure(str(error)) from error


def _say(event: DeviceEvent) -> None:
    """On standard error, for commands that have no display."""
    from edge_runtime.device.display import encrypted_line

    if isinstance(event, Encrypted):
        click.echo(encrypted_line(event), err=True)


@click.command()
@click.option("--server", required=True, help="Address of the aggregator, https://host:port.")
@click.option(
    "--token",
    required=True,
    envvar="EMBERLORA_TOKEN",
    show_envvar=True,
    help="One-time token from 'emberlora cloud token'; '-' reads it from standard input.",
)
@click.option("--name", required=True, help="This device's name, the one the token was made for.")
@home_option
@storage_options
@_data_option
@_eval_option
@click.option(
    "--ca",
    type=_FILE,
    help="Trust the server's certificate if it comes from this one (PEM).  [default: the system's CAs]",
)
@click.option("--insecure-http", is_flag=True, help="Allow plain http to another machine. Updates stay sealed.")
def enroll(  # noqa: PLR0913  # click passes each option as an argument
    *,
    server: str,
    token: str,
    name: str,
    home: Path,
    keys: KeyChoice,
    data: tuple[Path, ...],
    evaluation: tuple[Path, ...],
    ca: Path | None,
    insecure_http: bool,
) -> None:
    """Make this device known to an aggregator.

    The operator makes a token for a name; the device makes its own key, which never leaves it. All it keeps of its
    data is encrypted under a storage key, which lies beside its folder unless another place is said. A lost answer is
    repaired by running the same command again. First one product is computed in a child process: where ONNX Runtime
    does not work, nothing is enrolled. The server is told the machine's architecture, cores, memory and speed, and
    nothing else of it.

    \b
    Example:
      emberlora cloud token --name pi-1                                   # on the server
      emberlora edge enroll --server https://host:8440 --name pi-1 \\
          --token ember1.… --data mine.jsonl                              # on the device
      emberlora edge run
    """
    from edge_runtime.device.capability import tell_first
    from edge_runtime.device.enrolment import Trust, enrol
    from edge_runtime.device.host import Host
    from edge_runtime.device.trial import try_engine
    from edge_runtime.device.trust import check_server, read_ca
    from edge_runtime.wire import Token, check_name

    with one_line():
        try:
            parsed = Token.parse(sys.stdin.readline() if token == "-" else token)
            check_name(name, what="device")
        except RequestFormatError as error:
            raise InputError(str(error)) from error
        origin = check_server(server, insecure_http=insecure_http)
        if ca is not None and not origin.startswith("https:"):
            raise InputError(f"--ca is for https, and the server is {origin}")
        trust = Trust("" if ca is None else read_ca(ca), insecure_http)
        calibration_s = asyncio.run(try_engine())
        with opened(home, keys, _say, new=True) as place:
            work = enrol(place, server=origin, token=parsed, device=name, host=Host(), trust=trust)
            identity = asyncio.run(work)
            _remember(place, data, evaluation)
            asyncio.run(tell_first(place, calibration_s, host=Host()))
    click.echo(f"its folder is encrypted; without the storage key it is lost: {place.key_place()}", err=True)
    click.echo(f"{identity.device} is enrolled in task {identity.task}; next: emberlora edge run")


@click.command()
@home_option
@storage_options
@_data_option
@_eval_option
@click.option("--threads", type=click.IntRange(min=1), help="Threads for training.  [default: all cores]")
@click.option("--memory-mb", type=click.IntRange(min=1), help="Memory the training may plan with, in MB.")
@click.option(
    "--packed-weights",
    is_flag=True,
    help="Copy the frozen weights into the order that products want, as far as the memory budget goes: a step "
    "is up to a tenth faster, the copies take twice the weights' size. For bundles of base fp32.",
)
@click.option(
    "--micro-tokens",
    type=click.IntRange(min=1),
    help="Tokens that go through the model at once; a larger batch is divided, its gradient stays the same.  "
    "[default: 4096, less for a small --memory-mb]",
)
@click.option(
    "--remember-mb",
    type=click.IntRange(min=0),
    help="Disk for what the frozen lower blocks make of the examples, until the task ends; 0 computes it every time.  "
    "[default: 2048, or a tenth of the free disk if that is less]",
)
@click.option(
    "--tier",
    type=click.IntRange(min=0),
    default=0,
    help="Carry less of each plan than this device could: tier 1 or more, where the plan has tiers.  "
    "[default: what the plan means for a device of its free memory, or --memory-mb, and its speed]",
)
@click.option(
    "--checkpoint-s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds of training from one checkpoint to the next; a device that loses power goes on from the last one.",
)
@click.option("--skip-bad-lines", is_flag=True, help="Train on the good lines of a file that has bad ones.")
@click.option("--once", is_flag=True, help="Stop after one round.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON event a line for machines.")
@click.option(
    "--progress-s",
    type=click.FloatRange(min=0),
    default=0.0,
    help="With --json, seconds of training from one 'step' event to the next; the last one of a round always comes.  "
    "[default: 0, every step]",
)
def run(  # noqa: PLR0913  # click passes each option as an argument
    *,
    home: Path,
    keys: KeyChoice,
    data: tuple[Path, ...],
    evaluation: tuple[Path, ...],
    threads: int | None,
    memory_mb: int | None,
    packed_weights: bool,
    micro_tokens: int | None,
    remember_mb: int | None,
    tier: int,
    checkpoint_s: float,
    skip_bad_lines: bool,
    once: bool,
    as_json: bool,
    progress_s: float,
) -> None:
    """Take part in rounds until the task is finished.

    The device asks for plans, trains in a child process, and sends sealed updates. It may be stopped and started at
    any time: downloads go on where they were cut, training after its last checkpoint, and an update that was not
    acknowledged is sent again, not trained again. When the server cannot be reached it waits and says so. Ends with 0
    when the task is finished, 143 after SIGTERM, 130 after Ctrl-C.

    \b
    Example:
      emberlora edge run --data mine.jsonl --eval held-out.jsonl
      emberlora edge run --json | jq 'select(.event == "uploaded")'
    """
    from edge_runtime.device.display import JsonDisplay, TerminalDisplay
    from edge_runtime.device.events import Stopped
    from edge_runtime.device.host import Host
    from edge_runtime.device.inspector import ChildInspector
    from edge_runtime.device.loop import RunOptions, Tools
    from edge_runtime.device.running import check_settings, run_device, until_signal
    from edge_runtime.device.trainer import ChildTrainer

    display = JsonDisplay(progress_s) if as_json else TerminalDisplay()
    with one_line(), contextlib.closing(display), opened(home, keys, display.show) as place:
        settings = _remember(place, data, evaluation)
        if not place.state().finished:
            check_settings(settings)
        options = RunOptions(
            settings,
            threads=threads,
            skip_bad=skip_bad_lines,
            memory_budget_mb=memory_mb,
            packed_weights=packed_weights,
            micro_tokens=micro_tokens,
            remember_mb=remember_mb,
            tier=tier,
            checkpoint_s=checkpoint_s,
            once=once,
        )
        tools = Tools(trainer=ChildTrainer(), inspector=ChildInspector(), host=Host(), report=display.show)
        work = run_device(place, tools, options)
        code = until_signal(work, lambda name: display.show(Stopped(name)))
    if code:
        click.echo("stopped; 'emberlora edge run' goes on where it was", err=True)
        sys.exit(code)


class StatusReport(msgspec.Struct, frozen=True):
    """What ``status --json`` prints. Rounds are numbered from 0; -1 for none."""

    device: str
    server: str
    task: str
    home: str
    finished: bool
    seen_round: int
    done_round: int
    updates_counted: int
    pending_round: int | None  # of an update that is not acknowledged yet
    bytes_up: int
    bytes_down: int
    bundle: str
    storage_key: str | None  # where the key is that the home is encrypted under
    published: str | None  # peft folder, with the personal parameters
    personal: str | None  # file with the parameters that never leave this device
    data: tuple[str, ...]
    evaluation: tuple[str, ...]


@click.command()
@home_option
@json_option
def status(*, home: Path, as_json: bool) -> None:
    """Show what this device is doing and has done. Asks nobody; works while 'run' is running, and without its key.

    \b
    Example:
      emberlora edge status
      emberlora edge status --json | jq .done_round
    """
    from edge_runtime.device.outbox import first_round

    with one_line():
        place = Home(home)
        identity, state, settings = place.membership(), place.state(), place.settings()
        key_place = place.key_place()
        report = StatusReport(
            device=identity.device,
            server=identity.server,
            task=identity.task,
            home=str(place.folder),
            finished=state.finished,
            seen_round=state.seen_round,
            done_round=state.done_round,
            updates_counted=state.counted,
            pending_round=first_round(place.outbox),
            bytes_up=state.bytes_up,
            bytes_down=state.bytes_down,
            bundle=state.bundle,
            storage_key=None if key_place is None else str(key_place),
            published=str(place.published_folder) if place.published() else None,
            personal=str(place.personal) if place.personal.exists() else None,
            data=settings.data,
            evaluation=settings.evaluation,
        )
    click.echo(msgspec.json.encode(report) if as_json else _status_text(report, state))


def _status_text(report: StatusReport, state: DeviceState) -> str:
    from edge_runtime.device.display import size

    where = "finished" if state.finished else f"round {state.seen_round + 1}" if state.plan else "no plan seen yet"
    rows = {
        "device": report.device,
        "task": f"{report.task} at {report.server}",
        "state": where,
        "updates": f"{report.updates_counted} counted",
        "traffic": f"{size(report.bytes_up)} sent, {size(report.bytes_down)} received",
        "data": ", ".join(report.data) or "none yet: pass --data FILE to 'emberlora edge run'",
        "evaluation": ", ".join(report.evaluation),
        "adapter": report.published or "",
        "personal": report.personal or "",
        "home": report.home,
        "storage key": report.storage_key or "none: 'emberlora edge run' makes one and encrypts the home",
    }
    if report.pending_round is not None:
        rows["updates"] += f", one for round {report.pending_round + 1} not yet acknowledged"
    return "\n".join(f"{name:<11} {text}" for name, text in rows.items() if text)


@click.command()
@home_option
@storage_options
def leave(*, home: Path, keys: KeyChoice) -> None:
    """Leave the task; the aggregator forgets this device's key.

    Identity, position, unsent updates and personal parameters are removed here; downloads and a published adapter
    stay.

    \b
    Example:
      emberlora edge leave
    """
    from edge_runtime.device.enrolment import leave as leave_task
    from edge_runtime.device.host import Host

    with one_line(), opened(home, keys, _say) as place:
        identity = asyncio.run(leave_task(place, host=Host()))
    click.echo(f"{identity.device} has left task {identity.task}")


@click.command()
@home_option
@storage_options
def rotate_key(*, home: Path, keys: KeyChoice) -> None:
    """Replace this device's key by a new one; the old one is refused from then on.

    May be interrupted and repeated: 'run' and 'leave' finish what was begun.

    \b
    Example:
      emberlora edge rotate-key
    """
    from edge_runtime.device.host import Host
    from edge_runtime.device.rekeying import rotate

    with one_line(), opened(home, keys, _say) as place:
        identity = asyncio.run(rotate(place, host=Host()))
    click.echo(f"{identity.device} has a new key in task {identity.task}")


@click.command()
@home_option
@storage_options
@click.option("--ca", type=_FILE, help="Trust the server's certificate if it comes from this one (PEM).")
@click.option("--system-ca", is_flag=True, help="Trust the system's CAs instead.")
@click.option("--insecure-http", is_flag=True, help="Allow plain http to another machine. Updates stay sealed.")
def trust(*, home: Path, keys: KeyChoice, ca: Path | None, system_ca: bool, insecure_http: bool) -> None:
    """Change what this device's server must show: a certificate from this CA or one of the system's, or none.

    Asks nobody; the next 'run' uses it.

    \b
    Example:
      emberlora edge trust --ca new-ca.pem
    """
    from edge_runtime.device.trust import read_ca

    with one_line():
        if sum((ca is not None, system_ca, insecure_http)) != 1:
            raise InputError("give one of --ca FILE, --system-ca and --insecure-http")
        with opened(home, keys, _say) as place:
            text = "" if ca is None else read_ca(ca)
            identity = msgspec.structs.replace(place.identity(), ca=text, insecure_http=insecure_http)
            place.save_identity(identity)
    what = "plain http" if insecure_http else "the CAs of this system" if ca is None else str(ca)
    click.echo(f"{identity.device} trusts {what} for {identity.server}")


def _remember(home: Home, data: tuple[Path, ...], evaluation: tuple[Path, ...]) -> Settings:
    """The settings with what was given just now in place of what was remembered."""
    old = home.settings()
    new = msgspec.structs.replace(
        old,
        data=tuple(str(path.resolve()) for path in data) or old.data,
        evaluation=tuple(str(path.resolve()) for path in evaluation) or old.evaluation,
    )
    if new != old:
        home.save_settings(new)
    return new
