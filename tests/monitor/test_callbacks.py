"""What is logged of a stage, and what its progress says, by a real trainer."""

from __future__ import annotations

import pytest
from support.files import read
from support.small import Small

from alignctl.monitor.callbacks import MetricsFile, ProgressFile
from alignctl.monitor.enough import LogsEnough
from alignctl.monitor.heartbeat import Heartbeat
from alignctl.run.paths import StagePaths


class Shown(ProgressFile):
    """Keeps every content of progress.json."""

    def __init__(self, paths: StagePaths):
        super().__init__(paths, (), Heartbeat(paths, 0))
        self.seen = []

    def _write(self, state):
        super()._write(state)
        self.seen.append(read(self._path))


def trained(folder, **settings):
    """What is in metrics.jsonl, and what was shown, of an SFT of a few rows."""
    paths = StagePaths(folder / "sft")
    small = Small(paths.checkpoints)
    trainer = small.trainer(
        "sft", per_device_train_batch_size=2, save_strategy="no", rows=small.rows("demonstrations", 4), **settings
    )
    shown = Shown(paths)
    for callback in (LogsEnough(), MetricsFile(paths, shown.notice), shown):
        trainer.add_callback(callback)
    trainer.train()
    return [row for row in read(paths.metrics) if "loss" in row], shown.seen


def test_the_step_that_is_shown_has_the_newest_loss(tmp_path):
    logged, shown = trained(tmp_path, max_steps=6, learning_rate=1e-2, logging_steps=1)
    losses = {row["step"]: row["loss"] for row in logged}
    assert shown[-1]["step"] == 6
    assert [one["metrics"].get("loss") for one in shown] == [losses.get(one["step"]) for one in shown]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 3}, [1, 2, 3]),
        ({"max_steps": 47}, [1, *range(2, 47, 2), 47]),
        ({"max_steps": 6, "logging_strategy": "epoch"}, [1, 2, 4, 6]),
        ({"max_steps": 3, "logging_strategy": "no"}, []),
    ],
    ids=str,
)
def test_short_runs_have_a_curve(tmp_path, settings, steps):
    logged, _ = trained(tmp_path, logging_steps=10, **settings)
    assert [row["step"] for row in logged] == steps
