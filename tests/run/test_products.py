"""Rows that a stage makes: whole or not there, known by their hashes, noted by the stage that is trained on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import alignctl
from alignctl.config.compose import compose, read_request
from alignctl.config.stages import StageConfig, stage_config
from alignctl.errors import AlignctlError, RequestError
from alignctl.run import products
from alignctl.run.files import read_json, read_record, write_json
from alignctl.run.fingerprint import file_digest, listed
from alignctl.run.forms import PRODUCT
from alignctl.run.paths import RunPaths
from alignctl.run.products import (
    check_models,
    read_manifest,
    rows_changed,
    take_rows,
    unread_models,
    write_rows_product,
)
from alignctl.run.state import is_done

PAIRS = [{"prompt": f"p{i}", "chosen": "good", "rejected": "b\u00e4d"} for i in range(3)]


def stages() -> tuple[StageConfig, StageConfig]:
    """One that makes rows, so to speak, and one that reads them."""
    config, problems = compose(read_request(["recipe=quickstart", "eval=default", "dpo.data.from=sft"]))
    assert problems == []
    return stage_config(config, "sft"), stage_config(config, "dpo")


def test_rows_and_their_manifest(tmp_path):
    giver, _ = stages()
    paths = RunPaths(tmp_path).stage("sft")
    made = write_rows_product(paths, iter(PAIRS), "preferences", giver)
    content = (tmp_path / "sft" / "rows" / "rows.jsonl").read_bytes()
    assert [json.loads(line) for line in content.splitlines()] == PAIRS
    assert json.loads((tmp_path / "sft" / "rows" / "manifest.json").read_text()) == {
        "kind": "preferences",
        "count": 3,
        "columns": ["prompt", "chosen", "rejected"],
        "files": {"rows.jsonl": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
        "stage": "sft",
        "method": "sft",
        "alignctl": alignctl.__version__,
    }
    assert read_manifest(paths.rows) == made
    assert [path.name for path in paths.root.iterdir()] == ["rows"]


def breaking() -> Iterator[dict]:
    yield PAIRS[0]
    raise RuntimeError("the judge is gone")


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([], AlignctlError, "no rows were made"),
        ([PAIRS[0], {"prompt": "p", "completion": "c"}], ValueError, "row 2 is no preferences: it has the columns"),
        ([PAIRS[0], PAIRS[1] | {"margin": 1.0}], ValueError, "row 2 has the columns prompt, chosen, rejected, margin"),
        (breaking(), RuntimeError, "the judge is gone"),
    ],
    ids=["none", "another kind", "another column", "breaks off"],
)  # fmt: skip
def test_what_is_not_whole_is_not_there(tmp_path, rows, error, words):
    giver, _ = stages()
    paths = RunPaths(tmp_path).stage("sft")
    with pytest.raises(error, match=words):
        write_rows_product(paths, rows, "preferences", giver)
    assert not paths.rows.root.exists()
    write_rows_product(paths, PAIRS, "preferences", giver)
    assert read_manifest(paths.rows).count == 3
    assert [path.name for path in paths.root.iterdir()] == ["rows"], "what was half written is gone"


def trained(tmp_path: Path):
    """A run whose second stage is done with the rows of the first."""
    giver, taker = stages()
    run = RunPaths(tmp_path)
    first, second = run.stage("sft"), run.stage("dpo")
    write_rows_product(first, PAIRS, "preferences", giver)
    write_json(first.result, {})
    take_rows(taker, second)
    second.model.mkdir()
    second.checkpoints.mkdir()
    second.logs(1).mkdir(parents=True)
    write_json(second.result, {})
    return giver, taker, first, second


def test_a_stage_is_done_as_long_as_its_rows_are_those(tmp_path):
    giver, taker, first, second = trained(tmp_path)
    assert is_done(first)
    assert is_done(second)
    assert read_json(second.inputs)["rows_from"] == "sft"
    write_rows_product(first, PAIRS, "preferences", giver)  # made again, the same
    assert is_done(second)
    take_rows(taker, second)
    assert second.model.exists()
    write_rows_product(first, PAIRS[:2], "preferences", giver)
    assert is_done(first)
    assert rows_changed(second)
    assert not is_done(second)


def test_with_other_rows_it_starts_anew(tmp_path):
    giver, taker, first, second = trained(tmp_path)
    second.job_lock.symlink_to("12 0 n1 34")
    write_rows_product(first, PAIRS[:2], "preferences", giver)
    take_rows(taker, second)
    assert {path.name for path in second.root.iterdir()} == {".job", "inputs.json", "logs"}
    assert not rows_changed(second)


@pytest.mark.parametrize("damage", ["shorter", "other"])
def test_rows_that_are_not_what_was_written_are_refused(tmp_path, damage):
    _, taker, first, second = trained(tmp_path)
    content = first.rows.data.read_text()
    first.rows.data.write_text(content[:-5] if damage == "shorter" else content.replace("good", "evil"))
    with pytest.raises(AlignctlError, match=r"rows.jsonl is not what stage `sft` wrote") as refused:
        take_rows(taker, second)
    assert str(first.rows.root) in refused.value.problems[0].hint
    assert second.model.exists()


def test_rows_that_are_not_made_yet(tmp_path):
    _, taker = stages()
    with pytest.raises(AlignctlError, match="stage `sft` has made no rows yet"):
        take_rows(taker, RunPaths(tmp_path).stage("dpo"))


def test_a_stage_without_such_rows_notes_nothing(tmp_path):
    giver, _ = stages()
    take_rows(giver, RunPaths(tmp_path).stage("sft"))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_as_it_was_saved_is_no_start(tmp_path):
    _, taker = stages()
    paths = RunPaths(tmp_path)
    weights = paths.stage("sft").model / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"12345")
    check_models(taker, paths.stage("dpo"), pytest.fail)  # saved by who knows what
    write_json(
        weights.parent / "manifest.json",
        {"product": "model", "files": {weights.name: {"bytes": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}}},
    )
    check_models(taker, paths.stage("dpo"), pytest.fail)
    for damaged in (b"123", b"12354", None):  # cut short, two bytes flipped, gone
        weights.unlink() if damaged is None else weights.write_bytes(damaged)
        with pytest.raises(AlignctlError, match=r"model.safetensors is not what stage `sft` saved"):
            check_models(taker, paths.stage("dpo"), pytest.fail)


def test_a_large_model_is_read_once_for_all_its_roles_and_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "_LARGE", 5)
    read, told = [], []
    monkeypatch.setattr(products, "file_digest", lambda path: (read.append(path.name), file_digest(path))[1])
    taker = dataclasses.replace(stages()[1], roles_from={"reference": "sft"})
    paths = RunPaths(tmp_path)
    model = paths.stage("sft").model
    model.mkdir(parents=True)
    for name, content in {"model.safetensors": b"12345", "config.json": b"{}"}.items():
        (model / name).write_bytes(content)
    write_json(model / "manifest.json", {"files": listed(model)})
    assert taker.start_from == "sft"
    assert unread_models(taker, paths.stage("dpo")) == [model / "model.safetensors"]
    check_models(taker, paths.stage("dpo"), told.append)
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert told == ["dpo: 5 bytes of models are read, to see whether they are as earlier stages saved them"]
    assert unread_models(taker, paths.stage("dpo")) == []
    check_models(taker, paths.stage("dpo"), told.append)
    assert (read[2:], len(told)) == (["config.json"], 1)
    (model / "model.safetensors").write_bytes(b"54321")
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(AlignctlError, match=r"model.safetensors is not what stage `sft` saved"):
        check_models(taker, paths.stage("dpo"), told.append)
    assert len(told) == 2


def test_an_adapter_over_a_shared_base_is_looked_at_where_it_is(tmp_path):
    """Its stage has no `model/` with `model.merge=false`; with one, that is not what is taken."""
    arguments = ["recipe=rlhf_quickstart", "peft=lora", "sft.peft.type=none", "rm.model.merge=false"]
    config, problems = compose(read_request([*arguments, "ppo.sharing=shared_base"]))
    assert problems == []
    taker, paths = stage_config(config, "ppo"), RunPaths(tmp_path)
    weights = paths.stage("rm").adapter / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"12345")
    write_json(
        weights.parent / "manifest.json",
        {"product": "adapter", "files": {weights.name: {"bytes": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}}},
    )
    check_models(taker, paths.stage("ppo"), pytest.fail)
    weights.write_bytes(b"123")
    with pytest.raises(AlignctlError, match=r"adapter_model.safetensors is not what stage `rm` saved"):
        check_models(taker, paths.stage("ppo"), pytest.fail)


def test_a_manifest_that_does_not_say_what_its_files_hold_is_damaged(tmp_path):
    write_json(tmp_path / "manifest.json", {"files": {"model.safetensors": {"bytes": 5}}})
    with pytest.raises(RequestError, match="manifest.json"):
        read_record(tmp_path / "manifest.json", PRODUCT)
