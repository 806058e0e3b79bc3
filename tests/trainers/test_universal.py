"""What is made of a checkpoint for other processes; the whole way is in tests/whole/test_processes.py."""

from __future__ import annotations

import pytest

from alignctl.run.disk import lack_of_room
from alignctl.trainers.base import universal

pytestmark = pytest.mark.train


def test_a_checkpoint_stays_as_it_is_though_there_is_no_room_for_what_is_made_of_it(tmp_path, monkeypatch):
    checkpoint, staging = tmp_path / "checkpoint-5", tmp_path / ".staging"
    (checkpoint / "global_step5").mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step5")
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"0" * 5000)
    before = {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    monkeypatch.setattr("deepspeed.checkpoint.ds_to_universal.main", lambda arguments: None)
    universal._convert(checkpoint, staging / "converted")
    assert sorted(file.name for file in (staging / "converted").iterdir()) == ["latest", "trainer_state.json"]
    assert lack_of_room(RuntimeError("unexpected pos 576 vs 534"), staging) is None
    assert {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()} == before
