"""Writing a file whole or not at all: everything patchkit writes goes through here.

A failure to write is a `RunError`: the run was fine, the disk was not.
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from patchkit.errors import RunError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Puts `data` (text as UTF-8) at `path` so that readers see the old file or the whole new one.

    Missing parent directories are made. Raises RunError naming the file and the fix when the disk is full,
    the place is not writable or the system reports anything else; the temporary file is then gone and the old
    file is as it was.
    """
    path = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # 0o666 less the umask, as a plain open() would give: results are often read by other people.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_failure(path, len(payload), error) from error


def remove(path: Path | str) -> None:
    """Takes a file away, if it is there. Raises RunError naming the file when the system does not allow it."""
    path = Path(path)
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        # What will be written beside it says so better.
        return
    except OSError as error:
        raise write_failure(path, 0, error) from error


def write_failure(path: Path, size: int, error: OSError) -> RunError:
    """What to say where so many bytes could not be written to a path."""
    if error.errno in _DISK_FULL:
        what = f"no space left for {size:,} bytes ({error.strerror})"
        fix = "Free some space or give another --out directory"
    elif error.errno in _NOT_ALLOWED:
        what = f"not allowed to write there ({error.strerror})"
        fix = "Change the permissions or give another --out directory"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        what = f"a file is where a directory should be, or the other way round ({error.strerror})"
        fix = "Move it away or give another --out directory"
    else:
        what = f"{error.strerror or error}"
        fix = "Give another --out directory"
    return RunError(f"{path}: could not be written: {what}. {fix}. Nothing half-written was left.")
