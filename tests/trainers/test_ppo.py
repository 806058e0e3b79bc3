"""PPO's parts by themselves and together: scoring, advantages, update, and what a stage makes of them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from support.files import read
from support.in_process import run_stages
from support.models import weights_of
from support.rewards import REWARDS
from transformers import LlamaForCausalLM

from alignctl.errors import AlignctlError, NotANumber, RequestError
from alignctl.models.tokenizer import train_tokenizer
from alignctl.rollout.episodes import Episodes, Segment
from alignctl.rollout.rewards import (
    FunctionReward,
    Moments,
    RewardModel,
    combine,
    load_function,
    score,
)
from alignctl.trainers.on_policy.experience import spread
from alignctl.trainers.on_policy.models import Outputs
from alignctl.trainers.on_policy.ppo.advantage import build_experience
from alignctl.trainers.on_policy.ppo.config import PPOConfig
from alignctl.trainers.on_policy.ppo.trainer import PPOTrainer

pytestmark = pytest.mark.train


def settings(**given):
    return PPOConfig(output_dir="unused", use_cpu=True, **given)


def alone(value):
    return value


# Scoring


def episodes(prompt_ids, completion_ids, ended=None, prompts=None, completions=None):
    segments = [[Segment(ids)] for ids in completion_ids]
    ended = ended or [True] * len(prompt_ids)
    return Episodes(prompt_ids, segments, ended, prompts or prompt_ids, completions or completion_ids)


def test_each_source_is_normalised_clipped_and_weighted():
    rewards = {"reward_model": [{7: 3.0}, {7: 5.0}, {7: 25.0}], "length": [{7: 1.0}, {7: 2.0}, {7: 3.0}]}
    found = combine(rewards, [1.0, 0.5], {"reward_model": (5.0, 2.0)}, clip=2.5)
    assert found == [{7: -1.0 + 0.5}, {7: 0.0 + 1.0}, {7: 2.5 + 1.25}]


def test_a_source_may_score_some_tokens_and_another_the_whole():
    rewards = {"steps": [{1: 1.0, 4: 3.0}], "whole": [{4: 10.0}]}
    assert combine(rewards, [2.0, 1.0], {}, clip=None) == [{1: 2.0, 4: 16.0}]


def test_the_penalty_for_no_end_is_at_the_last_token_whatever_was_scored(small):
    trainer = build(small, missing_eos_penalty=2.0)

    def steps(drawn):
        return [{0: 1.0}, {}]

    steps.name = "short"
    trainer.scoring.sources = [steps]
    two = episodes([[1], [1]], [[2, 3, 4], [5]], ended=[False, False])
    scores = trainer.scoring.combined(two, trainer.scoring.ask(two), {})
    assert scores == [{0: 1.0, 2: -2.0}, {0: -2.0}]


def test_running_moments_are_those_of_everything_seen():
    moments, values = Moments(), [1.0, 4.0, -2.0, 8.0, 0.5]
    for some in (values[:2], [], values[2:]):
        moments.add(Moments.of(some))
    exact = torch.tensor(values, dtype=torch.float64)
    assert moments.mean == pytest.approx(float(exact.mean()))
    assert moments.std == pytest.approx(float(exact.std(unbiased=False)))
    assert Moments(**vars(moments)) == moments


def test_rewards_that_are_no_numbers_stop_the_run():
    source = FunctionReward(lambda prompts, completions: [1.0, math.nan], "broken")
    with pytest.raises(NotANumber, match='not a number for a completion of prompt 2, "b"'):
        score([source], episodes([[1], [1]], [[2], [3]], prompts=["a", "b"]))


def test_a_function_that_gives_too_few_numbers_is_told():
    with pytest.raises(AlignctlError, match="gave 1 numbers for 2 completions"):
        FunctionReward(lambda prompts, completions: [1.0], "short")(episodes([[1], [1]], [[2], [3]]))


def test_functions_come_from_modules_and_files(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("def lengths(prompts, completions):\n    return [len(c) for c in completions]\n")
    assert load_function(f"{file}:lengths")(episodes([[1]], [[2, 3]], completions=["four"])) == [{1: 4.0}]
    for missing in (f"{file}:widths", "no_such_module:reward", f"{tmp_path / 'none.py'}:reward"):
        with pytest.raises(RequestError, match="there is no reward function"):
            load_function(missing)


def test_a_reward_model_with_another_tokenizer_is_given_the_text(small):
    """Its own ids of the same words: the score is what it would give to the conversation itself."""
    other = train_tokenizer(["a quite different text about a cat and a dog"] * 3, 300)
    assert other.get_vocab() != small.tokenizer.get_vocab()
    model = small.reward_model()
    asked = [{"role": "user", "content": "a cat?"}]
    said = [{"role": "assistant", "content": "a dog"}]
    ours = small.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    drawn = episodes([ours], [small.tokenizer("a dog")["input_ids"]], prompts=[asked], completions=[said])
    ((found,),) = (score.values() for score in RewardModel(model, other, small.tokenizer, max_tokens=1000)(drawn))
    whole = torch.tensor([other.apply_chat_template(asked + said, return_dict=False)])
    with torch.no_grad():
        assert found == pytest.approx(float(model(whole).logits), abs=1e-5)


def test_a_completion_ends_for_the_reward_model_as_it_did(small):
    """With what the template writes after the end token, which a policy does not draw; cut off, with no end at all."""
    tokenizer = small.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content + '<|end|>'", "message.content + '<|end|>\\n'"
    )
    asked, said = [{"role": "user", "content": "a cat?"}], [{"role": "assistant", "content": "a dog"}]
    source = RewardModel(small.reward_model(), tokenizer, tokenizer, max_tokens=1000)
    end, dog = tokenizer.eos_token_id, tokenizer("a dog")["input_ids"]
    both = episodes([[1], [1]], [[*dog, end], dog], ended=[True, False], prompts=[asked] * 2, completions=[said] * 2)
    line_break = tokenizer("\n")["input_ids"]
    assert source._as_trained_on(both) == [[*dog, end, *line_break], dog]
    assert source._tokenize(both)[1] == [[*dog, end, *line_break], dog]


# Advantages


def outputs(logps, values, last_values):
    flat = torch.tensor
    return Outputs(flat(logps), torch.zeros(len(logps)), flat(values), flat(last_values))


def two(ended=(True, True)):
    return episodes([[9], [9]], [[1, 2, 3], [4]], ended=list(ended))


def experience(ended=(True, True), scores=({2: 2.0}, {0: -1.0}), **given):
    """Two completions, of three tokens and of one."""
    parts = outputs([-1.0, -1.0, -1.0, -2.0], [0.1, 0.2, 0.3, 0.4], [7.0, 8.0])
    parts = parts._replace(ref_logps=torch.tensor([-1.5, -1.0, -1.0, -2.0]))
    args = settings(**{"gamma": 1.0, "lam": 1.0, "whiten_advantages": False} | given)
    return build_experience(two(ended), parts, scores, 0.1, args, alone)


def test_the_score_is_on_the_last_token_and_the_penalty_on_every_one():
    found = experience()
    torch.testing.assert_close(found.rewards, torch.tensor([[-0.05, 0.0, 2.0], [-1.0, 0.0, 0.0]]))
    # with gamma and lambda 1 the return is what is still to come
    torch.testing.assert_close(found.returns, torch.tensor([[1.95, 2.0, 2.0], [-1.0, 0.0, 0.0]]))
    torch.testing.assert_close(found.advantages, torch.tensor([[1.85, 1.8, 1.7], [-1.4, 0.0, 0.0]]))


def test_a_score_can_be_at_any_token():
    found = experience(scores=({0: 0.5, 2: 2.0}, {}))
    torch.testing.assert_close(found.rewards, torch.tensor([[0.45, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found.returns, torch.tensor([[2.45, 2.0, 2.0], [0.0, 0.0, 0.0]]))


def test_what_the_policy_did_not_write_is_not_learnt_from():
    """A tool's answer between two parts of a completion: neither penalty nor advantage, and rewards reach past it."""
    parts = [[Segment([1]), Segment([2], trained=False), Segment([3])], [Segment([4])]]
    drawn = Episodes([[9], [9]], parts, [True, True], ["", ""], ["", ""])
    given = outputs([-1.0, -1.0, -1.0, -2.0], [0.1, 0.2, 0.3, 0.4], [7.0, 8.0])
    given = given._replace(ref_logps=torch.tensor([-1.5, -9.0, -1.0, -2.0]))
    args = settings(gamma=1.0, lam=1.0, whiten_advantages=False)
    found = build_experience(drawn, given, [{2: 2.0}, {0: -1.0}], 0.1, args, alone)
    assert found.mask.tolist() == [[True, False, True], [True, False, False]]
    torch.testing.assert_close(found.rewards[0], torch.tensor([-0.05, 0.0, 2.0]))
    torch.testing.assert_close(found.advantages[0], torch.tensor([1.85, 0.0, 1.7]))
    assert found.of([0]).mask.tolist() == [True, False, True]


