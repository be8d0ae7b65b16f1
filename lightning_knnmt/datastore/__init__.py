"""Keys and values of a parallel corpus on the disk, for reading."""

from lightning_knnmt.datastore.manifest import Manifest, Provenance, ShardInfo
from lightning_knnmt.datastore.store import Datastore

__all__ = ["Datastore", "Manifest", "Provenance", "ShardInfo"]
