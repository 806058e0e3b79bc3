"""Makes a trainer's checkpoints complete or absent. The only place that knows how transformers saves and finds one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from alignctl.engine.forward import is_divided
from alignctl.engine.tensor_parallel import place_among_rows
from alignctl.models.layers import layers_of, once, read_layers, without_weights, write_file, write_layers
from alignctl.models.sharding import divided_by_zero, loaded_without_weights, saved_without_weights
from alignctl.models.shared_files import load_weights, save_weights
from alignctl.run.checkpoints import PREFIX, STAGING, Checkpoint, complete_checkpoints, note_part, publish, remove_old
from alignctl.run.hashed import sync_hashed
from alignctl.run.owner import take_away
from alignctl.run.shares import kind_of
from alignctl.trainers.base.beside import Beside, Copies
from alignctl.trainers.base.universal import mend_loaded

_LOGS_KEPT = 1000  # in memory; metrics.jsonl has all of them


class CompleteCheckpoints:
    """Mixin before a transformers Trainer: its checkpoints are staged, written beside training and published (see
    beside.py and run/checkpoints.py). Whoever uses it asks all processes in each step whether one is `writing`, and
    tells all of them when none is: `all_have_written`.

    transformers asks `_get_output_dir` where to write; while a checkpoint is saved, the answer is the staging folder.
    """

    _staging = False
    _staged: Path | None = None
    """The checkpoint that is not published yet; the same in all processes."""
    _ended: Checkpoint | None = None
    """While it is taken over: the checkpoint that training had ended with."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Old checkpoints are removed here, after the new one is complete. transformers would do it before that, and at
        # the end of training remove the newest, which a run that was stopped continues from.
        self.keep_last, self.args.save_total_limit = self.args.save_total_limit, None
        self._beside, self._copies = Beside(), Copies(lambda text: self.tell(text))
        self.add_callback(FindsBest())

    def checkpoint_kind(self) -> dict[str, Any]:
        """What the manifest says of how a checkpoint was written."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return kind_of(self.accelerator.num_processes, plugin.zero_stage if plugin else 0, self.is_fsdp_enabled)

    def take_over(self, checkpoint: Checkpoint) -> bool:
        """Takes over weights and state of a checkpoint if training had ended with it, the best weights if they are
        wanted: training begins and ends again without a step. transformers would take one more.
        """
        state = TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE_NAME))
        ended_early = self.stops_early is not None and self.stops_early.exhausted(state)
        if state.global_step < state.max_steps and not ended_early:
            return False
        self._ended = checkpoint
        try:
            self.train()
        finally:
            self._ended = None
        return True

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._ended:
            self._take_over_ended(self._ended)
        return prepared

    def _take_over_ended(self, checkpoint: Checkpoint) -> None:
        self.state = TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE_NAME))
        find_best(self.state, checkpoint.path.parent)
        if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):  # which is loaded at the end
            self._load_trained(checkpoint.path)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._ended:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = kwargs.get("resume_from_checkpoint")
        if not (checkpoint and self.checkpoint_kind()["zero_stage"] in (1, 2)):
            return super()._inner_training_loop(*args, **kwargs)
        if not any(Path(checkpoint).glob("*_universal")):  # which has all in a form of its own
            self._load_trained(Path(checkpoint))
        with loaded_without_weights():
            return super()._inner_training_loop(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        groups = len(self.optimizer.param_groups) if self.is_fsdp_enabled else None
        with _types_kept(), _of_all_groups(self.lr_scheduler, groups) if groups else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and self.is_deepspeed_enabled and self.deepspeed.load_universal_checkpoint():
            mend_loaded(self, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Random states as they were; where other processes wrote them, seeds of their own for those that compute other
        rows."""
        alone = self.args.world_size == 1
        file = "rng_state.pth" if alone else f"rng_state_{self.args.process_index}.pth"
        if checkpoint and not Path(checkpoint, file).exists():
            _, place = place_among_rows(self.accelerator.unwrap_model(self.model))
            set_seed(self.args.seed + self.state.global_step + place)
        else:
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """The weights alone, where DeepSpeed would load its whole state, which other processes may have written."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            self._load_trained(Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def weights_to_save(self) -> tuple[str, dict[str, Tensor]]:
        """What a checkpoint has of the model: the name of its file, without an ending, and its tensors by name. A
        trainer that saves something else says what."""
        if hasattr(super(), "weights_to_save"):
            return super().weights_to_save()
        model = self.accelerator.unwrap_model(self.model)
        weights = model.state_dict(keep_vars=True)
        if isinstance(model, PeftModel):
            return "adapter_model", get_peft_model_state_dict(model, state_dict=weights)
        return "model", once(weights)

    def _load_trained(self, folder: Path) -> None:
        """Puts the weights of a checkpoint into the model, without anything that is needed to train on."""
        if divided_by_zero(self.model):
            stem, weights = self.weights_to_save()
            read_layers(folder, stem, weights)
        else:
            self._load_from_checkpoint(str(folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers does; layer by layer where ZeRO-3 divides the weights, and each process its share where FSDP2
        does."""
        if not is_divided(self.model):
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        stem, weights = self.weights_to_save()
        if self.args.should_save:
            self._save(str(folder), state_dict=without_weights(model))
            self._copies.forget(folder / f"{stem}.safetensors")  # which is of nothing
        if self.is_fsdp_enabled:
            self.accelerator.wait_for_everyone()  # for the folder
            save_weights(self.model, folder)
        elif isinstance(model, PeftModel):  # whose weights are read from one file
            write_file(folder / f"{stem}.safetensors", weights)
        else:
            write_layers(folder, stem, layers_of(weights), by_all=True)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, STAGING)) if self._staging else folder

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """No card among the checkpoints: TRL's cannot know the model a stage started from."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        del self.state.log_history[:-_LOGS_KEPT]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copies what is saved, once the checkpoint before is complete; all processes call it together."""
        self.finish_checkpoint()
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX}{self.state.global_step}"
        staged = folder / STAGING / name
        if self.args.should_save:
            take_away(folder / STAGING)
        self.accelerator.wait_for_everyone()

        logged, self.state.log_history = self.state.log_history, []
        self._staging = True
        try:
            with saved_without_weights(self.model_wrapped), self._copies.taking(**self._how_taken()):
                super()._save_checkpoint(model, trial)
            best = self.state.best_model_checkpoint
            if best and Path(best) == staged:
                self.state.best_model_checkpoint = str(folder / name)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        finally:
            self._staging, self.state.log_history = False, logged
        hashed = set(gather_object([str(file) for file in self._copies.written]))
        # What else is there now was written by the way, most of it by the first process, which sees to it.
        there = [file for file in staged.rglob("*") if file.is_file()] if self.args.should_save else []
        there = [file for file in there if str(file) not in hashed]
        self.accelerator.wait_for_everyone()
        self._staged = staged
        self._beside.start(partial(self._write, staged, self.state.global_step, self.checkpoint_kind(), there))
        if os.environ.get("WANDB_LOG_MODEL") == "checkpoint":
            self.finish_checkpoint()  # which transformers sends there next

    def _how_taken(self) -> dict[str, Any]:
        """What the copies of a checkpoint have to know."""
        kind, here = self.checkpoint_kind(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        state_of = here if kind["zero_stage"] or self.is_fsdp_enabled else 1
        weights_of = here if is_divided(self.model) else 1
        # A pickle, of access tokens too, that nothing reads.
        return {"leave_out": [TRAINING_ARGS_NAME], "state_of": state_of, "weights_of": weights_of}

    def _write(self, staged: Path, step: int, kind: dict[str, Any], there: list[Path]) -> None:
        """Beside training: what this process has copied, and what it found."""
        written = self._copies.write()
        written |= {file: sync_hashed(file) for file in there}
        files = {file.relative_to(staged).as_posix(): found for file, found in written.items()}
        note_part(staged, self.args.process_index, step, kind, files)

    @property
    def writing(self) -> bool:
        """Whether this process is still writing a checkpoint.

        Raises:
            OSError: It could not be written.
        """
        busy = self._beside.busy  # before it is asked how that ended, which may be meanwhile
        self._beside.look()
        return self._staged is not None and busy

    def all_have_written(self) -> None:
        """Publishes the checkpoint, if there is one that is not yet."""
        if self._staged is not None and self.args.should_save:
            best = self.state.best_model_checkpoint
            self._beside.start(partial(_publish, self._staged, self.keep_last, Path(best) if best else None))
        self._staged = None

    def finish_checkpoint(self) -> None:
        """Waits until the checkpoint that was saved last is complete; all processes call it together.

        Raises:
            OSError: It could not be written.
        """
        self._beside.wait()
        self.accelerator.wait_for_everyone()
        self.all_have_written()
        self._beside.wait()
        self.accelerator.wait_for_everyone()

    def _finalize_training(self, *args: Any) -> Any:
        self.finish_checkpoint()
        self._copies.let_go()
        return super()._finalize_training(*args)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except Exception:
            with suppress(Exception):
                if self.accelerator.num_processes == 1:
                    self.finish_checkpoint()
                else:  # to agree is more than can be asked of them: it is published when the run continues
                    self._beside.wait()
            raise


def _publish(staged: Path, keep_last: int | None, best: Path | None) -> None:
    """Beside training, in the first process."""
    if publish(staged) is None:
        raise RuntimeError(f"{staged} lacks what a process has written of it")
    remove_old(staged.parent.parent, keep_last, best)


class FindsBest(TrainerCallback):
    """Looks for the best checkpoint when training begins, which may be in the middle."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        find_best(state, Path(args.output_dir))


def find_best(state: TrainerState, folder: Path) -> None:
    """Names the best checkpoint so far as it is in `folder`, wherever that was when it was written; forgets one that is
    gone, so that the best of those to come is found."""
    if state.best_global_step is None:
        return
    written = state.best_model_checkpoint or f"{PREFIX}{state.best_global_step}"
    best = folder / Path(written).name
    if any(one.path == best for one in complete_checkpoints(folder)):
        state.best_model_checkpoint = str(best)
    else:
        state.best_model_checkpoint = state.best_global_step = state.best_metric = None


@contextmanager
def _of_all_groups(scheduler: Any, groups: int) -> Iterator[None]:
    """Loads what a schedule said of each group of weights, where it said the same of all, for as many groups as there
    are: they are more where weights are divided among several meshes."""
    usual = scheduler.load_state_dict

    def load(state: dict[str, Any]) -> None:
        then = state.get("_last_lr", ())
        if len(then) != groups and len(set(then)) == 1:
            of_each = {
                key: value for key, value in state.items() if isinstance(value, list) and len(value) == len(then)
            }
            state = state | {key: value[:1] * groups for key, value in of_each.items()}
        usual(state)

    scheduler.load_state_dict = load
    try:
        yield
    finally:
        del scheduler.load_state_dict


@contextmanager
def _types_kept() -> Iterator[None]:
    """Loads the state of an optimizer in the types that it has: torch (2.13) rounds it to those of the weights, and
    some keep float32 beside weights of 16 bits."""
    usual = Optimizer._process_value_according_to_param_policy

    def kept(param: Tensor, value: Tensor, param_id: int, param_groups: list[Any], key: Any = None) -> Tensor:
        wider = key != "step" and value.is_floating_point() and value.dtype.itemsize > param.dtype.itemsize
        return value.to(param.device) if wider else usual(param, value, param_id, param_groups, key)

    Optimizer._process_value_according_to_param_policy = staticmethod(kept)
    try:
        yield
    finally:
        Optimizer._process_value_according_to_param_policy = staticmethod(usual)
