"""The aggregator's config: one TOML file, read once, checked whole, frozen.

Every default has its reason beside it. ``SAMPLE`` is what ``emberlora cloud init`` writes.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from cloud.errors import ConfigError
from cloud.outliers import Outliers, outliers_problems
from cloud.planner import (
    AGGREGATIONS,
    POLICIES,
    Annealing,
    Tiers,
    annealing_problems,
    bytes_problems,
    tiers_problems,
)
from edge_runtime import wire
from edge_runtime.wire.codes import UpdateBits
from edge_runtime.wire.patch_frame import PatchBits

CONFIG_NAME = "emberlora.toml"
Upload = Literal["float32", "int8", "int4", "ternary", "auto"]
Download = Literal["float32", "int8", "int4", "auto"]
DOWNLOAD_BITS: dict[Download, PatchBits] = {"float32": 32, "int8": 8, "int4": 4}
UPLOAD_BITS: dict[Upload, UpdateBits] = {"float32": 32, "int8": 8, "int4": 4, "ternary": 2}


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is learned, by how many devices, in how many rounds."""

    name: str
    bundle: str  # folder, relative to the config file
    policy: str = "fixed"  # what is trained; "fixed": everything, always; the others read [annealing]
    aggregation: str = "alternate"  # exact and linear, half the bytes of sending both factors (RoLoRA)
    upload: Upload = "float32"  # fewer bits a value: a quarter or an eighth of the bytes, and noise in every update
    upload_density: float = 1.0  # share of a change's values that is sent, the largest; the rest waits on the device
    download: Download = "float32"  # exact; "int8" and "int4" round what devices train from, not what is learned
    rounds: int = 12  # six of each factor; MiniLM-sized tasks have settled by then
    rank: int | None = None  # None: the bundle's r_max
    head_init: Literal["bundle", "class-means"] = "bundle"  # the other costs a round, and classifies from the start
    head_init_devices: int | None = None  # updates that close the measuring round; None: devices_per_round
    head: Literal["trained", "frozen"] = "trained"  # frozen: every round sends the factors alone
    personal: tuple[wire.Personal, ...] = ()  # trained by every device for itself, never sent: the head, the B factors
    devices_per_round: int = 4  # a round closes at once when so many updates are counted
    min_devices: int = 2  # a mean over one device would be that device's update
    round_deadline_s: float = 600.0  # slower devices are not waited for longer than this
    min_examples: int = 1  # a device with fewer stays out of the round
    weight_cap: int = 65_536  # no device weighs more than this, whatever it says it holds
    max_update_norm: float | None = None  # None: what is right depends on model, rates and steps; outliers are relative
    seed: int = 0

    @property
    def shares_head(self) -> bool:
        """Whether rounds train and send the head, if the bundle has one to train."""
        return self.head == "trained" and "head" not in self.personal


class TrainingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How devices train; see :class:`edge_runtime.wire.Training`."""

    batch_size: int = 16
    max_tokens: int | None = None  # None: what the bundle's model can take
    steps: int | None = None  # optimizer steps of every device a round; None: epochs
    epochs: int | None = None  # passes over a device's own data a round; both None: one epoch
    lr_a: float = 5e-4
    lr_b: float = 2e-3  # B starts at zero and bears a larger rate than A (LoRA+, arXiv 2402.12354)
    lr_head: float = 2e-3  # a head starts untrained
    lr_schedule: wire.Schedule = "cosine"  # rates fall over the rounds to a tenth: it calms the last ones
    weight_decay: float = 0.0  # adapters are small; decay mostly slows them
    mu: float = 0.0  # FedProx pull towards the round's start; 0: none
    clip_norm: float | None = None  # None: gradients are not clipped
    example_share: float = 1.0  # of a device's examples, drawn by what they still teach: half is half of the compute
    local_kill: float | None = None  # None: a device trains to the end what the plan asks for
    products: wire.Products = "exact"  # "int8" is faster; off until you have seen that your task learns as well


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the server listens and keeps its data."""

    host: str = "127.0.0.1"
    port: int = 8440  # 0: any free one; the address is written to <data>/server.url
    data: str = "data"  # folder, relative to the config file
    tls_cert: str | None = None  # PEM, the server's own first, then those between it and its CA; as data, relative
    tls_key: str | None = None  # its private key, PEM, without a password: a server must start unattended
    allow_plain_http: bool = False  # true: listen on other addresses than loopback without TLS
    request_timeout_s: float = 120.0  # a body that takes longer is cut
    max_uploads_at_once: int = 16  # bodies held in memory together; others wait
    max_connections: int = 8_192  # every waiting device has one; more are closed at once
    # Of one address, or of one IPv6 network of 64 bits; this machine's own are not counted. An office may share one.
    max_connections_per_address: int = 512


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. ``folder`` is where it lies; relative paths start there."""

    task: TaskConfig
    training: TrainingConfig = TrainingConfig()
    annealing: Annealing = Annealing()  # read by the policies that anneal
    tiers: Tiers = Tiers()
    outliers: Outliers = Outliers()
    server: ServerConfig = ServerConfig()
    folder: str = "."

    @property
    def download_bits(self) -> PatchBits:
        """Bits of a value of a changed matrix on its way to the devices; "auto" is settled before this is asked."""
        return DOWNLOAD_BITS[self.task.download]

    @property
    def bundle_path(self) -> Path:
        """The bundle's folder."""
        return Path(self.folder) / self.task.bundle

    @property
    def data_path(self) -> Path:
        """The data folder."""
        return Path(self.folder) / self.server.data

    @property
    def tls_files(self) -> tuple[Path, Path] | None:
        """Certificate and key; None: plain HTTP."""
        server = self.server
        if server.tls_cert is None or server.tls_key is None:
            return None
        return Path(self.folder) / server.tls_cert, Path(self.folder) / server.tls_key


