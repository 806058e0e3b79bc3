"""What a stage tells trackers: TensorBoard, Weights & Biases, MLflow, Trackio, and what else transformers has an
integration for, which sends what the trainer logs. Here runs are opened, named, continued and ended, and what alignctl
measures is sent, too. Only the first process reports."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from alignctl.config.secrets import mask_text
from alignctl.config.stages import StageConfig
from alignctl.errors import LaunchError, Stopped
from alignctl.run.files import read_record, write_json
from alignctl.run.forms import TRACKERS
from alignctl.run.frozen import read_frozen
from alignctl.run.paths import RunPaths

_REST_S = 300  # in which a tracker that failed is left alone: each try may take minutes
_FINISH_S = 60  # in which what is left is sent in the end: a job may have no more time
_SAID = 200  # characters of what a tracker says
_PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
_HINTS = {
    "wandb": "log in with `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline",
    "mlflow": "look at MLFLOW_TRACKING_URI, and at the server's credentials",
}


@dataclass(frozen=True)
class About:
    """What a tracker is told of a stage."""

    recipe: str
    run: str
    """What the run is called."""
    stage: StageConfig
    paths: RunPaths

    @property
    def name(self) -> str:
        """What the stage is called: no two of a run alike."""
        return mask_text(self.stage.trainer.get("run_name") or f"{self.run}-{self.stage.name}")

    def project(self, tracker: str) -> str:
        """What the run belongs to: as the recipe says, or the tracker's own variable, or else the recipe's name."""
        return self.stage.tracker.project or os.environ.get(_PROJECT_VARIABLES.get(tracker, "")) or self.recipe

    @property
    def config_text(self) -> str:
        """The resolved config as config.yaml has it, without secrets."""
        return self.paths.config.read_text(encoding="utf-8")

    @property
    def config(self) -> dict[str, Any]:
        """The same as a mapping, under a key of its own: integrations put the trainer's settings beside it."""
        return {"config": OmegaConf.to_container(OmegaConf.create(self.config_text), resolve=False)}


class Tracker:
    """One of the integrations of transformers."""

    def __init__(self, name: str, about: About):
        self.name, self.about = name, about
        self.callback: TrainerCallback = INTEGRATION_TO_CALLBACK[name]()

    def open(self, known: str | None) -> str | None:
        """Opens the run, or goes on with the one that is known from before, and says by what it is known then."""

    def begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the first step."""
        self.callback.on_train_begin(args, state, control, **kwargs)

    def end(self, failed: bool) -> None:
        """After all else."""


class TensorBoard(Tracker):
    """Hides what was written of steps that are taken again."""

    def begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        elsewhere = os.environ.get("TENSORBOARD_LOGGING_DIR")  # one folder for all runs, and steps are hidden by folder
        ours = self.about.paths.tensorboard / self.about.stage.name
        folder = Path(elsewhere).expanduser() / self.about.name if elsewhere else ours
        writer = SummaryWriter(str(folder), purge_step=state.global_step + 1 if state.global_step else None)
        told = {"project": self.about.project(self.name), "name": self.about.name, "config": self.about.config_text}
        for key, text in told.items():
            writer.add_text(key, "".join(f"    {line}\n" for line in text.splitlines()))  # code, to Markdown
        writer.add_text("tags", ", ".join(self.about.stage.tracker.tags))
        self.callback.tb_writer = writer
        super().begin(args, state, control, **kwargs)


class Wandb(Tracker):
    """Groups the stages of a run."""

    def open(self, known: str | None) -> str:
        import wandb

        about = self.about
        run = wandb.init(
            project=about.project(self.name),
            name=about.name,
            group=about.run,
            id=known,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(about.paths.root),
            tags=about.stage.tracker.tags,
            config=about.config,
            settings=wandb.Settings(finish_timeout=_FINISH_S, finish_timeout_raises=True),
        )
        return run.id

    def end(self, failed: bool) -> None:
        import wandb

        try:
            wandb.finish(exit_code=int(failed))
        finally:
            wandb.teardown()  # at the end of the interpreter it would be too late: a worker does not come to it


class MLflow(Tracker):
    """Keeps its files in the run directory where no server, folder or database is named."""

    def open(self, known: str | None) -> str:
        import mlflow

        about = self.about
        if not mlflow.is_tracking_uri_set():
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would need more packages
            mlflow.set_tracking_uri(about.paths.mlruns)
        mlflow.set_experiment(about.project(self.name))
        run = mlflow.start_run(known, run_name=about.name, tags=dict.fromkeys(about.stage.tracker.tags, "true"))
        mlflow.log_text(about.config_text, about.paths.config.name)
        return run.info.run_id

    def end(self, failed: bool) -> None:
        import mlflow

        try:
            mlflow.flush_async_logging()
        finally:
            mlflow.end_run("FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """Opened by its integration, which goes on with a run of the same name, and takes the project of the trainer's
    settings."""

    def __init__(self, name: str, about: About):
        os.environ.setdefault("TRACKIO_DIR", str(about.paths.trackio))  # read when it is imported
        super().__init__(name, about)

    def begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        import trackio

        args.project = self.about.project(self.name)
        super().begin(args, state, control, **kwargs)
        trackio.config.update(self.about.config | {"tags": self.about.stage.tracker.tags})


_KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


class Reporting(Protocol):
    """What is asked of a trainer to report beside its logs."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    model: nn.Module
    processing_class: PreTrainedTokenizerBase


