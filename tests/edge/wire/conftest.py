"""One plan, one layout and one update with fixed keys; the golden bytes of ``test_wire_golden.py`` are theirs."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edge_runtime.wire import (
    EnvelopeContext,
    Layout,
    LocalMetrics,
    ModulePlan,
    Plan,
    SignedPlan,
    SignedRequest,
    Training,
    Update,
    UpdateRules,
    layout_of,
    sign_plan,
)

DEVICE = "pi-4"


@pytest.fixture(scope="session")
def signing_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(scope="session")
def round_key() -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes(range(32, 64)))


@pytest.fixture(scope="session")
def plan(round_key: X25519PrivateKey) -> Plan:
    return Plan(
        schema=1,
        task="sst2",
        round=7,
        rounds=20,
        state="train",
        bundle="b0" * 32,
        adapter="ad" * 32,
        adapter_bytes=1234,
        modules=(ModulePlan("layer.0.query", 2, "AB"), ModulePlan("layer.1.query", 1, "B")),
        head_alive=True,
        training=Training(batch_size=8, max_tokens=128, lr_a=2e-4, lr_b=1e-3, lr_head=1e-3, epochs=1),
        update=UpdateRules(),
        seed=42,
        deadline=1.8e9,
        round_key=round_key.public_key().public_bytes_raw().hex(),
    )


@pytest.fixture(scope="session")
def signed(plan: Plan, signing_key: Ed25519PrivateKey) -> SignedPlan:
    return sign_plan(plan, signing_key)


@pytest.fixture(scope="session")
def layout(plan: Plan) -> Layout:
    features = {"layer.0.query": (3, 2), "layer.1.query": (3, 2)}
    return layout_of(plan.modules, features, {"classifier.bias": (2,)})


@pytest.fixture(scope="session")
def update() -> Update:
    metrics = LocalMetrics(38, 100, 61, 0.6875, 0.5, 0.625, 12.5, None, 640.0)
    return Update(np.arange(14, dtype=np.float32) / 4 - 1, 300, metrics)


@pytest.fixture(scope="session")
def context(signed: SignedPlan) -> EnvelopeContext:
    return EnvelopeContext.of(signed, DEVICE)


@pytest.fixture(scope="session")
def request_() -> SignedRequest:
    return SignedRequest(
        device=DEVICE,
        method="PUT",
        target="/v1/tasks/sst2/rounds/7/updates/pi-4",
        body_digest="2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",  # of b"x"
        time=1_800_000_000,
        nonce=bytes(range(16)).hex(),
    )
