"""A global batch: what follows from it, whoever gives it, and what it is where nobody does."""

import pytest

from alignctl.config.batches import batch_of
from alignctl.config.compose import compose, read_request, value_sources
from alignctl.plan.alone import with_processes
from alignctl.plan.memory import Place
from alignctl.plan.plan import make_plan

TWO, EIGHT = ("distributed=ddp", "launcher.processes=2"), ("distributed=zero2", "launcher.gpus_per_node=8")
RLHF, GRPO = "recipe=rlhf_quickstart", "recipe=grpo_quickstart"


def composed(*arguments: str) -> dict:
    config, problems = compose(read_request(arguments))
    assert problems == []
    return config


@pytest.mark.parametrize(
    ("arguments", "stage", "follows", "rows"),
    [
        (["recipe=dpo_llama3"], "dpo", (2, 8), 16),
        (["recipe=dpo_llama3", *EIGHT], "dpo", (2, 8), 128),
        (["recipe=dpo_llama3", "dpo.global_batch_size=64"], "dpo", (2, 32), 64),
        (["recipe=dpo_llama3", "dpo.global_batch_size=64", *EIGHT], "dpo", (2, 4), 64),
        (["recipe=dpo_llama3", "global_batch_size=64", *EIGHT, "launcher.nodes=4"], "dpo", (2, 1), 64),
        (["recipe=dpo_llama3", "dpo.global_batch_size=64", "dpo.per_device_train_batch_size=4"], "dpo", (4, 16), 64),
        (["recipe=dpo_llama3", "global_batch_size=64", "dpo.global_batch_size=null"], "dpo", (2, 8), 16),
        (["recipe=sft_dpo_llama3", "global_batch_size=32", "dpo.global_batch_size=16"], "sft", (2, 16), 32),
        (["recipe=dpo_llama3", "dpo.global_batch_size=64", "dpo.gradient_accumulation_steps=32"], "dpo", (2, 32), 64),
        (["recipe=dpo_llama3", "global_batch_size=64", *EIGHT, "launcher.stages.dpo.nodes=2"], "dpo", (2, 2), 64),
        (["recipe=dpo_llama3", "global_batch_size=64", "distributed=fsdp2", "launcher.gpus_per_node=8"]
         + ["distributed.parallelism_config.sp_size=4"], "dpo", (2, 4), 64),
        ([RLHF, "ppo.global_batch_size=96", *TWO], "ppo", (48, 1), 96),
        ([RLHF, "ppo.global_batch_size=96", *TWO, "ppo.num_mini_batches=4"], "ppo", (192, 1), 96),
        ([GRPO, "grpo.global_batch_size=64", *TWO, "grpo.num_mini_batches=2"], "grpo", (64, 1), 64),
    ],
)  # fmt: skip
def test_what_follows(tmp_path, arguments, stage, follows, rows):
    """Rows of a process's batch, and how many of these it accumulates; processes that compute rows together have as
    many as they would have apart."""
    config = composed(*arguments)
    plan = make_plan(config, "r", tmp_path / "run")
    planned = next(one for one in plan.stages if one.config.name == stage)
    given = planned.config.trainer
    assert (given["per_device_train_batch_size"], given.get("gradient_accumulation_steps", 1)) == follows
    assert planned.global_batch_size == batch_of(config, stage).rows == rows


def test_what_is_given_beside_a_batch_or_after_it_is_left(tmp_path):
    """A recipe's accumulation gives way to a batch of the command line, and stays where it stands beside the batch."""
    recipe = tmp_path / "mine.yaml"
    own = "dpo: {global_batch_size: 32, gradient_accumulation_steps: 4}"
    recipe.write_text(f"defaults: [dpo_llama3, _self_]\n{own}\n")
    assert composed(f"recipe={recipe}")["dpo"]["gradient_accumulation_steps"] == 4
    config = composed(f"recipe={recipe}", "dpo.global_batch_size=64")
    assert config["dpo"]["gradient_accumulation_steps"] == 32
    assert composed(f"recipe={recipe}", "~dpo.gradient_accumulation_steps")["dpo"]["gradient_accumulation_steps"] == 16


def test_where_what_follows_comes_from():
    sources = value_sources(read_request(["recipe=dpo_llama3", "global_batch_size=64"]))
    assert sources["dpo.gradient_accumulation_steps"] == "follows from `global_batch_size`"
    sources = value_sources(read_request(["recipe=dpo_llama3"]))
    assert sources["dpo.gradient_accumulation_steps"].endswith("dpo_llama3.yaml")


def test_it_follows_for_one_of_many_processes():
    """What is rehearsed for so many has its batch divided among so many."""
    config = composed("recipe=dpo_llama3", "dpo.global_batch_size=64", *EIGHT)
    assert with_processes(config, Place(0, 32), "run")["dpo"]["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    ("more", "left"),
    [([], 32), (["dpo.learning_rate=1e-6"], None), (["dpo.learning_rate=1e-6", "dpo.batch_for=8"], 8)],
    ids=["the recipe's", "another rate", "both"],
)
def test_a_published_batch_goes_with_its_learning_rate(more, left):
    assert composed("recipe=dpo_llama3_70b", *more)["dpo"].get("batch_for") == left
