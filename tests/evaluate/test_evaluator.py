"""The Evaluator needs a model and rows: no trainer, no run, and what it measures is what a stage writes down."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
from support.files import read, write_rows
from support.in_process import run_stages

from alignctl.config.schema import EvalSettings, ModelSettings
from alignctl.data.settings import DataSettings

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

SEED, PROMPTS, NEW_TOKENS, LONGEST = 42, 3, 12, 256  # 42: of a run that names none

# What a command would import to load models and to measure them.
IMPORTS = """
import sys
import alignctl.evaluate.evaluator, alignctl.models.loading
print(sorted(m for m in sys.modules if m in ("trl", "alignctl.stage", "alignctl.trainers")))
"""


def test_imports_no_trainer(root):
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def run(folder, base, rows, method: str, *more: str):
    """A stage of a few steps that change the model a lot."""
    stage = "rm" if method == "reward" else method
    run_stages(
        folder, f"recipe={method}_local", f"model.path={base}", f"data.path={rows}", "data.limit=24",
        "data.eval_rows=8", "data.max_lost=1.0", f"eval.prompts={PROMPTS}", f"eval.max_new_tokens={NEW_TOKENS}",
        "rehearse=false", f"{stage}.max_steps=2", f"{stage}.learning_rate=1e-2", f"{stage}.warmup_steps=0",
        f"{stage}.bf16=false", f"{stage}.max_length={LONGEST}", f"{stage}.per_device_train_batch_size=4", *more,
    )  # fmt: skip
    return folder / stage


def evaluator(base, path, kind: str, **lengths):
    """On the rows that a run holds out."""
    from alignctl.data.reading import read_split
    from alignctl.data.recast import as_plain_text
    from alignctl.evaluate.evaluator import Evaluator
    from alignctl.evaluate.held_out import Lengths, build_held_out
    from alignctl.models.loading import load_tokenizer

    tokenizer, _ = load_tokenizer(ModelSettings(path=str(base)), str(base), texts=list)
    _, rows = read_split(DataSettings(path=str(path), limit=24, eval_rows=8), kind, SEED)
    questions = 0 if lengths.get("drops_longer") else PROMPTS
    held_out = build_held_out(
        as_plain_text(rows, str(base)), tokenizer, Lengths(512, LONGEST, **lengths), questions, NEW_TOKENS
    )
    settings = EvalSettings(prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    return Evaluator(tokenizer, held_out, judge=None, settings=settings, seed=SEED)


def load(source, tokenizer, role: str = "policy"):
    """A model that computes as a stage's does."""
    from alignctl.models.loading import load_model
    from alignctl.models.packing import put_packed_attention_on

    model = load_model(ModelSettings(path=str(source)), role, str(source), tokenizer, {}, SEED)
    assert put_packed_attention_on(model, model.device) is None
    return model


@pytest.fixture
def base(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture
def pairs(shared_data):
    return shared_data / "preference" / "hh_harmless_base" / "test.jsonl"


def test_a_policy_as_its_stage_measures_it(tmp_path, base, pairs):
    from alignctl.evaluate.reference import loaded_beside

    result = read(run(tmp_path, base, pairs, "dpo") / "result.json")
    evaluate = evaluator(base, pairs, "preferences", truncation_mode="keep_end")
    policy = load(tmp_path / "dpo" / "model", evaluate.tokenizer)
    reference = partial(loaded_beside, policy, partial(load, base, evaluate.tokenizer, "reference"))
    after = evaluate.measure(policy, reference)
    assert after.metrics == result["after"]
    assert after.metrics["kl"] > 0.01  # there was something to measure
    assert after.completions == [row["after"] for row in read(tmp_path / "dpo" / "samples.jsonl")]
    before = evaluate.measure(load(base, evaluate.tokenizer))
    assert before.metrics | {"kl": 0.0} == result["before"]


def test_an_adapter_switched_off_is_the_reference(tmp_path, base, pairs):
    from peft import PeftModel

    from alignctl.evaluate.reference import adapter_off

    stage = run(tmp_path, base, pairs, "dpo", "peft=lora")
    evaluate = evaluator(base, pairs, "preferences", truncation_mode="keep_end")
    policy = PeftModel.from_pretrained(load(base, evaluate.tokenizer), stage / "adapter").train()
    after = evaluate.measure(policy, partial(adapter_off, policy))
    assert after.metrics == read(stage / "result.json")["after"]
    assert after.metrics["kl"] > 0
    assert policy.training
    assert not any(layer._disable_adapters for layer in policy.modules() if hasattr(layer, "_disable_adapters"))


def labelled(pairs, file):
    """Pairs of transcripts taken apart into labelled completions of plain text."""
    lines = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()[:24]]
    rows = []
    for line in lines:
        for completion, label in (("chosen", True), ("rejected", False)):
            start, end = line[completion].rsplit("Assistant:", 1)
            rows.append({"prompt": start + "Assistant:", "completion": end, "label": label})
    return write_rows(file, rows)


