"""What becomes of a rollout that a server does not score: it is kept with a checkpoint, and the same command goes on
from both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from alignctl.rollout.drawing import Drawn
from alignctl.rollout.episodes import Episodes
from alignctl.rollout.rewards import Score
from alignctl.rollout.servers import ServerAway
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json, write_json
from alignctl.run.paths import StagePaths
from alignctl.trainers.base.everywhere import from_all

if TYPE_CHECKING:
    from alignctl.trainers.on_policy.base import OnPolicyTrainer


class Outage:
    """Asks servers for a trainer, and goes on where one was away. Its processes call each of these together."""

    def __init__(self, trainer: OnPolicyTrainer):
        self._trainer = trainer
        self._looked = False
        self._rollout: Episodes | None = None

    @property
    def _file(self) -> Path:
        args = self._trainer.args
        return StagePaths(Path(args.output_dir).parent).drawn(args.process_index)

    def drawn_before(self, prompt_ids: Sequence[Sequence[int]]) -> Drawn | None:
        """What was drawn to these prompts, in this step, when a server was away; only the first step of a process may
        find any."""
        trainer, looked, self._looked = self._trainer, self._looked, True
        if looked or not trainer.scoring.asks_servers:
            return None
        kept = read_json(self._file) or {}
        there = kept.get("step") == trainer.state.global_step and kept.get("prompt_ids") == list(map(list, prompt_ids))
        if not from_all(trainer.accelerator, {"there": there})["there"].all():
            return None
        logps = kept["logps"] and [[math.nan if one is None else one for one in row] for row in kept["logps"]]
        return Drawn(kept["completions"], kept["ended"], logps)

    def ask(self, episodes: Episodes) -> dict[str, list[Score]]:
        """Scores of a rollout by all sources.

        Raises:
            ServerAway: One of them did not answer a process; what all have drawn is kept.
            AlignctlError: A source does not score.
        """
        self._rollout = episodes
        return self._asked(episodes)

    def ask_again(self, part: Episodes) -> dict[str, list[Score]]:
        """Scores of what was drawn to some prompts of the rollout again; where a server is away the rollout is kept as
        it was first, and the same is drawn to them again.

        Raises:
            ServerAway, AlignctlError: As above.
        """
        return self._asked(part)

    def _asked(self, episodes: Episodes) -> dict[str, list[Score]]:
        scoring, away, rewards = self._trainer.scoring, None, {}
        try:
            rewards = scoring.ask(episodes)
        except ServerAway as error:
            away = error
        if not scoring.asks_servers:
            return rewards
        messages = gather_object([away.problems[0].message if away else None])
        if said := next(filter(None, messages), None):
            self._keep()
            raise ServerAway(
                said, "see to it that it answers, and give the same command again: what was drawn is kept"
            ) from away
        self._file.unlink(missing_ok=True)
        return rewards

    def _keep(self) -> None:
        """Writes what this process drew, and a checkpoint of the weights that drew it, where there is none."""
        trainer, episodes = self._trainer, self._rollout
        step = trainer.state.global_step
        drawn = {"completions": episodes.completion_ids, "ended": episodes.ended, "logps": episodes.drawn_logps}
        write_json(self._file, {"step": step, "prompt_ids": episodes.prompt_ids, **drawn})
        trainer.finish_checkpoint()
        newest = newest_checkpoint(Path(trainer.args.output_dir))
        if step and (newest is None or newest.step != step):
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.finish_checkpoint()
