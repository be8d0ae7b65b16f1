"""Sharded keys and values of a parallel corpus."""

from lightning_knnmt.datastore.builder import DatastoreConfig, build_datastore
from lightning_knnmt.datastore.errors import DatastoreError
from lightning_knnmt.datastore.manifest import Manifest, Provenance, ShardInfo
from lightning_knnmt.datastore.store import Datastore, StoredContext

__all__ = [
    "Datastore",
    "DatastoreConfig",
    "DatastoreError",
    "Manifest",
    "Provenance",
    "ShardInfo",
    "StoredContext",
    "build_datastore",
]
