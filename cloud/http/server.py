"""One listening aggregator: lock, keys, bundle, service, socket, in this order, and back in the reverse one."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from pathlib import Path

from aiohttp import web
from aiohttp.http import HttpProcessingError

from cloud import events
from cloud.config import Config, is_loopback
from cloud.errors import DataError
from cloud.http.app import make_app
from cloud.http.connections import BoundedSite
from cloud.keys import KEYS_FOLDER, load_keys
from cloud.lock import FolderLock
from cloud.operator import PIN_NAME, URL_NAME
from cloud.planning import check_fit
from cloud.service import Aggregator, Surroundings
from cloud.store.space import write_error
from cloud.tls import fingerprint, server_context
from edge_runtime.bundle import open_bundle

_KEEPALIVE_S = 75  # longer than a held plan request; aiohttp's default is an hour
_LINGER_S = 5  # for reading the rest of a refused body, so that the sender sees the answer
_SHUTDOWN_S = 10  # for requests that run when the server is told to stop


class Server:
    """Made by :meth:`start`, ended by :meth:`close`."""

    def __init__(self, aggregator: Aggregator, runner: web.AppRunner, lock: FolderLock, url_file: Path) -> None:
        self.aggregator = aggregator
        self.url = ""
        self._runner = runner
        self._lock = lock
        self._url_file = url_file

    @classmethod
    async def start(cls, config: Config, surroundings: Surroundings) -> Server:
        """Open everything and listen.

        Raises:
            ConfigError, DataError, BundleError: what cannot be used.
        """
        data = config.data_path
        keys = load_keys(data / KEYS_FOLDER)
        context = server_context(config)
        lock = FolderLock(data)
        try:
            bundle = await asyncio.to_thread(open_bundle, config.bundle_path)
            check_fit(config, bundle)
            aggregator = Aggregator(config, bundle, keys=keys, folder=data, surroundings=surroundings)
            await aggregator.start()
            app = make_app(aggregator, clock=surroundings.clock, report=surroundings.report)
            runner = web.AppRunner(
                app,
                access_log=None,
                logger=_protocol_log(),
                auto_decompress=False,
                keepalive_timeout=_KEEPALIVE_S,
                lingering_time=_LINGER_S,
                shutdown_timeout=_SHUTDOWN_S,
            )
            server = cls(aggregator, runner, lock, data / URL_NAME)
        except BaseException:  # whatever failed, the folder must be free again
            lock.release()
            raise
        try:
            await server._listen(surroundings.report, context)
        except BaseException:  # the same, with more to put back
            await server.close()
            raise
        return server

    async def _listen(self, report: events.Report, context: ssl.SSLContext | None) -> None:
        config = self.aggregator.config.server
        await self._runner.setup()
        try:
            await BoundedSite(self._runner, config, ssl_context=context).start()
        except OSError as error:
            raise DataError(f"{config.host}:{config.port}: cannot listen: {error.strerror}") from error
        port = self._runner.addresses[0][1]
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://{_bracketed(config.host)}:{port}"
        # Commands on this machine reach a server that listens everywhere on loopback.
        local = config.host if is_loopback(config.host) or not _is_wildcard(config.host) else "127.0.0.1"
        try:
            pin = fingerprint(self.aggregator.config)
            if pin is not None:
                _write_text(self._url_file.with_name(PIN_NAME), pin + "\n")
            _write_text(self._url_file, f"{scheme}://{_bracketed(local)}:{port}\n")
        except OSError as error:
            raise write_error(f"{self._url_file}: cannot be written", error) from error
        status = await self.aggregator.status()
        report(events.ServerStarted(self.url, status.task, status.state, status.round, status.received))

    async def close(self) -> None:
        """Stop listening, finish the requests that run, close the store, free the folder."""
        try:
            self.aggregator.drain()
            self._url_file.unlink(missing_ok=True)
            self._url_file.with_name(PIN_NAME).unlink(missing_ok=True)
            await self._runner.cleanup()
            await self.aggregator.close()
        finally:
            self._lock.release()


def _protocol_log() -> logging.Logger:
    """Where aiohttp reports its own faults.

    It would log a traceback for bytes that are no HTTP, and the bytes: whoever can connect could fill the disk.
    """
    log = logging.getLogger("cloud.http.protocol")
    if _not_http not in log.filters:
        log.addFilter(_not_http)
    return log


def _not_http(record: logging.LogRecord) -> bool:
    """Whether a record tells of something else than bytes that are no HTTP, which were answered with 400."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


def _is_wildcard(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
