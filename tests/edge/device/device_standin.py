"""A stand-in for the training child that trains nothing but speaks as the real one does.

As the real one it gets its job on standard input; what stands in the first data file says how it behaves.
:func:`make_frame` is shared with the trainer that tests run in their own process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_runtime.at_rest import Vault
from edge_runtime.bundle import encode_tensors, map_tensors, open_bundle
from edge_runtime.training.carried import read_carried
from edge_runtime.training.job import (
    PERSONAL_NAME,
    RESIDUAL_NAME,
    Done,
    Failed,
    Notice,
    Stepped,
    TrainingJob,
)
from edge_runtime.training.quantise import quantise
from edge_runtime.training.round import write_frame
from edge_runtime.wire import LocalMetrics, Update, encode_update, open_plan, tier_layouts

WEIGHT = 5


def make_frame(job: TrainingJob, weight: int = WEIGHT, *, rng: np.random.Generator | None = None) -> Done:
    """Verify what the parent prepared as the real child does, and write a frame of constant change.

    Where the plan quantises, it is rounded as the real child does, and what is left is written beside it. Where B is
    personal, the device's own grows by 0.5, and is written, too. With ``rng`` nothing is constant.
    """
    vault = Vault(job.grant)
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(job.plan_key))
    signed = open_plan(Path(job.plan).read_bytes(), key)
    bundle = open_bundle(Path(job.bundle), expected_digest=signed.plan.bundle)
    assert Path(job.adapter).stem == signed.plan.adapter
    manifest = bundle.manifest
    layout = tier_layouts(signed.plan, features=manifest.features, places=manifest.places, head={})[job.tier]
    values = np.full(layout.count, 0.25 * (signed.plan.round + 1), dtype=np.float32)
    if rng is not None:
        values = rng.normal(size=layout.count).astype(np.float32)
    if layout.quantisation is not None:
        assert job.residual is not None
        rounding = np.random.default_rng(job.rounding_seed)
        found = quantise(values, layout, read_carried(vault, "residual", Path(job.residual)), rng=rounding)
        data = vault.encrypt(encode_tensors(found.residual), "residual", round_=job.round)
        (Path(job.out) / RESIDUAL_NAME).write_bytes(data)
        values = found.values
    if "B" in signed.plan.personal_parts:
        assert job.personal is not None
        own = read_carried(vault, "personal", Path(job.personal)) or map_tensors(Path(job.adapter))
        own = {name: array + np.float32(0.5) for name, array in own.items() if name.endswith(".lora_b")}
        if rng is not None:
            own = {name: rng.normal(size=array.shape).astype(np.float32) for name, array in own.items()}
        data = vault.encrypt(encode_tensors(own), "personal", round_=job.round)
        (Path(job.out) / PERSONAL_NAME).write_bytes(data)
    metrics = LocalMetrics(steps=3, loss_start=2.0, loss_end=1.0, seconds=0.5, tier=job.tier)
    frame = encode_update(Update(values, max(weight, 1), metrics), signed_plan=signed, layout=layout)
    write_frame(job, frame)
    return Done(weight, metrics)


def say(event: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


def hang(data: Path, *, stubborn: bool) -> None:
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    data.with_name("pid").write_text(str(os.getpid()))
    time.sleep(60)


def main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=TrainingJob)
    data = Path(job.data[0])
    how = data.read_text().strip()
    with data.with_name("calls").open("a") as calls:
        calls.write(how + "\n")
    if how == "bad line":
        say(Failed(f"{data}: line 3: no text", input=True))
        return 2
    if how == "broken":
        say(Failed("EngineError: no graph", input=False))
        return 1
    if how == "crash":
        sys.stderr.write("noise\n" * 5000 + "out of luck\n")
        return 3
    if how == "junk":
        sys.stdout.write("hello\n")
    if how in ("hang", "stubborn"):
        hang(data, stubborn=how == "stubborn")
    if how == "long line":
        sys.stdout.write("x" * (3 << 20))
    if how == "no frame":
        say(Done(WEIGHT, LocalMetrics()))
        return 0
    say(Notice("two texts were cut"))
    for step in (1, 2, 3):
        say(Stepped(step, 3, 2.0 / step))
    say(make_frame(job))
    return 0


if __name__ == "__main__":
    sys.exit(main())
