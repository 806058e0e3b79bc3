"""Shapes of models without their weights: those that transformers makes of them."""

from __future__ import annotations

from collections import Counter

import pytest

from alignctl.config.compose import CONF_DIR
from alignctl.config.schema import ModelSettings
from alignctl.plan.shapes import shape_of, table, tensors

MODELS = table()


@pytest.mark.parametrize("name", MODELS)
def test_the_table_counts_the_parameters_of_its_models(name):
    model = MODELS[name]
    assert sum(one.numbers * one.count for one in tensors(model["shape"])) == model["parameters"]


def test_no_id_is_of_two_models():
    ids = [one for model in MODELS.values() for one in model["ids"]]
    assert len(ids) == len(set(ids))


def test_models_that_can_be_chosen_are_in_the_table():
    paths = [line.split()[1] for file in CONF_DIR.glob("model/*.yaml") for line in file.read_text().splitlines()
             if line.startswith("path: ") and "/" in line]  # fmt: skip
    assert len(paths) > 5
    assert [path for path in paths if shape_of(ModelSettings(path=path)) is None] == []


def test_nothing_is_known_of_other_families():
    assert tensors({"model_type": "mamba"}) is None


@pytest.mark.train
@pytest.mark.parametrize("kind", sorted({model["shape"]["model_type"] for model in MODELS.values()}))
@pytest.mark.parametrize("scores", [False, True])
def test_tensors_are_those_that_transformers_makes(kind, scores):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    shape = next(model["shape"] for model in MODELS.values() if model["shape"]["model_type"] == kind)
    shape = dict(shape) | {"num_hidden_layers": 2}
    config = AutoConfig.for_model(**shape, pad_token_id=None, num_labels=1)
    with torch.device("meta"):
        made = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_config(config)
    wanted: Counter = Counter()
    for one in tensors(shape, scores):
        wanted[one.shape] += one.count
    assert Counter(tuple(weight.shape) for weight in made.parameters()) == wanted
