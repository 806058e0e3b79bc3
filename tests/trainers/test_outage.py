"""What a trainer keeps of a rollout that no server scored."""

from __future__ import annotations

import pytest
from support.files import read
from support.reward_server import serve_json

from alignctl.errors import AlignctlError
from alignctl.trainers.on_policy import base
from alignctl.trainers.on_policy.ppo.config import PPOConfig
from alignctl.trainers.on_policy.ppo.trainer import PPOTrainer

pytestmark = pytest.mark.train


def build(small, url):
    (small.folder / "out").mkdir(exist_ok=True)
    args = PPOConfig(
        output_dir=str(small.folder / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        sharing="shared_value", reward_funcs=[url], reward_retries=0, per_device_train_batch_size=8, max_steps=1,
        max_prompt_length=64, response_length=4, save_strategy="no",
    )  # fmt: skip
    return PPOTrainer(
        model=small.model, args=args, train_dataset=small.rows("preferences", 8).select_columns(["prompt"]),
        processing_class=small.tokenizer, ref_model=small.model,
    )  # fmt: skip


def test_what_was_drawn_is_not_drawn_again(small, monkeypatch):
    with serve_json(lambda path, body: [float(len(asked))] * 8 if len(asked) > 1 else 503) as (url, asked):
        with pytest.raises(AlignctlError, match="what was drawn is kept; there is no checkpoint yet"):
            build(small, url).train()
        kept = small.folder / "drawn" / "rank_0.json"
        assert len(read(kept)["completions"]) == 8
        monkeypatch.setattr(base, "draw_completions", lambda *_: pytest.fail("drawn again"))
        again = build(small, url)
        again.train()
    assert asked[0]["body"] == asked[1]["body"]
    assert again.state.global_step == 1
    assert not kept.exists()


def test_what_was_drawn_to_other_prompts_is_drawn_anew(small):
    with serve_json(lambda path, body: [1.0] * 8 if len(asked) > 1 else 503) as (url, asked):
        with pytest.raises(AlignctlError, match="did not answer"):
            build(small, url).train()
        kept = small.folder / "drawn" / "rank_0.json"
        kept.write_text(kept.read_text().replace('"step": 0', '"step": 3'))
        build(small, url).train()
    assert asked[0]["body"] == asked[1]["body"]
