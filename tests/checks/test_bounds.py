"""The table of bounds speaks of fields that there are."""

from __future__ import annotations

from alignctl.checks.bounds import TRAINER
from alignctl.config.trl_fields import config_fields
from alignctl.methods.registry import methods


def test_each_field_that_is_bound_for_all_trainers_is_one_that_a_stage_accepts():
    accepted = {key for method in methods().values() for key in config_fields(method.config_class)}
    assert set(TRAINER) <= accepted
