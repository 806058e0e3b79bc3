"""Makes a trainer's checkpoints complete or absent. The only place that knows how transformers saves one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from alignctl.run.checkpoints import PREFIX, STAGING, publish, remove_old


class CompleteCheckpoints:
    """Mixin before a transformers Trainer: its checkpoints are staged and published (see run/checkpoints.py).

    transformers asks `_get_output_dir` where to write; while a checkpoint is saved, the answer is the staging folder.
    """

    _staging = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, STAGING)) if self._staging else folder

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """No card among the checkpoints: TRL's cannot know the model a stage started from."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX}{self.state.global_step}"
        staged, final = folder / STAGING / name, folder / name
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()

        # Old checkpoints are removed here, after the new one is complete, and not by transformers before that.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
            self.args.save_total_limit = limit

        best = self.state.best_model_checkpoint
        if best and Path(best) == staged:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(staged, final, self.state.global_step)
            best = self.state.best_model_checkpoint
            remove_old(folder, limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()
