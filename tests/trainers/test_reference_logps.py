"""Reference log-probabilities: computed once for a sweep, found again by content, and those of the merged SFT model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.files import read
from support.in_process import run_stages
from support.models import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignctl.data.tokenizing import cut, tokenize_completions
from alignctl.engine.logps import completion_logps

pytestmark = pytest.mark.train

QUICK = ("data.limit=32", "data.eval_limit=8", "eval.prompts=0")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """An SFT model of the quickstart world, trained with LoRA and merged."""
    run = run_stages(
        tmp_path_factory.mktemp("sft"),
        "recipe=sft_quickstart",
        *QUICK,
        *TINY,
        "peft=lora",
        "peft.r=4",
        "sft.max_steps=6",
    )
    return run / "sft" / "model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference_logps"


def dpo(folder, sft, *more: str):
    run = run_stages(
        folder, "recipe=sft_dpo_quickstart", "stages=[dpo]", "dpo.from=null", f"model.path={sft}", "model.scratch=null",
        *QUICK, "dpo.max_steps=3", "dpo.logging_steps=1", "dpo.loss_type=[sigmoid]", "dpo.loss_weights=[1]", *more,
    )  # fmt: skip
    return run / "dpo"


def losses(stage):
    return [row["loss"] for row in read(stage / "metrics.jsonl") if "loss" in row]


def notices(stage):
    return " ".join(read(stage / "progress.json")["notices"])


PRECOMPUTED = "dpo.precompute_ref_log_probs=true"


def test_a_sweep_over_beta_pays_once(tmp_path, sft, cache):
    asked = ("dpo.beta=0.3", "eval.prompts=6", "eval.max_new_tokens=8")
    plain = dpo(tmp_path / "plain", sft, *asked)
    first = dpo(tmp_path / "first", sft, PRECOMPUTED, "dpo.beta=0.1")
    assert notices(first).count("computed and kept") == 2  # training rows and held-out rows
    written = {file: file.stat().st_ino for file in cache.iterdir()}
    assert len(written) == 2
    second = dpo(tmp_path / "second", sft, PRECOMPUTED, *asked)
    assert notices(second).count("found in") == 2
    assert {file: file.stat().st_ino for file in cache.iterdir()} == written
    assert losses(second) == pytest.approx(losses(plain), abs=1e-6)
    measured = read(second / "result.json")["after"]
    assert measured == pytest.approx(read(plain / "result.json")["after"], abs=1e-4)
    assert measured["kl"] > 0


def test_an_adapter_finds_the_same_with_another_seed(tmp_path, sft, cache):
    dpo(tmp_path / "first", sft, PRECOMPUTED, "peft=lora")
    again = dpo(tmp_path / "second", sft, PRECOMPUTED, "peft=lora", "seed=7")
    assert notices(again).count("found in") == 2


@pytest.mark.parametrize("change", ["dpo.max_length=24", "data.limit=31", "dpo.truncation_mode=keep_end"])
def test_what_changes_the_numbers_is_computed_anew(tmp_path, sft, cache, change):
    dpo(tmp_path / "first", sft, PRECOMPUTED, "data.max_lost=1")
    other = dpo(tmp_path / "second", sft, PRECOMPUTED, "data.max_lost=1", change)
    assert "train rows: computed" in notices(other)


@pytest.mark.parametrize("change", ["dpo.max_length=40", "dpo.ld_alpha=0.1"])
def test_a_cache_of_the_datasets_library_is_not_asked(tmp_path, sft, cache, change):
    """Rows of a file are cached on disk by that library, and TRL keeps log-probabilities beside them."""
    from alignctl.data.quickstart import preferences

    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in preferences("train")[:24]))
    common = (
        f"data.path={file}", "data.eval_rows=0", "eval.judge=null", "dpo.truncation_mode=keep_end",
        "data.max_lost=1", "~data.eval_limit", "~data.limit",
    )  # fmt: skip
    plain = losses(dpo(tmp_path / "plain", sft, *common, change))
    dpo(tmp_path / "first", sft, PRECOMPUTED, *common)
    assert losses(dpo(tmp_path / "second", sft, PRECOMPUTED, *common, change)) == pytest.approx(plain, abs=1e-6)


def test_the_same_weights_under_another_config_are_another_reference(tmp_path, sft, cache):
    dpo(tmp_path / "first", sft, PRECOMPUTED)
    other = tmp_path / "other"
    shutil.copytree(sft, other)
    config = read(other / "config.json")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    (other / "config.json").write_text(json.dumps(config))
    assert "train rows: computed" in notices(dpo(tmp_path / "second", other, PRECOMPUTED))


def test_a_broken_file_is_computed_anew(tmp_path, sft, cache):
    whole = dpo(tmp_path / "first", sft, PRECOMPUTED)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert losses(dpo(tmp_path / "second", sft, PRECOMPUTED)) == losses(whole)


def test_kto_and_ipo_keep_theirs_too(tmp_path, sft, cache):
    for name in ("kto", "ipo"):
        arguments = (
            f"recipe=sft_{name}_quickstart", f"stages=[{name}]", f"{name}.from=null", f"model.path={sft}",
            "model.scratch=null", *QUICK, f"{name}.max_steps=2", f"{name}.logging_steps=1",
        )  # fmt: skip
        plain = run_stages(tmp_path / f"{name}_plain", *arguments) / name
        precomputed = f"{name}.precompute_ref_log_probs=true"
        run_stages(tmp_path / f"{name}_first", *arguments, precomputed)
        again = run_stages(tmp_path / f"{name}_again", *arguments, precomputed) / name
        assert "found in" in notices(again)
        assert losses(again) == pytest.approx(losses(plain), abs=1e-6)


def test_after_lora_sft_the_reference_is_the_merged_model(tmp_path, sft, cache):
    """What DPO with an adapter takes for its reference is what the saved SFT model says by itself."""
    dpo(tmp_path / "run", sft, PRECOMPUTED, "peft=lora", "dpo.max_steps=1")
    from safetensors.torch import load_file

    kept = [load_file(file) for file in cache.iterdir()]
    train = max(kept, key=lambda columns: len(columns["ref_chosen_logps"]))
    from alignctl.data.quickstart import preferences

    model, tokenizer = AutoModelForCausalLM.from_pretrained(sft).eval(), AutoTokenizer.from_pretrained(sft)
    for side in ("chosen", "rejected"):
        answers = []
        for row in preferences("train")[:32]:
            prompt, (completion,) = tokenize_completions(tokenizer, row["prompt"], [row[side]])
            answers.append(cut(prompt, completion, 128, "keep_start"))
        prompts, completions = zip(*answers, strict=True)
        alone = torch.stack([logps.sum() for logps in completion_logps(model, prompts, completions, 8)])
        torch.testing.assert_close(train[f"ref_{side}_logps"], alone, rtol=1e-5, atol=1e-4)


def test_a_reference_of_its_own(tmp_path, sft, cache):
    """`reference` names another model than the one that is trained: then the first loss is not log 2."""
    other = run_stages(tmp_path / "other", "recipe=sft_quickstart", *QUICK, *TINY, "sft.max_steps=2", "seed=5")
    for more in ((), (PRECOMPUTED,), ("peft=lora",)):
        stage = dpo(tmp_path / f"run{len(more)}{more}", sft, f"dpo.reference={other / 'sft' / 'model'}", *more)
        assert abs(losses(stage)[0] - 0.693147) > 1e-3
        plan = json.loads((stage.parent / "plan.json").read_text())
        assert plan["stages"][0]["roles"]["reference"].endswith("other/sft/model")
