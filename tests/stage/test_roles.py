"""The models of a stage's roles: loaded because the method names them, whatever other roles it has."""

from __future__ import annotations

import json

import pytest
from support.added import add_method
from support.in_process import run_stages
from support.models import TINY

from alignctl.trainers.sft import SFTTrainer

pytestmark = pytest.mark.train

SMALL = (
    "data.limit=48", "data.eval_limit=8", "eval.prompts=0", *TINY,
)  # fmt: skip


class WithRewardModel(SFTTrainer):
    """Imitates, and is given a reward model that it does not need."""

    given = None

    def __init__(self, *, reward_model, reward_processing_class, reward_statistics, **kwargs):
        WithRewardModel.given = reward_model, reward_processing_class, reward_statistics
        super().__init__(**kwargs)


def test_a_reward_model_without_a_value_model(tmp_path, monkeypatch):
    rm = run_stages(
        tmp_path / "rm", "recipe=sft_rm_quickstart", "stages=[rm]", "rm.from=null", "rm.max_steps=1", *SMALL
    )
    add_method(monkeypatch, "rewarded", "sft", roles=("policy", "reward_model"), trainer=f"{__name__}:WithRewardModel")
    folder = rm / "rm" / "model"
    run_stages(
        tmp_path / "cell", "recipe=sft_quickstart", "sft.method=rewarded", "sft.max_steps=1",
        f"sft.reward_model={folder}", *SMALL,
    )  # fmt: skip
    model, tokenizer, statistics = WithRewardModel.given
    assert model.score.out_features == 1
    assert len(tokenizer) == 400
    assert statistics == json.loads((folder / "reward_statistics.json").read_text())
