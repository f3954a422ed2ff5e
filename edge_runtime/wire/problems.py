"""The one table from error class to what stands on the wire: problem type, HTTP status, when to retry (RFC 9457)."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from edge_runtime.wire import errors as e

CONTENT_TYPE = "application/problem+json"
_PREFIX = "urn:emberlora:problem:"


@dataclass(frozen=True)
class Problem:
    """How one error class is told: type name, HTTP status, and the retry hint in seconds (None: do not retry)."""

    name: str
    status: int
    retry_s: float | None = None


PROBLEMS: dict[type[e.WireError], Problem] = {
    e.PlanFormatError: Problem("plan-format", 422),
    e.PlanSignatureError: Problem("plan-signature", 422),
    e.PlanOrderError: Problem("plan-order", 422),
    e.PlanStaleError: Problem("plan-stale", 422),
    e.PlanKeyError: Problem("plan-key", 422),
    e.EnvelopeError: Problem("envelope", 422),
    e.UpdateFormatError: Problem("update-format", 422),
    e.UpdateDigestError: Problem("update-digest", 400, retry_s=5.0),
    e.UpdateOffsetError: Problem("update-offset", 409, retry_s=0.0),
    e.UpdatePlanError: Problem("update-plan", 422),
    e.UpdateLayoutError: Problem("update-layout", 422),
    e.UpdateValueError: Problem("update-value", 422),
    e.UpdateNormError: Problem("update-norm", 422),
    e.PatchFormatError: Problem("patch-format", 422),
    e.PatchPlanError: Problem("patch-plan", 422),
    e.PatchValueError: Problem("patch-value", 422),
    e.RequestFormatError: Problem("request-format", 400),
    e.RequestTooLargeError: Problem("request-too-large", 413),
    e.SignatureError: Problem("signature", 401),
    e.UnknownDeviceError: Problem("unknown-device", 401),
    e.DeviceRevokedError: Problem("device-revoked", 403),
    e.TokenError: Problem("token", 403),
    e.NotPermittedError: Problem("not-permitted", 403),
    e.NotFoundError: Problem("not-found", 404),
    e.RoundClosedError: Problem("round-closed", 409, retry_s=0.0),
    e.RoundAheadError: Problem("round-ahead", 409, retry_s=60.0),  # until the others have made up for it
    e.UpdateConflictError: Problem("update-conflict", 409),
    e.TaskFinishedError: Problem("task-finished", 410, retry_s=0.0),
    e.UnavailableError: Problem("unavailable", 503, retry_s=5.0),
    e.RateLimitedError: Problem("rate-limited", 429, retry_s=60.0),
    e.StorageFullError: Problem("storage-full", 507, retry_s=60.0),  # somebody has to make room first
}
_BY_TYPE = {_PREFIX + problem.name: error for error, problem in PROBLEMS.items()}


class ProblemDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of an error answer. Unknown members are ignored, as RFC 9457 wants."""

    type: str
    title: str = ""
    status: int = 0
    detail: str = ""
    retry_after_s: float | None = None


def problem_for(error: e.WireError) -> Problem:
    """The row of the table for this error; every concrete class has one."""
    return PROBLEMS[type(error)]


def encode_problem(error: e.WireError) -> bytes:
    """The problem document for an error."""
    problem = problem_for(error)
    title = (type(error).__doc__ or "").strip().rstrip(".")
    detail = str(error).encode("utf-8", "replace").decode()  # a path with undecodable bytes must not break the answer
    return msgspec.json.encode(ProblemDocument(_PREFIX + problem.name, title, problem.status, detail, problem.retry_s))


def decode_problem(body: bytes, *, status: int) -> e.WireError:
    """The error an answer stands for; an answer that is no problem document of ours becomes ``UnavailableError``
    for 5xx and 429 and ``RequestError``'s format class otherwise."""
    try:
        document = msgspec.json.decode(body[:65536], type=ProblemDocument)
        error = _BY_TYPE[document.type]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, RecursionError):
        text = body[:200].decode("utf-8", "replace").strip()
        if status >= 500 or status == 429:
            return e.UnavailableError(f"the server answered {status}: {text}")
        return e.RequestFormatError(f"the server answered {status}: {text}")
    return error(document.detail)
