"""What a pilot found, as values that are printed, drawn, and written as JSON."""

from __future__ import annotations

from typing import Literal

import msgspec

from cloud.pilot.grades import Grades, Shares


class Wish(msgspec.Struct, frozen=True):
    """What the operator wants to run after the pilot; None: as the pilot, or what follows from it."""

    devices: int | None = None
    rounds: int | None = None
    rounds_per_day: float | None = None
    examples: int | None = None  # of one device
    round_s: float | None = None  # longest a round may take


class DeviceFinding(msgspec.Struct, frozen=True):
    """One device in the pilot. None: not measured.

    Attributes:
        name: Of the device.
        counted: Updates in applied rounds that trained.
        refused: Updates that were refused, or came too late.
        machine: Its architecture and cores, in its own words.
        up_bytes_s: Bytes a second of its updates.
        up_by: Who measured that: the server where updates of 64 KiB or more came, else the device.
        down_bytes_s: Bytes a second of what it fetched, measured by the device.
        round_trip_s: Shortest time until a request was answered, measured by the device.
        up_bytes: Of its updates, the mean.
        down_bytes: Fetched for a round, the mean, without the bundle.
        transfer_s: That these bytes take at these speeds.
        train_s: Median seconds of a round's work: loading, evaluating, training.
        step_s: Median seconds of an optimizer step in its last round, measured by the device.
        examples: That it trains on; of a language model, as batches held them.
        example_s: ``train_s`` by examples that went through training.
        answer_s: From a round's opening to its update; the 90th percentile.
        peak_mb: Highest private memory while training, MiB.
        available_mb: Memory that was free before, MiB.
        shares: What the grades are made from.
        grades: Letters.
    """

    name: str
    counted: int
    refused: int
    machine: str | None
    up_bytes_s: float | None
    up_by: Literal["server", "device"] | None
    down_bytes_s: float | None
    round_trip_s: float | None
    up_bytes: float | None
    down_bytes: float | None
    transfer_s: float | None
    train_s: float | None
    step_s: float | None
    examples: int | None
    example_s: float | None
    answer_s: float | None
    peak_mb: float | None
    available_mb: float | None
    shares: Shares
    grades: Grades


class Suggestion(msgspec.Struct, frozen=True):
    """How to run the task with many devices.

    Attributes:
        devices: In all.
        devices_per_round: That close a round: all but the slowest fifth.
        min_devices: Half of them, two at least.
        rounds: That train.
        round_deadline_s: Twice the 90th percentile of the pilot's answers, or what was wished.
        rounds_per_day: Wished, or one an hour; no more than deadlines allow.
        policy: ``task.policy``.
        upload: ``task.upload``.
        download: ``task.download``.
        affordable_bytes: What the slowest useful link moves, up and down, in a quarter of the deadline; None: unknown.
        bytes_per_device_per_round: Suggested budget; None: none is needed, or links are not known.
        least_bytes: The smallest budget that the policy can keep to; where it has none, what the pilot's rounds moved.
        note: Why there is this budget, or none.
        toml: Lines for the config.
    """

    devices: int
    devices_per_round: int
    min_devices: int
    rounds: int
    round_deadline_s: int
    rounds_per_day: float
    policy: str
    upload: str
    download: str
    affordable_bytes: int | None
    bytes_per_device_per_round: int | None
    least_bytes: int
    note: str
    toml: str


class Month(msgspec.Struct, frozen=True):
    """Thirty days at the suggested schedule, if rounds go on all the time.

    Attributes:
        rounds: In them.
        device_up: Bytes of a device that takes part in every round; None: not known.
        device_down: The same.
        bundle: Bytes of the first download, once.
        server_up: Bytes that the server receives: of the updates that are counted.
        server_down: Bytes that it sends, to all devices.
        hours_median: Of work on the device in the middle, by the pilot's times.
        hours_slowest: On the slowest.
    """

    rounds: float
    device_up: float | None
    device_down: float | None
    bundle: int
    server_up: float | None
    server_down: float | None
    hours_median: float | None
    hours_slowest: float | None


class Reason(msgspec.Struct, frozen=True):
    """One line of the verdict. ``passed`` None: the pilot cannot say, which forbids nothing."""

    about: str
    figure: str
    wanted: str
    passed: bool | None


class Findings(msgspec.Struct, frozen=True):
    """Everything."""

    task: str
    go: bool
    reasons: tuple[Reason, ...]
    devices: tuple[DeviceFinding, ...]
    suggestion: Suggestion
    month: Month
    deadline_s: float  # of the pilot's rounds
    rounds: int  # of the pilot that trained and were applied
