"""The plan: what the aggregator asks of a device in one round, and its signature.

On the wire a plan is 64 bytes of Ed25519 signature (RFC 8032) followed by JSON. The signature covers
``b"emberlora plan 1\\0"`` and the JSON as sent, so nothing needs to be made canonical to check it. The digest of a plan
is the SHA-256 of all its bytes, signature included.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.wire.deflate import ZLIB, deflate
from edge_runtime.wire.errors import PlanFormatError, PlanOrderError, PlanSignatureError
from edge_runtime.wire.names import is_name
from edge_runtime.wire.quantisation import Quantisation
from edge_runtime.wire.tiers import Tier, tier_problems

SCHEMA = 1
MAX_PLAN_BYTES = 1 << 20
_SIGNATURE_BYTES = 64
_CONTEXT = b"emberlora plan 1\0"
_PERSONAL = (msgspec.UNSET, ("head",), ("B",), ("head", "B"))  # one spelling for one meaning


class _Versioned(msgspec.Struct):
    """Only the schema of a plan: a plan of another schema is told by its number, whatever its other fields are."""

    schema: object = None


Products = Literal["exact", "int8"]
Personal = Literal["head", "B"]


class ModulePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One LoRA module this round: its rank, which factors are trained and sent, and which components of them."""

    name: str
    rank: int
    alive: Literal["", "A", "B", "AB"]
    # Components, rows of A and columns of B, that are trained and sent: rising numbers from 0, fewer than the rank. The
    # others stay in the forward pass as they are. Left out: all, and none of a dead module.
    trained: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET

    @property
    def trained_components(self) -> tuple[int, ...]:
        """Numbers of the components that are trained in the alive factors."""
        return tuple(range(self.rank)) if self.trained is msgspec.UNSET else self.trained

    @property
    def trained_rank(self) -> int:
        """How many components are trained in the alive factors."""
        return self.rank if self.trained is msgspec.UNSET else len(self.trained)


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a device trains. AdamW; its state lives for one round."""

    batch_size: int
    max_tokens: int
    lr_a: float
    lr_b: float
    lr_head: float
    steps: int | None = None  # optimizer steps of every device; None: ``epochs`` passes over its own data
    epochs: int | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    mu: float = 0.0  # FedProx: weight of (mu/2)·|θ − θ_t|², arXiv 1812.06127
    clip_norm: float | None = None  # global gradient norm; None: gradients are not clipped
    # With frozen weights; left out: exact. int8 is faster, its gradients a few per cent off. A plan without it is one
    # that devices from before this field understand.
    products: Literal["int8"] | msgspec.UnsetType = msgspec.UNSET
    # A module that moves less than this share of what all moved at the round's start is trained no longer on this
    # device in this round. Left out: all are trained to the end. Devices from before this field obey such plans.
    local_kill: float | msgspec.UnsetType = msgspec.UNSET
    # The share of its examples that a device trains on, those likely that have most left to teach. Left out: all of
    # them. Devices from before this field obey such plans.
    example_share: float | msgspec.UnsetType = msgspec.UNSET

    @property
    def products_wanted(self) -> Products:
        """``products`` with its default filled in."""
        return self.products or "exact"


class UpdateRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds that make the aggregator's sum exact.

    A value is summed as ``round(value · 2**fraction_bits) · weight`` in int64; the bounds keep the sum of
    ``max_devices`` updates inside 63 bits.
    """

    fraction_bits: int = 32
    max_abs: float = 8.0  # largest absolute change of one parameter in one round
    weight_cap: int = 65_536  # a device's weight is cut to this
    max_devices: int = 1_024
    # Largest L2 norm of a whole change; left out: as large as ``max_abs`` lets it be. Devices from before this field
    # obey plans without it.
    max_norm: float | msgspec.UnsetType = msgspec.UNSET


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module's text.

    ``state`` "measure" asks for sums over the device's examples (:mod:`.measurement`) and trains nothing; "finished"
    names the last adapter, and nothing is trained then either.
    """

    schema: int
    task: str
    round: int
    rounds: int  # planned number of rounds
    state: Literal["measure", "train", "finished"]
    bundle: str  # SHA-256 of the bundle's manifest, hex
    adapter: str  # SHA-256 of the adapter file every device starts from, hex
    adapter_bytes: int
    modules: tuple[ModulePlan, ...]
    head_alive: bool
    training: Training
    update: UpdateRules
    seed: int
    deadline: float  # Unix time in seconds after which the round may close without this device
    round_key: str = ""  # X25519 public key of the round, hex; updates are sealed to it
    min_examples: int = 1  # a device with fewer stays out of the round
    tier: int = 0  # nobody reads it
    # How updates are sent; left out: as float32. Devices from before this field obey such plans.
    quantisation: Quantisation | msgspec.UnsetType = msgspec.UNSET
    # What a device trains beside what is alive, and keeps: the trained head, factor B of every living module. Left out:
    # nothing. Devices from before this field obey such plans.
    personal: tuple[Personal, ...] | msgspec.UnsetType = msgspec.UNSET
    # What weaker devices carry, tier 1 first; left out: all carry everything. The same holds for this one.
    tiers: tuple[Tier, ...] | msgspec.UnsetType = msgspec.UNSET

    @property
    def personal_parts(self) -> tuple[Personal, ...]:
        """``personal`` with its default filled in."""
        return () if self.personal is msgspec.UNSET else self.personal

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every module by name."""
        return {module.name: module.rank for module in self.modules}


