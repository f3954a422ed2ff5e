"""What a run found: the fields of ``report.json``, and the bounds its figures must keep."""

from __future__ import annotations

import msgspec

from cloud.planlog import RoundLog

MIN_AFTER = 0.80  # accuracy of the published adapter
MAX_BELOW_CENTRAL = 0.03  # what not pooling the data may cost
MAX_PEFT_GAP = 0.005  # between the devices' engine and torch with peft


class Report(msgspec.Struct, frozen=True):
    """One run. Metrics are accuracy (0 to 1) or mean loss (nats); paths are relative to the report's folder."""

    model: str
    task: str
    devices: int
    rounds: int
    metric: str
    before: float  # of the exported adapter, on the devices
    after: float  # of the published adapter, on the devices
    central: float  # trained on the pooled texts, as many steps as all devices together
    peft_after: float  # of the published adapter, by torch and peft
    tfidf: float | None
    bytes_up: int
    bytes_down: int
    bytes_full_fedavg: int  # every parameter as float32, both ways, every device and round
    run_s: float
    round_s: tuple[float, ...]
    edge_peak_private_mb: tuple[float, ...]
    edge_peak_rss_mb: tuple[float, ...]
    adapter: str
    bundle_digest: str
    # More than was asked for, for the page and for comparing runs.
    curve: tuple[float, ...] = ()  # metric on the devices before every round, and after the last
    round_bytes_up: tuple[int, ...] = ()
    round_bytes_down: tuple[int, ...] = ()  # bundle and adapters, without plans
    edge_train_s: tuple[float, ...] = ()  # of one round, the last
    edge_examples: dict[str, dict[str, int]] = {}  # training texts by device and package
    train_examples: int = 0
    heldout_examples: int = 0
    parameters: int = 0
    bundle_bytes: int = 0
    local_steps: int = 0
    seed: int = 0
    quick: bool = False
    phase_s: dict[str, float] = {}
    versions: dict[str, str] = {}
    plans: tuple[RoundLog, ...] = ()  # as `emberlora cloud plans --json` prints them


def misses(report: Report) -> list[str]:
    """Every figure outside its bounds, in words; empty for a good run."""
    rules = {
        f"the devices' figure {report.after:.4f} and peft's {report.peft_after:.4f} differ by more than "
        f"{MAX_PEFT_GAP}": abs(report.after - report.peft_after) > MAX_PEFT_GAP,
        f"after: expected at least {MIN_AFTER}, got {report.after:.4f}": report.metric == "accuracy"
        and report.after < MIN_AFTER,
        f"after: expected within {MAX_BELOW_CENTRAL} of central {report.central:.4f}, got {report.after:.4f}": (
            report.metric == "accuracy" and report.after < report.central - MAX_BELOW_CENTRAL
        ),
        f"after: expected a loss below {report.before:.4f}, got {report.after:.4f}": report.metric == "loss"
        and report.after >= report.before,
    }
    return [message for message, broken in rules.items() if broken]


def cumulated(amounts: tuple[int, ...]) -> list[int]:
    """Running sums."""
    sums, total = [], 0
    for amount in amounts:
        total += amount
        sums.append(total)
    return sums
