"""Every shipped recipe and group composes, and the published reference setting is exact."""

import importlib.util

import pytest

from alignctl.checks.notices import find_notices
from alignctl.checks.problems import find_problems
from alignctl.config.compose import (
    CONF_DIR,
    compose,
    expand_sweep,
    list_recipes,
    read_request,
    swept,
    value_sources,
)
from alignctl.config.stages import stage_config
from alignctl.errors import RequestError

RECIPES = [recipe.name for recipe in list_recipes()]
# What a recipe leaves to the user, so that it can be checked.
GIVEN = ["model.path=owner/model", "data.path=owner/rows"]


def composed(*arguments: str) -> dict:
    config, problems = compose(read_request(arguments))
    assert problems == []
    return config


def test_recipes_are_found():
    assert len(RECIPES) >= 4
    assert "quickstart" in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_composes_without_problems(name):
    given = GIVEN if name.endswith("_local") else []
    config = composed(f"recipe={name}", *given)
    found = [one.message for one in find_problems(config)]
    lacks = name == "grpo_qwen3_32b" and importlib.util.find_spec("vllm") is None
    assert found == (["`grpo.generation=vllm` needs the package `vllm`"] if lacks else [])
    assert find_notices(config, config["stages"]) == []


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_recipe_has_a_summary_line(recipe):
    assert 20 < len(recipe.summary) < 130


GROUP_OPTIONS = [(p.parent.name, p.stem) for p in sorted(CONF_DIR.glob("*/*.yaml"))]


def test_group_options_are_found():
    assert len(GROUP_OPTIONS) >= 15


@pytest.mark.parametrize(("group", "option"), GROUP_OPTIONS)
def test_group_option_composes(group, option):
    place = {"stage": "stage@dpo", "method": "method@dpo", "data": "data@dpo.data"}.get(group, group)
    config = composed("recipe=dpo_llama3", f"{place}={option}")
    section = {"stage": config["dpo"], "method": config["dpo"], "data": config["dpo"].get("data")}.get(group)
    assert section or config[group]


def test_what_a_ready_stage_is_made_of_can_be_replaced():
    config = composed("recipe=sft_dpo_llama3", "data@sft.data=ultrachat", "stage@dpo=dpo_quickstart", "dpo.beta=0.3")
    assert config["sft"]["data"]["path"] == "HuggingFaceH4/ultrachat_200k"
    assert config["sft"]["per_device_train_batch_size"] == 2
    assert (config["dpo"]["from"], config["dpo"]["max_length"], config["dpo"]["beta"]) == ("sft", 128, 0.3)


def test_reference_setting_of_dpo_llama3():
    config = composed("recipe=dpo_llama3")
    assert config["stages"] == ["dpo"]
    assert config["model"] == {"path": "meta-llama/Llama-3.1-8B-Instruct"}  # with adapters in the type it has: bfloat16
    assert config["peft"] == {
        "type": "lora",
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    dpo = config["dpo"]
    assert dpo["data"]["path"] == "argilla/ultrafeedback-binarized-preferences"
    wanted = {
        "bf16": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "learning_rate": 5e-7,
        "beta": 0.1,
        "num_train_epochs": 1,
        "warmup_steps": 0.1,
        "logging_steps": 10,
        "save_steps": 500,
        "disable_dropout": False,
    }
    assert {key: dpo[key] for key in wanted} == wanted


def test_sft_dpo_llama3_starts_dpo_from_sft():
    config = composed("recipe=sft_dpo_llama3")
    assert config["stages"] == ["sft", "dpo"]
    assert config["dpo"]["from"] == "sft"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("dpo.beta=0.2", lambda c: c["dpo"]["beta"] == 0.2),
        ("++dpo.beta=0.3", lambda c: c["dpo"]["beta"] == 0.3),
        ("+dpo.neftune_noise_alpha=5", lambda c: c["dpo"]["neftune_noise_alpha"] == 5),
        ("dpo.weight_decay=1e-2", lambda c: c["dpo"]["weight_decay"] == 0.01),  # not in the YAML, no + needed
        ("~dpo.save_total_limit", lambda c: "save_total_limit" not in c["dpo"]),
        ("dpo.loss_type=[sigmoid,sft]", lambda c: c["dpo"]["loss_type"] == ["sigmoid", "sft"]),
        ("dpo.run_name='a, b: $x'", lambda c: c["dpo"]["run_name"] == "a, b: $x"),
        ("dpo.lr_scheduler_kwargs={num_cycles:2}", lambda c: c["dpo"]["lr_scheduler_kwargs"] == {"num_cycles": 2}),
        ("peft=none", lambda c: c["peft"] == {"type": "none"}),
        ("data@dpo.data=quickstart", lambda c: c["dpo"]["data"]["path"] == "builtin:quickstart"),
        ("dpo.max_length=null", lambda c: c["dpo"]["max_length"] is None),
    ],
)
def test_override_grammar(override, read):
    assert read(composed("recipe=dpo_llama3", override))


