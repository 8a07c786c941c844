"""Writing a file so that its name always stands for a whole file."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What flock says on a file system without locks, such as some network mounts.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """`write(temporary path)`, flush it to the disk, then give it the name `path`.

    Whatever happens on the way (a full disk, kill -9, a power cut), what had the name before is still there and whole.
    What a killed process leaves is `.NAME.PID.THREAD.tmp` beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        write(str(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same path, a file that is made for this and stays.

    However a process ends, its turn ends with it. Where the system (Windows) or the
    file system has no locks nobody waits.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def _sync_directory(directory: Path) -> None:
    # The rename itself is safe only when the directory is on the disk. Windows cannot open a directory.
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
