"""In place of the training child: ``python -m tests.crash.child NUMBER FOLDER``, the job on standard input.

It checks the job as the real one does and speaks as it does, but what it contributes is one-hot: a value at the index
of its device, 0 elsewhere, with the weight of its device. No two trainings have the same value, so the sum shows which
of them were counted, with which weight, and how often.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_runtime.bundle import open_bundle
from edge_runtime.training.held import end_with_parent, read_job
from edge_runtime.training.job import Done, Event, Stepped, TrainingJob
from edge_runtime.training.round import write_frame
from edge_runtime.wire import LocalMetrics, Update, encode_update, open_plan, tier_layouts
from tests.crash.record import fresh_number, note

WEIGHTS = {"one": 2, "two": 8}
STEPS, STEP_S = 2, 0.05
_VALUES = 1024  # by so many a scenario trains at most


def value_of(number: int) -> float:
    """What training ``number`` contributes; exact in float32 and in the plan's fixed point."""
    return 1.0 + number % _VALUES / _VALUES


def main(index: int, folder: Path, job: TrainingJob) -> None:
    device = list(WEIGHTS)[index]
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(job.plan_key))
    signed = open_plan(Path(job.plan).read_bytes(), key)
    plan = signed.plan
    bundle = open_bundle(Path(job.bundle), expected_digest=plan.bundle, verify=False)
    number = fresh_number(folder)
    seen = folder / f"seen-{number}.safetensors"
    shutil.copyfile(job.adapter, seen)
    note(folder, "seen", device, round=plan.round, file=seen.name)
    for step in range(1, STEPS + 1):
        say(Stepped(step, STEPS, 2.0))
        time.sleep(STEP_S)
    layout = tier_layouts(plan, features=bundle.manifest.features, places={}, head={})[0]
    values = np.zeros(layout.count, np.float32)
    values[index] = value_of(number)
    update = Update(values, WEIGHTS[device], LocalMetrics(steps=STEPS, loss_start=2.0, loss_end=2.0, seconds=0.1))
    frame = encode_update(update, signed_plan=signed, layout=layout)
    digest = hashlib.sha256(frame).hexdigest()
    note(folder, "trained", device, round=plan.round, value=value_of(number), frame=digest)
    write_frame(job, frame)
    say(Done(update.weight, update.metrics))


def say(event: Event) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    given = msgspec.json.decode(read_job(), type=TrainingJob)
    end_with_parent()
    main(int(sys.argv[1]), Path(sys.argv[2]), given)
