"""The tests' own table of methods has a row for each, and says enough of it."""

from __future__ import annotations

import pytest
from support.methods import METHODS

from alignctl.config.compose import RECIPES_DIR
from alignctl.methods.registry import methods, resolve


def test_every_method_has_its_row():
    assert list(METHODS) == list(methods())


@pytest.mark.parametrize("name", METHODS)
def test_a_product_of_rows_says_what_they_are(name):
    method = methods()[name]
    assert (method.product == "rows") == (method.makes is not None)
    assert method.product == "rows" or method.trainer is not None


@pytest.mark.parametrize("name", METHODS)
def test_recipes_and_comparisons_are_there(name):
    row, method = METHODS[name], methods()[name]
    assert (RECIPES_DIR / f"{row.recipe}.yaml").is_file()
    assert (row.local is None) == (row.trl is None) == (not row.compared)
    assert row.local is None or (RECIPES_DIR / f"{row.local}.yaml").is_file()
    assert (row.passes is not None) == (method.stability == "stable"), "TRL keeps a trainer to compare the engine with"


@pytest.mark.train
@pytest.mark.parametrize("name", METHODS)
def test_a_trainer_of_ours_has_the_reference_that_its_row_names(name):
    trainer = resolve(methods()[name].trainer)
    if hasattr(trainer, "has_reference"):
        assert trainer.has_reference == ("reference" in methods()[name].roles)
