"""Files that a change of a datastore, finished or not, has left behind."""

import re
from pathlib import Path

from lightning_knnmt.datastore.manifest import Manifest, remove_other_shards
from lightning_knnmt.storage.layout import remove_other_indexes


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove shards, indexes and lists of removed entries that do not belong to a manifest.

    Args:
        folder: The datastore's, to which nobody else writes.
        manifest: Its manifest, or the one that it is going to have.
    """
    remove_other_shards(folder, manifest.shards)
    remove_other_indexes(folder, manifest.generation)
    kept = None if manifest.removed is None else manifest.removed.file
    for path in folder.glob("removed-*.json*"):
        if path.name != kept and re.fullmatch(r"removed-\d+\.json(\.partial)?", path.name):
            path.unlink()
