"""What a stage of GRPO or RLOO may not say, and what to type instead."""

from __future__ import annotations

import pytest

from alignctl.checks.notices import find_notices
from alignctl.checks.problems import find_problems
from alignctl.cli.tables import print_plan
from alignctl.config.compose import compose, read_request
from alignctl.config.stages import stage_config
from alignctl.methods.registry import methods
from alignctl.monitor.common import common_metrics
from alignctl.plan.plan import make_plan

GIVEN = ("model.path=owner/model", "data.path=owner/rows", "recipe=grpo_local", "grpo.reward_funcs=[scores:right]")


def composed(*more):
    config, problems = compose(read_request((*GIVEN, *more)))
    assert problems == []
    return config


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["grpo.num_generations=1"], "`grpo.num_generations` must be at least 2, got `1`"),
        (["grpo.num_generations=5"], "`grpo.per_device_train_batch_size=32` counts completions, and is no multiple of "
                                     "`grpo.num_generations=5`"),
        (["grpo.steps_per_generation=5"], "`grpo.num_mini_batches=5` is more than the prompts of a rollout, 4"),
        (["grpo.loss_type=cispo"], "takes `grpo.epsilon_high` for the largest ratio"),
        (["grpo.loss_type=vespo", "grpo.importance_sampling_level=sequence"], "weights whole completions by itself"),
        (["grpo.loss_type=vespo", "grpo.generation=vllm"], "vllm_importance_sampling_mode=sequence_mask` completions"),
        (["grpo.loss_type=sapo", "grpo.epsilon=0.1"], "`grpo.epsilon` would have no effect"),
        (["grpo.vespo_k_pos=1.0"], "`grpo.vespo_k_pos` would have no effect"),
        (["grpo.entropy_target=1.0"], "`grpo.entropy_target` would have no effect"),
        (["grpo.use_bias_correction_kl=false"], "`grpo.use_bias_correction_kl` would have no effect"),
        (["grpo.sync_ref_model=true"], "`grpo.sync_ref_model` would have no effect with `grpo.beta=0`"),
        (["grpo.delta=1.1"], "`grpo.delta=1.1` bounds the ratio before the clipping does, at 1.2"),
        (["grpo.max_redraws=3"], "`grpo.max_redraws` would have no effect"),
        (["grpo.use_adaptive_entropy=true", "grpo.entropy_coef=2"], "does not lie between `entropy_coef_min=0.0` and"),
        (["grpo.multi_objective_aggregation=normalize_then_sum", "grpo.scale_rewards=batch"],
         "`grpo.scale_rewards` would have no effect with `multi_objective_aggregation=normalize_then_sum`"),
        (["grpo.soft_overlong_tokens=200"], "is more than `grpo.response_length=128`"),
        (["grpo.use_vllm=true", "grpo.generation=continuous"],
         "`grpo.use_vllm=true` and `grpo.generation=continuous` exclude each other"),
        (["grpo.use_vllm=false", "grpo.generation=vllm"],
         "`grpo.use_vllm=false` and `grpo.generation=vllm` exclude each other"),
        (["grpo.use_vllm=true", "grpo.zero_signal_groups=redraw"], "cannot be where vLLM draws"),
        (["grpo.top_k=20"], "`grpo.top_k` is not a stage's to set"),
        (["grpo.generation_batch_size=64"], "`grpo.generation_batch_size` is not a stage's to set"),
        (["grpo.value_model=owner/model"], "unknown key `grpo.value_model`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(given, expected):
    messages = [problem.message for problem in find_problems(composed(*given))]
    assert any(expected in message for message in messages), messages


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], None),
        (["epsilon=0.3", "delta=4"], "nothing comes up to `grpo.epsilon`, `grpo.delta`"),
        (["epsilon=0.3", "num_iterations=2"], None),
        (["epsilon_high=0.28", "num_mini_batches=2"], None),
        (["generation=continuous", "off_policy_mask_threshold=1.0"], "comes up to `grpo.off_policy_mask_threshold`"),
        (["loss_type=cispo", "epsilon_high=5.0"], None),
        (["loss_type=dr_grpo"], "with `grpo.scale_rewards=group`: the other half is `grpo.scale_rewards=none`"),
        (["loss_type=dr_grpo", "scale_rewards=false"], None),
        (["loss_type=luspo"], "the other half is `grpo.importance_sampling_level=sequence`"),
        (["loss_type=luspo", "importance_sampling_level=sequence"], None),
        (["num_mini_batches=3"], "does not divide the 4 prompts of a process's rollout"),
    ],
    ids=str,
)
def test_what_does_nothing_or_is_half_is_told(given, expected):
    config = composed(*(f"grpo.{one}" for one in given))
    assert find_problems(config) == []
    found = find_notices(config, ["grpo"])
    assert [expected in line for line in found] == ([True] if expected else []), found


def test_what_trl_names_otherwise_is_taken():
    stage = stage_config(composed("grpo.max_completion_length=64", "grpo.steps_per_generation=2"), "grpo").trainer
    assert (stage["response_length"], stage["num_mini_batches"]) == (64, 2)
    both = "recipe=grpo_local", "grpo.max_completion_length=64", "grpo.response_length=32"
    (problem,) = compose(read_request(both))[1]
    assert "`grpo.max_completion_length` is another name of `grpo.response_length`" in problem.message


@pytest.mark.parametrize(
    ("name", "given", "spared"),
    [("grpo", {}, True), ("grpo", {"beta": 0.1}, False), ("rloo", {}, False), ("rloo", {"beta": 0.0}, True)],
)
def test_without_a_penalty_no_reference_is_held(name, given, spared):
    assert methods()[name].spares_reference(given) == spared


def test_metrics_have_common_names():
    ppo = {"score": 1.0, "kl/k1": 2.0, "kl/k3": 2.5, "completion_length": 8.0, "entropy": 0.5, "loss": 9.0}
    grpo = {"reward": 1.0, "kl/k1": 2.0, "kl": 0.1, "completions/mean_length": 8.0, "entropy": 0.5}
    expected = {"rollout/reward": 1.0, "rollout/kl": 2.0, "rollout/length": 8.0, "rollout/entropy": 0.5}
    assert common_metrics(ppo) == common_metrics(grpo) == expected
    assert common_metrics({"loss": 1.0}) == {}


@pytest.mark.parametrize(("beta", "models"), [("0", "policy"), ("0.1", "policy, reference")])
def test_a_plan_names_the_models_that_are_held(tmp_path, capsys, beta, models):
    print_plan(make_plan(composed(f"grpo.beta={beta}"), "grpo_local", tmp_path))
    assert f"models        {models}\n" in capsys.readouterr().out
