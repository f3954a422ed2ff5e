"""The aggregator over HTTP: decode, call, encode."""

from cloud.http.app import make_app
from cloud.http.server import Server

__all__ = ["Server", "make_app"]
