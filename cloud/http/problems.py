"""From exceptions to problem documents (RFC 9457): the one place where server faults are logged."""

from __future__ import annotations

import logging
import math

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from cloud import events
from cloud.errors import CloudError, DataFullError
from edge_runtime import wire
from edge_runtime.wire.problems import CONTENT_TYPE

_log = logging.getLogger("cloud.http")


def problem_response(error: wire.WireError) -> web.Response:
    """The answer for a refusal, as the contract's table says."""
    problem = wire.problem_for(error)
    headers = {} if problem.retry_s is None else {"Retry-After": str(math.ceil(problem.retry_s))}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "EmberLoRA"  # RFC 9110 § 11.6.1 wants one
    return web.Response(
        body=wire.encode_problem(error), status=problem.status, content_type=CONTENT_TYPE, headers=headers
    )


def _told(error: CloudError) -> wire.NotNowError:
    """What a device may know of a fault on this side."""
    if isinstance(error, DataFullError):
        return wire.StorageFullError("the aggregator's disk is full, nothing of this was kept; try again later")
    return wire.UnavailableError("the aggregator cannot do this now; try again later")


def problem_middleware(report: events.Report) -> Middleware:
    """A middleware that answers every exception with a problem document and reports it."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except wire.WireError as error:
            refusal = error
        except web.HTTPException as error:  # aiohttp's own: no such route or method
            if error.status < 400:
                raise
            refusal = wire.NotFoundError(f"{request.method} {request.path[:200]}: {error.reason}")
        except CloudError as error:
            report(events.WorkFailed(what=f"{request.method} {request.path}", detail=str(error)))
            return problem_response(_told(error))
        except Exception:  # noqa: BLE001 - the last line before the wire: logged here and nowhere else
            _log.exception("%s %s failed", request.method, request.path)
            return problem_response(wire.UnavailableError("the aggregator failed; try again later"))
        name = wire.problem_for(refusal).name
        report(events.RequestRefused(request.method, request.path[:200], name, str(refusal)))
        return problem_response(refusal)

    return middleware