def load_config(path: Path, *, server: Mapping[str, object] | None = None) -> Config:
    """Read and check a config file.

    Args:
        path: The file.
        server: Values from the command line that replace those of ``[server]``; None values do not.

    Raises:
        ConfigError: no such file, not TOML, unknown or missing keys, or values that contradict each other.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); make one with `emberlora cloud init`") from error
    return parse_config(data, path=path, server=server)


def parse_config(data: bytes, *, path: Path, server: Mapping[str, object] | None = None) -> Config:
    """Check the bytes of a config file that lies at ``path``; ``server`` as for :func:`load_config`.

    Raises:
        ConfigError: see :func:`load_config`.
    """
    try:
        # TOML syntax first, so that its errors and those of the keys read differently.
        table = msgspec.toml.decode(data)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not TOML for this program: nested too deep") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not TOML: not UTF-8 text") from error
    if "folder" in table:
        raise ConfigError(f"{path}: Object contains unknown field `folder`")
    given = {key: value for key, value in (server or {}).items() if value is not None}
    if given and isinstance(table.get("server", {}), dict):
        table["server"] = {**table.get("server", {}), **given}
    try:
        config = msgspec.convert({**table, "folder": str(path.parent)}, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
    problems = config_problems(config)
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    return config


def config_problems(config: Config) -> list[str]:
    """Every way in which the values are wrong by themselves or contradict each other."""
    try:
        wire.check_name(config.task.name, what="task.name")
    except wire.RequestFormatError as error:
        return [str(error)]
    return [
        *_task_problems(config.task),
        *_training_problems(config.training),
        *(annealing_problems(config.annealing, config.task.rounds) if config.task.policy != "fixed" else []),
        *_bytes_problems(config),
        *(_tiers_problems(config) if config.tiers.enabled else []),
        *(_outliers_problems(config) if config.outliers.enabled else []),
        *_server_problems(config.server),
    ]


def _task_problems(task: TaskConfig) -> list[str]:
    rules = {
        f"task.policy: expected one of {', '.join(POLICIES)}, got {task.policy!r}": task.policy not in POLICIES,
        f"task.aggregation: expected one of {', '.join(AGGREGATIONS)}, got {task.aggregation!r}": (
            task.aggregation not in AGGREGATIONS
        ),
        "task.policy (lora-a2) trains some components of a module, task.aggregation (stack) writes all of them anew: "
        "change one of the two": task.policy == "lora-a2" and task.aggregation == "stack",
        f"task.upload ({task.upload}) must be float32 with task.aggregation (stack): what a device keeps for its next "
        "update is of components that are written anew": task.upload != "float32" and task.aggregation == "stack",
        f"task.upload_density: expected more than 0 and at most 1, got {task.upload_density}": not (
            0 < task.upload_density <= 1
        ),
        f"task.upload_density ({task.upload_density}) needs task.upload int8, int4 or ternary, got {task.upload}: "
        "values that are sent by their positions are codes": task.upload_density < 1 and task.upload == "float32",
        f"task.rounds: expected at least 1, got {task.rounds}": task.rounds < 1,
        f"task.rank: expected at least 1, got {task.rank}": task.rank is not None and task.rank < 1,
        f"task.min_devices: expected at least 1, got {task.min_devices}": task.min_devices < 1,
        f"task.min_devices ({task.min_devices}) must not exceed task.devices_per_round ({task.devices_per_round})": (
            task.min_devices > task.devices_per_round
        ),
        f"task.round_deadline_s: expected more than 0, got {task.round_deadline_s}": not (
            0 < task.round_deadline_s < math.inf
        ),
        f"task.min_examples: expected at least 1, got {task.min_examples}": task.min_examples < 1,
        f"task.weight_cap ({task.weight_cap}) times task.devices_per_round ({task.devices_per_round}) "
        "must be from 1 to 2**27, so that the sum stays exact": not 1
        <= task.weight_cap * task.devices_per_round
        <= 2**27,
        f"task.max_update_norm: expected more than 0, got {task.max_update_norm}": task.max_update_norm is not None
        and not 0 < task.max_update_norm < math.inf,
    }
    return [message for message, broken in rules.items() if broken] + _head_problems(task) + _personal_problems(task)


def _bytes_problems(config: Config) -> list[str]:
    settings, task = config.annealing, config.task
    given = settings.bytes_per_device_per_round is not None or settings.total_bytes is not None
    return bytes_problems(settings, task.policy) + [
        f"{key} is auto, which needs annealing.bytes_per_device_per_round or annealing.total_bytes"
        for key, value in {"task.upload": task.upload, "task.download": task.download}.items()
        if value == "auto" and not given
    ]


def _tiers_problems(config: Config) -> list[str]:
    task = config.task
    rules = {
        "tiers.enabled needs task.aggregation alternate, b-only or both: stack makes all components of a module anew "
        "from whole products": task.aggregation == "stack",
        f"tiers.enabled needs task.min_devices of at least 2, got {task.min_devices}: what fewer devices carry "
        "does not move": task.min_devices < 2,
    }
    return [*tiers_problems(config.tiers), *(message for message, broken in rules.items() if broken)]


def _outliers_problems(config: Config) -> list[str]:
    task, needed = config.task, config.outliers.min_devices
    rules = {
        f"outliers.min_devices ({needed}) must not exceed task.devices_per_round ({task.devices_per_round}): nobody "
        "would ever be judged": needed > task.devices_per_round,
        f"outliers.enabled needs task.min_devices below task.devices_per_round ({task.devices_per_round}), got "
        f"{task.min_devices}: nobody could be set aside": task.min_devices >= task.devices_per_round,
    }
    return [*outliers_problems(config.outliers), *(message for message, broken in rules.items() if broken)]


def _head_problems(task: TaskConfig) -> list[str]:
    devices = task.head_init_devices
    if devices is None:
        return []
    rules = {
        f"task.head_init_devices ({devices}) must be from task.min_devices ({task.min_devices}) to 16,384, so that the "
        "sum stays exact": not task.min_devices <= devices <= 2**14,
        f"task.head_init_devices is for task.head_init class-means, not {task.head_init}": task.head_init == "bundle",
    }
    return [message for message, broken in rules.items() if broken]


def _personal_problems(task: TaskConfig) -> list[str]:
    own_b = "B" in task.personal
    rules = {
        f"task.personal ({', '.join(task.personal)}): a part stands twice": (
            len(set(task.personal)) < len(task.personal)
        ),
        "task.personal has the head, which task.head (frozen) never trains: change one of the two": (
            "head" in task.personal and task.head == "frozen"
        ),
        f"task.personal has B, so that A alone is shared: task.aggregation must be a-only, got {task.aggregation}": (
            own_b and task.aggregation != "a-only"
        ),
        "task.aggregation (a-only) trains A, which learns nothing from a B of zeros: task.personal must have B": (
            not own_b and task.aggregation == "a-only"
        ),
        f"task.personal has B, so that the server cannot know what a module moves: task.policy must be fixed, got "
        f"{task.policy}": own_b and task.policy != "fixed",
    }
    return [message for message, broken in rules.items() if broken]


def _training_problems(training: TrainingConfig) -> list[str]:
    amounts = {"batch_size": training.batch_size, "steps": training.steps, "epochs": training.epochs}
    rates = ("lr_a", "lr_b", "lr_head", "weight_decay", "mu")
    problems = [
        f"training.{name}: expected at least 1, got {value}"
        for name, value in {**amounts, "max_tokens": training.max_tokens}.items()
        if value is not None and value < 1
    ]
    for name in rates:
        rate = getattr(training, name)
        if not (math.isfinite(rate) and rate >= 0):
            problems.append(f"training.{name}: expected 0 or more, got {rate}")
    if training.steps is not None and training.epochs is not None:
        problems.append("training.steps and training.epochs: give one of them, not both")
    if not 0 < training.example_share <= 1:
        problems.append(f"training.example_share: expected more than 0 and at most 1, got {training.example_share}")
    if training.local_kill is not None and not 0 < training.local_kill <= 1:
        problems.append(f"training.local_kill: expected more than 0 and at most 1, got {training.local_kill}")
    if training.clip_norm is not None and not training.clip_norm > 0:
        problems.append(f"training.clip_norm: expected more than 0, got {training.clip_norm}")
    return problems


def _server_problems(server: ServerConfig) -> list[str]:
    rules = {
        f"server.port: expected 0 to 65535, got {server.port}": not 0 <= server.port <= 65535,
        f"server.host ({server.host}) is not loopback and there is no TLS: set server.tls_cert and server.tls_key "
        "(or --tls-cert and --tls-key), or server.allow_plain_http = true (or --insecure-http) to serve plain HTTP on "
        "it all the same": not (server.tls_cert or server.allow_plain_http or is_loopback(server.host)),
        "server.tls_cert and server.tls_key: give both or neither": (server.tls_cert is None)
        != (server.tls_key is None),
        f"server.request_timeout_s: expected more than 0, got {server.request_timeout_s}": not (
            0 < server.request_timeout_s < math.inf
        ),
        f"server.max_uploads_at_once: expected at least 1, got {server.max_uploads_at_once}": (
            server.max_uploads_at_once < 1
        ),
        f"server.max_connections_per_address: expected 1 to server.max_connections ({server.max_connections}), got "
        f"{server.max_connections_per_address}": (
            not 1 <= server.max_connections_per_address <= server.max_connections
        ),
    }
    return [message for message, broken in rules.items() if broken]


def is_loopback(host: str) -> bool:
    """Whether listening on ``host`` reaches this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# Learning rates of A and B that `init` writes, as measured at rank 8 (docs/adr/0022); a decoder's are cautious. A
