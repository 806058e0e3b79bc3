"""How much memory is left, of the machine and of what a container may take."""

from __future__ import annotations

from alignctl.run import memory


def test_the_smaller_of_machine_and_container_counts(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.free_memory() == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 500000\n")
    assert memory.free_memory() == 5000 * 1024
    (tmp_path / "memory.max").write_text("4000000\n")
    assert memory.free_memory() == 1_500_000
    (tmp_path / "meminfo").unlink()
    (tmp_path / "memory.stat").unlink()
    assert memory.free_memory() is None
