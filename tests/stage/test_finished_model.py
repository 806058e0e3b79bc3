"""What a stage leaves is what was trained: in the type that is wanted, with what rounding costs said, merged or not."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.files import metrics, read
from support.in_process import frozen, run_stages
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignctl.cli.summary import run_summary
from alignctl.errors import LaunchError
from alignctl.models import comparing, saving
from alignctl.models.comparing import said_of
from alignctl.run.state import is_done

pytestmark = pytest.mark.train

QUICK = (
    "model.scratch=null", "data.limit=16", "data.eval_limit=8", "eval.prompts=0", "rehearse=false",
)  # fmt: skip
SFT = ("recipe=sft_quickstart", "sft.max_steps=2", "sft.learning_rate=1e-2", "sft.warmup_steps=0", *QUICK)
BOTH = (
    "recipe=sft_dpo_quickstart",
    "dpo.max_steps=1",
    "dpo.logging_steps=1",
    "dpo.loss_type=[sigmoid]",
    "dpo.loss_weights=null",
    *SFT[1:],
)
REWARD = (
    "recipe=sft_rm_quickstart", "stages=[rm]", "rm.from=null", "rm.max_steps=2", "rm.learning_rate=1e-2", *QUICK,
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory, shared_data):
    """The pretrained Llama, which has one weight for embeddings and head, in two types."""
    folder = tmp_path_factory.mktemp("bases")
    source = shared_data / "models" / "stories260K"
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    for kind in ("float32", "bfloat16"):
        AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, kind)).save_pretrained(folder / kind)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / kind)
    return folder


def kinds(model) -> set:
    return {tensor.dtype for tensor in load_file(model / "model.safetensors").values()}


def notices(stage) -> str:
    return "\n".join(read(stage / "progress.json")["notices"])


IDS = [torch.arange(5, 60)]


def said(model):
    return said_of(model, IDS)


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_type_is_the_checkpoint_s_and_its_cost_is_said(tmp_path, bases, peft):
    run = run_stages(tmp_path, *SFT, f"model.path={bases / 'bfloat16'}", f"peft={peft}")
    stage = run / "sft"
    assert kinds(stage / "model") == {torch.bfloat16}
    saved = read(stage / "result.json")["saved"]
    assert saved["dtype"] == read(stage / "model" / "config.json")["dtype"] == "bfloat16"
    assert saved["bytes"] == (stage / "model" / "model.safetensors").stat().st_size
    assert 0 < saved["difference"]["mean"] < saved["difference"]["largest"] < 0.5  # nats, of weights with 8 bits
    assert "model/: bfloat16, 5" in notices(stage)
    assert "rounding changes its log-probabilities by" in notices(stage)


@pytest.mark.parametrize(("wanted", "kind"), [("float32", torch.float32), ("float16", torch.float16)])
def test_another_type_on_request(tmp_path, bases, wanted, kind):
    stage = run_stages(tmp_path, *SFT, f"model.path={bases / 'bfloat16'}", f"model.save_dtype={wanted}") / "sft"
    assert kinds(stage / "model") == {kind}
    assert read(stage / "model" / "config.json")["dtype"] == wanted
    assert ("rounding" in notices(stage)) == (wanted == "float16")


def test_what_a_later_stage_starts_from_stays_as_it_was_trained(tmp_path, bases):
    run = run_stages(tmp_path, *BOTH, f"model.path={bases / 'bfloat16'}")
    assert kinds(run / "sft" / "model") == {torch.float32}
    assert kinds(run / "dpo" / "model") == {torch.bfloat16}  # as the checkpoint that the first stage started from
    assert metrics(run / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_where_it_is_rounded_the_next_stage_starts_from_what_stands_there(tmp_path, bases):
    run = run_stages(tmp_path, *BOTH, f"model.path={bases / 'float32'}", "sft.model.save_dtype=bfloat16")
    assert kinds(run / "sft" / "model") == {torch.bfloat16}
    assert f"`dpo` takes the model as it stands in {run / 'sft' / 'model'}, in bfloat16" in notices(run / "sft")
    assert metrics(run / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


TIED = ("peft=lora", "sft.learning_rate=5e-2")


@pytest.mark.parametrize("adapted", ["target_modules=[q_proj,embed_tokens]", "trainable_token_indices=[5,6,7]"])
def test_an_adapter_on_tied_embeddings_is_merged_as_it_was_trained(tmp_path, bases, adapted):
    stage = run_stages(
        tmp_path, *SFT, *TIED, f"model.path={bases / 'float32'}", f"peft.{adapted}"
    ) / "sft"  # fmt: skip
    merged, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (stage / "model", bases / "float32"))
    before = said(base)
    apart = said(merged) - said(PeftModel.from_pretrained(base, stage / "adapter"))
    assert apart.abs().max() < 1e-4  # nats
    assert (said(merged) - before).abs().max() > 0.1  # it did learn
    assert merged.config.tie_word_embeddings == ("embed_tokens" not in adapted)


def test_a_reward_model_is_compared_by_its_scores(tmp_path, bases):
    stage = run_stages(tmp_path, *REWARD, "peft=lora", f"model.path={bases / 'bfloat16'}") / "rm"
    assert kinds(stage / "model") == {torch.bfloat16}
    assert "rounding changes its scores by" in notices(stage)
    assert AutoModelForSequenceClassification.from_pretrained(stage / "model").config.num_labels == 1


def test_what_was_merged_wrong_is_no_model(tmp_path, bases, monkeypatch):
    """As a merge that leaves the adapter out would be."""
    monkeypatch.setattr(saving, "merged", lambda trained: trained.unload())
    request = (*SFT, *TIED, f"model.path={bases / 'float32'}")
    with pytest.raises(saving.AlignctlError, match="it says other things than in memory"):
        run_stages(tmp_path, *request)
    stage = tmp_path / "sft"
    assert (stage / "adapter" / "adapter_model.safetensors").is_file()
    assert not (stage / "model").exists()
    assert not (stage / "result.json").exists()
    monkeypatch.undo()
    steps = len(metrics(stage))
    run_stages(tmp_path, *request)
    assert len(metrics(stage)) == steps  # it only saved
    assert (stage / "model").is_dir()


def test_without_the_memory_to_compare_it_is_said(tmp_path, bases, monkeypatch):
    monkeypatch.setattr(comparing, "free_memory", lambda: 1000)
    stage = run_stages(tmp_path, *SFT, f"model.path={bases / 'float32'}") / "sft"
    assert read(stage / "result.json")["saved"]["difference"] is None
    assert "too little memory" in notices(stage)


def test_an_adapter_kept_alone_is_the_product(tmp_path, bases):
    base = bases / "float32"
    request = (*SFT, "peft=lora", "model.merge=false", "peft.lora_bias=true", f"model.path={base}")
    run = run_stages(tmp_path, *request)
    stage = run / "sft"
    assert not (stage / "model").exists()
    assert read(stage / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert read(stage / "adapter" / "manifest.json")["product"] == "adapter"
    plan = frozen(tmp_path, *request)
    assert is_done(plan.paths.stage("sft"))
    assert run_summary(plan)["stages"]["sft"]["adapter"] == str(stage / "adapter")
    before = said(AutoModelForCausalLM.from_pretrained(base))
    adapted = said(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), stage / "adapter"))
    assert (adapted - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("wanted", "needed"),
    [
        (("peft=none",), r"5\d\d\.\d kB for the finished model"),  # 260,000 numbers of the checkpoint's type
        (("peft=lora", "peft.r=1", "model.merge=false"), r"\d+\.\d kB for the finished adapter"),
    ],
)
def test_room_is_asked_for_what_is_saved(tmp_path, bases, wanted, needed):
    too_many = ("sft.max_steps=1000000000000", "sft.save_steps=1", "sft.save_total_limit=null")
    with pytest.raises(LaunchError, match=f" {needed}"):
        run_stages(tmp_path, *SFT, *too_many, f"model.path={bases / 'bfloat16'}", *wanted)
