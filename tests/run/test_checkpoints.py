"""Only complete checkpoints are seen, and the newest and best are kept."""

import json

import pytest

from alignctl.run.checkpoints import MANIFEST, complete_checkpoints, newest_checkpoint, publish, remove_old


def save(folder, step, content="weights"):
    staged = folder / ".staging" / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_text(content)
    (staged / "model.safetensors").chmod(0o600)
    (staged / "sub").mkdir()
    (staged / "sub" / "optimizer.pt").write_text("state")
    publish(staged, folder / f"checkpoint-{step}", step)
    return folder / f"checkpoint-{step}"


def test_newest_by_step_not_by_name(tmp_path):
    for step in (5, 100, 20):
        save(tmp_path, step)
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [5, 20, 100]
    assert newest_checkpoint(tmp_path).path == tmp_path / "checkpoint-100"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def damage_missing(path):
    (path / "sub" / "optimizer.pt").unlink()


def damage_torn(path):
    (path / "model.safetensors").write_text("wei")


def damage_manifest(path):
    (path / MANIFEST).write_text('{"step": 9')


def damage_no_manifest(path):
    (path / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [damage_missing, damage_torn, damage_manifest, damage_no_manifest])
def test_damaged_checkpoints_are_not_seen(tmp_path, damage):
    save(tmp_path, 4)
    damage(save(tmp_path, 9))
    assert newest_checkpoint(tmp_path).step == 4


def test_a_kill_inside_a_save_leaves_the_one_before(tmp_path):
    save(tmp_path, 4)
    staged = tmp_path / ".staging" / "checkpoint-8"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_text("half")
    assert newest_checkpoint(tmp_path).step == 4


def test_manifest_lists_every_file_and_they_can_be_read_by_others(tmp_path):
    path = save(tmp_path, 3)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest == {"step": 3, "bytes": {"model.safetensors": 7, "sub/optimizer.pt": 5}}
    assert (path / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, None, [3, 4]), (1, 2, [2, 4]), (None, None, [1, 2, 3, 4]), (0, None, [1, 2, 3, 4]), (9, None, [1, 2, 3, 4])],
)
def test_remove_old(tmp_path, keep, best, left):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    remove_old(tmp_path, keep, tmp_path / f"checkpoint-{best}" if best else None)
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == left
