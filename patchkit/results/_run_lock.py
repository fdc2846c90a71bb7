"""One run at a time in a directory: whoever works there holds a lock on a hidden file in it.

The system lets go of the lock when its holder ends, however that happens, so that a file left behind is in nobody's way.
"""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from pathlib import Path

from patchkit.errors import InputError
from patchkit.files import write_failure

LOCK = ".lock"

# Those of this process. A copy of the process would keep them locked after its death.
_HELD: set[int] = set()


def _let_go_in_a_copy() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_a_copy)


class RunLock:
    """The lock of a directory, which is made where it is missing.

    Raises:
        InputError: another process holds it, or this one does already.
        RunError: the place is not writable.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._locked()
        except OSError as error:
            raise write_failure(self._path, 0, error) from error
        _HELD.add(self._descriptor)

    def release(self) -> None:
        """Takes the file away and lets go."""
        if self._descriptor in _HELD:
            _HELD.remove(self._descriptor)
            # While it is still held: whoever waits for it sees that the file is not the one in the directory.
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)

    def _locked(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(descriptor, self._path)
                if self._is_there(descriptor):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            # The one who held it took it away in between.
            os.close(descriptor)

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 256, 0).decode("utf-8", "replace").split(" ", 1)
        who = f"process {holder[0]} on {holder[1]}" if len(holder) == 2 else "another process"
        raise InputError(
            f"{path.parent}: {who} is working in this directory. Wait until it has ended, or choose another --out "
            "directory; two runs in one would spoil each other."
        ) from None
    except OSError as error:
        # Some file systems of clusters have no locks, and all goes well without one as long as nobody starts two runs.
        warnings.warn(
            f"{path.parent}: no lock could be had here ({error.strerror}); do not start two runs in this directory",
            stacklevel=4,
        )
