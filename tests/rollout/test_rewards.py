"""Where PPO's rewards come from: columns of the rows, reward models that see less, and one process that fails."""

from __future__ import annotations

import json

import pytest
import torch
from support.files import read
from support.in_process import run_stages

from alignctl.errors import RequestError, Stopped
from alignctl.models.tokenizer import train_tokenizer
from alignctl.rollout.episodes import Episodes, Segment
from alignctl.rollout.rewards import RewardModel, totals

pytestmark = pytest.mark.train

# A stage so small that it is mostly imports.
ALONE = (
    "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null", "ppo.normalize_rewards=none",
    "eval=default", "eval.prompts=0", "data.eval_rows=0", "model.scratch.vocab_size=300", "ppo.response_length=4",
    "ppo.max_prompt_length=200", "ppo.per_device_train_batch_size=4", "ppo.logging_steps=1", "ppo.max_steps=2",
)  # fmt: skip

FUNCTIONS = """
def sums(prompts, completions, answer, **others):
    assert sorted(others) == ["labels", "problem", "steps"], others
    for asked, result, written, steps in zip(prompts, answer, others["labels"], others["steps"]):
        a, b = steps
        assert result == a + b and str(a) in asked and str(result) in written
    return [float(a) + len(c) / 100 for a, c in zip(answer, completions)]

def only_answers(completions, *, answer, weight=1.0):
    return [float(a) * weight + len(c) / 100 for a, c in zip(answer, completions)]

def wants_more(prompts, completions, answer, solution):
    return [0.0] * len(prompts)
"""


