"""Everything the two sides of the wire may say no to, each with a name.

WireError
├── PlanError                   a plan is not to be obeyed (device: do nothing, ask again)
│   ├── PlanFormatError         not a plan of this schema, or it contradicts itself
│   ├── PlanSignatureError      not signed by the key this device trusts
│   ├── PlanOrderError          another task's plan, or an older round than one already seen
│   ├── PlanStaleError          not given as the answer to the request that asked
│   └── PlanKeyError            no statements lead from the key this device trusts to another
├── UpdateError                 an update is not to be counted (device: obey, do not resend)
│   ├── EnvelopeError           cannot be opened: wrong key, wrong context, or changed bytes
│   ├── UpdateFormatError       magic, version or length are wrong
│   ├── UpdateDigestError       the bytes are not those the sender named (device: send them again)
│   ├── UpdateOffsetError       a part begins elsewhere than what is there ends (device: ask, go on from there)
│   ├── UpdatePlanError         made for another round or another plan
│   ├── UpdateLayoutError       other blocks or shapes than the plan's
│   ├── UpdateValueError        NaN, infinity, a value or weight outside the plan's bounds
│   └── UpdateNormError         larger as a whole than the plan allows
├── PatchError                  a patch of the adapter is not to be applied (device: fetch the whole adapter)
│   ├── PatchFormatError        magic, version, bits, marks or length are wrong
│   ├── PatchPlanError          from another round than asked, or to another adapter than the plan's
│   └── PatchValueError         NaN, infinity, a scale or code that is none
├── RequestError                the request itself is refused (device: obey, tell the user)
│   ├── RequestFormatError      malformed headers, body or names
│   ├── RequestTooLargeError    body longer than allowed
│   ├── SignatureError          not signed by the sender's key, too old, or seen before
│   ├── UnknownDeviceError      no such device, or one that left
│   ├── DeviceRevokedError      the operator refuses this device's key for good
│   ├── TokenError              enrolment token unknown, used, expired, or for another name
│   ├── NotPermittedError       signed by a known key that may not do this
│   └── NotFoundError           no such resource
├── RoundError                  the round's state forbids it (device: follow the retry hint)
│   ├── RoundClosedError        this round takes no more updates; ask for the next plan
│   ├── RoundAheadError         the device is done with a round that the aggregator has not come to
│   ├── UpdateConflictError     another update of this device is already counted in this round
│   └── TaskFinishedError       the task has ended; the last adapter is published
└── NotNowError                 the aggregator cannot do this now (device: retry later)
    ├── UnavailableError        it ends, is overloaded, or failed
    ├── RateLimitedError        this device asks too often
    └── StorageFullError        its disk is full; nothing of the request was kept
"""


class WireError(Exception):
    """Base of all; never raised itself."""


class PlanError(WireError):
    """A plan is not to be obeyed."""


class PlanFormatError(PlanError):
    """Not a plan of this schema, or it contradicts itself."""


class PlanSignatureError(PlanError):
    """Not signed by the key this device trusts."""


class PlanOrderError(PlanError):
    """Another task's plan, or an older round than one already seen."""


class PlanStaleError(PlanError):
    """Not given as the answer to the request that asked."""


class PlanKeyError(PlanError):
    """No chain of statements leads from the key that is trusted to another."""


class UpdateError(WireError):
    """An update is not to be counted."""


class EnvelopeError(UpdateError):
    """A sealed update cannot be opened."""


class UpdateFormatError(UpdateError):
    """Magic, version or length of an update are wrong."""


class UpdateDigestError(UpdateError):
    """The bytes are not those the sender named."""


class UpdateOffsetError(UpdateError):
    """A part of an update begins elsewhere than what is there ends."""


class UpdatePlanError(UpdateError):
    """Made for another round or another plan."""


class UpdateLayoutError(UpdateError):
    """Other blocks or shapes than the plan's."""


class UpdateValueError(UpdateError):
    """NaN, infinity, or a value or weight outside the plan's bounds."""


class UpdateNormError(UpdateError):
    """The L2 norm of the change is over the plan's bound."""


class PatchError(WireError):
    """A patch of the adapter is not to be applied."""


class PatchFormatError(PatchError):
    """Magic, version, bits, marks or length of a patch are wrong."""


class PatchPlanError(PatchError):
    """From another round than asked, or to another adapter than the plan's."""


class PatchValueError(PatchError):
    """NaN, infinity, or a scale or code that is none."""


class RequestError(WireError):
    """The request itself is refused."""


class RequestFormatError(RequestError):
    """Malformed headers, body or names."""


class RequestTooLargeError(RequestError):
    """A body longer than allowed."""


class SignatureError(RequestError):
    """Not signed by the sender's key, too old, or seen before."""


class UnknownDeviceError(RequestError):
    """No such device, or one that left."""


class DeviceRevokedError(RequestError):
    """The operator has revoked this device: its key is refused for good."""


class TokenError(RequestError):
    """An enrolment token that is unknown, used, expired, or made for another name."""


class NotPermittedError(RequestError):
    """Signed by a known key that may not do this."""


class NotFoundError(RequestError):
    """No such resource."""


class RoundError(WireError):
    """The state of the round forbids it."""


class RoundClosedError(RoundError):
    """This round takes no more updates."""


class RoundAheadError(RoundError):
    """The device is done with a round that the aggregator has not come to."""


class UpdateConflictError(RoundError):
    """Another update of this device is already counted in this round."""


class TaskFinishedError(RoundError):
    """The task has ended; the last adapter is published."""


class NotNowError(WireError):
    """The aggregator cannot do this now."""


class UnavailableError(NotNowError):
    """The aggregator cannot answer now."""


class RateLimitedError(NotNowError):
    """This device has sent too many requests."""


class StorageFullError(NotNowError):
    """The aggregator's disk is full."""
