"""Fields read from source are those of the imported classes: the test that fails when TRL changes its ways."""

import dataclasses

import pytest

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
