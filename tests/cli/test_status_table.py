"""What `alignctl status` shows of a stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignctl.cli.status import _facts
from alignctl.launch.status import StageStatus

STAGE = StageStatus(
    name="sft", method="sft", state="running", job=None, shared=None, attempts=1, step=3, max_steps=9, metrics={},
    seconds_left=None, time_left=None, note="", error=None,
)  # fmt: skip


@pytest.mark.parametrize(("metrics", "shown"), [({"loss": 0.51239}, "0.5124"), ({"loss": None}, ""), ({}, "")], ids=str)
def test_a_loss_that_is_no_number_is_left_out(metrics, shown):
    """Files of a run are strict JSON: NaN is null there."""
    assert _facts(replace(STAGE, metrics=metrics)) == ["", "3/9", shown, "", ""]
