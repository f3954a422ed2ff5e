"""What a running device tells its user; with ``run --json`` each is one line, named by its member ``event``."""

from __future__ import annotations

import msgspec

from edge_runtime.device.eligibility import Obstacle


class DeviceEvent(msgspec.Struct, frozen=True, tag_field="event"):
    """Base of all."""


class Started(DeviceEvent, frozen=True, tag="started"):
    """The device is running; ``round`` is the last one it is done with, -1 for none."""

    device: str
    task: str
    server: str
    round: int


class Planned(DeviceEvent, frozen=True, tag="plan"):
    """A plan was accepted."""

    round: int
    rounds: int  # planned number of rounds
    state: str  # "measure", "train" or "finished"
    digest: str
    factors_alive: int
    factors: int  # two for every module
    head_alive: bool
    adapter_bytes: int
    personal: tuple[str, ...] = ()  # what this device trains and keeps: "head", "B"


class PlanKeyChanged(DeviceEvent, frozen=True, tag="plan-key-changed"):
    """Plans are signed with another key from now on; the one before has said so."""

    plan_key: str  # Ed25519 public key, hex


class Fetched(DeviceEvent, frozen=True, tag="fetched"):
    """Bundle and adapter of the plan are here and verified."""

    round: int
    bytes: int  # downloaded for it; 0 when everything was here


class Encrypted(DeviceEvent, frozen=True, tag="encrypted"):
    """A home of an older version, which was in the clear, has been encrypted in place."""

    files: int
    key: str  # where its storage key is


class Noticed(DeviceEvent, frozen=True, tag="notice"):
    """A line for the user, for example about truncated examples."""

    text: str


class EvaluatedRound(DeviceEvent, frozen=True, tag="evaluated"):
    """The plan's adapter on the device's evaluation data, before training."""

    round: int
    examples: int
    correct: int
    loss: float  # mean nats


class TrainingResumed(DeviceEvent, frozen=True, tag="resumed"):
    """A training that was interrupted goes on from its last checkpoint."""

    round: int
    step: int  # that was done last
    steps: int


class StepDone(DeviceEvent, frozen=True, tag="step"):
    """One optimizer step is done."""

    round: int
    step: int  # counted from 1
    steps: int
    loss: float  # mean nats of this batch


class ModulesStilled(DeviceEvent, frozen=True, tag="stilled"):
    """These modules stand still on this device; they are not trained after this step of the round."""

    round: int
    step: int  # counted from 1
    modules: tuple[str, ...]


class MeasuredPart(DeviceEvent, frozen=True, tag="measured"):
    """So many of this device's examples are measured, in a round that measures class means."""

    round: int
    examples: int
    of: int


class TrainedRound(DeviceEvent, frozen=True, tag="trained"):
    """Local training ended, or measuring, which has no steps and no losses."""

    round: int
    weight: int
    steps: int
    loss_start: float | None  # mean nats
    loss_end: float | None
    seconds: float | None
    peak_private_mb: float | None
    peak_total_mb: float | None
    spared: dict[int, int] = {}  # tokens whose lowest blocks were read and not computed, by how many blocks
    tier: int = 0  # of the plan's, that was carried; 0: all of the plan
    skipped: int = 0  # steps of modules that were left out because the module stood still
    examples: int = 0  # that were trained on …
    of_examples: int = 0  # … of how many


class Uploaded(DeviceEvent, frozen=True, tag="uploaded"):
    """The server has acknowledged the update."""

    round: int
    bytes: int  # sealed
    weight: int  # as counted, after the cap


class Skipped(DeviceEvent, frozen=True, tag="skipped"):
    """This device adds nothing to a round. ``reason`` is a problem's name, "few-examples" or "damaged"."""

    round: int
    reason: str
    detail: str


class Waiting(DeviceEvent, frozen=True, tag="waiting"):
    """Something did not work and is tried again; ``error`` is the name of its class."""

    error: str
    detail: str
    waited_s: float  # since it first failed
    retry_s: float  # until the next attempt


class Ineligible(DeviceEvent, frozen=True, tag="ineligible"):
    """By its user's rules this device may not train a round yet; it looks again about every minute."""

    round: int
    obstacles: tuple[Obstacle, ...]


class Held(DeviceEvent, frozen=True, tag="held"):
    """By its user's rules this device may no longer train; what it has done is kept."""

    round: int
    obstacles: tuple[Obstacle, ...]
    retry_s: float  # until it looks again


class Finished(DeviceEvent, frozen=True, tag="finished"):
    """The task has ended and its adapter is here."""

    round: int
    adapter: str  # digest
    folder: str  # peft folder
    bytes_up: int
    bytes_down: int


class Stopped(DeviceEvent, frozen=True, tag="stopped"):
    """A signal ended the process; nothing is lost."""

    signal: str