@dataclass(frozen=True)
class SignedPlan:
    """A plan as it travels: its bytes, what they say, and their digest in hex."""

    data: bytes
    plan: Plan
    digest: str

    @cached_property
    def deflated(self) -> bytes:
        """The same bytes for a device that reads ``Content-Encoding: deflate``: a plan repeats itself a lot."""
        return deflate(self.data, ZLIB)


def sign_plan(plan: Plan, key: Ed25519PrivateKey) -> SignedPlan:
    """Encode and sign a plan."""
    text = msgspec.json.encode(plan)
    data = key.sign(_CONTEXT + text) + text
    return SignedPlan(data, plan, hashlib.sha256(data).hexdigest())


def open_plan(data: bytes, key: Ed25519PublicKey) -> SignedPlan:
    """Check the signature, then read.

    Raises:
        PlanSignatureError: not signed by ``key``.
        PlanFormatError: too large, not JSON of this schema, or self-contradicting.
    """
    if not _SIGNATURE_BYTES < len(data) <= MAX_PLAN_BYTES:
        raise PlanFormatError(
            f"plan: length: expected {_SIGNATURE_BYTES + 1} to {MAX_PLAN_BYTES} bytes, got {len(data)}"
        )
    signature, text = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
    try:
        key.verify(signature, _CONTEXT + text)
    except InvalidSignature as error:
        raise PlanSignatureError("plan: not signed by the aggregator this device enrolled with") from error
    return SignedPlan(data, _parse_plan(text), hashlib.sha256(data).hexdigest())


def check_order(plan: Plan, *, task: str, last_round: int) -> None:
    """A device obeys only its own task's plans, in rising order; the current round's plan may come again.

    Raises:
        PlanOrderError: another task, or a round before ``last_round``.
    """
    if plan.task != task:
        raise PlanOrderError(f"plan: another task: expected {task!r}, got {plan.task!r}")
    if plan.round < last_round:
        raise PlanOrderError(
            f"plan: older than one already seen: expected round {last_round} or later, got {plan.round}"
        )


