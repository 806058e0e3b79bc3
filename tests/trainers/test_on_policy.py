"""The base of methods that learn from their own completions, by a second method, which has no value model."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from support.added import add_method
from support.files import read, weights
from support.in_process import StopsAfter, frozen, run_stages
from support.models import weights_of
from support.rewards import REWARDS
from torch.utils.data import BatchSampler

from alignctl.errors import RequestError, Stopped
from alignctl.rollout.episodes import Episodes, Segment
from alignctl.rollout.rewards import totals
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.on_policy.base import OnPolicyTrainer
from alignctl.trainers.on_policy.config import OnPolicyConfig
from alignctl.trainers.on_policy.experience import build
from alignctl.trainers.on_policy.setup import EachSeveralTimes
from alignctl.trainers.on_policy.update import PassLoss, passes_of

pytestmark = pytest.mark.train


class LeaveOneOutTrainer(Managed, OnPolicyTrainer):
    """REINFORCE; the baseline of a completion is the mean score of the others of its prompt, arXiv:2402.14740."""

    has_reference = False

    def learn_from(self, episodes, scores):
        rewards = torch.tensor(totals(scores)).view(-1, episodes.group_size)
        others = (rewards.sum(1, keepdim=True) - rewards) / (episodes.group_size - 1)
        return build(episodes, self.outputs_of(episodes), (rewards - others).view(-1, 1))

    def losses(self, outputs, experience):
        ratio = (outputs.logps - experience.logps).exp() * experience.mask
        return PassLoss(-(ratio * experience.advantages).sum(), {"ratio": ratio.sum()})


RECIPE = """
defaults:
  - /base
  - /data: quickstart
  - override /model: quickstart
  - _self_
stages: [cell]
data: {limit: 32, eval_limit: 8}
eval: {prompts: 2, max_new_tokens: 4}
model: {scratch: {vocab_size: 400, config: {hidden_size: 32, intermediate_size: 64}}}
cell:
  method: leave_one_out
  num_generations: 4
  per_device_train_batch_size: 8
  response_length: 8
  max_prompt_length: 64
  learning_rate: 1.0e-3
  max_steps: 6
  save_steps: 3
  logging_steps: 1
  bf16: false
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    columns = {"roles": ("policy", "reward_model"), "config_class": "alignctl.trainers.on_policy.config:OnPolicyConfig"}
    add_method(monkeypatch, "leave_one_out", "ppo", trainer=f"{__name__}:LeaveOneOutTrainer", **columns)
    (tmp_path / "own.yaml").write_text(RECIPE + f"  reward_funcs: ['{REWARDS}:short']\n")
    return f"recipe={tmp_path / 'own.yaml'}"


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_second_method_is_a_stage_that_can_be_stopped_and_continued(tmp_path, recipe, peft):
    given = (recipe, f"peft={peft}")
    whole = run_stages(tmp_path / "whole", *given) / "cell"
    with pytest.raises(Stopped, match="stopped at step 4 of 6"):
        run_stages(tmp_path / "cut", *given, signal=StopsAfter(4))
    continued = run_stages(tmp_path / "cut", *given) / "cell"
    assert weights(continued / "model") == weights(whole / "model")
    rows = read(whole / "metrics.jsonl")
    assert [row["score"] for row in rows] == [row["score"] for row in read(continued / "metrics.jsonl")]
    assert {"score", "rewards/short", "completion_length", "ratio", "advantages/mean", "entropy"} <= rows[0].keys()
    assert rows[0]["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert not {"kl/k1", "kl_coef", "loss/value"} & rows[0].keys()
    result, answers = read(whole / "result.json"), [row["after"] for row in read(whole / "samples.jsonl")]
    assert result["after"]["rewards/short"] == pytest.approx(-sum(map(len, answers)) / 10 / len(answers))
    assert result["after"]["rewards/short_std"] >= 0
    assert result["certainty"]["rewards/short"]["n"] == len(answers) == 2


def build_trainer(small, **given):
    (small.folder / "out").mkdir(exist_ok=True)
    defaults = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_prompt_length": 64, "response_length": 8,
        "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "report_to": "none", "reward_funcs": [f"{REWARDS}:short"], "use_cpu": True,
    }  # fmt: skip
    return LeaveOneOutTrainer(
        model=small.model,
        args=OnPolicyConfig(output_dir=str(small.folder / "out"), **defaults | given),
        train_dataset=small.rows("preferences", 16).select_columns(["prompt"]),
        processing_class=small.tokenizer,
    )


