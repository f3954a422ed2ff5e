"""Refusals over real HTTP: each by its name, and nothing has changed after it."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace

import aiohttp
import numpy as np
import pytest
from cloud_fleet import Device, Site, values_for

from cloud.planning import plan_layout
from edge_runtime import wire
from edge_runtime.wire import resources


@pytest.fixture
async def one(site: Site, session: aiohttp.ClientSession) -> Device:
    return await site.device(session, "one")


@pytest.fixture
async def two(site: Site, session: aiohttp.ClientSession) -> Device:
    return await site.device(session, "two")


async def picture(site: Site) -> tuple[object, ...]:
    """Everything a refused update must leave as it was."""
    status = await site.operator.status()
    aggregator = site.server.aggregator
    total = aggregator._work.total
    return site.files(), status.received, status.round, total.devices, total.weight, total.mean().tolist()


def good(device: Device, signed: wire.SignedPlan) -> bytes:
    return device.seal(signed, device.frame(signed, values_for(device.site, signed, 1)))


class TestUpdates:
    async def test_repeat_is_answered_with_the_first_receipt(self, site: Site, one: Device) -> None:
        signed = await one.plan()
        sealed = good(one, signed)
        first = await one.put(signed, sealed)
        before = await picture(site)
        again = await one.put(signed, sealed)
        assert (first.status, again.status) == (201, 200)
        assert first.body == again.body
        receipt = wire.decode_message(again.body, wire.UpdateReceipt)
        assert receipt == wire.UpdateReceipt("one", 0, hashlib.sha256(sealed).hexdigest(), 10)
        assert await picture(site) == before

    async def test_repeat_is_answered_after_the_round_too(self, site: Site, one: Device, two: Device) -> None:
        signed = await one.plan()
        sealed = good(one, signed)
        first = await one.put(signed, sealed)
        await two.put(signed, good(two, signed))
        await one.plan(after=0)
        again = await one.put(signed, sealed)
        assert (again.status, again.body) == (200, first.body)
        other = await one.put(signed, good(one, signed))
        assert (other.status, other.problem()) == (409, "RoundClosedError")
        assert other.headers["Retry-After"] == "0"

    async def test_other_update_conflicts(self, site: Site, one: Device) -> None:
        signed = await one.plan()
        await one.put(signed, good(one, signed))
        before = await picture(site)
        answer = await one.put(signed, good(one, signed))
        assert (answer.status, answer.problem()) == (409, "UpdateConflictError")
        assert await picture(site) == before

    async def test_racing_updates_of_one_device_count_once(self, site: Site, one: Device) -> None:
        signed = await one.plan()
        answers = await asyncio.gather(*(one.put(signed, good(one, signed)) for _ in range(6)))
        assert sorted(answer.status for answer in answers) == [201, 409, 409, 409, 409, 409]
        assert len([name for name in site.files() if name.startswith("updates/")]) == 1

    async def test_bad_frames_are_refused_by_name(self, site: Site, one: Device, two: Device) -> None:
        signed = await one.plan()
        layout = plan_layout(site.bundle, signed.plan)
        values = values_for(site, signed, 1)
        frame = bytearray(one.frame(signed, values))
        nan, big = values.copy(), values.copy()
        nan[3], big[0] = np.nan, 9.0
        elsewhere = replace(signed, plan=replace_plan(signed.plan, round=5))
        rolled = wire.Layout((*layout.blocks[1:], layout.blocks[0]))
        other_layout = wire.encode_update(wire.Update(values, 1), signed_plan=signed, layout=rolled)
        cases = {
            "EnvelopeError": [
                two.seal(signed, bytes(frame)),
                flipped(good(one, signed), 40),
                wire.seal(bytes(frame), round_key="09" + "00" * 31, context=wire.EnvelopeContext.of(signed, "one")),
            ],
            "UpdateFormatError": [
                one.seal(signed, b"X" + bytes(frame[1:])),
                good(one, signed)[:-1],
                good(one, signed) + b"x",
                b"short",
            ],
            "UpdatePlanError": [
                one.seal(signed, wire.encode_update(wire.Update(values, 1), signed_plan=elsewhere, layout=layout))
            ],
            "UpdateLayoutError": [one.seal(signed, other_layout)],
            "UpdateValueError": [
                one.seal(signed, one.frame(signed, nan)),
                one.seal(signed, one.frame(signed, big)),
                one.seal(signed, one.frame(signed, values, weight=0)),
            ],
        }
        before = await picture(site)
        for name, bodies in cases.items():
            for body in bodies:
                answer = await one.put(signed, body)
                assert (answer.status, answer.problem()) == (422, name)
                assert answer.headers["Content-Type"] == "application/problem+json"
        assert await picture(site) == before
        assert (await one.put(signed, good(one, signed))).status == 201

    async def test_body_other_than_signed_is_refused(self, site: Site, one: Device) -> None:
        signed = await one.plan()
        path = resources.update_path("tiny", 0, "one")
        sealed = good(one, signed)
        before = await picture(site)
        answer = await one.send("PUT", path, flipped(sealed, 9), one.head("PUT", path, sealed))
        assert (answer.status, answer.problem()) == (400, "UpdateDigestError")
        assert await picture(site) == before

    async def test_length_must_be_announced_and_plain(self, site: Site, one: Device) -> None:
        signed = await one.plan()
        path = resources.update_path("tiny", 0, "one")
        sealed = good(one, signed)

        async def chunks():
            yield sealed

        url = site.server.url + path
        async with one.session.put(url, data=chunks(), headers=one.head("PUT", path, sealed)) as response:
            assert (
                type(wire.decode_problem(await response.read(), status=response.status)).__name__
                == "RequestFormatError"
            )
        headers = one.head("PUT", path, sealed) | {"Content-Encoding": "gzip"}
        answer = await one.send("PUT", path, sealed, headers)
        assert answer.problem() == "RequestFormatError"

    async def test_other_round_or_task_is_refused(self, site: Site, one: Device) -> None:
        signed = await one.plan()
        sealed = good(one, signed)
        for path, name in {
            resources.update_path("tiny", 1, "one"): "RoundClosedError",
            resources.update_path("other", 0, "one"): "NotFoundError",
            "/v1/tasks/tiny/rounds/x/updates/one": "RequestFormatError",
            "/v1/nothing": "NotFoundError",
        }.items():
            assert (await one.send("PUT", path, sealed)).problem() == name


class TestSignatures:
    async def test_each_forged_part_is_refused(self, site: Site, one: Device, two: Device) -> None:
        target = resources.plan_target("tiny", after=-1, wait_s=0)
        head = one.head("GET", target)
        answer = await one.send("GET", target, headers=head)
        assert answer.status == 200
        request, _ = wire.parse_authorization(head["Authorization"], method="GET", target=target)
        proof, digest = answer.headers[wire.PLAN_ANSWER], hashlib.sha256(answer.body).hexdigest()
        wire.check_answer(proof, digest=digest, request=request, key=one.plan_key)
        cases = {
            "SignatureError": [
                head,  # replayed
                one.head("GET", target + "0"),
                one.head("POST", target),
                one.head("GET", target, time=int(site.clock()) - 301),
                one.head("GET", target, time=int(site.clock()) + 301),
                one.head("GET", target, device="two"),
                one.head("GET", target, device="operator"),
            ],
            "UnknownDeviceError": [one.head("GET", target, device="nobody")],
            "RequestFormatError": [{}, {"Authorization": "Bearer x"}],
            "UpdateDigestError": [one.head("GET", target, body_digest="00" * 32)],
        }
        for name, heads in cases.items():
            for headers in heads:
                answer = await one.send("GET", target, headers=headers)
                assert answer.problem() == name
                assert (answer.headers.get("WWW-Authenticate") == "EmberLoRA") == (answer.status == 401)

    async def test_a_device_that_is_ahead_is_told_so(self, site: Site, one: Device) -> None:
        """It is done with a later round than there is, as after a restore; with the current one it just waits."""
        answer = await one.send("GET", resources.plan_target("tiny", after=1, wait_s=30))
        assert (answer.status, answer.problem()) == (409, "RoundAheadError")
        assert "is done with round 1, and this aggregator is at 0" in answer.body.decode()
        assert (await one.send("GET", resources.plan_target("tiny", after=0, wait_s=0))).status == 204

    async def test_devices_and_operator_keep_to_their_own(self, site: Site, one: Device, two: Device) -> None:
        signed = await one.plan()
        path = resources.update_path("tiny", 0, "two")
        answer = await one.send("PUT", path, good(two, signed))
        assert (answer.status, answer.problem()) == (403, "NotPermittedError")
        assert (await one.send("DELETE", resources.DEVICE.format(device="two"))).problem() == "NotPermittedError"
        for method, target in (("GET", resources.OPERATOR_STATUS), ("POST", resources.OPERATOR_STOP)):
            assert (await one.send(method, target)).problem() == "NotPermittedError"
        operator = Device(site, one.session, "operator", site.operator_key())
        target = resources.plan_target("tiny", after=-1, wait_s=0)
        assert (await operator.send("GET", target)).problem() == "NotPermittedError"


class TestPlansAndBlobs:
    @pytest.mark.parametrize("query", ["", "?after=x&wait=0", "?after=-2&wait=0", "?after=0&wait=-1", "?after=1"])
    async def test_malformed_poll_is_refused(self, one: Device, query: str) -> None:
        answer = await one.send("GET", "/v1/tasks/tiny/plan" + query)
        assert (answer.status, answer.problem()) == (400, "RequestFormatError")

    async def test_bundle_comes_whole_and_in_ranges(self, site: Site, one: Device) -> None:
        signed = await one.plan()
        manifest = await one.blob(signed.plan.bundle)
        assert hashlib.sha256(manifest.body).hexdigest() == signed.plan.bundle
        entry = site.bundle.manifest.files["graphs/block.onnx"]
        assert len((await one.blob(entry.sha256)).body) == entry.bytes == 5000
        part = await one.blob(entry.sha256, Range="bytes=4990-")
        assert (part.status, part.body, part.headers["Content-Range"]) == (206, b"b" * 10, "bytes 4990-4999/5000")
        assert (await one.blob(entry.sha256, Range="bytes=5000-")).status == 416
        down = next(device.bytes_down for device in (await site.operator.status()).devices)
        assert down == len(signed.data) + len(manifest.body) + 5000 + 10

    async def test_a_plan_is_deflated_for_who_asks_for_it(self, site: Site, one: Device) -> None:
        """What is counted is what is sent."""
        target, counted = resources.plan_target("tiny", after=-1, wait_s=0), [0]
        for asked, encoding in (("deflate", "deflate"), ("identity", None), ("gzip, deflate", None)):
            headers = {**one.head("GET", target, b""), "Accept-Encoding": asked}
            answer = await one.send("GET", target, headers=headers)
            assert (answer.status, answer.headers.get("Content-Encoding")) == (200, encoding)
            assert answer.headers["Vary"] == "Accept-Encoding"
            signed = wire.open_plan(answer.body, one.plan_key)  # the test's client has inflated it
            sent = len(signed.data if encoding is None else signed.deflated)
            counted.append(counted[-1] + sent)
            assert int(answer.headers["Content-Length"]) == sent
            assert (await site.operator.status()).bytes_down == counted[-1]
        assert counted[1] < 0.8 * (counted[2] - counted[1])

    @pytest.mark.parametrize("digest", ["00" * 32, "..%2F..%2Fkeys%2Fplan.pem", "x"])
    async def test_other_blobs_are_not_found(self, one: Device, digest: str) -> None:
        answer = await one.blob(digest)
        assert (answer.status, answer.problem()) == (404, "NotFoundError")

    async def test_sealed_updates_are_never_served(self, one: Device) -> None:
        signed = await one.plan()
        sealed = good(one, signed)
        await one.put(signed, sealed)
        assert (await one.blob(hashlib.sha256(sealed).hexdigest())).problem() == "NotFoundError"

    async def test_waiting_devices_are_sent_away_at_shutdown(self, site: Site, one: Device) -> None:
        poll = asyncio.create_task(one.send("GET", resources.plan_target("tiny", after=0, wait_s=30)))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(site.server.close(), 3)
        answer = await poll
        assert (answer.status, answer.problem(), answer.headers["Retry-After"]) == (503, "UnavailableError", "5")
        site.server = None

    async def test_health_needs_no_signature(self, one: Device) -> None:
        assert (await one.send("GET", resources.HEALTH, headers={})).status == 200


class TestEnrolment:
    async def token(self, site: Site, name: str = "new", ttl_s: int = 60) -> wire.Token:
        return wire.Token.parse((await site.operator.make_token(name, ttl_s)).token)

    async def test_lost_answer_is_given_again(self, site: Site, session: aiohttp.ClientSession) -> None:
        token, device = await self.token(site), Device(site, session, "new")
        first = await device.enrol(token)
        site.clock.now += 120
        assert await device.enrol(token) == first

    async def test_one_of_racing_devices_wins(self, site: Site, session: aiohttp.ClientSession) -> None:
        token = await self.token(site)
        racers = [Device(site, session, "new") for _ in range(5)]
        results = await asyncio.gather(*(device.enrol(token) for device in racers), return_exceptions=True)
        winners = [device for device, r in zip(racers, results, strict=True) if isinstance(r, wire.Enrolled)]
        assert len(winners) == 1
        assert {type(result) for result in results} == {wire.Enrolled, wire.TokenError}
        assert (await winners[0].plan()).plan.round == 0

    async def test_bad_tokens_are_refused(self, site: Site, session: aiohttp.ClientSession) -> None:
        token = await self.token(site)
        with pytest.raises(wire.TokenError, match="made for another name"):
            await Device(site, session, "else").enrol(token)
        with pytest.raises(wire.TokenError, match="unknown"):
            await Device(site, session, "new").enrol(replace(token, secret="00" * 16))
        site.clock.now += 61
        with pytest.raises(wire.TokenError, match="ran out 1 s ago"):
            await Device(site, session, "new").enrol(token)
        assert (await site.operator.status()).devices == ()

    async def test_enrolled_name_is_taken(self, site: Site, session: aiohttp.ClientSession) -> None:
        tokens = [await self.token(site), await self.token(site)]
        await Device(site, session, "new").enrol(tokens[0])
        with pytest.raises(wire.TokenError, match="enrolled already"):
            await Device(site, session, "new").enrol(tokens[1])

    async def test_leaving_device_is_refused_and_stays_counted(self, site: Site, one: Device, two: Device) -> None:
        signed = await one.plan()
        await one.put(signed, good(one, signed))
        assert (await one.send("DELETE", resources.DEVICE.format(device="one"))).status == 204
        target = resources.plan_target("tiny", after=0, wait_s=0)
        assert (await one.send("GET", target)).problem() == "UnknownDeviceError"
        await site.restart()
        assert (await one.send("GET", target)).problem() == "UnknownDeviceError"
        await two.put(signed, good(two, signed))
        assert (await two.plan(after=0)).plan.round == 1
        assert (await site.operator.status()).history[0].devices == 2

    async def test_left_name_may_come_back_with_a_new_token(self, site: Site, one: Device) -> None:
        await one.send("DELETE", resources.DEVICE.format(device="one"))
        again = Device(site, one.session, "one")
        await again.enrol(await self.token(site, "one"))
        assert (await again.plan()).plan.round == 0

    async def test_operator_may_send_a_device_away(self, site: Site, one: Device) -> None:
        operator = Device(site, one.session, "operator", site.operator_key())
        assert (await operator.send("DELETE", resources.DEVICE.format(device="one"))).status == 204
        assert (await operator.send("DELETE", resources.DEVICE.format(device="one"))).problem() == "UnknownDeviceError"

    async def test_malformed_enrolment_is_refused(self, site: Site, session: aiohttp.ClientSession) -> None:
        device = Device(site, session, "new")
        bodies = [b"{", b"[" * 50_000, b'{"token":"zz","device":"new","signing_key":"00"}', b"{}", b"x" * (64 << 10)]
        for body in bodies:
            assert (await device.send("POST", resources.ENROLMENTS, body, headers={})).problem() == "RequestFormatError"
        answer = await device.send("POST", resources.ENROLMENTS, b"x" * (65 << 10), headers={})
        assert (answer.status, answer.problem()) == (413, "RequestTooLargeError")


def flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def replace_plan(plan: wire.Plan, **changes: object) -> wire.Plan:
    return wire.Plan(**{**{name: getattr(plan, name) for name in plan.__struct_fields__}, **changes})
