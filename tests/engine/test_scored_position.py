"""Which token a reward model scores, the same wherever it is asked: also where the token of the padding ends texts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.files import read, write_rows
from support.in_process import run_stages
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignctl.engine.forward import evaluating
from alignctl.engine.layout import pack
from alignctl.engine.rewards import score_layout, sequence_scores
from alignctl.models.packing import put_packed_attention_on
from alignctl.rollout.episodes import Episodes, Segment
from alignctl.rollout.rewards import RewardModel, totals

pytestmark = pytest.mark.train

END = 2


@pytest.fixture(scope="module")
def scorer(shared_data):
    """stories260K with a head, and a tokenizer without a pad token of its own."""
    folder = shared_data / "models" / "stories260K"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    assert tokenizer.eos_token_id == END
    return model, tokenizer


def score_at(model, ids, position):
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return float(model.score(hidden[0, position]))


PROMPT = [260, 261, END, 262]  # as a chat template ends a turn
ENDED, CUT, TWICE, AFTER = [270, 271, END], [270, 271], [270, 271, END, END], [270, END, 13]


@pytest.mark.parametrize("packed", [False, True])
def test_with_one_token_for_both_the_last_other_token_is_scored(scorer, packed):
    """Training, padded or packed, evaluation and PPO read the same position."""
    model, tokenizer = scorer
    if packed:
        assert put_packed_attention_on(model, torch.device("cpu")) is None
    completions = [ENDED, CUT, TWICE, AFTER]
    last = score_at(model, PROMPT + CUT, -1)
    expected = [last, last, last, score_at(model, PROMPT + AFTER, -1)]
    found = sequence_scores(model, [PROMPT] * 4, completions, 8)
    assert found == pytest.approx(expected, abs=1e-5)
    segments = [[Segment(completion)] for completion in completions]
    episodes = Episodes([PROMPT] * 4, segments, [False] * 4, ["p"] * 4, ["c"] * 4)
    assert totals(RewardModel(model, tokenizer, tokenizer, 1000)(episodes)) == pytest.approx(expected, abs=1e-5)
    rows = [torch.tensor(PROMPT + completion) for completion in completions]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=END)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad(), evaluating(model):
        by_transformers = type(model).forward(model, input_ids=batch, attention_mask=mask).logits[:, 0]
        by_us = (
            score_layout(model, pack(rows, [(0, 1, 2, 3)], model.device), batch)[:, 0] if packed else by_transformers
        )
    assert by_us.tolist() == pytest.approx(expected, abs=1e-5)


def test_with_a_pad_token_of_its_own_the_end_token_is_scored(scorer):
    model, _ = scorer
    model.config.pad_token_id = 0
    try:
        found = sequence_scores(model, [PROMPT] * 2, [ENDED, CUT], 8)
    finally:
        model.config.pad_token_id = END
    expected = [score_at(model, PROMPT + ENDED, -1), score_at(model, PROMPT + CUT, -1)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_a_reward_stage_trains_that_position_padded_or_not(tmp_path, shared_data):
    """From a checkpoint that has no pad token."""
    base = shared_data / "models" / "stories260K"
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    described = read(folder / "tokenizer_config.json")
    del described["pad_token"]
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    pairs = [{"prompt": f"{i} and one?", "chosen": f" It is {i + 1}", "rejected": f" {i}"} for i in range(8)]
    file = write_rows(tmp_path / "pairs.jsonl", pairs)
    losses = {}
    for engine in ("padded", "shared_prefix"):
        run = run_stages(
            tmp_path / engine, "recipe=reward_local", f"model.path={folder}", f"data.path={file}", "rm.max_steps=1",
            "rm.per_device_train_batch_size=8", f"rm.engine={engine}", "rm.logging_steps=1", "rehearse=false",
            "data.eval_rows=0",
        )  # fmt: skip
        losses[engine] = read(run / "rm" / "metrics.jsonl")[0]["loss"]
    assert losses["padded"] == pytest.approx(losses["shared_prefix"], abs=1e-5)
    saved = AutoTokenizer.from_pretrained(tmp_path / "padded" / "rm" / "model")
    assert saved.pad_token == saved.eos_token
    assert read(tmp_path / "padded" / "rm" / "model" / "config.json")["pad_token_id"] == saved.eos_token_id
