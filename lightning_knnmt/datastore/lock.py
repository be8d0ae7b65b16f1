"""One writer at a time."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lightning_knnmt.datastore.errors import DatastoreError

FILE_NAME = "writer.lock"  # stays in the folder; what counts is the lock on it, which ends with its process


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a datastore, as long as the block runs or until the process dies.

    Args:
        folder: The datastore's; made if it is not there.

    Raises:
        DatastoreError: Another process writes there, or nobody can.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise _not_writable(folder, error) from error
    with file:
        if not _lock(file, folder / FILE_NAME):
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            raise DatastoreError(
                f"{folder} is being written to by {holder}; wait until it has finished, or choose another folder"
            )
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise _not_writable(folder, error) from error
        try:
            yield
        finally:
            file.truncate(0)


def _not_writable(folder: Path, error: OSError) -> DatastoreError:
    return DatastoreError(
        f"{folder} cannot be written to ({error.strerror}); make room or allow writing there, or choose another folder"
    )


def _lock(file: IO[bytes], path: Path) -> bool:
    """Lock a file, if nobody else has; the operating system unlocks it when it is closed or its process ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # a locked byte cannot be read, and the first ones name the holder
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise DatastoreError(f"{path} cannot be locked ({error.strerror}); choose a folder on a disk") from error
    return True