def _parse_plan(text: bytes) -> Plan:
    try:
        version = msgspec.json.decode(text, type=_Versioned).schema
        if version != SCHEMA:
            behind = "aggregator" if isinstance(version, int) and version < SCHEMA else "device"
            raise PlanFormatError(f"plan: schema: expected {SCHEMA}, got {version!r:.40}: upgrade the {behind}")
        plan = msgspec.json.decode(text, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanFormatError(f"plan: not a plan of schema {SCHEMA}: {str(error)[:200]}") from error
    problems = plan_problems(plan)
    if problems:
        raise PlanFormatError("plan: contradicts itself: " + "; ".join(problems))
    return plan


def plan_problems(plan: Plan) -> list[str]:
    """Every way in which a plan contradicts itself; empty for a good one."""
    training, rules = plan.training, plan.update
    rates = (training.lr_a, training.lr_b, training.lr_head, training.weight_decay, training.mu, training.eps)
    amounts = (training.steps, training.epochs)
    fields = {
        "task must be a name": not is_name(plan.task),
        "round must be from 0 to 2**32 - 1": not 0 <= plan.round < 2**32,  # four bytes in an update
        "seed and adapter_bytes must be from 0 to 2**63 - 1": not all(
            0 <= number < 2**63 for number in (plan.seed, plan.adapter_bytes)
        ),
        "min_examples must be at least 1": plan.min_examples < 1,  # no update may weigh nothing
        "a module stands twice": len({module.name for module in plan.modules}) != len(plan.modules),
        "ranks must be 1 to 1024": any(not 1 <= module.rank <= 1024 for module in plan.modules),
        "trained components must be rising numbers of some of an alive module's": not all(
            map(_trains_some_or_all, plan.modules)
        ),
        "exactly one of steps and epochs must be given": sum(amount is not None for amount in amounts) != 1,
        "steps, epochs, batch_size and max_tokens must be positive": any(
            amount is not None and amount < 1 for amount in (*amounts, training.batch_size, training.max_tokens)
        ),
        "learning rates, weight decay, mu and eps must be finite and not negative": any(
            not (math.isfinite(rate) and rate >= 0) for rate in rates
        ),
        "betas must be at least 0 and below 1": any(not 0 <= beta < 1 for beta in (training.beta1, training.beta2)),
        "clip_norm must be positive": training.clip_norm is not None and not training.clip_norm > 0,
        "local_kill must be more than 0 and at most 1": not (
            training.local_kill is msgspec.UNSET or 0 < training.local_kill <= 1
        ),
        "example_share must be more than 0 and less than 1": not (
            training.example_share is msgspec.UNSET or 0 < training.example_share < 1
        ),
        "update bounds do not fit 63 bits": not _sum_fits(rules),
        "max_norm must be more than 0 and finite, and is for changes, not for what is measured": not (
            rules.max_norm is msgspec.UNSET or (0 < rules.max_norm < math.inf and plan.state != "measure")
        ),
        "a plan that is answered needs a round key of 64 hex digits": (
            plan.state != "finished" and not _is_digest(plan.round_key)
        ),
        "a measuring plan trains nothing, quantises nothing and weighs every device 1": (
            plan.state == "measure" and (_trains(plan) or bool(plan.quantisation) or rules.weight_cap != 1)
        ),
        "personal must be head, B, or both in this order": plan.personal not in _PERSONAL,
        "what is personal must not be sent": _sends_personal(plan),
        "digests must be 64 hex digits": not (_is_digest(plan.bundle) and _is_digest(plan.adapter)),
        "only a plan that trains has tiers": plan.state != "train" and plan.tiers is not msgspec.UNSET,
    }
    problems = [message for message, broken in fields.items() if broken] + _quantisation_problems(plan)
    return problems if plan.tiers is msgspec.UNSET else [*problems, *tier_problems(plan.tiers)]


def _quantisation_problems(plan: Plan) -> list[str]:
    if not plan.quantisation:
        return []
    ranges, density = plan.quantisation.ranges, plan.quantisation.density
    rules = {
        "ranges must be more than 0 and at most max_abs": any(not 0 < r <= plan.update.max_abs for r in ranges),
        "density must be more than 0 and less than 1": density is not msgspec.UNSET and not 0 < density < 1,
    }
    return [message for message, broken in rules.items() if broken]


def _trains_some_or_all(module: ModulePlan) -> bool:
    """One spelling for one meaning: all are never listed, and none is a dead module."""
    listed = module.trained
    if listed is msgspec.UNSET:
        return True
    return bool(
        module.alive
        and 0 < len(listed) < module.rank
        and all(low < high for low, high in pairwise((-1, *listed, module.rank)))
    )


def _trains(plan: Plan) -> bool:
    """Whether anything is alive or personal."""
    return plan.head_alive or bool(plan.personal) or any(module.alive for module in plan.modules)


def _sends_personal(plan: Plan) -> bool:
    """Whether something that is to stay on the device is alive, and so in an update."""
    parts = plan.personal_parts
    return ("head" in parts and plan.head_alive) or ("B" in parts and any("B" in m.alive for m in plan.modules))


def _is_digest(value: str) -> bool:
    return len(value) == 64 and set(value) <= set("0123456789abcdef")


def _sum_fits(rules: UpdateRules) -> bool:
    if rules.weight_cap < 1 or rules.max_devices < 1:
        return False
    if not (0 < rules.max_abs < 2**63 and 0 < rules.fraction_bits < 63):  # also keeps the product below a float's range
        return False
    return (int(rules.max_abs * 2**rules.fraction_bits) + 1) * rules.weight_cap * rules.max_devices < 2**63
