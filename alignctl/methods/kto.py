"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, Eq. 7): labels of single completions, no pairs needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.preferences import BETA, REFERENCE, check_reference
from alignctl.methods.registry import POSITIVE, RUN_OWNED_FIELDS, Method


def _check(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    size, steps = stage.get("per_device_train_batch_size", 8), stage.get("gradient_accumulation_steps", 1)
    given = stage.get("global_batch_size")
    whole = isinstance(size, int) and isinstance(steps, int)
    if stage.get("loss_type", "kto") == "kto" and not stage["processes"] and whole and size * steps < 2:
        yield Problem(
            f"`{name}.per_device_train_batch_size={size}`: KTO estimates the KL divergence with the other completions "
            "of an optimizer step, so it needs 2 or more",
            f"set `{name}.per_device_train_batch_size=2`" + (" and a global batch of 2 or more" if given else ""),
        )
    yield from check_reference(name, stage)


METHOD = Method(
    name="kto",
    summary="Kahneman-Tversky optimization: labels of single completions, wanted or not",
    when="with thumbs up and down instead of pairs, also where one of them is rare",
    paper="https://arxiv.org/abs/2402.01306",
    data_kind="feedback",
    row_columns=(),
    product="model",
    makes=None,
    roles=("policy", "reference"),
    spares_reference=None,
    stability="stable",
    config_class="alignctl.trainers.preference.kto:KTOConfig",
    trainer="alignctl.trainers.preference.kto:KTOTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=None,
    divides_rows=False,
    owned_fields=RUN_OWNED_FIELDS
    | {"train_sampling_strategy": "KTO shuffles once: its KL estimate needs batches of a fixed order"},
    key_metrics=("rewards/margins", "kl"),
    renamed={},
    bounds=BETA | REFERENCE | {"desirable_weight": POSITIVE, "undesirable_weight": POSITIVE},
    check=_check,
    notices=None,
)