def test_labelled_answers(tmp_path, base, pairs):
    """Without pairs a stage adds the held-out loss: that is its trainer's."""
    from alignctl.evaluate.reference import loaded_beside

    rows = labelled(pairs, tmp_path / "rows.jsonl")
    stage = run(tmp_path, base, rows, "kto")
    evaluate = evaluator(base, rows, "feedback")
    policy = load(stage / "model", evaluate.tokenizer)
    reference = partial(loaded_beside, policy, partial(load, base, evaluate.tokenizer, "reference"))
    metrics = evaluate.measure(policy, reference).metrics
    expected = read(stage / "result.json")["after"]
    assert set(expected) - set(metrics) == {"loss"}
    assert metrics == {key: value for key, value in expected.items() if key != "loss"}
    assert "label_auc" in metrics


def test_a_reward_model_as_its_stage_measures_it(tmp_path, base, pairs):
    stage = run(tmp_path, base, pairs, "reward")
    evaluate = evaluator(base, pairs, "preferences", drops_longer=True)
    model = load(stage / "model", evaluate.tokenizer, "reward_model")
    metrics = evaluate.measure_reward_model(model).metrics
    assert metrics == read(stage / "result.json")["after"]
    assert metrics["margin"] != 0
    assert 0 < len(evaluate.held_out.pairs.chosen) < 8  # some are longer than may be, and left out


def test_what_is_lost_is_not_measured(base, tmp_path):
    """Of a pair of which `keep_end` leaves no prompt on a side, neither side; nor is its prompt asked."""
    from alignctl.data.reading import read_split
    from alignctl.evaluate.held_out import Lengths, build_held_out
    from alignctl.models.loading import load_tokenizer

    rejected = ["a", "a " * 40, "a", "a"]
    pairs = [{"prompt": f"Once {i}", "chosen": "upon a time", "rejected": one} for i, one in enumerate(rejected)]
    file = write_rows(tmp_path / "rows.jsonl", pairs)
    rows, _ = read_split(DataSettings(path=str(file), eval_rows=0), "preferences", SEED)
    tokenizer, _ = load_tokenizer(ModelSettings(path=str(base)), str(base), texts=list)
    held_out = build_held_out(rows, tokenizer, Lengths(512, 32, "keep_end"), 4, NEW_TOKENS, lost={2})
    assert (len(held_out.pairs.chosen), len(held_out.pairs.rejected)) == (3, 3)
    assert held_out.questions.texts == ["Once 0", "Once 2", "Once 3"]
    assert held_out.questions.numbers == [1, 3, 4], "by which a function that fails on an answer is told"


def test_no_rows_nothing_measured(base):
    from alignctl.evaluate.evaluator import Evaluator
    from alignctl.evaluate.held_out import HeldOut, Lengths, build_held_out

    held_out = build_held_out(None, None, Lengths(512), num_questions=4, max_new_tokens=8)
    assert held_out == HeldOut()
    evaluate = Evaluator(None, held_out, judge=None, settings=EvalSettings(), seed=0)
    model = torch.nn.Linear(1, 1)
    assert evaluate.measure(model).metrics == evaluate.measure_reward_model(model).metrics == {}
