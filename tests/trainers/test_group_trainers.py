"""GRPO's and RLOO's trainers, with completions put in."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
import trl
from support.rewards import REWARDS
from support.small import Small

from alignctl.errors import AlignctlError
from alignctl.rollout.drawing import Drawn
from alignctl.rollout.episodes import Episodes, Segment
from alignctl.trainers.on_policy.config import OnPolicyConfig
from alignctl.trainers.on_policy.group.config import GRPOConfig, RLOOConfig

pytestmark = pytest.mark.train

# Of two prompts, four each; the sixth and the eighth are cut off.
COMPLETIONS = [[5, 6, 7, 8, 9], [10, 11, 12], [13], [14, 15, 16, 17], [18, 19], [20, 21, 22, 23, 24, 25], [26],
               [27, 28, 29, 30, 31, 32]]  # fmt: skip
LENGTHS = torch.tensor([len(ids) for ids in COMPLETIONS], dtype=torch.float64)
REWARD = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 3.0, 1.0, 1.0]], dtype=torch.float64)
TOKENS = 28


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("run") / "checkpoints")


@pytest.fixture
def put_in(small, monkeypatch):
    """A trainer whose rollouts are of given completions and rewards, one after another where there are several."""

    def make(name, *rollouts, **settings):
        given = {
            "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1, "learning_rate": 1e-2,
            "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False, "response_length": 6,
            "max_prompt_length": 100, "reward_funcs": [f"{REWARDS}:length"], "max_grad_norm": 0.0,
        }  # fmt: skip
        trainer = small.trainer(name, **given | settings)
        rollouts = list(rollouts or [(COMPLETIONS, REWARD)])
        trainer.seen_places, present = [], []

        def draw(prompts, places):
            trainer.seen_places.append(list(places))
            completions, rewards = rollouts.pop(0) if len(rollouts) > 1 else rollouts[0]
            present[:] = rewards.flatten().tolist()
            return Drawn(list(completions), [len(ids) < 6 for ids in completions])

        def ask(episodes):
            return {"given": [{} if value is None or math.isnan(value) else {len(ids) - 1: value}
                              for value, ids in zip(present, episodes.completion_ids, strict=True)]}  # fmt: skip

        monkeypatch.setattr(trainer, "draw", draw)
        monkeypatch.setattr(trainer.scoring, "ask", ask)
        return trainer

    return make


@pytest.mark.parametrize("ours", [GRPOConfig, RLOOConfig])
def test_defaults_are_trl_s(ours):
    theirs = {field.name: field.default for field in fields(getattr(trl, ours.__name__))}
    own = {field.name: field.default for field in fields(ours)}
    of_all = {field.name for field in fields(OnPolicyConfig)} - {"num_generations"}
    shared = set(own) & set(theirs) - of_all
    assert {"beta", "epsilon", "num_generations", "sync_ref_model"} <= shared
    assert {name: own[name] for name in shared} == {name: theirs[name] for name in shared}
    assert own["response_length"] == theirs["max_completion_length"]


def first_log(trainer):
    trainer.train()
    return next(row for row in trainer.state.log_history if "loss" in row)


def advantages(rewards=REWARD):
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", lambda of_tokens: 0.0),  # the sum of advantages
        ("dapo", lambda of_tokens: of_tokens / TOKENS),
        ("bnpo", lambda of_tokens: of_tokens / TOKENS),
        ("dr_grpo", lambda of_tokens: of_tokens / (8 * 6)),
        ("luspo", lambda of_tokens: of_tokens / 8),
    ],
)
def test_what_a_loss_is_divided_by(put_in, loss_type, expected):
    """On policy the loss of a token is minus its advantage."""
    of_tokens = -float((advantages() * LENGTHS).sum())
    found = first_log(put_in("grpo", loss_type=loss_type))
    assert found["loss"] == pytest.approx(expected(of_tokens), abs=1e-6)
    assert found["clip_ratio/region_mean"] == 0


def test_mini_batches_divide_by_the_average_of_a_rollout(put_in):
    """As TRL does; the tokens that each has, 13 and 15, do not matter. The step that comes before moves nothing."""
    of_groups = -(advantages() * LENGTHS).view(2, 4).sum(1)
    trainer = put_in("grpo", num_mini_batches=2, learning_rate=0.0)
    assert first_log(trainer)["loss"] == pytest.approx(float(of_groups.sum()) / TOKENS, abs=1e-6)
    by_rows = put_in("grpo", num_mini_batches=2, learning_rate=0.0, loss_type="luspo")
    assert first_log(by_rows)["loss"] == pytest.approx(float(of_groups.sum()) / 8, abs=1e-6)


def test_metrics_have_trl_s_names_and_numbers(put_in):
    found = first_log(put_in("grpo", beta=0.1))
    expected = {
        "reward": REWARD.mean(), "reward_std": REWARD.std(), "rewards/given/mean": REWARD.mean(),
        "rewards/given/std": REWARD.std(), "frac_reward_zero_std": 0.0, "completions/mean_length": 3.5,
        "completions/min_length": 1.0, "completions/max_length": 6.0, "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": 16 / 6, "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 5.0, "kl": 0.0, "rollout/kl": 0.0, "rollout/length": 3.5,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-6
    )
    assert found["entropy"] > 1
    assert found["num_tokens"] > TOKENS + 8  # with the prompts


def test_what_was_cut_off_is_masked_and_stays_in_its_baseline(put_in):
    ended = LENGTHS < 6
    found = first_log(put_in("grpo", mask_truncated_completions=True))
    expected = -float((advantages() * LENGTHS)[ended].sum() / LENGTHS[ended].sum())
    assert found["loss"] == pytest.approx(expected, abs=1e-6)
    found = first_log(put_in("grpo", mask_truncated_completions=True, loss_type="grpo"))
    assert found["loss"] == pytest.approx(-float(advantages()[ended].sum()) / 8, abs=1e-6)


def test_long_completions_are_penalised(put_in):
    rewards = REWARD - torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    found = first_log(put_in("grpo", soft_overlong_tokens=2, scale_rewards=False))
    worth = (rewards - rewards.mean(1, keepdim=True)).flatten()
    assert found["loss"] == pytest.approx(-float((worth * LENGTHS).sum()) / TOKENS, abs=1e-6)


ALIKE = torch.tensor([[1.0, 0.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)


def test_groups_without_signal_are_counted_or_left_out(put_in):
    of_first = -float((advantages(ALIKE) * LENGTHS)[:4].sum())
    kept, dropped = (
        first_log(put_in("grpo", (COMPLETIONS, ALIKE), zero_signal_groups=how)) for how in ("keep", "drop")
    )
    assert kept["loss"] == pytest.approx(of_first / TOKENS, abs=1e-6)
    assert dropped["loss"] == pytest.approx(of_first / 13, abs=1e-6)
    assert kept["frac_reward_zero_std"] == dropped["frac_reward_zero_std"] == 0.5
    luspo = first_log(put_in("grpo", (COMPLETIONS, ALIKE), zero_signal_groups="drop", loss_type="luspo"))
    assert luspo["loss"] == pytest.approx(of_first / 4, abs=1e-6)


def test_groups_without_signal_are_drawn_again(put_in):
    again = [[40], [41, 42], [43, 44, 45], [46, 47, 48, 49]]
    still = (again, torch.tensor([2.0, 2.0, 2.0, 2.0]))
    other = (again[::-1], torch.tensor([0.0, 1.0, 2.0, 3.0]))
    trainer = put_in("grpo", (COMPLETIONS, ALIKE), still, other, zero_signal_groups="redraw", max_redraws=3)
    found = first_log(trainer)
    assert trainer.seen_places == [list(range(8)), [12, 13, 14, 15], [20, 21, 22, 23]]
    rewards = torch.stack([ALIKE[0], other[1].double()])
    lengths = torch.cat([LENGTHS[:4], torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)])
    assert found["loss"] == pytest.approx(-float((advantages(rewards) * lengths).sum() / lengths.sum()), abs=1e-6)
    assert found["frac_reward_zero_std"] == 0


def episodes(**given):
    """Of the completions, the prompts being a token each."""
    prompts, segments = [[7]] * 4 + [[8]] * 4, [[Segment(ids)] for ids in COMPLETIONS]
    return Episodes(prompts, segments, [True] * 8, ["a"] * 8, ["b"] * 8, group_size=4, **given)


@pytest.mark.parametrize("groups", [[], [1]])
def test_who_has_nothing_to_draw_again_scores_with_the_others(put_in, groups):
    """A divided reward model would wait for it for ever."""
    trainer, asked_about = put_in("grpo", (COMPLETIONS[:4], REWARD[1])), []
    ask = trainer.scoring.ask
    trainer.scoring.ask = lambda part: asked_about.append(part.row_numbers) or ask(part)
    asked = {"given": [{0: 9.0}] * 8}
    _, found = trainer._draw_again(episodes(row_numbers=[1] * 4 + [2] * 4), asked, groups, 1)
    assert asked_about == [[groups[0] + 1 if groups else 1] * 4]
    assert (found == asked) == (not groups)


def test_a_last_rollout_of_few_prompts_is_divided_by_what_it_has(put_in):
    trainer = put_in("grpo", num_mini_batches=2)
    for of_all, expected in ((8, TOKENS / 2), (4, TOKENS)):
        trainer._of_all = of_all
        assert trainer.counted(episodes(), [0, 1, 2, 3]) == expected


def test_what_nothing_scored_teaches_nothing(put_in):
    rewards = REWARD.clone()
    rewards[1, 1] = torch.nan
    found = first_log(put_in("grpo", (COMPLETIONS, rewards), loss_type="luspo", scale_rewards="none"))
    worth = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(0.0).flatten()
    assert found["loss"] == pytest.approx(-float((worth * LENGTHS).sum()) / 8, abs=1e-6)
    assert found["reward"] == pytest.approx(float(rewards.nanmean()))


def test_the_entropy_is_a_mean_over_tokens_whatever_the_loss(put_in):
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        plain, with_entropy = (first_log(put_in("grpo", loss_type=loss_type, entropy_coef=coef)) for coef in (0.0, 0.5))
        assert plain["loss"] - with_entropy["loss"] == pytest.approx(0.5 * with_entropy["entropy"], rel=1e-5)


def test_the_weight_of_the_entropy_is_adapted_from_the_second_rollout_on(put_in):
    trainer = put_in(
        "grpo", use_adaptive_entropy=True, entropy_target=99.0, entropy_coef=0.1, entropy_coef_delta=0.05, max_steps=2,
        learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    first, second = [row for row in trainer.state.log_history if "loss" in row]
    assert [first["entropy_coef"], second["entropy_coef"]] == pytest.approx([0.15, 0.2])
    assert first["loss"] - second["loss"] == pytest.approx(0.15 * first["entropy"], rel=1e-4)


def test_only_tokens_of_high_entropy_are_learnt_from(put_in):
    trainer = put_in("grpo", top_entropy_quantile=0.25)
    experience = []
    learn = trainer.learn_from
    trainer.learn_from = lambda *given: experience.append(learn(*given)) or experience[-1]
    outputs_of, entropy = trainer.outputs_of, []
    trainer.outputs_of = lambda episodes: entropy.append(outputs_of(episodes).entropy) or outputs_of(episodes)
    first_log(trainer)
    learnt = experience[0].high_entropy[experience[0].mask]
    assert entropy[0][learnt].min() > entropy[0][~learnt].max()
    assert TOKENS // 4 <= learnt.sum() <= TOKENS // 4 + 3  # the first tokens of a group have the same


def test_what_vllm_drew_is_weighted(put_in):
    """By its ratio: of tokens that the policy finds twice as likely, the loss is twice as large."""
    expected = first_log(put_in("grpo"))["loss"]
    trainer = put_in("grpo", vllm_importance_sampling_mode="token_truncate", num_iterations=2, learning_rate=0.0)
    roll_out, outputs_of = trainer._roll_out, trainer.outputs_of

    def drawn_by_another(inputs, drawn=None):
        episodes = roll_out(inputs, drawn)
        logps = outputs_of(episodes).logps.detach() - math.log(2)
        object.__setattr__(episodes, "drawn_logps", [one.tolist() for one in logps.split([*map(len, COMPLETIONS)])])
        return episodes

    trainer._roll_out = drawn_by_another
    found = first_log(trainer)
    assert found["loss"] == pytest.approx(2 * expected, rel=1e-4)
    assert found["sampling/importance_sampling_ratio/mean"] == pytest.approx(2.0, rel=1e-4)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("second", [1.0, 2.0])
def test_rewards_that_differ_in_no_group_stop_training(put_in, second):
    """Between groups they may."""
    rewards = torch.tensor([[1.0] * 4, [second] * 4])
    trainer = put_in("grpo", (COMPLETIONS, rewards), max_steps=30, learning_rate=0.0)
    with pytest.raises(AlignctlError, match="in each of the last 20 rollouts the completions of every prompt"):
        trainer.train()
    assert trainer.state.global_step == 19


def test_rloo_takes_the_penalty_off_the_reward(put_in):
    """The policy is its reference, so that there is none in the first rollout; then there is."""
    others = (REWARD.sum(1, keepdim=True) - REWARD) / 3
    found = first_log(put_in("rloo"))
    assert found["loss"] == pytest.approx(-float((REWARD - others).mean()), abs=1e-6)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    trainer = put_in("rloo", max_steps=3, beta=0.5, num_iterations=2, normalize_advantages=True)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert logs[2]["kl"] != pytest.approx(0, abs=1e-4)
    assert logs[2]["rollout/kl"] == pytest.approx(logs[2]["kl"] * TOKENS / 8, rel=1e-4)


def test_without_a_penalty_no_reference_is_looked_at(put_in):
    trainer = put_in("grpo")
    trainer.ref_model = None
    assert "kl" not in first_log(trainer)
    assert put_in("grpo", beta=0.1).has_reference
