"""How much memory is left on this machine. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MACHINE = Path("/proc/meminfo")
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# How the two versions of control groups call the limit, what is taken, and what of that is a cache that can go.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def free_memory() -> int | None:
    """Bytes that may still be taken, of the machine and of every control group that this process is in: a container's,
    a job's, a step's. None where the system does not say."""
    return min((one for one in (_of_machine(), *_of_groups()) if one is not None), default=None)


def _of_machine() -> int | None:
    try:
        lines = _MACHINE.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _of_groups() -> Iterator[int | None]:
    """Of the groups that limit memory, from this process's own up to the one that all are in. The path of the own one
    may be the host's, which a container does not see; its own limit is then at the top."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    yield _of_group(_GROUPS, _V2)
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, files = (_GROUPS / "memory", _V1) if controllers else (_GROUPS, _V2)
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if ".." not in folder.parts and folder.is_relative_to(top):
                yield _of_group(folder, files)


def _of_group(folder: Path, files: tuple[str, str, str]) -> int | None:
    limit, usage, cache = files
    try:
        most, taken = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # `max` where there is no limit
        return None
    return most - taken + int(stat.get(cache, 0))
