"""Makes the rows of a run's stages ready before the first of them trains, and finds what a stage would refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from alignctl.beforehand.standing_in import config_of, trainer_of, without_models
from alignctl.config.stages import StageConfig
from alignctl.config.trl_fields import config_fields
from alignctl.data.raw import Source, load_raw
from alignctl.data.rows import Rows
from alignctl.data.settings import DataSettings
from alignctl.data.sources import is_on_this_machine, shown
from alignctl.errors import AlignctlError
from alignctl.methods.registry import methods
from alignctl.monitor.heartbeat import Heartbeat
from alignctl.monitor.stopping import StopSignal
from alignctl.run.frozen import read_stage
from alignctl.run.paths import RunPaths, StagePaths
from alignctl.stage.build import rows_to_train_on
from alignctl.stage.job import Job, rank
from alignctl.stage.ledger import write_ledgers
from alignctl.stage.run import prepare
from alignctl.trainers.base.managed import StageTrainer


@dataclass(frozen=True)
class Ready:
    """A stage whose rows are as it trains on them."""

    job: Job
    trainer: StageTrainer
    rows: Rows
    held_rows: Rows | None
    said: list[str]
    """What people should know of the rows; what the trainer says of the model that stands in is not."""


@dataclass
class Line:
    """Stages one after the other, and what each leaves for those that start from it."""

    paths: RunPaths
    """A folder with the plan, where what is made for the moment lies."""
    stop: StopSignal
    _tokenizers: dict[str, str] = field(default_factory=dict)
    _configs: dict[str, PretrainedConfig] = field(default_factory=dict)

    def ready(self, name: str, **trainer: object) -> Ready | None:
        """The next stage with its rows; None where they, or the tokenizer, are not there yet.

        Args:
            trainer: Fields of the trainer in place of the stage's, as far as it has them.

        Raises:
            AlignctlError: The stage would be refused.
        """
        stage, weights = read_stage(self.paths, name)
        method, before = methods()[stage.method], stage.start_from
        start = weights.get(method.trained)
        is_new = before is not None and not (start and Path(start).exists())
        made_later = stage.data.rows_from and not Path(stage.data.path).exists()
        if method.product == "rows" or made_later or (is_new and before not in self._tokenizers):
            return None
        folders = self.paths.stage(name)
        config = self._configs[before] if is_new else config_of(stage, start)
        stage = without_models(stage, self._tokenizers[before] if is_new else None)
        known = config_fields(method.config_class)
        stage.trainer.update({key: value for key, value in trainer.items() if key in known})
        job = prepare(stage, weights, folders, Heartbeat(folders, rank()), self.stop)
        self._leaves(name, job, folders, config)
        job.progress.phase("tokenising")
        rows, held_rows = rows_to_train_on(job)
        said = list(job.progress.notices)
        return Ready(job, trainer_of(job, rows, held_rows, config), rows, held_rows, said)

    def _leaves(self, name: str, job: Job, folders: StagePaths, config: PretrainedConfig) -> None:
        self._tokenizers[name] = str(folders.root / "tokenizer")
        self._configs[name] = config
        job.tokenizer.save_pretrained(self._tokenizers[name])


def look(paths: RunPaths, names: Sequence[str], stop: StopSignal) -> list[dict[str, Any]]:
    """Makes the rows of stages ready, as far as they are there. What the stages would refuse, as JSON takes it."""
    line, found = Line(paths, stop), []
    for name in names:
        try:
            ready = line.ready(name)
            if ready is not None:
                write_ledgers(ready.job, ready.trainer, ready.rows, ready.held_rows)
        except AlignctlError as error:
            found += [one | {"message": f"stage `{name}`: {one['message']}"} for one in error.told()]
    return found


def has_more(paths: RunPaths, names: Sequence[str], most: int) -> bool:
    """Whether the files of some stages have more rows than so many."""
    stages = [read_stage(paths, name)[0] for name in names]
    files = {shown(path): (stage, path) for stage in stages for path in _files(stage.data)}
    return any(_has_more(stage, path, most) for stage, path in files.values())


def _files(data: DataSettings) -> list[str | list[str]]:
    """Those that rows are read from here, each as it is given."""
    given = [entry.get("path") for entry in data.mix or ()] + [*(data.eval or {}).values(), data.eval_path]
    if not data.rows_from:
        given.append(data.path)
    return [path for path in given if path and is_on_this_machine(path)]


def _has_more(stage: StageConfig, path: str | list[str], most: int) -> bool:
    source = Source(shown(path), path, "train", "train", None)
    return sum(1 for _ in islice(load_raw(stage.data, source, methods()[stage.method].data_kind), most + 1)) > most
