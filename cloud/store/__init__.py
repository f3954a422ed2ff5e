"""What the aggregator keeps: rows in SQLite, blobs and unfinished updates in folders."""

from cloud.store.blobs import OBJECTS, UPDATES, Blobs
from cloud.store.database import Database
from cloud.store.opening import Identity
from cloud.store.parts import Parts
from cloud.store.records import (
    CapabilityRecord,
    Contributions,
    DeviceRecord,
    RevocationRecord,
    RoundRecord,
    TokenRecord,
    UpdateRecord,
)
from cloud.store.schema import SCHEMA

__all__ = [
    "OBJECTS",
    "SCHEMA",
    "UPDATES",
    "Blobs",
    "CapabilityRecord",
    "Contributions",
    "Database",
    "DeviceRecord",
    "Identity",
    "Parts",
    "RevocationRecord",
    "RoundRecord",
    "TokenRecord",
    "UpdateRecord",
]
