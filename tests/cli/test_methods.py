"""`alignctl methods`, and that the table, conf/method/, the pages and the recipes agree."""

from __future__ import annotations

import json
import re

import pytest
from support.added import add_method

from alignctl.cli.methods import describe_methods, render_methods
from alignctl.config.compose import CONF_DIR, list_recipes
from alignctl.config.trl_fields import config_fields
from alignctl.methods.registry import methods

# Whose fields without an effect are refused one by one.
TRL = {"grpo": "trl.trainer.grpo_config:GRPOConfig", "rloo": "trl.trainer.rloo_config:RLOOConfig"}
NAMES = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))


def test_lists_every_method_with_what_it_needs(alignctl):
    done = alignctl("methods")
    assert done.code == 0
    for name in NAMES:
        assert f"\n{name}: " in "\n" + done.out
    assert "messages; label: true or false" in done.out
    assert max(map(len, done.out.splitlines())) <= 110


def test_json(alignctl):
    rows = {row["name"]: row for row in json.loads(alignctl("methods", "--json").out)}
    assert sorted(rows) == NAMES
    assert rows["kto"]["models"] == ["policy", "reference"]
    assert set(rows["kto"]["formats"]) >= {"feedback", "preference"}
    assert rows["simpo"]["models"] == ["policy"]
    assert rows["orpo"]["stability"] == "young"
    assert all(row["when"] and row["paper"].startswith("https://") for row in rows.values())


def test_columns_that_a_method_looks_at_beside_the_texts(alignctl):
    blocks = alignctl("methods").out.split("\n\n")
    of = {block.partition(":")[0].strip(): block for block in blocks}
    assert "column `margin`, a number, 0.0 where a row has none" in of["reward"]
    assert "any other columns" in of["ppo"]
    assert "margin" not in of["dpo"]


def test_what_makes_rows_says_of_which_kind(monkeypatch):
    assert "makes" not in render_methods()
    add_method(monkeypatch, "pick", "sft", product="rows", makes="preferences")
    assert re.search(r"^  makes +preferences: two completions", render_methods(), re.MULTILINE)
    assert [row["makes"] for row in describe_methods() if "makes" in row] == ["preferences"]


def test_one_yaml_a_method():
    assert {"dpo", "ipo", "kto", "orpo", "ppo", "reward", "sft", "simpo"} <= set(NAMES)
    assert sorted(methods()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_fields_that_a_stage_may_not_set_are_fields(name):
    """When TRL drops one, it must go from our table too."""
    method = methods()[name]
    theirs = {field for one in TRL.values() for field in config_fields(one)} if name in TRL else set()
    inherited = {"deepspeed", "fsdp", "fsdp_config", "enable_jit_checkpoint"}
    assert set(method.owned_fields) - set(config_fields(method.config_class)) - theirs - inherited <= {
        "trust_remote_code",
        "pad_token",
        "model_init_kwargs",
    }


def test_every_pipeline_has_a_recipe_for_a_laptop_and_one_for_llama():
    names = {recipe.name for recipe in list_recipes()}
    for pipeline in ("sft_dpo", "sft_rm", "sft_kto", "orpo", "sft_simpo", "rlhf"):
        assert {f"{pipeline}_quickstart", f"{pipeline}_llama3"} <= names


@pytest.mark.train
@pytest.mark.parametrize("name", NAMES)
def test_trainer_and_config_can_be_resolved(name):
    from alignctl.methods.registry import resolve

    method = methods()[name]
    config = resolve(method.config_class)(output_dir="unused", bf16=False)
    assert set(config_fields(method.config_class)) <= set(vars(config)), "the source was read as something it is not"
    assert resolve(method.trainer)
    assert callable(resolve(method.stage_function))


@pytest.mark.parametrize("name", TRL)
def test_every_field_of_trl_is_taken_or_refused_with_what_to_set(name):
    method = methods()[name]
    known = {*config_fields(method.config_class), *method.owned_fields, *method.renamed}
    assert set(config_fields(TRL[name])) <= known