# config without rates keeps the defaults above: the plans of a running task must not change.
SAMPLE_RATES = {"classify": (2e-3, 4e-3), "lm": (1e-3, 4e-3)}


def sample_config(*, task: str, bundle: str, max_tokens: int, rank: int, rates: tuple[float, float]) -> str:
    """The commented file that ``init`` writes; ``rates`` are those of A and B."""
    values = {"task": task, "bundle": bundle.replace("\\", "/"), "max_tokens": max_tokens, "rank": rank}
    values |= {"lr_a": rates[0], "lr_b": rates[1]}
    return "".join(_align(line) + "\n" for line in SAMPLE.format(**values).splitlines())


def _align(line: str) -> str:
    """A line with its comment in one column."""
    value, separator, comment = line.partition("  # ")
    return f"{value.rstrip():<30} # {comment}" if separator else line


SAMPLE = """\
# EmberLoRA aggregator. Unknown keys are refused; units stand in the names; paths start at this file's folder.

[task]
name = "{task}"
bundle = "{bundle}"            # made by `emberlora export`
policy = "fixed"               # everything; or "anneal", "kill-revive", "annealed-kill-revive", "lora-a2"
aggregation = "alternate"      # B in even rounds, A in odd ones: exact; or "b-only", "a-only", "both", "stack"
upload = "float32"             # how a change is sent; or "int8", "int4", "ternary": a quarter, an eighth, a twentieth
upload_density = 1.0           # with all but float32: the share of its values that an update holds, the largest ones
download = "float32"           # devices fetch what has changed; "int8" and "int4" send it in fewer bits
rounds = 12
rank = {rank}                  # at most the bundle's r_max
head_init = "bundle"           # or "class-means": one more round, first, makes a classifier's head from sums
# head_init_devices = 4        # updates that close that round; left out: devices_per_round
head = "trained"               # or "frozen": never trained and never sent, for a head that works from the start
personal = []                  # "head", "B": every device trains its own and keeps it; with "B" aggregation "a-only"
devices_per_round = 4          # a round closes at once when so many updates are counted …
min_devices = 2                # … or at its deadline when at least so many are
round_deadline_s = 600
min_examples = 1               # a device with fewer examples stays out
weight_cap = 65536             # no device weighs more than this
# max_update_norm = 1.0        # bound on the L2 norm of a change: devices scale theirs down to it; left out: none
seed = 0

[training]
batch_size = 16
max_tokens = {max_tokens}      # longer examples are cut
epochs = 1                     # passes of a device over its own data in a round; or: steps = 20
lr_a = {lr_a}                  # try twice and half of both before anything else; low ranks want more
lr_b = {lr_b}                  # B starts at zero and bears a larger rate
lr_head = 2e-3
lr_schedule = "cosine"         # rates fall over the rounds to a tenth; or "constant"
weight_decay = 0.0
mu = 0.0                       # FedProx pull towards the round's start
# clip_norm = 1.0              # bound on the global gradient norm; left out: no clipping
example_share = 1.0            # of its examples, that a device trains in a round: 0.5 takes those that still teach
# local_kill = 0.3             # a device stops training what moves less than this share of the mean at its start
products = "exact"             # with frozen weights; "int8" is faster, its gradients are a few per cent off

[annealing]                    # read by the other policies; budgets are shares of the adapter at the task's rank
budget_start = 1.0
budget_end = 0.25              # "lora-a2": of all components, in every round; it reads nothing else here
curve = "cubic"                # or "cosine", "linear"
initiating_rounds = 2          # at the full budget
heating_rounds = 0             # after them, in which the budget climbs from its end to its start; best without them
final_rounds = 2               # at the end's budget
initiating_mu = 0.0            # FedProx pull in the initiating rounds; 0: that of [training]
temperature_start = 0.5        # of reviving: how much weaker, in parts of the mean, a dead module may be
temperature_end = 0.02
depth_start = 1.0              # share of the blocks, from the last one down, in which anything may be trained
depth_end = 1.0                # falls as the budget does: devices compute no backward pass below, and remember the rest

# A budget in bytes, up and down, the mean of the training rounds. budget_start and budget_end are then scaled to fit it
# and only give the shape. [task] upload and download may be "auto" then: the most precise of float32, int8 and int4,
# download at least as precise as upload, with which every module could have rank 1 in the last round; if there is none,
# upload int4 and download int8.
# bytes_per_device_per_round = 500000
# total_bytes = 24000000       # instead: of devices_per_round devices in all training rounds together

[tiers]                        # of weaker devices, which train fewer and later blocks; a list has a value a tier
enabled = false                # a device takes the weakest tier that is meant for it by what it measured of itself
blocks = [0.5, 0.167]          # share of the blocks, the last ones, that tier 1, tier 2, … trains
max_rank = []                  # most components a module, [4, 2] for example; empty: all the plan trains
memory_mib = [1024, 512]       # a tier is meant for devices with less memory for training …
step_s = [2.0, 8.0]            # … and for those whose training step takes longer; see `emberlora edge bench`

[outliers]                     # updates that are set aside when a round closes; `cloud audit show` names them
enabled = false                # look at your fleet first: a device with much or rare data is far from others, too
norm_factor = 5.0              # set aside what is larger than so many times the median of the round …
min_cosine = -0.15             # … or points away from the mean direction of all others; -1: whatever points where
min_devices = 8                # of fewer in a round nobody is judged

[server]
host = "127.0.0.1"
port = 8440                    # 0: any free one; the address stands in <data>/server.url
data = "data"
# tls_cert = "cert.pem"        # with these two it speaks https; files in PEM form
# tls_key = "key.pem"
allow_plain_http = false       # true: plain HTTP on other addresses than loopback
request_timeout_s = 120
max_uploads_at_once = 16
max_connections = 8192         # a waiting device has one
max_connections_per_address = 512  # a proxy on another machine needs as many as max_connections
"""
