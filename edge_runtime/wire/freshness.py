"""That a plan is the one in force now: the answer it comes in is signed anew, for the request that asked.

A plan's own signature says who made it and not when, and a date in it would need right clocks on boards that have none,
and a new signature whenever a round waits longer than was thought. So the aggregator signs, with the key of the plans,
that this plan answers this request: device, target and nonce. Whoever kept an old plan cannot give it to a device
again, whatever its clock says, and a plan is obeyed only as the answer to a request that was just made.
"""

from __future__ import annotations

import base64

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.wire.errors import PlanStaleError
from edge_runtime.wire.requests import SignedRequest

PLAN_ANSWER = "EmberLoRA-Plan-Answer"  # header of an answer with a plan


def sign_answer(digest: str, request: SignedRequest, key: Ed25519PrivateKey) -> str:
    """The header's value: that the plan with this digest, hex, answers this request; ``key`` signs plans."""
    return base64.b64encode(key.sign(_text(digest, request))).decode()


def check_answer(header: str | None, *, digest: str, request: SignedRequest, key: Ed25519PublicKey) -> None:
    """Demand that a plan was given as the answer to this request.

    Args:
        header: Value of ``PLAN_ANSWER``; None where there was none.
        digest: Of the plan that came, hex.
        request: What was asked.
        key: Of the aggregator's plans.

    Raises:
        PlanStaleError: it was not.
    """
    if header is None:
        raise PlanStaleError(
            f"plan: the answer does not say that it is in force now: expected the header {PLAN_ANSWER}: the aggregator "
            "is of an older version and has to be upgraded, or an old answer is being given again"
        )
    try:
        key.verify(base64.b64decode(header, validate=True), _text(digest, request))
    except (ValueError, InvalidSignature) as error:
        raise PlanStaleError(
            f"plan: not made for this request: expected an answer to {request.nonce[:12]}: an old one is given again"
        ) from error


def _text(digest: str, request: SignedRequest) -> bytes:
    return f"emberlora plan answer 1\n{request.device}\n{request.target}\n{request.nonce}\n{digest}\n".encode()
