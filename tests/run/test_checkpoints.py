"""Only complete checkpoints are seen, and the newest and best are kept."""

import hashlib
import json
import resource
import shutil

import pytest

from alignctl.run.checkpoints import (
    DAMAGED,
    MANIFEST,
    STAGING,
    changed_files,
    complete_checkpoints,
    finish_staged,
    is_read,
    newest_checkpoint,
    note_part,
    publish,
    remove_old,
    set_aside_torn,
)
from alignctl.run.hashed import sync_hashed, write_hashed

KIND = {"processes": 2, "zero_stage": 3}
PARTS = ("model.safetensors", "sub/optimizer.pt")  # of two processes, one each


def stage(folder, step, content="weights", parts=PARTS):
    staged = folder / STAGING / f"checkpoint-{step}"
    (staged / "sub").mkdir(parents=True)
    (staged / "model.safetensors").write_text(content)
    (staged / "model.safetensors").chmod(0o600)
    (staged / "sub" / "optimizer.pt").write_text("state")
    for rank, name in enumerate(parts):
        note_part(staged, rank, step, KIND, {name: sync_hashed(staged / name)})
    return staged


def save(folder, step, content="weights"):
    return publish(stage(folder, step, content))


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


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_named_and_set_aside(tmp_path, damage):
    save(tmp_path, 4)
    for _ in range(2):
        damage(path := save(tmp_path, 9))
        assert set_aside_torn(tmp_path) == {path: DAMAGES[damage]}
        assert sorted(one.name for one in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    assert sorted(one.name for one in (tmp_path / DAMAGED).iterdir()) == ["checkpoint-9", "checkpoint-9-2"]
    assert set_aside_torn(tmp_path) == {}


@pytest.mark.parametrize("name", ["checkpoint-best-so-far", "checkpoint-6-backup", "checkpoint-", "checkpoint-1.parts"])
def test_what_others_keep_among_checkpoints_is_let_be(tmp_path, name):
    (save(tmp_path, 6)).rename(tmp_path / name)
    for step in (7, 8):
        save(tmp_path, step)
    assert newest_checkpoint(tmp_path).step == 8
    remove_old(tmp_path, 1, None)
    (tmp_path / name / MANIFEST).unlink()
    assert set_aside_torn(tmp_path) == {}
    assert sorted(one.name for one in tmp_path.glob("checkpoint-*")) == sorted([name, "checkpoint-8"])
    assert (tmp_path / name / "model.safetensors").read_text() == "weights"


READ = ("model.safetensors", "adapter_config.json", "config.json", "trainer_state.json", "global_step4/a_states.pt")
NOT_READ = ("README.md", "tokenizer.json", "reference/tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("name", NOT_READ)
def test_a_checkpoint_is_taken_though_files_are_damaged_that_training_does_not_read(tmp_path, name):
    path = save(tmp_path, 4)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 3, "sha256": "0", "rank": 1}
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert newest_checkpoint(tmp_path).flaws == (f"{name} is missing",)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("abc")
    (checkpoint,) = complete_checkpoints(tmp_path)
    assert checkpoint.flaws == ()
    assert changed_files(checkpoint, 1, 2) == [name]


def test_what_training_reads():
    assert [name for name in (*READ, *NOT_READ) if is_read(name)] == [*READ]


def test_what_a_link_leads_to_is_left_alone(tmp_path):
    link(save(tmp_path, 9))
    set_aside_torn(tmp_path)
    assert (tmp_path / "elsewhere" / "model.safetensors").exists()


def test_each_process_looks_at_what_it_wrote(tmp_path):
    flip(save(tmp_path, 4))
    (checkpoint,) = complete_checkpoints(tmp_path)
    assert [changed_files(checkpoint, rank, 2) for rank in (0, 1)] == [["model.safetensors"], []]
    assert [changed_files(checkpoint, rank, 3) for rank in (0, 1, 2)] == [["model.safetensors"], [], []]
    assert changed_files(checkpoint, 0, 1) == ["model.safetensors"]


def test_a_checkpoint_lacks_its_name_until_all_have_written(tmp_path):
    staged = stage(tmp_path, 4, parts=PARTS[:1])
    assert publish(staged) is None
    assert newest_checkpoint(tmp_path) is None
    note_part(staged, 1, 4, KIND, {PARTS[1]: sync_hashed(staged / PARTS[1])})
    assert publish(staged) == tmp_path / "checkpoint-4"
    assert not any((tmp_path / STAGING).iterdir())


def test_what_was_staged_by_all_becomes_complete_where_its_run_was_killed(tmp_path):
    stage(tmp_path, 4)
    stage(tmp_path, 9, parts=PARTS[:1])
    finish_staged(tmp_path)
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [4]
    assert not (tmp_path / STAGING).exists()


def test_a_file_is_hashed_while_it_is_written(tmp_path):
    content = bytes(range(256)) * 1000
    written = write_hashed(tmp_path / "sub" / "file", lambda file: [file.write(content), file.write(b"end")])
    assert (tmp_path / "sub" / "file").read_bytes() == content + b"end"
    assert written == sync_hashed(tmp_path / "sub" / "file")


def test_the_systems_error_is_raised_whatever_a_library_makes_of_it(tmp_path):
    def write(file):
        try:
            file.write(b"content")
        except OSError as error:
            raise RuntimeError("unexpected position") from error

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_hashed(tmp_path / "full", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "rank": rank}
        for rank, (name, content) in enumerate(zip(PARTS, (b"weights", b"state"), strict=True))
    }
    assert manifest == {"step": 3, "kind": KIND, "files": files}
    assert newest_checkpoint(tmp_path).kind == KIND
    assert (path / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [3, 4]),
        (1, 2, [2, 4]),
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (9, None, [1, 2, 3, 4]),
        (-1, None, [1, 2, 3, 4]),
    ],
)
def test_remove_old(tmp_path, keep, best, left):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    remove_old(tmp_path, keep, tmp_path / f"checkpoint-{best}" if best else None)
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == left
