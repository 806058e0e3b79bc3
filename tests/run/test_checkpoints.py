"""Only complete checkpoints are seen, and the newest and best are kept."""

import hashlib
import json

import pytest

from alignctl.run.checkpoints import (
    MANIFEST,
    complete_checkpoints,
    newest_checkpoint,
    publish,
    remove_old,
    remove_torn,
)


def save(folder, step, content="weights"):
    staged = folder / ".staging" / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_text(content)
    (staged / "model.safetensors").chmod(0o600)
    (staged / "sub").mkdir()
    (staged / "sub" / "optimizer.pt").write_text("state")
    publish(staged, folder / f"checkpoint-{step}", step, {"processes": 2, "zero_stage": 3})
    return folder / f"checkpoint-{step}"


def test_newest_by_step_not_by_name(tmp_path):
    for step in (5, 100, 20):
        save(tmp_path, step)
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [5, 20, 100]
    assert newest_checkpoint(tmp_path).path == tmp_path / "checkpoint-100"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def delete(path):
    (path / "sub" / "optimizer.pt").unlink()


def truncate(path):
    (path / "model.safetensors").write_text("wei")


def halve_manifest(path):
    (path / MANIFEST).write_text('{"step": 9')


def empty_manifest(path):
    (path / MANIFEST).write_text("[]")


def delete_manifest(path):
    (path / MANIFEST).unlink()


def flip(path):
    (path / "model.safetensors").write_text("weighty")


def link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


DAMAGES = {
    delete: "sub/optimizer.pt is missing",
    truncate: "model.safetensors has 3 bytes, not 7",
    halve_manifest: "its MANIFEST.json is damaged",
    empty_manifest: "its MANIFEST.json is damaged",
    delete_manifest: "it has no MANIFEST.json",
    link: "it is a link to another folder",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_not_seen(tmp_path, damage):
    save(tmp_path, 4)
    damage(save(tmp_path, 9))
    assert newest_checkpoint(tmp_path).step == 4


@pytest.mark.parametrize("damage", [*DAMAGES, flip])
def test_damaged_checkpoints_are_named_and_removed(tmp_path, damage):
    save(tmp_path, 4)
    damage(path := save(tmp_path, 9))
    reason = (DAMAGES | {flip: "the content of model.safetensors has changed since it was written"})[damage]
    assert remove_torn(tmp_path) == {path: reason}
    assert sorted(one.name for one in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]
    assert remove_torn(tmp_path) == {}


def test_what_a_link_leads_to_is_left_alone(tmp_path):
    link(save(tmp_path, 9))
    remove_torn(tmp_path)
    assert (tmp_path / "elsewhere" / "model.safetensors").exists()


def test_older_checkpoints_are_not_hashed(tmp_path):
    flip(save(tmp_path, 4))
    save(tmp_path, 9)
    assert remove_torn(tmp_path) == {}
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [4, 9]


def test_a_kill_inside_a_save_leaves_the_one_before(tmp_path):
    save(tmp_path, 4)
    staged = tmp_path / ".staging" / "checkpoint-8"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_text("half")
    assert newest_checkpoint(tmp_path).step == 4


def test_manifest_lists_every_file_and_they_can_be_read_by_others(tmp_path):
    path = save(tmp_path, 3)
    manifest = json.loads((path / MANIFEST).read_text())
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in (("model.safetensors", b"weights"), ("sub/optimizer.pt", b"state"))
    }
    kind = {"processes": 2, "zero_stage": 3}
    assert manifest == {"step": 3, "kind": kind, "files": files}
    assert newest_checkpoint(tmp_path).kind == kind
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
