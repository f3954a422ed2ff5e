"""Instants between two steps that a process must survive being killed at, by name.

A point is a function of the product and whether death comes before or after it; :mod:`tests.crash.process` puts it
there from outside. Nothing in the product knows of points.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

SERVER = "server"
When = Literal["before", "after"]


class Point(NamedTuple):
    """Where a process dies: ``where`` is ``module:name`` or ``module:Class.name``."""

    name: str
    place: str  # "server", "device", or "one": the device that downloads the bundle and sends its updates whole
    where: str
    when: When
    most: int  # every run that nobody else kills comes by at least so often


POINTS = (
    # An update on its way into the sum
    Point("update durable, row not written", SERVER, "cloud.store.database:Database.add_updates", "before", 2),
    Point("row written, not committed", SERVER, "cloud.store.log:append_all", "after", 2),
    Point("row committed, update not summed", SERVER, "cloud.store.database:Database.add_updates", "after", 2),
    Point("update summed, device not answered", SERVER, "cloud.service:_add_all", "after", 2),
    # One that comes in parts
    Point("part durable, device not answered", SERVER, "cloud.store.parts:Parts.append", "after", 4),
    Point("all parts there, update not counted", SERVER, "cloud.store.parts:Parts.whole", "after", 2),
    # The end of a round
    Point("adapter made, round not final", SERVER, "cloud.store.database:Database.end_round", "before", 2),
    Point("round final, its key not destroyed", SERVER, "cloud.store.database:Database.destroy_keys", "before", 3),
    Point("key destroyed, updates not tidied", SERVER, "cloud.store.database:Database.destroy_keys", "after", 3),
    Point("adapter written, not published", SERVER, "cloud.publish:write_peft_folder", "after", 2),
    # A device before it trains
    Point("part of the bundle fetched", "one", "edge_runtime.device.fetch:fetch_blob", "after", 5),
    Point("patch fetched, adapter being made", "device", "edge_runtime.device.patching:demand", "before", 2),
    Point("adapter made, state not written", "device", "edge_runtime.device.fetch:Store.adapter", "after", 3),
    # Its update
    Point("in training", "device", "edge_runtime.device.loop:Device._relay", "before", 4),
    Point("sealed, not recorded", "device", "edge_runtime.device.outbox:write_bytes", "after", 1),
    Point("recorded, not sent", "device", "edge_runtime.device.outbox:Outbox.add", "after", 2),
    Point("sent, answer not read", "one", "edge_runtime.device.client:Client._sent", "after", 2),
    Point("acknowledged, state not written", "device", "edge_runtime.device.client:Client.upload", "after", 2),
    Point("state written, journal not emptied", "device", "edge_runtime.device.outbox:Outbox.remove", "before", 2),
    Point("last adapter written, not in its place", "device", "edge_runtime.device.loop:write_record", "before", 1),
)
