"""What a device process and its training child tell each other.

The child is ``python -m edge_runtime.training.child``. It reads a :class:`TrainingJob` as a line of JSON from standard
input, prints one event of ``Event`` a line as JSON on standard output, and writes ``update.encrypted`` into the job's
``out`` folder before it prints :class:`Done`; where the plan quantises also ``residual.encrypted``, what the frame
leaves out, where it leaves parameters to the device ``personal.encrypted``, those, and where it asks for a share of the
examples ``importance.encrypted``, what each of them still has to teach. Training runs in a child so that
its memory returns to the system between rounds, and so that the resident process never loads the engine. The child ends
with its parent, however that ends (:mod:`edge_runtime.training.held`).

The job's ``checkpoint`` file outlives the child: a training that was stopped or killed goes on from there. SIGTERM asks
for one after the step under way, and the end; before the first step it ends the child at once.

Whatever follows from the device's texts is encrypted before it is written. The child is given the keys of these files
in the job, which therefore is on no disk, in no list of processes and in no environment.
"""

from __future__ import annotations

import msgspec

from edge_runtime.at_rest import Grant, Purpose
from edge_runtime.wire.update import LocalMetrics

FRAME_NAME = "update.encrypted"
REMEMBERED_NAME = "remembered.hidden"
RESIDUAL_NAME = "residual.encrypted"
PERSONAL_NAME = "personal.encrypted"
IMPORTANCE_NAME = "importance.encrypted"
CARRIED_NAMES = (RESIDUAL_NAME, PERSONAL_NAME, IMPORTANCE_NAME)  # what a device carries over to later rounds
CHECKPOINT_NAME = "checkpoint.encrypted"
# What a training needs keys for.
JOB_PURPOSES: tuple[Purpose, ...] = ("frame", "residual", "personal", "importance", "remembered", "checkpoint")


class TrainingJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files of one round, all verified by the parent before."""

    plan: str  # signed plan
    round: int  # the plan's
    plan_key: str  # Ed25519 public key that signed it, hex
    bundle: str  # folder
    adapter: str  # file
    data: tuple[str, ...]
    evaluation: tuple[str, ...]
    out: str  # folder for the frame
    grant: Grant  # keys of what is written and read
    skip_bad: bool = False
    threads: int | None = None  # None: all cores
    memory_budget_mb: int | None = None
    packed_weights: bool = False  # where the bundle's base is fp32
    micro_tokens: int | None = None  # None: what suits model and budget
    remember_mb: int | None = (
        None  # for what the frozen blocks make of the examples, on disk; None: what suits the disk
    )
    remembered: str | None = None  # file: the same from round to round; None: forgotten when the training ends
    residual: str | None = None  # file: what updates before did not say; None, or no such file: nothing
    personal: str | None = None  # file: what this device keeps for itself; None, or no such file: nothing yet
    importance: str | None = None  # file: what examples still have to teach; None, or no such file: not known
    checkpoint: str | None = None  # file: where an interrupted training goes on; None: it begins anew
    checkpoint_s: float = 30.0  # seconds of training from one to the next
    tier: int = 0  # of the plan's, that this device carries
    rounding_seed: int = 0  # for stochastic rounding; of the device's own entropy, so that no two devices round alike


class Notice(msgspec.Struct, frozen=True, tag="notice"):
    """A line for the user, for example about truncated examples."""

    text: str


class Evaluated(msgspec.Struct, frozen=True, tag="evaluated"):
    """The plan's adapter on the device's evaluation data, before training."""

    examples: int
    correct: int
    loss: float  # mean nats


class Resumed(msgspec.Struct, frozen=True, tag="resumed"):
    """A training that was interrupted goes on."""

    step: int  # that was done last
    steps: int


class Stepped(msgspec.Struct, frozen=True, tag="stepped"):
    """One optimizer step is done."""

    step: int  # counted from 1
    steps: int
    loss: float  # mean nats of this batch


class Stilled(msgspec.Struct, frozen=True, tag="stilled"):
    """These modules stand still; they are not trained after this step of the round."""

    step: int  # counted from 1
    modules: tuple[str, ...]


class MeasuredPart(msgspec.Struct, frozen=True, tag="measured"):
    """So many of the device's examples are measured, in a round that measures class means."""

    examples: int
    of: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The frame is written."""

    weight: int
    metrics: LocalMetrics
    spared: dict[int, int] = {}  # tokens whose lowest blocks were read and not computed, by how many blocks
    skipped: int = 0  # steps of modules that were left out because the module stood still
    examples: tuple[int, int] = (0, 0)  # that were trained on, of how many
    tokens: int = 0  # of those that were trained on


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job ends without a frame. ``input`` says that the user's data or settings are the cause."""

    message: str
    input: bool


Event = Notice | Evaluated | Resumed | Stepped | Stilled | MeasuredPart | Done | Failed


def decode_event(line: bytes) -> Event:
    """Read one line of the child's output.

    Raises:
        msgspec.DecodeError: it is not an event.
    """
    event: Event = msgspec.json.decode(line, type=Event)
    return event
