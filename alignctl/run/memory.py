"""How much memory is left on this machine. Torch-free."""

from __future__ import annotations

from pathlib import Path

_MACHINE, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that may still be taken, of the machine and of the control group that a container or a job is; None where
    the system does not say."""
    free = [one for one in (_of_machine(), _of_group()) if one is not None]
    return min(free, default=None)


def _of_machine() -> int | None:
    try:
        lines = _MACHINE.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _of_group() -> int | None:
    try:
        most, taken = (int((_GROUP / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # `max` where there is no limit
        return None
    return most - taken + int(stat.get("inactive_file", 0))
