"""Downloads go on where they were cut, and never trust what they find."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from device_bench import Bench
from device_server import Aggregator, Serving

from edge_runtime.bundle import MANIFEST_NAME
from edge_runtime.bundle.manifest import MAX_MANIFEST_BYTES
from edge_runtime.device import events, fetch
from edge_runtime.device.client import Client, Signer
from edge_runtime.device.errors import ArtifactDigestError, TransportError
from edge_runtime.device.fetch import fetch_blob
from edge_runtime.device.host import Host
from edge_runtime.device.outbox import pending_for
from edge_runtime.wire import Enrolment, RoundClosedError, encode_problem
from edge_runtime.wire.problems import CONTENT_TYPE


@pytest.fixture
async def client(bench: Bench) -> AsyncIterator[Client]:
    identity = bench.home.identity()
    async with Client(identity.server, Host(), signer=Signer.of(identity)) as client:
        yield client


def test_constants_stated_twice_agree() -> None:
    assert (fetch.MANIFEST_NAME, fetch.MAX_MANIFEST_BYTES) == (MANIFEST_NAME, MAX_MANIFEST_BYTES)


async def test_a_cut_download_resumes(bench: Bench) -> None:
    """The whole task, with the largest file cut: every byte of it crosses once."""
    weights = bench.aggregator.bundle.weights
    bench.aggregator.faults.cut[weights] = 100_000
    await bench.run()
    size = len(bench.aggregator.blobs[weights])
    assert bench.aggregator.blob_requests(weights) == [(None, 100_000), ("bytes=100000-", size - 100_000)]
    (waiting,) = bench.of(events.Waiting)
    assert "the answer was cut" in waiting.detail
    assert bench.of(events.Finished)


async def test_a_server_that_ignores_range_is_read_from_the_start(bench: Bench, client: Client, tmp_path: Path) -> None:
    weights, data = bench.aggregator.bundle.weights, bench.aggregator.blobs[bench.aggregator.bundle.weights]
    bench.aggregator.faults.cut[weights] = 5_000
    with pytest.raises(TransportError, match="cut") as cut:
        await fetch_blob(client, weights, tmp_path / "w", max_bytes=len(data))
    assert cut.value.progress
    bench.aggregator.faults.ignore_range = True
    await fetch_blob(client, weights, tmp_path / "w", max_bytes=len(data))
    assert (tmp_path / "w").read_bytes() == data
    assert bench.aggregator.blob_requests(weights) == [(None, 5_000), ("bytes=5000-", len(data))]


async def test_a_whole_partial_file_is_not_fetched_again(bench: Bench, client: Client, tmp_path: Path) -> None:
    """The crash came between the last byte and the rename."""
    weights, data = bench.aggregator.bundle.weights, bench.aggregator.blobs[bench.aggregator.bundle.weights]
    (tmp_path / "w.partial").write_bytes(data)
    await fetch_blob(client, weights, tmp_path / "w", max_bytes=len(data))
    assert (tmp_path / "w").read_bytes() == data
    assert client.traffic.down == 0


async def test_a_wrong_partial_file_is_dropped(bench: Bench, client: Client, tmp_path: Path) -> None:
    weights, data = bench.aggregator.bundle.weights, bench.aggregator.blobs[bench.aggregator.bundle.weights]
    (tmp_path / "w.partial").write_bytes(b"x" * 1000)
    await fetch_blob(client, weights, tmp_path / "w", max_bytes=len(data))
    assert (tmp_path / "w").read_bytes() == data
    assert [asked for asked, _ in bench.aggregator.blob_requests(weights)] == ["bytes=1000-", None]


async def test_wrong_bytes_twice_are_an_error_and_leave_nothing(bench: Bench, client: Client, tmp_path: Path) -> None:
    weights = bench.aggregator.bundle.weights
    bench.aggregator.faults.swap_blob[weights] = b"other"
    with pytest.raises(ArtifactDigestError, match="twice"):
        await fetch_blob(client, weights, tmp_path / "w", max_bytes=1000)
    assert list(tmp_path.glob("w*")) == []


async def test_the_bundles_own_adapter_is_not_fetched_again(bench: Bench) -> None:
    aggregator = bench.aggregator
    digest = aggregator.bundle.manifest.files["adapter.safetensors"].sha256
    aggregator.adapter = digest
    aggregator.plans.clear()
    aggregator._open()
    await bench.run(once=True)
    assert len(aggregator.blob_requests(digest)) == 1
    assert bench.home.adapter_path(digest).read_bytes() == aggregator.blobs[digest]


async def serve_one(answer: web.Response) -> Serving:
    async def handler(_: web.Request) -> web.Response:
        return answer

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", handler)
    holder = type("Holder", (), {"app": lambda _: app, "url": ""})()
    return Serving(holder)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"status": 206, "body": b"zz", "headers": {"Content-Range": "bytes 7-8/9"}}, "begins at 7: expected 3"),
        ({"status": 206, "body": b"zz"}, "begins at None: expected 3"),
        ({"status": 302, "headers": {"Location": "http://127.0.0.1:1/login"}}, "answered 302"),
        ({"status": 404, "text": "<html>nothing\nhere"}, "not as an aggregator does: <html>nothing here"),
    ],
)
async def test_answers_that_are_no_aggregators(tmp_path: Path, answer: dict[str, object], message: str) -> None:
    """A wrong range, a captive portal, a proxy's page: retried, never taken for content or for a refusal."""
    async with await serve_one(web.Response(**answer)) as server, Client(server.url, Host()) as client:  # type: ignore[arg-type]
        (tmp_path / "w.partial").write_bytes(b"abc")
        with pytest.raises(TransportError, match=message):
            await fetch_blob(client, hashlib.sha256(b"abcd").hexdigest(), tmp_path / "w", max_bytes=10)
        assert not (tmp_path / "w").exists()


async def test_a_refusal_arrives_though_the_body_was_not_read(bench: Bench, tmp_path: Path) -> None:
    """The server answers from the headers of a large upload; the device must see why, not a broken pipe."""
    sealed = bytes(16 << 20)
    error = RoundClosedError("round 0: closed")
    answer = web.Response(status=409, body=encode_problem(error), content_type=CONTENT_TYPE)
    signer = Signer.of(bench.home.identity())
    async with await serve_one(answer) as server, Client(server.url, Host(), signer=signer) as client:
        with pytest.raises(RoundClosedError, match="round 0: closed"):
            await client.upload(pending_for("docs", 0, "a" * 64, sealed=sealed, weight=1), sealed)


async def test_a_page_with_status_200_is_no_message(aggregator: Aggregator) -> None:
    async with await serve_one(web.Response(text="<html>log in")) as server, Client(server.url, Host()) as client:
        with pytest.raises(TransportError, match="answered with no Enrolled"):
            await client.enrol(Enrolment("a" * 32, "pi-1", "b" * 64))
