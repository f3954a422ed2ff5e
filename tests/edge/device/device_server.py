"""A small honest aggregator for tests: the resources of the wire, kept in memory, with faults one can ask for.

It verifies what an aggregator verifies (signatures, nonces, tokens, digests, layouts, envelopes) with the wire's own
functions, sums with numpy, and opens the next round when ``wanted`` updates are counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qs

import msgspec
import numpy as np
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from device_bundle import FEATURES, MODULES, PLACES, RANK, TinyBundle

from edge_runtime import wire
from edge_runtime.bundle import encode_tensors, parse_tensors
from edge_runtime.wire import resources
from edge_runtime.wire.patch import change_of
from edge_runtime.wire.patch_frame import component_counts
from edge_runtime.wire.problems import CONTENT_TYPE

TASK = "docs"


@dataclass
class Faults:
    """What goes wrong on purpose."""

    away: bool = False  # every connection is dropped
    away_for: set[str] = field(default_factory=set)  # methods whose connections are dropped
    unavailable_s: float | None = None  # with this hint
    unavailable: type[wire.NotNowError] = wire.UnavailableError
    cut: dict[str, int] = field(default_factory=dict)  # blob digest -> bytes before the connection breaks, once
    ignore_range: bool = False
    swap_blob: dict[str, bytes] = field(default_factory=dict)  # blob digest -> other bytes
    no_capability: bool = False  # as an aggregator from before devices measured themselves
    no_patches: bool = False  # as an aggregator from before there were any
    swap_patch: Callable[[bytes], bytes] | None = None  # other bytes in place of a patch
    cut_patches: int = 0  # so many patches break after their first bytes
    behind: bool = False  # as an aggregator that was restored from an older backup
    empty: bool = False  # polls are answered at once: nothing new, come back in 0 s
    plan: bytes | None = None  # sent in place of the plan in force
    proof: str | None = None  # sent in place of what shows that the plan is in force; empty: nothing is
    close_before_upload: bool = False  # the round closes just before an update arrives
    deaf: int = 0  # so many uploads are counted and their answers dropped


class Aggregator:
    """See the module's text."""

    def __init__(self, bundle: TinyBundle, *, rounds: int = 2, wanted: int = 1, min_examples: int = 1) -> None:
        self.bundle, self.rounds, self.wanted, self.min_examples = bundle, rounds, wanted, min_examples
        self.quantisation: wire.Quantisation | None = None  # of the plans to come
        self.personal: tuple[wire.Personal, ...] = ()  # the same
        self.tiers: tuple[wire.Tier, ...] = ()  # of the plans to come; all of a round's devices then carry the same
        self.key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        self.next_key: Ed25519PrivateKey | None = None  # of the next plan, if another
        self.statements: list[wire.KeyStatement] | None = None  # None: as an aggregator from before there were any
        self.faults = Faults()
        self.blobs: dict[str, bytes] = dict(bundle.blobs)
        self.adapter = self.store(bundle.adapter)
        self.tokens: dict[str, tuple[str, str | None]] = {}  # secret -> (name, key that used it)
        self.devices: dict[str, str] = {}
        self.revoked: set[str] = set()
        self.retired: set[str] = set()  # keys that were replaced
        self.told: list[wire.Capability] = []
        self.nonces: set[str] = set()
        self.proofs: list[str] = []  # of plans that were sent
        self.plans: list[wire.SignedPlan] = []
        self.received: list[tuple[int, str, bytes]] = []  # every upload that arrived whole: round, device, bytes
        self.counted: dict[int, dict[str, tuple[wire.UpdateReceipt, wire.Update]]] = {}
        self.requests: list[tuple[str, str, str | None, int]] = []  # method, path, range, bytes of blob sent
        self.news = asyncio.Event()
        self.url = ""
        self._open()

    # -- what an operator does ------------------------------------------------------------------------------------

    def token(self, name: str) -> wire.Token:
        secret = os.urandom(16).hex()
        self.tokens[secret] = (name, None)
        return wire.Token(secret, hashlib.sha256(self.key.public_key().public_bytes_raw()).hexdigest())

    def store(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def close_round(self) -> None:
        """Apply what is counted and open the next round."""
        updates = [update for _, update in self.counted.get(self.plans[-1].plan.round, {}).values()]
        if updates:
            weights = [update.weight for update in updates]
            mean = np.average([update.values for update in updates], axis=0, weights=weights).astype(np.float32)
            tensors = {name: array.copy() for name, array in parse_tensors(self.blobs[self.adapter], what="").items()}
            layout = self.layouts[updates[0].metrics.tier]
            for name, change in layout.split(mean).items():
                tensors[name][layout.where(name)] += change
            self.adapter = self.store(encode_tensors(tensors))
        self._open()

    def next_plan(self, **changes: object) -> wire.Plan:
        round_ = len(self.plans)
        self.round_key = X25519PrivateKey.generate()
        plan = wire.Plan(
            schema=1,
            task=TASK,
            round=round_,
            rounds=self.rounds,
            state="train" if round_ < self.rounds else "finished",
            bundle=self.bundle.digest,
            adapter=self.adapter,
            adapter_bytes=len(self.blobs[self.adapter]),
            modules=tuple(wire.ModulePlan(name, RANK, "A" if "B" in self.personal else "B") for name in MODULES),
            head_alive=False,
            training=wire.Training(batch_size=2, max_tokens=8, lr_a=0.1, lr_b=0.1, lr_head=0.1, steps=3),
            update=wire.UpdateRules(max_devices=8),
            seed=7,
            deadline=time.time() + 600,
            round_key=self.round_key.public_key().public_bytes_raw().hex(),
            min_examples=self.min_examples,
            quantisation=self.quantisation or msgspec.UNSET,
            personal=self.personal or msgspec.UNSET,
            tiers=self.tiers if self.tiers and round_ < self.rounds else msgspec.UNSET,
        )
        return msgspec.structs.replace(plan, **changes)

    @property
    def layouts(self) -> tuple[wire.Layout, ...]:
        return wire.tier_layouts(self.plans[-1].plan, features=FEATURES, places=PLACES, head={})

    def _open(self) -> None:
        self.key = self.next_key or self.key
        self.plans.append(wire.sign_plan(self.next_plan(), self.key))
        self.news.set()
        self.news = asyncio.Event()

    # -- what a device sees ---------------------------------------------------------------------------------------

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._middleware], client_max_size=64 << 20)
        app.router.add_post(resources.ENROLMENTS, self._enrol)
        app.router.add_delete(resources.DEVICE, self._leave)
        app.router.add_put(resources.DEVICE_KEY, self._rekey)
        app.router.add_put(resources.CAPABILITY, self._tell)
        app.router.add_get(resources.PLAN, self._plan)
        app.router.add_get(resources.PLAN_KEYS, self._plan_keys)
        app.router.add_get(resources.BLOB, self._blob)
        app.router.add_get(resources.PATCH, self._patch)
        app.router.add_put(resources.UPDATE, self._update)
        return app

    @web.middleware
    async def _middleware(self, request: web.Request, handler: object) -> web.StreamResponse:
        self.requests.append((request.method, request.path, request.headers.get("Range"), 0))
        if self.faults.away or request.method in self.faults.away_for:
            return self._drop(request)
        try:
            if self.faults.unavailable_s is not None:
                raise self.faults.unavailable("busy")
            return await self._found(request, handler)
        except wire.WireError as error:
            body = wire.encode_problem(error)
            if isinstance(error, wire.NotNowError):
                document = msgspec.json.decode(body)
                body = msgspec.json.encode(document | {"retry_after_s": self.faults.unavailable_s})
            return web.Response(status=wire.problem_for(error).status, body=body, content_type=CONTENT_TYPE)

    async def _found(self, request: web.Request, handler: object) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[operator]
        except web.HTTPNotFound as error:
            raise wire.NotFoundError(f"{request.method} {request.path}: Not Found") from error

    def _drop(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def _verify(self, request: web.Request) -> wire.SignedRequest:
        header = request.headers.get("Authorization", "")
        signed, signature = wire.parse_authorization(header, method=request.method, target=request.path_qs)
        if signed.device in self.revoked:
            raise wire.DeviceRevokedError(f"device {signed.device}: was revoked by the operator")
        if signed.device not in self.devices:
            raise wire.UnknownDeviceError(f"device {signed.device}: not known")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.devices[signed.device]))

        def seen(asked: wire.SignedRequest) -> bool:
            known = asked.nonce in self.nonces
            self.nonces.add(asked.nonce)
            return known

        wire.verify_request(signed, signature, key=key, now=time.time(), seen=seen)
        return signed

    async def _enrol(self, request: web.Request) -> web.Response:
        asked = wire.decode_message(await request.read(), wire.Enrolment)
        name, used_by = self.tokens.get(asked.token, ("", None))
        if name != asked.device or used_by not in (None, asked.signing_key):
            raise wire.TokenError("token: unknown, used, or made for another name")
        self.tokens[asked.token] = (name, asked.signing_key)
        self.devices[name] = asked.signing_key
        if self.faults.deaf:
            self.faults.deaf -= 1
            return self._drop(request)
        key = self.key.public_key().public_bytes_raw().hex()
        return web.Response(status=201, body=wire.encode_message(wire.Enrolled(name, TASK, key)))

    async def _rekey(self, request: web.Request) -> web.Response:
        signed = self._verify(request)
        message = wire.decode_message(await request.read(), wire.NewKey)
        wire.check_new_key(signed.device, message)
        if message.signing_key in self.retired:
            raise wire.NotPermittedError("new key: was in use before")
        if message.signing_key != self.devices[signed.device]:
            self.retired.add(self.devices[signed.device])
            self.devices[signed.device] = message.signing_key
        if self.faults.deaf:
            self.faults.deaf -= 1
            return self._drop(request)
        return web.Response(status=204)

    async def _tell(self, request: web.Request) -> web.Response:
        signed, body = self._verify(request), await request.read()
        assert hashlib.sha256(body).hexdigest() == signed.body_digest
        assert request.match_info["device"] == signed.device
        if self.faults.no_capability:
            raise wire.NotFoundError(f"PUT {request.path}: Not Found")
        self.told.append(wire.decode_message(body, wire.Capability))
        return web.Response(status=204)

    async def _leave(self, request: web.Request) -> web.Response:
        del self.devices[self._verify(request).device]
        return web.Response(status=204)

    async def _plan(self, request: web.Request) -> web.Response:
        asked = self._verify(request)
        if request.match_info["task"] != TASK:
            raise wire.NotFoundError("no such task")
        if self.faults.behind:
            raise wire.RoundAheadError("restored")
        if self.faults.empty:
            return web.Response(status=204, headers={"Retry-After": "0"})
        after, until = int(request.query["after"]), time.monotonic() + int(request.query["wait"])
        while self.plans[-1].plan.round <= after and time.monotonic() < until:
            try:
                await asyncio.wait_for(self.news.wait(), until - time.monotonic())
            except asyncio.TimeoutError:
                break
        if self.faults.plan is None and self.plans[-1].plan.round <= after:
            return web.Response(status=204)
        data = self.faults.plan or self.plans[-1].data
        proof = self.faults.proof
        if proof is None:
            proof = wire.sign_answer(hashlib.sha256(data).hexdigest(), asked, self.key)
        self.proofs.append(proof)
        return web.Response(body=data, headers={wire.PLAN_ANSWER: proof} if proof else {})

    async def _plan_keys(self, request: web.Request) -> web.Response:
        self._verify(request)
        if self.statements is None:
            raise wire.NotFoundError(f"GET {request.path}: Not Found")
        return web.Response(body=wire.encode_message(wire.PlanKeyChain(tuple(self.statements))))

    def rotate(self) -> None:
        """Plans from the next one on are signed with a new key."""
        self.next_key = Ed25519PrivateKey.generate()
        self.statements = [*(self.statements or ()), wire.state_key(TASK, self.key, self.next_key.public_key())]

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        self._verify(request)
        digest = request.match_info["digest"]
        if digest not in self.blobs:
            raise wire.NotFoundError(f"blob {digest}: not here")
        data, start = self.faults.swap_blob.get(digest, self.blobs[digest]), 0
        asked = request.headers.get("Range")
        if asked and not self.faults.ignore_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
        part = data[start:]
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(part)
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        await response.prepare(request)
        stop = self.faults.cut.pop(digest, None)
        await response.write(part[:stop])
        self.requests[-1] = (*self.requests[-1][:3], len(part[:stop]))
        if stop is not None:
            await asyncio.sleep(0.05)  # let the bytes leave
            assert request.transport is not None
            request.transport.abort()
        return response

    async def _patch(self, request: web.Request) -> web.StreamResponse:
        self._verify(request)
        if self.faults.no_patches:
            raise wire.NotFoundError(f"GET {request.path}: Not Found")
        # By what the plans name, so that a plan that a test has swapped is patched to as it stands.
        plan = wire.open_plan(self.faults.plan or self.plans[-1].data, self.key.public_key()).plan
        since = int(request.query["since"])
        if int(request.match_info["round"]) != plan.round:
            raise wire.RoundClosedError("not the current round")
        before, after = self.tensors_of(since), parse_tensors(self.blobs[plan.adapter], what="")
        same = {name for name, array in before.items() if name in after and array.tobytes() == after[name].tobytes()}
        head = wire.PatchHead(since, plan.round, plan.adapter)
        layout = wire.adapter_layout(plan.ranks, FEATURES, {})
        if any(name not in after or after[name].shape != shape for name, shape in layout.blocks):
            raise wire.NotFoundError("a test's adapter that does not fit its plan can only be fetched whole")
        changes = {
            name: change_of(name, after[name], range(count))
            for name, count in component_counts(layout).items()
            if name not in same
        }
        data = wire.encode_patch(head, changes, layout)
        data = data if self.faults.swap_patch is None else self.faults.swap_patch(data)
        self.requests[-1] = (*self.requests[-1][:2], request.query_string, len(data))
        if not self.faults.cut_patches:
            return web.Response(body=data)
        self.faults.cut_patches -= 1
        response = web.StreamResponse()
        response.content_length = len(data)
        await response.prepare(request)
        await response.write(data[:20])
        await asyncio.sleep(0.05)  # let the bytes leave
        return self._drop(request)

    def tensors_of(self, round_: int) -> dict[str, np.ndarray]:
        """The adapter of a round's plan, -1 for the bundle's own."""
        own = self.bundle.manifest.files["adapter.safetensors"].sha256
        return parse_tensors(self.blobs[own if round_ == -1 else self.plans[round_].plan.adapter], what="")

    async def _update(self, request: web.Request) -> web.Response:
        signed = self._verify(request)
        device, round_ = request.match_info["device"], int(request.match_info["round"])
        if device != signed.device:
            raise wire.NotPermittedError("not yours")
        sealed = await request.read()
        digest = hashlib.sha256(sealed).hexdigest()
        if digest != signed.body_digest:
            raise wire.UpdateDigestError("other bytes than named")
        self.received.append((round_, device, sealed))
        if self.faults.close_before_upload:
            self.faults.close_before_upload = False
            self.close_round()
        receipt = self._count(device, round_, sealed, digest)
        if self.faults.deaf:
            self.faults.deaf -= 1
            return self._drop(request)
        return web.Response(status=201, body=wire.encode_message(receipt))

    def _count(self, device: str, round_: int, sealed: bytes, digest: str) -> wire.UpdateReceipt:
        known = self.counted.get(round_, {}).get(device)
        if known is not None:
            if known[0].digest != digest:
                raise wire.UpdateConflictError(f"update of {device} for round {round_}: another one is counted")
            return known[0]
        plan = self.plans[-1]
        if plan.plan.round != round_ or plan.plan.state != "train":
            raise wire.RoundClosedError(f"round {round_}: closed")
        frame = wire.unseal(sealed, round_key=self.round_key, context=wire.EnvelopeContext.of(plan, device))
        update = wire.decode_update(frame, signed_plan=plan, layout=wire.layout_for(frame, self.layouts))
        receipt = wire.UpdateReceipt(device, round_, digest, min(update.weight, plan.plan.update.weight_cap))
        self.counted.setdefault(round_, {})[device] = (receipt, replace(update, values=update.values.copy()))
        if len(self.counted[round_]) >= self.wanted:
            self.close_round()
        return receipt

    def patch_requests(self) -> list[tuple[int, int, int]]:
        """(since, round, bytes) of every patch that was made."""
        return [
            (int(parse_qs(asked)["since"][0]), int(path.split("/")[-2]), sent)
            for _, path, asked, sent in self.requests
            if path.endswith("/adapter") and asked
        ]

    def blob_requests(self, digest: str) -> list[tuple[str | None, int]]:
        """Range asked and bytes sent of every request for a blob."""
        return [(range_, sent) for _, path, range_, sent in self.requests if path.endswith(digest)]


class Serving:
    """An aggregator on a loopback port; ``async with``."""

    def __init__(self, aggregator: Aggregator, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.aggregator, self._port, self._tls = aggregator, port, tls

    async def __aenter__(self) -> Aggregator:
        self._runner = web.AppRunner(self.aggregator.app(), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self._tls)
        await site.start()
        port = self._runner.addresses[0][1]
        self.aggregator.url = f"http{'s' if self._tls else ''}://127.0.0.1:{port}"
        return self.aggregator

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
