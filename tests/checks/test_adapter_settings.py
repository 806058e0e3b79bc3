"""What is wrong with an adapter is found before anything is loaded: names that match nothing in the files of the model,
settings that would scale it to nothing, and what it could not be saved or compared with."""

from __future__ import annotations

import json
import struct

import pytest

from alignctl.checks.problems import find_problems
from alignctl.config.adapters import changes_base, rewrites_base, without_effect
from alignctl.config.compose import compose, read_request
from alignctl.config.types import type_error
from alignctl.config.weights import saved_tensors, saved_type

PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "input_layernorm")
NAMES = ["model.embed_tokens.weight", *(f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in PARTS)]


def checkpoint(folder, names=NAMES, kind="F32"):
    """A folder that looks like a checkpoint to who reads no numbers: two files and their index."""
    folder.mkdir()
    width = {"F32": 4, "BF16": 2}[kind]
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in files.items():
        at = {name: [4 * width * i, 4 * width * (i + 1)] for i, name in enumerate(some)}
        header = {name: {"dtype": kind, "shape": [2, 2], "data_offsets": place} for name, place in at.items()}
        text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4 * width * len(some))
    index = {"weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def problems(tmp_path):
    """What is wrong with a recipe whose model is such a folder, as text."""
    folder = checkpoint(tmp_path / "model")

    def find(*arguments: str, recipe: str = "sft_dpo_quickstart", model: str = "") -> list[str]:
        given = [f"recipe={recipe}", f"model.path={model or folder}", "model.scratch=null", *arguments]
        config, wrong = compose(read_request(given))
        return [f"{one.message} {one.hint or ''}" for one in [*wrong, *find_problems(config)]]

    return find


def one(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("peft.target_modules=[q_prj,v_proj]", ["target_modules", "`q_prj`", "matches nothing", "`q_proj`"]),
        ("peft.target_modules=.*k_proj", ["target_modules", "matches nothing"]),
        ("peft.target_modules=[proj]", ["`proj`", "matches nothing"]),
        ("peft.modules_to_save=[lm_haed]", ["modules_to_save", "`lm_head`"]),
        ("peft.exclude_modules=[k_proj]", ["exclude_modules", "`k_proj`"]),
        ("peft.target_modules=[q_proj] peft.exclude_modules=[v_proj]", ["exclude_modules", "`v_proj`"]),
        ("peft.target_modules=[q_proj] peft.rank_pattern={v_proj:2}", ["rank_pattern", "`v_proj`"]),
        ("peft.target_modules=[q_proj] peft.layers_to_transform=[0,2]", ["the layer 2", "from 0 to 1"]),
        ("peft.trainable_token_indices={embed:[1]}", ["trainable_token_indices", "`embed`", "`embed_tokens`"]),
        ("peft.target_modules=[] peft.target_parameters=[experts.up]", ["target_parameters", "`experts.up`"]),
        ("peft.target_modules=[q_proj,lm_head]", ["`lm_head`", "past an adapter"]),
        ("peft.target_modules=q_proj|lm_head", ["`lm_head`", "past an adapter"]),
        ("peft.target_modules=.*", ["`lm_head`", "set `peft.exclude_modules=[lm_head]`"]),
        ("peft.target_modules=all-linear peft.layers_to_transform=[0]", ["layers_to_transform", "modules in a list"]),
        ("peft.target_modules=.*_proj peft.layers_pattern=[layers]", ["layers_pattern", "modules in a list"]),
        ("peft.target_modules=[q_proj] peft.layers_pattern=[layers]", ["no layers are chosen"]),
        (
            "peft.target_modules=[embed_tokens] peft.ensure_weight_tying=true",
            ["`lm_head`", "take `ensure_weight_tying`"],
        ),
        ("peft.bias=all", ["`peft.bias=all` would have no effect"]),
        ("peft.lora_bias=true", ["the model has no bias", "`model.merge=false`"]),
        ("peft.target_modules=[q_proj] peft.lora_bias=true", ["q_proj` has no bias", "`model.merge=false`"]),
    ],
)
def test_names_that_match_nothing(problems, given, words):
    found = one(problems("stages=[sft]", "peft=lora", *given.split()))
    assert all(word in found for word in words), found


@pytest.mark.parametrize(
    "given",
    [
        "peft.target_modules=[q_proj,layers.1.mlp.up_proj,embed_tokens]",
        r'peft.target_modules="model\.layers\.\d+\.(mlp|self_attn)\..*_proj"',
        "peft.modules_to_save=[embed_tokens,lm_head]",
        "peft.target_modules=[q_proj] peft.layers_to_transform=1 peft.alpha_pattern={layers.1.self_attn.q_proj:2}",
        "peft.exclude_modules=[mlp.up_proj]",
        "peft.target_modules=.* peft.exclude_modules=[lm_head]",
        "peft.init_lora_weights=pissa_niter_16",
    ],
)
def test_names_that_match_something(problems, given):
    stage = ["peft.target_modules=all-linear"] if "target_modules" not in given else []
    assert problems("stages=[sft]", "peft=lora", *stage, *given.split()) == []


@pytest.mark.parametrize(
    "names", [["h.0.attn.weight", "wte.weight"], [*NAMES, "model.layers.0.experts.0.up.weight"], []]
)
def test_where_files_call_weights_otherwise_the_worker_looks(tmp_path, problems, names):
    folder = checkpoint(tmp_path / "other", names)
    assert problems("stages=[sft]", "peft=lora", "peft.target_modules=[nothing]", model=str(folder)) == []


