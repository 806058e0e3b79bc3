"""The table of methods: what each one is and needs. Torch-free; trainers are named as text and resolved by workers.

A method is one module of this package with a `METHOD` in it. No other code compares method names: where behaviour
differs, a column is missing here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from alignctl.errors import Problem

DataKind = Literal["demonstrations", "preferences", "feedback", "prompts"]
Role = Literal["policy", "reference", "reward_model", "value_model"]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Where the values of a number lie; None for no end on that side."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    hint: str | None = None
    """What to set instead, where it is not plain."""


POSITIVE, NOT_NEGATIVE, FRACTION = Bound(above=0), Bound(least=0), Bound(least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class RowColumn:
    """A column of the rows, beside their texts, that a method's loss or rewards look at."""

    name: str
    number: bool
    """Whether its values are numbers, in a batch float32 `[batch]`; a row with something else cannot be used. Other
    values are a list in a batch, as the file has them."""
    missing: Any
    """What stands where a row has no value; None: such a row cannot be used."""


EVERY_OTHER_COLUMN = RowColumn(name="*", number=False, missing=None)
"""For methods that take whatever else a row has, as it is, and empty where it is empty."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table. No defaults: a method must say each of these things about itself."""

    name: str
    """Key in recipes, in conf/method/ and in this table."""
    summary: str
    when: str
    """When to choose it, for people."""
    paper: str
    """URL of where the method comes from."""
    data_kind: DataKind
    """What one row of its data holds, see data/formats.py."""
    row_columns: tuple[RowColumn, ...]
    """What it looks at of a row beside the texts. A column that the data does not have is absent: a method that cannot
    do without says so itself."""
    product: Literal["model", "rows"]
    """What its stage leaves for those that come after."""
    makes: DataKind | None
    """What one row of its product holds; None where that is a model."""
    roles: tuple[Role, ...]
    """Models it needs, the one it trains first. A reference may be the policy with its adapter switched off."""
    spares_reference: Callable[[Mapping[str, Any]], bool] | None
    """Whether a stage with these fields does without its reference while it trains, so that none is held; None where it
    never does."""
    stability: Literal["stable", "young"]
    """Stable: a trainer that TRL keeps stable, and what alignctl adds. Young: the trainer is alignctl's own."""
    config_class: str
    """`"module:Class"` of the trainer's settings; its fields are the fields of a stage."""
    trainer: str | None
    """`"module:Class"` of the trainer: TRL's, or one that takes the same keyword arguments. None where none is used."""
    stage_function: str
    """`"module:function"` that runs one stage to its result, with the arguments of stage/run.py's `run_stage`."""
    mixes_rows: Callable[[Mapping[str, Any]], str | None] | None
    """Why the loss, given all fields of a stage, looks at the rows of a batch together, so that an optimizer step is
    not divided otherwise; None where it never does."""
    divides_rows: bool
    """Whether several processes can compute its rows together, each a part of every row, or of every matrix."""
    owned_fields: Mapping[str, str]
    """Fields of the config class that a stage may not set, each with what to set instead."""
    key_metrics: tuple[str, ...]
    """What the live display shows beside the loss, under the trainer's names."""
    renamed: Mapping[str, str]
    """Former names of its fields, and names that TRL has for them, which are taken, and their names."""
    bounds: Mapping[str, Bound]
    """Of the numbers among its own fields; checks/bounds.py has those of all methods."""
    check: Callable[[str, Mapping[str, Any]], Iterator[Problem]] | None
    """Says which fields of a stage exclude each other, given its name and its fields, `peft` merged, and whether there
    are several `processes`; None where none do."""
    notices: Callable[[str, Mapping[str, Any]], Iterator[str]] | None
    """Says what people should know of fields that are as they may be, given the name of a stage and its fields: that
    some do nothing so, or less than they are known for. None where there is nothing to say."""

    @property
    def trained(self) -> Role:
        return self.roles[0]

    def does_without_reference(self, stage: Mapping[str, Any]) -> bool:
        """Whether a stage with these fields holds no reference while it trains."""
        return self.spares_reference is not None and self.spares_reference(stage)

    def declares(self, column: str) -> bool:
        """Whether a column is among those it names."""
        return any(declared.name == column for declared in self.row_columns)


# Fields of transformers.TrainingArguments that belong to the run and not to a stage's recipe.
RUN_OWNED_FIELDS = {
    "output_dir": "set `run_dir`",
    "do_train": "name the stage in `stages`",
    "do_eval": "set `eval_strategy`",
    "do_predict": "alignctl does not predict",
    "resume_from_checkpoint": "run the same command again: it continues from the newest checkpoint",
    "local_rank": "it comes from the launcher",
    "seed": "set `seed` of the run",
    "per_device_eval_batch_size": "set `eval.batch_size`",
    "disable_tqdm": "progress is shown by alignctl",
    "deepspeed": "it comes from the launcher",
    "fsdp": "it comes from the launcher",
    "fsdp_config": "it comes from the launcher",
    "parallelism_config": "set `distributed`",
    "enable_jit_checkpoint": "alignctl saves on SIGTERM and SIGINT by itself",
    "push_to_hub": "push the folder `model/` of the finished stage",
    "hub_token": "set HF_TOKEN in the environment: keys are never written to disk",
    "report_to": "choose a `tracker`, for example `tracker=wandb`",
    "project": "set `tracker.project`",
    "model_init_kwargs": "use the section `model`",
    "trust_remote_code": "use `model.trust_remote_code`",
    "pad_token": "it comes from the tokenizer",
}


RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Former names of fields of all methods."""


@cache
def methods() -> dict[str, Method]:
    """All methods by name, in alphabetical order."""
    import alignctl.methods as package

    rows = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        method = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), "METHOD", None)
        if method is not None:
            rows[method.name] = method
    return rows


def resolve(target: str) -> Any:
    """Imports what `"module:name"` names. Only for names written in this code base, never for a user's."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
