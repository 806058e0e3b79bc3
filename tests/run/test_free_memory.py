"""How much memory is left, of the machine and of what a container or a job may take."""

from __future__ import annotations

import pytest

from alignctl.run import memory

MACHINE = 5000 * 1024


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine with as much free, and a function that writes the files of a control group."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)

    def write(group: str, **files: str) -> None:
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / group / f"memory.{name}").write_text(f"{content}\n")

    return write


def test_the_smaller_of_machine_and_container_counts(tmp_path, groups):
    assert memory.free_memory() == MACHINE
    groups("", max="max", current="3000000", stat="anon 1000\ninactive_file 500000")
    assert memory.free_memory() == MACHINE
    groups("", max="4000000")
    assert memory.free_memory() == 1_500_000
    (tmp_path / "meminfo").unlink()
    (tmp_path / "memory.stat").unlink()
    assert memory.free_memory() is None


def test_the_limit_of_a_job_lies_above_the_group_of_its_process(tmp_path, groups):
    (tmp_path / "own").write_text("0::/slurm/job_7/step_0/task_0\n")
    groups("slurm", max="max", current="9", stat="inactive_file 0")
    groups("slurm/job_7", max="4000000", current="3000000", stat="inactive_file 200000")
    groups("slurm/job_7/step_0/task_0", max="max", current="10", stat="inactive_file 0")
    groups("slurm/job_8", max="100", current="50", stat="inactive_file 0")  # another's
    assert memory.free_memory() == 1_200_000
    groups("slurm/job_7/step_0", max="700000", current="500000", stat="inactive_file 0")
    assert memory.free_memory() == 200_000


@pytest.mark.parametrize("path", ["/slurm/job_7/step_0", "/docker/what-only-the-host-sees", "/../elsewhere"])
def test_the_first_version_of_control_groups(tmp_path, groups, path):
    (tmp_path / "own").write_text(f"5:cpu,cpuacct:/other\n4:memory:{path}\n1:name=systemd:/\n0::/\n")
    stat = "inactive_file 1\ntotal_inactive_file 100000"
    unlimited = {"limit_in_bytes": "9223372036854771712", "usage_in_bytes": "10", "stat": stat}
    limited = {"limit_in_bytes": "3000000", "usage_in_bytes": "2500000", "stat": stat}
    job = path.startswith("/slurm")
    groups("memory", **(unlimited if job else limited))
    groups("memory/slurm/job_7", **limited)
    assert memory.free_memory() == 600_000