@pytest.fixture
def sums(tmp_path):
    """The setting of a stage on questions with their answers."""
    rows = [
        {
            "prompt": f"What is {a} plus {a + 3}?",
            "answer": 2 * a + 3,
            "labels": f"it is {2 * a + 3}",
            "steps": [a, a + 3],
            "problem": "sum",
            "prompt_ids": "not the tokens",
        }
        for a in range(12)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    return (*ALONE, f"data.path={tmp_path / 'sums.jsonl'}")


def test_reward_functions_get_the_columns_that_they_ask_for(tmp_path, sums):
    file = tmp_path / "rewards.py"
    run = run_stages(tmp_path / "run", *sums, f"ppo.reward_funcs=[{file}:sums,{file}:only_answers]")
    for row in read(run / "ppo" / "metrics.jsonl"):
        assert row["rewards/sums"] == pytest.approx(row["rewards/only_answers"])
        assert row["rewards/sums"] > 1


def test_a_column_that_is_not_there_is_told_before_training(tmp_path, sums):
    with pytest.raises(RequestError, match="`wants_more` asks for `solution`, which the rows do not have") as raised:
        run_stages(tmp_path / "run", *sums, f"ppo.reward_funcs=[{tmp_path / 'rewards.py'}:wants_more]")
    assert "`answer`, `labels`, `steps`, `problem`" in raised.value.problems[0].hint
    assert not (tmp_path / "run" / "ppo" / "metrics.jsonl").exists()


def test_pairs_taken_as_prompts_bring_their_columns(tmp_path, sums):
    rows = [
        {"prompt": [{"role": "user", "content": f"Say {i}"}], "chosen": [{"role": "assistant", "content": f"{i}"}],
         "rejected": [{"role": "assistant", "content": "no"}], "answer": i}
        for i in range(12)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def chosen(prompts, completions, answer, chosen):\n"
        "    assert [str(a) for a in answer] == [c[0]['content'] for c in chosen]\n"
        "    return [float(a) for a in answer]\n"
    )
    paths = (f"data.path={tmp_path / 'pairs.jsonl'}", f"ppo.reward_funcs=[{tmp_path / 'rewards.py'}:chosen]")
    assert len(read(run_stages(tmp_path / "run", *ALONE, *paths) / "ppo" / "metrics.jsonl")) == 2


def test_a_reward_model_that_sees_less_is_refused(tmp_path):
    """The policy sees 256 tokens, the reward model, of the same tokens, 100."""
    run = run_stages(
        tmp_path / "rm", "recipe=rlhf_quickstart", "stages=[sft,rm]", "data.limit=32", "data.eval_limit=8",
        "sft.max_steps=1", "rm.max_steps=1", "rm.max_length=100", "model.scratch.vocab_size=400",
    )  # fmt: skip
    config = run / "rm" / "model" / "config.json"
    config.chmod(0o644)
    config.write_text(json.dumps(read(config) | {"max_position_embeddings": 100}))
    arguments = (
        "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", f"ppo.reward_model={run / 'rm' / 'model'}",
        f"model.path={run / 'sft' / 'model'}", "model.scratch=null", "data.limit=8", "eval.prompts=0",
        "ppo.max_prompt_length=69", "ppo.response_length=32",
    )  # fmt: skip
    for layout, name in (("separate", "value model"), ("shared_value", "reward model")):
        with pytest.raises(RequestError, match=f"101 tokens together, more than the {name} can see: 100"):
            run_stages(tmp_path / layout, *arguments, f"ppo.sharing={layout}")


def test_a_text_that_other_tokens_make_too_long_loses_its_start_and_is_counted(small):
    other = train_tokenizer(["a cat"] * 3, 262)  # hardly more than bytes
    model = small.reward_model()
    limit = model.config.max_position_embeddings
    asked = ["the cat " * 60, "a cat", "a cat"]
    said = [" sat", " ran", " ran on" * 60]
    prompts = [small.tokenizer(text)["input_ids"] for text in asked]
    completions = [small.tokenizer(text)["input_ids"] for text in said]
    source = RewardModel(model, other, small.tokenizer, max_tokens=1000)
    segments = [[Segment(completion)] for completion in completions]
    found = totals(source(Episodes(prompts, segments, [True] * 3, asked, said)))
    assert source.cut_frac == pytest.approx(2 / 3)
    for question, answer, score in zip(asked, said, found, strict=True):
        ids = other(question + answer + other.eos_token)["input_ids"][-limit:]
        with torch.no_grad():
            assert score == pytest.approx(float(model(torch.tensor([ids])).logits), abs=1e-5)
    alone = RewardModel(model, other, small.tokenizer, max_tokens=1000)
    alone(Episodes(prompts[1:2], segments[1:2], [True], asked[1:2], said[1:2]))
    assert alone.cut_frac == 0.0


class StopsAfter:
    """A request to stop that is there from the step after one on."""

    waits = False

    def __init__(self, file, step):
        self._file, self._step = file, step

    @property
    def requested(self):
        return self._file.exists() and any(row["step"] >= self._step for row in read(self._file))


def test_samples_have_no_gaps_and_no_repeats_after_a_stop(tmp_path, sums):
    """The run is stopped after step 4, and is given more as if it had been killed in step 6."""
    settings = (*sums, f"ppo.reward_funcs=[{tmp_path / 'rewards.py'}:only_answers]", "ppo.max_steps=6",
                "ppo.num_train_epochs=9", "ppo.num_sample_completions=2")  # fmt: skip
    whole = run_stages(tmp_path / "whole", *settings) / "ppo" / "samples_while_training.jsonl"
    assert [row["step"] for row in read(whole)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    newest = [{key: row[key] for key in ("prompt", "completion", "score")} for row in read(whole)[-2:]]
    assert read(whole.with_name("progress.json"))["trained"]["samples"] == newest
    file = tmp_path / "run" / "ppo" / "samples_while_training.jsonl"
    with pytest.raises(Stopped):
        run_stages(tmp_path / "run", *settings, signal=StopsAfter(file.with_name("metrics.jsonl"), 3))
    assert [row["step"] for row in read(file)] == [1, 1, 2, 2, 3, 3, 4, 4]
    with file.open("a") as later:
        later.write("".join(json.dumps({"step": step, "prompt": "torn"}) + "\n" for step in (5, 5, 6)) + '{"st')
    run_stages(tmp_path / "run", *settings)
    assert file.read_text() == whole.read_text()
