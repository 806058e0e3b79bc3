"""Processes that measure together share the held-out rows out: each takes its part of the time, and all find the same
as one process does."""

from __future__ import annotations

import json

import pytest
from support.processes import run_script

pytestmark = [pytest.mark.train, pytest.mark.slow]

ROWS, PROMPTS = 40, 8
SCRIPT = f"""
import json, os, sys
from contextlib import nullcontext

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignctl.config.schema import EvalSettings
from alignctl.data.reading import read_split
from alignctl.data.recast import as_plain_text
from alignctl.data.settings import DataSettings
from alignctl.evaluate.evaluator import Evaluator
from alignctl.evaluate.held_out import Lengths, build_held_out
from alignctl.rollout.rewards import FunctionReward
from alignctl.rollout.scoring import Scoring
from alignctl.rollout.settings import RewardSettings

base, rows, out = sys.argv[1:]
torch.set_num_threads(1)
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
tokenizer = AutoTokenizer.from_pretrained(base)
_, held = read_split(DataSettings(path=rows, limit={2 * ROWS}, eval_rows={ROWS}), "preferences", seed=3)
held_out = build_held_out(
    as_plain_text(held, base), tokenizer, Lengths(512, 256), {PROMPTS}, 48
)
counts = FunctionReward(lambda completions: [float(len(one)) for one in completions], "length")
scoring = Scoring(RewardSettings(), [counts], None)
evaluator = Evaluator(tokenizer, held_out, None, EvalSettings(max_new_tokens=48, batch_size=2), 3, scoring)
policy = AutoModelForCausalLM.from_pretrained(base)
reference = AutoModelForCausalLM.from_pretrained(base)
with torch.no_grad():
    reference.lm_head.weight.mul_(1.1)
tokens = 0

def count(module, args, options):
    global tokens
    tokens += options["input_ids"].numel()

for model in (policy, reference):
    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
found = evaluator.measure(policy, lambda: nullcontext(reference))
with open(f"{{out}}/{{os.environ.get('RANK', 'alone')}}.json", "w") as file:
    json.dump({{"metrics": found.metrics, "completions": found.completions, "tokens": tokens}}, file)
"""


def test_four_processes_find_what_one_does_with_a_fourth_of_the_work(tmp_path, shared_data):
    base, rows = shared_data / "models" / "stories260K", shared_data / "preference" / "llms_from_scratch_pref"
    for processes in (1, 4):
        run_script(SCRIPT, tmp_path, base, rows / "train.jsonl", tmp_path, processes=processes)
    alone, *together = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", 0, 1, 2, 3))
    assert len(alone["completions"]) == PROMPTS
    mean = sum(map(len, alone["completions"])) / PROMPTS
    assert alone["metrics"]["rewards/length"] == pytest.approx(mean, abs=1)  # a space may stand before an answer
    for one in together:
        assert one["metrics"] == pytest.approx(alone["metrics"], abs=1e-5)
        assert one["completions"] == alone["completions"]
        assert one["tokens"] < 0.3 * alone["tokens"]  # time itself depends on what else the machine does