@pytest.mark.parametrize(
    "given",
    [
        ["peft=lora_embeddings"],
        ["peft=lora", "peft.exclude_modules=[lm_head]"],
        ["peft=lora", "peft.modules_to_save=[score]"],
        ["peft=lora", "peft.exclude_modules=score"],
    ],
)
def test_a_head_that_models_of_another_stage_have(problems, given):
    """One section is for policies and reward models, and each has the head that the other has not."""
    separate = [] if given == ["peft=lora_embeddings"] else ["ppo.sharing=separate"]
    assert problems(*given, *separate, recipe="rlhf_quickstart") == []


def test_a_reward_model_has_no_adapter_on_the_other_head(problems):
    given = ("stages=[rm]", "rm.from=null", "peft=lora")
    assert "`lm_head`" in one(problems(*given, "peft.target_modules=[lm_head]", recipe="sft_rm_quickstart"))
    assert "`scroe`" in one(problems(*given, "peft.modules_to_save=[scroe]", recipe="sft_rm_quickstart"))


def test_the_typo_is_what_is_answered(problems):
    found = one(problems("stages=[sft]", "peft=none", "peft.rr=4"))
    assert found == "unknown key `peft.rr` did you mean `peft.r`?"
    assert "`peft.type` is none" in one(problems("stages=[sft]", "peft=none", "peft.r=4"))


def test_what_rewrites_the_base_needs_it_whole(problems):
    start = ("stages=[sft]", "peft=lora", "peft.init_lora_weights=olora")
    processes = "launcher.processes=2"
    assert problems(*start) == problems(*start, "distributed=zero2", processes) == []
    assert "divides them" in one(problems(*start, "distributed=zero3", processes))
    assert "nothing to go on from" in one(problems(*start, "model.merge=false"))
    assert any("4 bits" in text for text in problems("stages=[sft]", "peft=qlora", "peft.init_lora_weights=pissa"))


def test_an_adapter_kept_alone_is_no_start(problems):
    alone = ("peft=lora", "model.merge=false")
    assert problems("stages=[dpo]", "dpo.from=null", *alone) == []
    found = one(problems("stages=[sft,dpo]", *alone))
    assert "`dpo.from=sft`" in found
    assert "`sft.model.merge=true`" in found
    assert problems("stages=[sft,dpo]", *alone, "sft.model.merge=true") == []
    role = ("stages=[sft,dpo]", "peft=lora", "dpo.from=null", "dpo.reference=sft", "sft.model.merge=false")
    assert "`dpo.reference=sft`" in one(problems(*role))
    assert "no stage trains an adapter" in one(problems("stages=[sft]", "model.merge=false"))
    assert "`sft` trains all weights" in one(problems("stages=[sft]", "sft.model.merge=false"))
    assert "no whole model" in one(problems("stages=[sft]", *alone, "model.save_dtype=float16"))


def test_an_adapter_of_random_weights_is_not_kept_alone(problems):
    config, _ = compose(read_request(["recipe=sft_quickstart", "peft=lora", "model.merge=false"]))
    assert "random weights" in find_problems(config)[0].message


def test_reentrant_checkpointing_of_an_adapter_under_ddp(problems):
    given = ("stages=[sft]", "sft.gradient_checkpointing=true", "launcher.processes=2", "distributed=ddp")
    kwargs = "sft.activation_checkpointing_kwargs={use_reentrant: true}"
    assert "`sft.activation_checkpointing_kwargs.use_reentrant=false`" in one(problems(*given, "peft=lora", kwargs))
    assert problems(*given, "peft=none", kwargs) == []
    assert problems(*given, "peft=lora", kwargs.replace("true", "false")) == []


def test_a_shared_base_stays_as_it_is(problems):
    given = ("peft=lora", "sft.peft.type=none", "ppo.sharing=shared_base", "rm.peft.init_lora_weights=pissa")
    found = one(problems(*given, recipe="rlhf_quickstart"))
    assert "`rm.peft.init_lora_weights=pissa`" in found


def test_which_settings_change_the_weights_under_an_adapter():
    assert rewrites_base({"init_lora_weights": "pissa_niter_4"}) == "init_lora_weights=pissa_niter_4"
    assert rewrites_base({"bias": "all"}) is None
    assert changes_base({"bias": "all"}) == "bias=all"
    assert changes_base({"init_lora_weights": "gaussian", "bias": "none"}) is changes_base({}) is None


def test_a_name_with_a_number_in_it_is_written_with_brackets():
    annotation = "bool | Literal['pissa', 'pissa_niter_[number of iters]']"
    assert type_error("pissa_niter_16", annotation) is None
    assert type_error("pissa_niter_", annotation) is not None
    assert type_error("pissa_niter_[number of iters]", annotation) is not None


def test_what_is_no_expression_matches_nothing():
    (problem,) = without_effect({"target_modules": "(q_proj"}, ["model.q_proj"], [])
    assert "`(q_proj`" in problem.message


def test_files_of_weights_are_read_without_them(tmp_path, shared_data):
    tensors = saved_tensors(checkpoint(tmp_path / "bf16", kind="BF16"))
    assert set(tensors) == set(NAMES)
    assert saved_type(tensors) == "bfloat16"
    real = saved_tensors(shared_data / "models" / "stories260K")
    assert real["model.embed_tokens.weight"].shape == (512, 64)
    assert saved_tensors(tmp_path) == {}
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert saved_tensors(tmp_path) == {}
    assert saved_type({}) is None
