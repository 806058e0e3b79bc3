"""Training starts from the reference, whatever the adapter and whatever a model drops at random: the first DPO loss is
ln 2, and PPO's first ratio is 1. Settings of adapters of which that is not so are refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig
from support.files import metrics, read
from support.in_process import run_stages
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alignctl.data.quickstart import preferences
from alignctl.errors import RequestError
from alignctl.models.tokenizer import train_tokenizer

pytestmark = pytest.mark.train

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
SHORT = (
    "model.scratch=null", "data.limit=8", "data.eval_limit=4", "eval.prompts=0", "rehearse=false",
)  # fmt: skip
DPO = (
    "recipe=sft_dpo_quickstart", "stages=[dpo]", "dpo.from=null", "dpo.loss_type=[sigmoid]", "dpo.loss_weights=null",
    "dpo.max_steps=2", "dpo.logging_steps=1", "dpo.warmup_steps=0", "dpo.learning_rate=1e-2", *SHORT,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([one["content"] for row in preferences("train")[:200] for one in row["chosen"]], 400)


@pytest.fixture(scope="module")
def make(tmp_path_factory, tokenizer):
    """A checkpoint with random weights, from the values of its config."""

    def checkpoint(model_type: str = "llama", **options) -> str:
        folder = tmp_path_factory.mktemp(model_type)
        torch.manual_seed(0)
        # The tokenizers of some kinds of models add a token of their own when they are loaded.
        config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer) + 8, **options)
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return checkpoint


@pytest.fixture(scope="module")
def with_biases(make):
    """A Llama with biases in its attention."""
    return make(**SIZES, attention_bias=True)


STARTS, NIGHT = None, pytest.mark.night
QV = "peft.target_modules=[q_proj,v_proj]"
# Of every field of peft's config: values, and None where training starts from the reference with them, else what the
# refusal says.
OPTIONS = {
    "alora_invocation_tokens": [("peft.alora_invocation_tokens=[5,6]", "packed rows")],
    "alpha_pattern": [
        (f"{QV} peft.alpha_pattern={{q_proj:4}}", STARTS),
        ("peft.alpha_pattern={q_proj:0}", "off there"),
    ],
    "arrow_config": [("peft.arrow_config={}", "trained already")],
    "bias": [("peft.bias=all", STARTS), (f"{QV} peft.bias=lora_only", STARTS)],
    "corda_config": [("peft.corda_config={}", "preparation")],
    "ensure_weight_tying": [("peft.ensure_weight_tying=true", STARTS)],
    "eva_config": [("peft.eva_config={}", "preparation")],
    "exclude_modules": [("peft.exclude_modules=[k_proj]", STARTS)],
    "fan_in_fan_out": [("peft.fan_in_fan_out=true", STARTS)],
    "init_lora_weights": [
        *((f"peft.init_lora_weights={name}", STARTS) for name in ("pissa", "olora", "mica")),
        *((f"peft.init_lora_weights={name}", STARTS) for name in ("true", "gaussian", "orthogonal", "pissa_niter_4")),
        *((f"peft.init_lora_weights={name}", "preparation") for name in ("corda", "eva", "loftq")),
        ("peft.init_lora_weights=false", "random change"),
        ("peft.init_lora_weights=lora_ga", "must be true or false or one of"),
        ("peft.init_lora_weights=pissa_niter_many", "must be true or false or one of"),
    ],
    "kasa_config": [("peft.kasa_config={}", "takes a part of the weights away")],
    "layer_replication": [
        ("peft.layer_replication=[[0,2],[1,2]]", "cannot be merged"),
        ("peft.layer_replication=[[0,2],[1,2]] model.merge=false", "another model than the reference"),
    ],
    "layers_pattern": [(f"{QV} peft.layers_to_transform=[1] peft.layers_pattern=layers", STARTS)],
    "layers_to_transform": [(f"{QV} peft.layers_to_transform=0", STARTS)],
    "loftq_config": [("peft.loftq_config={loftq_bits:4}", "preparation")],
    "lora_alpha": [("peft.lora_alpha=3", STARTS), ("peft.lora_alpha=0", "must be greater than 0")],
    "lora_bias": [
        (f"{QV} peft.lora_bias=true", STARTS),
        ("peft.target_modules=[q_proj,up_proj] peft.lora_bias=true", "up_proj` has no bias to merge into"),
        ("peft.lora_bias=true model.merge=false", STARTS),
    ],
    "lora_dropout": [
        ("peft.lora_dropout=0.1", "would have no effect: `dpo.disable_dropout` is true"),
        ("peft.lora_dropout=1.0", "from 0 to below 1"),
    ],
    "lora_ga_config": [("peft.lora_ga_config={}", "preparation")],
    "megatron_config": [("peft.megatron_config={}", "Megatron")],
    "megatron_core": [("peft.megatron_core=mine", "Megatron")],
    "modules_to_save": [("peft.modules_to_save=[embed_tokens,lm_head]", STARTS)],
    "monteclora_config": [("peft.monteclora_config={}", "noise")],
    "qalora_group_size": [("peft.qalora_group_size=8", "GPTQ")],
    "r": [("peft.r=3", STARTS), ("peft.r=0", "at least 1")],
    "rank_pattern": [(f"{QV} peft.rank_pattern={{q_proj:4}}", STARTS), ("peft.rank_pattern={q_proj:0}", "no adapter")],
    "runtime_config": [("peft.runtime_config={}", "cannot be used")],
    "target_modules": [("peft.target_modules=[embed_tokens,o_proj]", STARTS), ("peft.target_modules=.*_proj", STARTS)],
    "target_parameters": [("peft.target_modules=[] peft.target_parameters=[q_proj.weight]", STARTS)],
    "trainable_token_indices": [
        ("peft.trainable_token_indices=[3,4]", STARTS),
        ("peft.trainable_token_indices=[3,4000]", "names the token 4000"),
    ],
    "use_bdlora": [(f"{QV} peft.use_bdlora={{nblocks:2,target_modules_bd_a:[q_proj,v_proj]}}", STARTS)],
    "use_dora": [("peft.use_dora=true", STARTS)],
    "use_qalora": [("peft.use_qalora=true", "GPTQ")],
    "use_rslora": [("peft.use_rslora=true", STARTS)],
    "velora_config": [("peft.velora_config={}", STARTS)],
}
BY_DAY = (
    "peft.bias=all", "peft.init_lora_weights=pissa", "peft.init_lora_weights=olora",
    "peft.lora_bias=true model.merge=false", "peft.target_modules=[embed_tokens,o_proj]",
)  # fmt: skip
CASES = [
    pytest.param(given, refused, id=given, marks=() if refused or given in BY_DAY else NIGHT)
    for values in OPTIONS.values()
    for given, refused in values
]


def test_every_field_of_an_adapter_is_tried():
    known = {field.name for field in dataclasses.fields(PeftConfig)}
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(LoraConfig)} - known


@pytest.mark.parametrize(("given", "refused"), CASES)
def test_the_start_is_the_reference_with_every_option(tmp_path, with_biases, given, refused):
    arguments = (*DPO, f"model.path={with_biases}", "peft=lora", *given.split())
    if refused:
        with pytest.raises(RequestError) as error:
            run_stages(tmp_path, *arguments)
        assert refused in str(error.value)
        return
    stage = run_stages(tmp_path, *arguments) / "dpo"
    first, second = metrics(stage)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert second["loss"] != pytest.approx(math.log(2), abs=1e-5)  # it did learn
    result = read(stage / "result.json")
    assert result["product"] == "adapter" or result["saved"]["difference"]["largest"] < 1e-4


@pytest.mark.parametrize("start", ["pissa", pytest.param("pissa_niter_4", marks=NIGHT)])
def test_rewards_and_kl_are_against_the_base(tmp_path, with_biases, start):
    """Nothing is trained, so both are 0; also where the reference is computed beforehand."""
    for number, more in enumerate(([], ["dpo.precompute_ref_log_probs=true"])):
        stage = run_stages(
            tmp_path / str(number), *DPO, f"model.path={with_biases}", "peft=lora", f"peft.init_lora_weights={start}",
            "eval.prompts=2", "eval.max_new_tokens=4", "dpo.learning_rate=1e-12", *more,
        ) / "dpo"  # fmt: skip
        assert metrics(stage)[-1]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        assert read(stage / "result.json")["after"]["kl"] == pytest.approx(0, abs=1e-5)


# What models of each type drop at random while they are trained, as their configs call it.
DROPS = {
    "llama": {**SIZES, "attention_dropout": 0.1},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.1, "max_position_embeddings": 256,
    },
    "seed_oss": {**SIZES, "attention_dropout": 0.1, "residual_dropout": 0.1},
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
        "n_positions": 256,
    },
    "mixtral": {  # without the part of its loss that is about its experts
        **SIZES, "num_local_experts": 2, "attention_dropout": 0.1, "router_jitter_noise": 0.1,
        "router_aux_loss_coef": 0.0,
    },
    "gpt_neox": {**SIZES, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "qwen2": {**SIZES, "attention_dropout": 0.1},
    "mistral": {**SIZES, "attention_dropout": 0.1},
    "gemma2": {**SIZES, "attention_dropout": 0.1},
    "gemma3_text": {**SIZES, "attention_dropout": 0.1},
    "phi": {**SIZES, "attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "phi3": {**SIZES, "attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "pad_token_id": 0},
    "falcon": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "gptj": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1,
        "attn_pdrop": 0.1, "n_positions": 256,
    },
    "persimmon": {**SIZES, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "biogpt": {
        **SIZES, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "activation_dropout": 0.1,
        "layerdrop": 0.1,
    },
    "starcoder2": {**SIZES, "attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1},
}  # fmt: skip
MODELS_BY_DAY = ("llama", "opt", "mixtral")


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in MODELS_BY_DAY else NIGHT) for name in DROPS]
)
def test_no_dropout_is_left_on(tmp_path, make, model_type):
    model = make(model_type, **DROPS[model_type])
    stage = run_stages(tmp_path, *DPO, f"model.path={model}", "peft=none", "dpo.learning_rate=1e-3") / "dpo"
    assert metrics(stage)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    before, after = (read(Path(folder, "config.json")) for folder in (model, stage / "model"))
    rates = [key for key in before if "drop" in key or "noise" in key]
    assert {key: after[key] for key in rates} == {key: before[key] for key in rates}


def test_ppo_starts_at_the_ratio_1_with_attention_dropout(tmp_path, make):
    model = make(**DROPS["llama"])
    stage = run_stages(
        tmp_path, "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null", *SHORT,
        "ppo.normalize_rewards=none", "ppo.reward_funcs=[alignctl.data.quickstart:reward]", f"model.path={model}",
        "peft=none", "ppo.max_steps=1", "ppo.learning_rate=1e-9", "ppo.response_length=4", "ppo.logging_steps=1",
        "ppo.per_device_train_batch_size=8",
    ) / "ppo"  # fmt: skip
    (first,) = metrics(stage)
    assert first["kl_to_rollout"] == pytest.approx(0, abs=1e-6)
    assert first["clip_fraction"] == 0


def test_a_finished_model_has_the_config_that_it_started_with(tmp_path, with_biases):
    stage = run_stages(tmp_path, *DPO, f"model.path={with_biases}", "peft=none") / "dpo"
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (with_biases, stage / "model")]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    assert configs[1]["use_cache"]
    assert AutoTokenizer.from_pretrained(stage / "model").get_vocab()
