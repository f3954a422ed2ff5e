"""The HTTP resources by name; every path is built and matched from here, on both sides.

======  =========================================================  ==================================================
method  path                                                       meaning
======  =========================================================  ==================================================
POST    /v1/enrolments                                             a device becomes known (not signed: it has a token)
DELETE  /v1/devices/{device}                                       a device leaves
PUT     /v1/devices/{device}/key                                   a device changes its key
PUT     /v1/tasks/{task}/devices/{device}/capability               what a device measured of itself
GET     /v1/tasks/{task}/plan?after=N&wait=S                       long poll: the first plan of a round after N
GET     /v1/tasks/{task}/plan-keys                                 the changes of the key that signs plans
GET     /v1/blobs/{digest}                                         bundle files and adapters, with ``Range``
GET     /v1/tasks/{task}/rounds/{round}/adapter?since=N&reads=V    a patch to the plan's adapter from that of round N
PUT     /v1/tasks/{task}/rounds/{round}/updates/{device}           a sealed update
GET     /v1/…/updates/{device}/parts/{digest}                      how much of one is there that comes in parts
PATCH   /v1/…/updates/{device}/parts/{digest}?offset=N&of=M        the next part of one
GET     /v1/operator/status                                        the operator's commands
POST    /v1/operator/tokens, …/revocations, …/plan-key, …/stop      the same
GET     /v1/health                                                 alive and serving (not signed)
======  =========================================================  ==================================================
"""

from __future__ import annotations

from edge_runtime.wire.patch_frame import VERSION

ENROLMENTS = "/v1/enrolments"
DEVICE = "/v1/devices/{device}"
DEVICE_KEY = "/v1/devices/{device}/key"
CAPABILITY = "/v1/tasks/{task}/devices/{device}/capability"
PLAN = "/v1/tasks/{task}/plan"
PLAN_KEYS = "/v1/tasks/{task}/plan-keys"
BLOB = "/v1/blobs/{digest}"
PATCH = "/v1/tasks/{task}/rounds/{round}/adapter"
UPDATE = "/v1/tasks/{task}/rounds/{round}/updates/{device}"
UPDATE_PARTS = UPDATE + "/parts/{digest}"
OPERATOR_STATUS = "/v1/operator/status"
OPERATOR_TOKENS = "/v1/operator/tokens"
OPERATOR_REVOCATIONS = "/v1/operator/revocations"
OPERATOR_PLAN_KEY = "/v1/operator/plan-key"
OPERATOR_STOP = "/v1/operator/stop"
HEALTH = "/v1/health"

MAX_WAIT_S = 60  # longest a plan request may be held
MAX_PART_BYTES = 1 << 20  # a server holds a part in memory while it comes


def plan_target(task: str, *, after: int, wait_s: int) -> str:
    """Target of the long poll; ``after`` is the last round this device is done with, -1 for none."""
    return f"{PLAN.format(task=task)}?after={after}&wait={wait_s}"


def patch_target(task: str, round_: int, *, since: int) -> str:
    """Target of a patch from the adapter of round ``since``, -1 for the bundle's own, to that of ``round_``."""
    return f"{PATCH.format(task=task, round=round_)}?since={since}&reads={VERSION}"


def capability_path(task: str, device: str) -> str:
    """Path of what a device measured of itself."""
    return CAPABILITY.format(task=task, device=device)


def update_path(task: str, round_: int, device: str) -> str:
    """Path of one device's update to one round."""
    return UPDATE.format(task=task, round=round_, device=device)


def parts_path(task: str, round_: int, device: str, digest: str) -> str:
    """Path of one device's update to one round that is sent in parts; ``digest`` is that of the whole, hex."""
    return UPDATE_PARTS.format(task=task, round=round_, device=device, digest=digest)


def part_target(path: str, *, offset: int, of: int) -> str:
    """Target of the part that begins after ``offset`` bytes of an update of ``of`` bytes."""
    return f"{path}?offset={offset}&of={of}"
