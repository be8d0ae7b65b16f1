"""One writer at a time."""

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import LOCK
from lightning_knnmt.storage.ranks import Ranks


@contextmanager
def only_writer(folder: Path, ranks: Ranks = Ranks()) -> Iterator[None]:
    """Keep other processes from writing to a datastore, as long as the block runs or until the process dies.

    Ranks that write together enter and leave the block together. Rank 0 shuts everybody out, then shares the lock with
    the others, so that nobody else writes before the last of them is gone, even if the first was killed.

    Args:
        folder: The datastore's; made if it is not there.
        ranks: This process's place among those that write together.

    Raises:
        DatastoreError: Another process writes there, or nobody can.
    """
    made = ranks.size == 1 and not folder.exists()
    with ExitStack() as stack:

        def enter(shared: bool) -> IO[bytes]:
            file = stack.enter_context(_open(folder))
            if not _lock(file, folder / LOCK, shared):
                holder = file.read(200).decode(errors="replace").strip() or "another process"
                raise DatastoreError(
                    f"{folder} is being written to by {holder}; wait until it has finished, or choose another folder"
                )
            if not _is_at(file, folder / LOCK):
                raise DatastoreError(f"{folder} was removed by another process just now; run the same command again")
            return file

        def enter_first() -> None:
            file = enter(shared=False)
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError as error:
                raise _not_writable(folder, error) from error
            stack.callback(file.truncate, 0)
            if made:
                stack.callback(_remove_if_unused, folder)  # while the lock is held
            if ranks.size > 1:
                _lock(file, folder / LOCK, shared=True)

        def enter_other() -> None:
            if ranks.rank > 0:
                enter(shared=True)

        ranks.first(enter_first)
        ranks.each(enter_other)
        yield
    ranks.each(lambda: None)  # rank 0 may want the folder for itself, which it has when all have left


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _remove_if_unused(folder: Path) -> None:
    """Remove a folder that nothing was written to, such as that of a build whose corpus was refused."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:
        with suppress(PermissionError):  # Windows keeps what is open
            (folder / LOCK).unlink()
            folder.rmdir()


def _open(folder: Path) -> IO[bytes]:
    """The file whose lock counts, which stays in the folder: a regular one, since its content is replaced."""
    path = folder / LOCK
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = None if path.is_symlink() else os.open(path, flags, 0o666)
    except OSError as error:
        raise _not_writable(folder, error) from error
    found = path.lstat() if descriptor is None else os.fstat(descriptor)
    if descriptor is not None and stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        return os.fdopen(descriptor, "r+b", buffering=0)
    if descriptor is not None:
        os.close(descriptor)
    raise DatastoreError(f"{path} is a link or no plain file, expected a plain file of one name; remove it")


def _not_writable(folder: Path, error: OSError) -> DatastoreError:
    return DatastoreError(
        f"{folder} cannot be written to ({error.strerror}); make room or allow writing there, or choose another folder"
    )


def _lock(file: IO[bytes], path: Path, shared: bool) -> bool:
    """Lock a file, if nobody else has; the operating system unlocks it when it is closed or its process ends.

    Args:
        file: The open file.
        path: Its path.
        shared: Let others share the lock. Windows cannot: there, only rank 0 has it.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            if shared:
                return True
            file.seek(1 << 30)  # a locked byte cannot be read, and the first ones name the holder
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise DatastoreError(f"{path} cannot be locked ({error.strerror}); choose a folder on a disk") from error
    return True