@pytest.mark.parametrize("other", [{"engine": "padded"}, {"pass_tokens": 120}])
def test_a_prompt_lies_once_in_the_layout_and_numbers_stay(small, other):
    first, second = build_trainer(small), build_trainer(small, **other)
    rows = next(iter(first.get_train_dataloader()))
    assert [prompt == rows["prompt"][0] for prompt in rows["prompt"]] == [True] * 4 + [False] * 4
    episodes = first._roll_out(rows)
    assert [list(group) for group in episodes.groups] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    packed = first._batch(episodes, list(range(8))).layout
    apart = sum(map(len, episodes.prompt_ids)) + sum(map(len, episodes.completion_ids))
    saved = 3 * sum(len(episodes.prompt_ids[group[0]]) for group in episodes.groups)
    assert packed.input_ids.numel() == apart - saved
    for trainer in (first, second):
        torch.manual_seed(3)
        trainer.train()
    difference = (weights_of(first.model) - weights_of(second.model)).norm() / weights_of(first.model).norm()
    assert difference < 1e-5


def test_a_score_is_told_from_the_others_of_its_prompt(small):
    trainer = build_trainer(small, num_generations=2)
    episodes = Episodes(
        [[5, 6]] * 2 + [[7]] * 2, [[Segment([8, 9])], [Segment([10])], [Segment([11])], [Segment([12])]], [True] * 4,
        [""] * 4, [""] * 4, group_size=2,
    )  # fmt: skip
    with torch.no_grad():
        found = trainer.learn_from(episodes, [{1: 3.0}, {0: 1.0}, {0: 5.0}, {0: 5.0}])
    torch.testing.assert_close(found.advantages, torch.tensor([[2.0, 2.0], [-2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))


def test_processes_get_whole_groups_and_every_epoch_another_order():
    now = [0]
    sampler = EachSeveralTimes(rows=8, times=4, seed=1, epoch=lambda: now[0])
    orders = []
    for now[0] in range(2):
        batches = BatchSampler(sampler, batch_size=8, drop_last=True)
        shares = [list(BatchSamplerShard(batches, num_processes=2, process_index=index)) for index in range(2)]
        groups = [batch[first : first + 4] for share in shares for batch in share for first in (0, 4)]
        assert all(len(set(group)) == 1 for group in groups)
        assert sorted(group[0] for group in groups) == list(range(8))
        orders.append(list(sampler))
    assert orders[0] != orders[1]


def test_processes_that_continue_are_in_the_epoch_they_were_in():
    """What accelerate puts around a loader of several processes in mid-epoch does not tell a sampler its epoch."""
    sampler = EachSeveralTimes(rows=8, times=2, seed=1, epoch=lambda: 3)
    shard = BatchSamplerShard(BatchSampler(sampler, batch_size=4, drop_last=True), num_processes=2, process_index=1)
    loader = DataLoaderShard(list(range(8)), batch_sampler=shard, collate_fn=list)
    loader.set_epoch(3)
    whole = list(loader)
    continued = skip_first_batches(loader, 1)
    continued.set_epoch(3)
    assert len(whole) == 2
    assert list(continued) == whole[1:]


def test_a_group_that_is_too_large_for_a_pass_is_divided():
    segments = [[Segment([1] * length)] for length in (5, 3, 9, 2)]
    episodes = Episodes([[7] * 10] * 4, segments, [True] * 4, [""] * 4, [""] * 4, group_size=4)
    assert list(passes_of(episodes, [0], 100, packed=True)) == [[0, 1, 2, 3]]
    assert sorted(passes_of(episodes, [0], 21, packed=True)) == [[0, 1], [2, 3]]
    assert sorted(passes_of(episodes, [0], 21, packed=False)) == [[0], [1], [2], [3]]
    assert list(passes_of(episodes, [0], 4, packed=True)) == [[2], [0], [1], [3]]  # a completion is never divided


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("per_device_train_batch_size=6",), r"`cell.per_device_train_batch_size=6` counts completions, .*multiple"),
        (("num_mini_batches=3",), r"`cell.num_mini_batches=3` is more than the prompts of a rollout, 2"),
        (("auto_find_batch_size=true",), "would cut the completions of a prompt apart"),
    ],
)
def test_a_rollout_is_made_of_whole_groups(tmp_path, recipe, settings, why):
    with pytest.raises(RequestError, match=why):
        run_stages(tmp_path / "run", recipe, *(f"cell.{setting}" for setting in settings))


def test_a_rollout_that_the_rows_do_not_fill_is_refused(tmp_path, recipe):
    with pytest.raises(RequestError, match=r"a rollout is of 256 completions, and the \d+ prompts give \d+"):
        run_stages(tmp_path / "run", recipe, "cell.per_device_train_batch_size=256", "cell.dataloader_drop_last=true")


def test_the_plan_counts_whole_groups(tmp_path, recipe):
    """Of three prompts with four completions each, two optimizer steps take two prompts and one."""
    plan = frozen(tmp_path / "run", recipe, "cell.per_device_train_batch_size=12", "cell.num_mini_batches=2")
    assert plan.stages[0].global_batch_size == 8