def test_sources_name_the_file_of_each_value():
    sources = value_sources(read_request(["recipe=sft_dpo_llama3", "dpo.beta=0.2", "+dpo.weight_decay=0.1"]))
    assert sources["dpo.beta"] == "command line"
    assert sources["dpo.weight_decay"] == "command line"
    assert sources["dpo.from"].endswith("recipes/sft_dpo_llama3.yaml")
    assert sources["dpo.learning_rate"].endswith("conf/stage/dpo_llama3.yaml")
    assert sources["dpo.loss_type"].endswith("conf/method/dpo.yaml")
    assert sources["sft.data.path"].endswith("conf/data/capybara.yaml")


def test_a_recipe_of_ones_own(tmp_path):
    own = tmp_path / "my folder (1)" / "mine.yaml"
    own.parent.mkdir()
    own.write_text("# Mine.\ndefaults:\n  - dpo_llama3\n  - _self_\nstages: [dpo]\ndpo:\n  beta: 0.7\n")
    by_path = composed(f"recipe={own}")
    assert by_path["dpo"]["beta"] == 0.7
    request = read_request(["recipe=mine"], [own.parent])
    assert compose(request)[0] == by_path
    assert "mine" in [recipe.name for recipe in list_recipes([own.parent])]


def test_a_group_of_ones_own_beside_the_recipes(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ours.yaml").write_text("path: our/model\n")
    config, problems = compose(read_request(["recipe=dpo_llama3", "model=ours"], [tmp_path]))
    assert problems == []
    assert config["model"]["path"] == "our/model"


def test_sweep_is_every_combination_in_order():
    request = read_request(["recipe=dpo_llama3", "dpo.beta=0.05,0.1", "seed=1,2", "dpo.loss_type=[hinge,sft]"])
    points = expand_sweep(request)
    assert [swept(request, point) for point in points] == [
        ["dpo.beta=0.05", "seed=1"],
        ["dpo.beta=0.05", "seed=2"],
        ["dpo.beta=0.1", "seed=1"],
        ["dpo.beta=0.1", "seed=2"],
    ]
    assert all("dpo.loss_type=[hinge,sft]" in point.overrides for point in points)


def test_a_sweep_can_go_over_all_options_and_names_none_twice():
    points = expand_sweep(read_request(["recipe=dpo_llama3", "peft=glob(lora*)", "dpo.beta=0.1,0.1"]))
    assert [point.overrides for point in points] == [
        ("peft=lora", "dpo.beta=0.1"),
        ("peft=lora_attention", "dpo.beta=0.1"),
        ("peft=lora_embeddings", "dpo.beta=0.1"),
    ]


def test_deleted_settings_have_their_defaults():
    config = composed("recipe=dpo_llama3", "~seed", "~tracker")
    assert find_problems(config) == []
    assert stage_config(config, "dpo").seed == 42
    assert stage_config(config, "dpo").tracker.names == []


def test_the_same_adapter_named_again_keeps_its_settings():
    config = composed("recipe=dpo_llama3", "dpo.peft.type=lora", "dpo.peft.r=8")
    peft = stage_config(config, "dpo").peft
    assert (peft["r"], peft["lora_alpha"]) == (8, 32)


def test_a_recipe_that_starts_from_itself(tmp_path):
    (tmp_path / "dpo_llama3.yaml").write_text("# Ours.\ndefaults: [dpo_llama3, _self_]\nstages: [dpo]\n")
    with pytest.raises(RequestError, match="starts from itself"):
        compose(read_request(["recipe=dpo_llama3"], [tmp_path]))


def test_what_counts_as_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("# Inherits its stages.\ndefaults: [dpo_llama3, _self_]\n")
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "x.yaml").write_text("stages: [dpo]\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ours.yaml").write_text("defaults: [llama3_8b]\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text("stages: [dpo]\n")
    (tmp_path / "latin.yaml").write_bytes(b"stages: [d\xe9]\n")
    own = {recipe.name for recipe in list_recipes([tmp_path])} - set(RECIPES)
    assert own == {"mine", "team/x"}
    assert compose(read_request(["recipe=team/x"], [tmp_path]))[0] == {"stages": ["dpo"]}
    with pytest.raises(RequestError, match="cannot be read"):
        compose(read_request(["recipe=latin"], [tmp_path]))


def test_broken_yaml_names_the_recipe(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("stages: [dpo\ndpo: {{{")
    with pytest.raises(RequestError, match="broken"):
        compose(read_request([f"recipe={broken}"]))


def test_unknown_default_names_the_recipe(tmp_path):
    lost = tmp_path / "lost.yaml"
    lost.write_text("defaults:\n  - /base\n  - /model: nowhere\nstages: [dpo]\n")
    with pytest.raises(RequestError, match=r"lost.*nowhere"):
        compose(read_request([f"recipe={lost}"]))


def test_a_field_may_be_given_by_its_former_name(tmp_path):
    def sharing(*overrides, recipe="rlhf_llama3"):
        request = read_request([f"recipe={recipe}", *overrides])
        config, problems = compose(request)
        assert not problems
        assert "roles" not in config["ppo"]
        return config["ppo"]["sharing"], value_sources(request)["ppo.sharing"]

    assert sharing()[0] == "shared_base"
    assert sharing("ppo.roles=separate") == ("separate", "command line")
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [rlhf_llama3, _self_]\nppo: {roles: shared_value}\n")
    assert sharing(recipe=own) == ("shared_value", str(own))
    assert sharing("ppo.sharing=separate", recipe=own) == ("separate", "command line")
    assert sharing("ppo.roles=separate", recipe=own) == ("separate", "command line")
    derived = tmp_path / "derived.yaml"
    derived.write_text("defaults: [own, _self_]\nppo: {sharing: separate}\n")
    assert sharing(recipe=derived) == ("separate", str(derived))
    assert sharing("ppo={roles: shared_value}") == ("shared_value", "command line")


def test_both_names_of_a_field_in_one_place(tmp_path):
    overrides = ["dpo.gradient_checkpointing=true", "dpo.activation_checkpointing=false"]
    _, [problem] = compose(read_request(["recipe=dpo_local", *overrides]))
    assert "`dpo.gradient_checkpointing` is another name of `dpo.activation_checkpointing`" in problem.message
    assert "the command line has both" in problem.message
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [dpo_local, _self_]\ndpo: {gradient_checkpointing: true}\n")
    config, problems = compose(read_request([f"recipe={own}", "dpo.activation_checkpointing=false"]))
    assert (problems, config["dpo"]["activation_checkpointing"]) == ([], False)
    own.write_text(own.read_text().replace("true}", "true, activation_checkpointing: true}"))
    with pytest.raises(RequestError, match=r"own.yaml has both"):
        compose(read_request([f"recipe={own}"]))