def test_a_truncated_completion_can_count_what_would_have_come():
    found = experience(ended=(False, False), bootstrap_truncated=True, gamma=0.5, lam=1.0)
    torch.testing.assert_close(found.returns[0, 2], torch.tensor(2.0 + 0.5 * 7.0))
    torch.testing.assert_close(found.returns[1], torch.tensor([-1.0 + 0.5 * 8.0, 0.0, 0.0]))
    plain = experience(ended=(False, False), gamma=0.5, lam=1.0)
    torch.testing.assert_close(plain.returns[1, 0], torch.tensor(-1.0))


def test_whitened_advantages_look_at_tokens_only():
    found = experience(whiten_advantages=True)
    tokens = found.advantages[found.mask]
    assert float(tokens.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(tokens.std()) == pytest.approx(1.0, abs=1e-5)
    assert not found.advantages[~found.mask].any()


def test_tokens_are_spread_over_rows():
    assert spread(torch.tensor([1, 2, 3, 4]), two()).tolist() == [[1, 2, 3], [4, 0, 0]]


# The trainer


def build(small, **given):
    (small.folder / "out").mkdir(exist_ok=True)
    defaults = {
        "per_device_train_batch_size": 8, "max_prompt_length": 64, "response_length": 8, "max_steps": 2,
        "learning_rate": 1e-3,
        "temperature": 1.0, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none",
        "reward_funcs": [f"{REWARDS}:short"],
    }  # fmt: skip
    args = PPOConfig(output_dir=str(small.folder / "out"), use_cpu=True, **defaults | given)
    value_model = small.reward_model() if args.sharing == "separate" else None
    return PPOTrainer(
        model=small.model, args=args, train_dataset=small.rows("preferences", 16).select_columns(["prompt"]),
        processing_class=small.tokenizer, ref_model=small.model, value_model=value_model,
    )  # fmt: skip


def test_with_adapters_the_policy_without_its_own_is_the_reference(tmp_path):
    run = run_stages(
        tmp_path / "run", "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null",
        "ppo.normalize_rewards=none", "ppo.reward_funcs=[alignctl.data.quickstart:reward]", "data.limit=64",
        "peft=lora", "data.eval_limit=8", "eval.prompts=2", "ppo.max_steps=2", "ppo.learning_rate=1e-2",
        "ppo.response_length=4",
        "ppo.per_device_train_batch_size=8", "model.scratch.vocab_size=400", "ppo.disable_dropout=false",
    )  # fmt: skip
    first, second = read(run / "ppo" / "metrics.jsonl")
    assert first["kl/k3"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl/k3"] > 1e-6
    assert (run / "ppo" / "adapter" / "adapter_config.json").is_file()
    assert LlamaForCausalLM.from_pretrained(run / "ppo" / "model").num_parameters() > 0


@pytest.mark.parametrize("other", [{"pass_tokens": 40}, {"engine": "padded"}, {"rollout_tokens": 1000}])
def test_how_the_work_is_divided_changes_nothing(small, other):
    """Passes of the update, and padding; batches of the rollout draw other completions, so there only one fits all."""
    first, second = build(small, num_mini_batches=2), build(small, num_mini_batches=2, **other)
    for trainer in (first, second):
        torch.manual_seed(3)
        trainer.train()
    difference = (weights_of(first.model) - weights_of(second.model)).norm() / weights_of(first.model).norm()
    assert difference < 1e-5


@pytest.mark.parametrize("sharing", ["separate", "shared_value"])
@pytest.mark.parametrize("given", [{}, {"value_warmup_steps": 1, "entropy_coef": 0.1}])
def test_the_pass_that_scores_is_the_first_of_the_update(small, sharing, given):
    """Not so where dropout is left on, of which there is none here."""
    first, second = (build(small, sharing=sharing, disable_dropout=off, **given) for off in (True, False))
    assert first._first_pass_is_scoring(two())
    assert not second._first_pass_is_scoring(two())
    for trainer in (first, second):
        torch.manual_seed(3)
        trainer.train()
    difference = (weights_of(first.model) - weights_of(second.model)).norm() / weights_of(first.model).norm()
    assert difference < 1e-5
    for name in ("entropy", "ratio", "loss/policy", "loss/value"):
        ours, theirs = ([row[name] for row in one.state.log_history if name in row] for one in (first, second))
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_at_the_start_of_a_rollout_policy_and_reference_agree(small):
    trainer = build(small, max_steps=1, num_ppo_epochs=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert log["clip_fraction"] == 0.0
    assert log["kl/k1"] == pytest.approx(0.0, abs=1e-4)
    assert log["rewards/short"] == log["score"]
    for name in ("kl/k2", "kl/k3", "entropy", "value/explained_variance", "eos_share", "completion_length",
                 "advantages/std", "tokens_per_s/rollout", "tokens_per_s/update", "loss/value"):  # fmt: skip
        assert math.isfinite(log[name])
    rows = [json.loads(line) for line in (small.folder / "samples_while_training.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert rows[0].keys() == {"step", "prompt", "completion", "score", "rewards"}


@pytest.mark.parametrize(("sharing", "part"), [("separate", "value_model."), ("shared_value", "value_head.")])
def test_while_the_value_model_warms_up_the_policy_stays(small, sharing, part):
    trainer = build(small, value_warmup_steps=5, weight_decay=0.1, sharing=sharing)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith(part) for name in moved)


def test_what_each_layout_holds(small):
    policy = LlamaForCausalLM(small.config()).num_parameters()
    separate, shared = build(small), build(small, sharing="shared_value")
    assert sum(p.numel() for p in shared.model.parameters()) == policy + small.config().hidden_size + 1
    value_model = small.reward_model().num_parameters()
    assert sum(p.numel() for p in separate.model.parameters()) == policy + value_model


def test_the_kl_coefficient_is_adapted(small):
    trainer = build(small, target_kl=1000.0, kl_horizon=8, kl_coef=0.1)
    trainer.train()
    assert trainer.kl_coef == pytest.approx(0.1 * 0.8**2)


def test_an_entropy_bonus_is_taken_off_the_loss_and_keeps_the_entropy_up(small):
    logs = []
    for entropy_coef in (0.0, 2.0):
        trainer = build(small, entropy_coef=entropy_coef, num_ppo_epochs=1, max_steps=8, learning_rate=1e-2)
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "score" in log])
    for log in logs[1]:
        parts = log["loss/policy"] - 2.0 * log["entropy"] + 0.1 * log["loss/value"]
        assert log["loss"] == pytest.approx(parts, abs=1e-4)  # the trainer rounds what it logs
    assert logs[0][0]["entropy"] == pytest.approx(logs[1][0]["entropy"])
    assert logs[1][-1]["entropy"] > logs[0][-1]["entropy"] + 1e-3


def test_a_checkpoint_s_own_ways_of_generating_are_left_out(small):
    """They would draw from another distribution than the one that is scored."""
    trainer = build(small)
    drawn = []
    for penalty in (1.0, 50.0):
        trainer.policy.generation_config.repetition_penalty = penalty
        torch.manual_seed(0)
        rows = trainer.train_dataset.select(range(4)).to_list()
        drawn.append(trainer._roll_out(trainer.data_collator(rows)).completion_ids)
        assert trainer.policy.generation_config.repetition_penalty == penalty
    assert drawn[0] == drawn[1]


def test_more_than_the_model_can_see_is_refused(small):
    with pytest.raises(RequestError, match="more than the model can see: 128 tokens"):
        build(small, response_length=100)


def test_equal_scores_stop_the_run(small):
    (small.folder / "same.py").write_text("def same(prompts, completions):\n    return [0.1] * len(prompts)\n")
    trainer = build(small, reward_funcs=[f"{small.folder / 'same.py'}:same"], max_steps=9, num_train_epochs=9)
    with pytest.raises(AlignctlError, match="last 5 rollouts had the same score, 0.1"):
        trainer.train()


def test_prompts_that_are_too_long_are_counted_and_refused(tmp_path):
    with pytest.raises(RequestError, match=r"`ppo.max_prompt_length=12`.*the prompt is longer"):
        run_stages(
            tmp_path / "run", "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null",
            "ppo.normalize_rewards=none", "ppo.reward_funcs=[alignctl.data.quickstart:reward]", "data.limit=64",
            "eval.prompts=0", "ppo.max_prompt_length=12",
        )  # fmt: skip


def test_a_stage_on_both_sources_of_rewards(tmp_path):
    small_run = (
        "recipe=rlhf_quickstart", "stages=[rm,ppo]", "rm.from=null", "ppo.from=null", "data.limit=64",
        "data.eval_limit=8", "eval.prompts=2", "eval.max_new_tokens=4", "rm.max_steps=2", "ppo.max_steps=2",
        "ppo.per_device_train_batch_size=8", "ppo.response_length=8", "model.scratch.vocab_size=400",
        "ppo.reward_funcs=[alignctl.data.quickstart:reward]", "ppo.reward_weights=[1,0.5]",
    )  # fmt: skip
    run = run_stages(tmp_path / "run", *small_run)
    metrics = read(run / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert {"rewards/reward_model", "rewards/reward", "score", "kl/k3"} <= metrics[0].keys()
    assert LlamaForCausalLM.from_pretrained(run / "ppo" / "model").num_parameters() > 0
    assert not SimpleNamespace(**read(run / "ppo" / "data.json")["train"]).lost
