"""Fields read from source are those of the imported classes: the test that fails when TRL changes its ways."""

import ast
import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import alignctl
from alignctl.config.compose import CONF_DIR
from alignctl.config.schema import PEFT_CLASSES
from alignctl.config.trl_fields import config_fields, enum_values
from alignctl.methods.registry import methods, resolve


@pytest.mark.train
@pytest.mark.parametrize(
    "config_class", [m.config_class for m in methods().values()] + [c for c in PEFT_CLASSES.values() if c]
)
def test_fields_equal_those_of_the_class(config_class):
    cls = resolve(config_class)
    read = config_fields(config_class)
    real = {field.name: field for field in dataclasses.fields(cls)}
    assert real.keys() <= read.keys() | {"task_type", "peft_type", "auto_mapping", "peft_version",
                                         "base_model_name_or_path", "revision", "inference_mode"}  # fmt: skip
    for name, field in real.items():
        if name in read and read[name].default is not None and field.default is not dataclasses.MISSING:
            assert read[name].default == field.default, name


def own_fields(config_class: str) -> set[str]:
    """Fields that a class of ours defines itself."""
    home = config_class.partition(":")[0].replace(".", "/") + ".py"
    (body,) = (
        node.body
        for node in ast.parse((Path(alignctl.__file__).parents[1] / home).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == config_class.partition(":")[2]
    )
    return {item.target.id for item in body if isinstance(item, ast.AnnAssign)}


@pytest.mark.parametrize("method", methods().values(), ids=lambda method: method.name)
def test_our_defaults_are_those_of_the_group(method):
    """Else a stage that does not take conf/method/ would be another one."""
    fields, group = config_fields(method.config_class), OmegaConf.load(CONF_DIR / "method" / f"{method.name}.yaml")
    ours = {name: fields[name].default for name in own_fields(method.config_class) if fields[name].default is not None}
    assert {name: group[name] for name in ours if name in group} == {k: v for k, v in ours.items() if k in group}


def test_help_gives_choices():
    fields = config_fields("trl.trainer.dpo_config:DPOConfig")
    assert {"sigmoid", "hinge", "ipo", "exo_pair", "sft"} <= set(fields["loss_type"].choices)
    assert set(fields["f_divergence_type"].choices) == {
        "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence",
    }  # fmt: skip
    assert fields["beta"].choices is None


def test_enumerations():
    assert "cosine" in enum_values("SchedulerType")
    assert enum_values("NoSuchThing") is None


def test_missing_class_says_so():
    with pytest.raises(LookupError, match="no class `PPOConfig`"):
        config_fields("trl.trainer.dpo_config:PPOConfig")
    with pytest.raises(LookupError, match="nowhere"):
        config_fields("trl.nowhere:X")
