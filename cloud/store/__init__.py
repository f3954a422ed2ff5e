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

__all__ = [
    "OBJECTS",
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
