"""Supervised fine-tuning on demonstrations, with TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.registry import RUN_OWNED_FIELDS, Method


def _check(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    if stage.get("packing") and stage.get("max_length", 1024) is None:
        yield Problem(f"`{name}.packing` needs `{name}.max_length`: the length of a packed row, in tokens")
    if stage.get("padding_free") and not stage.get("packing") and stage.get("max_length", 1024) is not None:
        yield Problem(
            f"`{name}.padding_free` without `{name}.packing` does not keep to `{name}.max_length`",
            f"take it out: nothing is padded anyway where `{name}.engine` is auto",
        )
    if stage.get("assistant_only_loss") and stage.get("completion_only_loss"):
        yield Problem(
            f"`{name}.assistant_only_loss` and `{name}.completion_only_loss` exclude each other: the first is for "
            "conversations, the second for prompt and completion",
            f"set one of them to false, or `{name}.completion_only_loss=null` to let the rows decide",
        )


METHOD = Method(
    name="sft",
    summary="supervised fine-tuning: imitate demonstrations",
    when="first, unless the model already answers in the form you want",
    paper="https://arxiv.org/abs/2203.02155",
    data_kind="demonstrations",
    row_columns=(),
    product="model",
    makes=None,
    roles=("policy",),
    spares_reference=None,
    stability="stable",
    config_class="alignctl.trainers.sft:SFTConfig",
    trainer="alignctl.trainers.sft:SFTTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=None,
    divides_rows=True,
    owned_fields=RUN_OWNED_FIELDS
    | {
        "chat_template_path": "use `model.chat_template`",
        "eos_token": "use `model.eos_token`",
        "dataset_text_field": "the text is found by alignctl, see `data.format`",
    },
    key_metrics=("mean_token_accuracy",),
    renamed={},
    bounds={},
    check=_check,
    notices=None,
)
