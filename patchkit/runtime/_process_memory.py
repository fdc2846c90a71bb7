"""What Linux says of this process's memory: the rooms of its control groups and limits, and its own peak."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

#: Where the kernel tells; other systems have none of these files, and then nothing is known from here.
PROC = Path("/proc/self")
GROUPS = Path("/sys/fs/cgroup")

#: Of version 2 and 1: folder of the memory controller, files of limits, of usage, and the line of memory.stat that says
#: how much of the usage are files that the kernel would give up.
_VERSIONS = {
    2: ("", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: ("memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def group_rooms() -> Iterator[int]:
    """Bytes left in each control group that this process is in, of those that have a limit."""
    for line in _lines(PROC / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            version = 1
        elif number == "0" and not controllers:
            version = 2
        else:
            continue
        # A limit of a group holds for the groups in it. In a container the path may be the host's, of which only the
        # end, or nothing, is to be seen.
        folder, limits, usage, cache = _VERSIONS[version]
        group = GROUPS / folder / path.strip("/")
        for place in (group, *group.parents):
            if not place.is_relative_to(GROUPS / folder):
                break
            yield from _room(place, limits, usage, cache)


def _room(group: Path, limits: tuple[str, ...], usage: str, cache: str) -> Iterator[int]:
    known = [int(line) for file in limits for line in _lines(group / file) if line.isdigit()]
    used = _lines(group / usage)
    if not known or not used:
        return
    given_up = [
        int(line.split()[1]) for line in _lines(group / "memory.stat") if line.startswith(f"{cache} ")
    ]
    yield max(0, min(known) - int(used[0]) + sum(given_up))


def own_rooms() -> Iterator[int]:
    """Bytes left of the limits that were set for this process alone (`ulimit -v`, `ulimit -d`)."""
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, now = resource.getrlimit(limit)[0], status(used)
        if most != resource.RLIM_INFINITY and now is not None:
            yield max(0, most - now)


def status(name: str) -> int | None:
    """Bytes of a line of /proc/self/status, None where there is none."""
    for line in _lines(PROC / "status"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def rise() -> Callable[[], int | None]:
    """Starts measuring; what is returned gives the bytes by which this process's memory rose since, at the most."""
    try:
        # 5 sets the peak to what there is now.
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return lambda: None
    before, files = status("VmHWM"), status("RssFile")

    def found() -> int | None:
        peak, mapped = status("VmHWM"), status("RssFile")
        if before is None or files is None or peak is None or mapped is None:
            return None
        return max(0, peak - before - max(0, mapped - files))

    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