class Trackers(TrainerCallback):
    """Tells trackers what the trainer logs while it trains, and what it is told to. One that fails is left alone for
    some minutes; training goes on."""

    def __init__(self, trackers: Sequence[Tracker] = (), tell: Callable[[str], None] = lambda text: None):
        self._trackers, self._tell = trackers, tell
        self._begun = self._training = False
        self._failed: set[str] = set()
        self._rests_until: dict[str, float] = {}
        self._last: tuple[Any, ...] = ()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for tracker in self._trackers:
            args.run_name = tracker.about.name
        self._each(lambda tracker: tracker.callback.on_init_end(args, state, control, **kwargs))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = True
        self._begin(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._training:
            self._each(lambda tracker: tracker.callback.on_log(args, state, control, logs=dict(logs or {}), **kwargs))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._each(lambda tracker: tracker.callback.on_save(args, state, control, **kwargs))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends no tracker's run: what is measured after training belongs to it."""
        self._training = False

    def report(self, trainer: Reporting, values: Mapping[str, Any]) -> None:
        """Tells them the numbers among some values, nested or not, as held-out ones: `{"after": {"kl": 1}}` is
        `eval/after/kl`."""
        told = trainer.args, trainer.state, trainer.control
        kwargs = {"model": trainer.model, "processing_class": trainer.processing_class}
        self._begin(*told, **kwargs)
        logs = {f"eval_{name}": number for name, number in _numbers(values)}
        self._each(lambda tracker: tracker.callback.on_log(*told, logs=dict(logs), **kwargs))

    def close(self, failed: bool) -> None:
        """Ends the run of each."""
        self._rests_until.clear()
        if self._begun:
            *told, kwargs = self._last
            self._each(lambda tracker: tracker.callback.on_train_end(*told, **kwargs))
        self._rests_until.clear()
        self._each(lambda tracker: tracker.end(failed))

    def _begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._trackers:
            return  # a rehearsal, whose models are not to be kept by what is told nobody
        self._last = (args, state, control, kwargs)
        if not self._begun:
            self._begun = True
            self._each(lambda tracker: tracker.begin(args, state, control, **kwargs))

    def _each(self, act: Callable[[Tracker], Any]) -> None:
        """Does what may fail because of a tracker, unless that failed just now; the first failure is told."""
        for tracker in self._trackers:
            name = tracker.name
            if time.monotonic() < self._rests_until.get(name, 0.0):
                continue
            try:
                act(tracker)
            except Exception as error:
                traceback.print_exc()  # for whoever looks into the log
                self._rests_until[name] = time.monotonic() + _REST_S
                if name not in self._failed:
                    self._failed.add(name)
                    self._tell(f"{_failure(name, error)}; the stage goes on, and metrics.jsonl has all")


@contextmanager
def reporting(stage: StageConfig, paths: RunPaths, tell: Callable[[str], None]) -> Iterator[Trackers]:
    """The trackers of a stage, each with its run, which is ended in the end. To be entered before weights are loaded,
    by the first process.

    Raises:
        LaunchError: One cannot be started, and nothing of the run was ever told to any.
    """
    trackers = Trackers(_opened(stage, paths, tell), tell)
    failed = True
    try:
        yield trackers
        failed = False
    except Stopped:
        failed = False
        raise
    finally:
        trackers.close(failed)


def _opened(stage: StageConfig, paths: RunPaths, tell: Callable[[str], None]) -> list[Tracker]:
    if not stage.tracker.names:
        return []
    known = read_record(paths.trackers, TRACKERS) or {}
    about = About(read_frozen(paths)["recipe"], stage.tracker.name or paths.root.name, stage, paths)
    opened, ids = [], dict(known.get(stage.name, {}))
    for name in stage.tracker.names:
        try:
            tracker = _KINDS.get(name, Tracker)(name, about)
            number = tracker.open(ids.get(name))
        except Exception as error:
            if not known:
                Trackers(opened).close(failed=True)
                raise LaunchError(
                    _failure(name, error), f"{_HINTS.get(name, 'see the log')}; `tracker=none` reports to none"
                ) from error
            traceback.print_exc()
            tell(f"{_failure(name, error)}; the stage is not reported to it, and metrics.jsonl has all")
        else:
            opened.append(tracker)
            ids |= {name: number} if number else {}
    write_json(paths.trackers, known | {stage.name: ids})
    return opened


def _failure(name: str, error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return f"the tracker `{name}` failed: {said[:_SAID]}{'...' if len(said) > _SAID else ''}"


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Names, with `/` between their parts, and numbers of a nested value; those of a list are counted from 0."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}/{key}".lstrip("/"))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{name}/{number}")
    elif isinstance(value, Real):
        yield name, float(value)
