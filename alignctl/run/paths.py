"""File names of a run directory. The only place that knows them. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignctl.errors import LaunchError

PLAN = "plan.json"
"""What a run is known by: a folder that has it is one."""

PRODUCT_MANIFEST = "manifest.json"
"""In a folder of rows or of weights that a stage made: its files with their sizes and hashes, and who made them."""

REWARD_STATISTICS = "reward_statistics.json"
"""Beside the weights of a reward model: how it scores."""


@dataclass(frozen=True)
class RowsPaths:
    """Files of rows that a stage made: complete as soon as the folder exists."""

    root: Path

    @property
    def data(self) -> Path:
        """One row a line."""
        return self.root / "rows.jsonl"

    @property
    def manifest(self) -> Path:
        """What they are, how many, of which stage, and the size and hash of each file."""
        return self.root / PRODUCT_MANIFEST

    @property
    def staged(self) -> RowsPaths:
        """Where they are written until they are complete."""
        return RowsPaths(self.root.with_name(f".{self.root.name}.staging"))


@dataclass(frozen=True)
class StagePaths:
    """Files of one stage."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The finished model: complete as soon as it exists."""
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        """The adapter alone, where one was trained."""
        return self.root / "adapter"

    @property
    def rows(self) -> RowsPaths:
        """The rows that the stage made, where its method makes rows and no model."""
        return RowsPaths(self.root / "rows")

    @property
    def inputs(self) -> Path:
        """Which rows of an earlier stage this one is trained on."""
        return self.root / "inputs.json"

    @property
    def checked(self) -> Path:
        """Which large files of earlier stages' models are as they were saved, and when those were changed last."""
        return self.root / "checked.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: what the trainer logged."""
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """What the stage is doing now, for whoever looks."""
        return self.root / "progress.json"

    @property
    def data(self) -> Path:
        """Rows read, kept and skipped."""
        return self.root / "data.json"

    @property
    def samples(self) -> Path:
        """Sampled completions before and after, one prompt a line."""
        return self.root / "samples.jsonl"

    @property
    def samples_while_training(self) -> Path:
        """Completions that were drawn while training and how they scored, one a line."""
        return self.root / "samples_while_training.jsonl"

    def drawn(self, rank: int) -> Path:
        """What a process drew and no server scored, for a run that is continued."""
        return self.root / "drawn" / f"rank_{rank}.json"

    @property
    def evaluation_before(self) -> Path:
        """What was measured before training, kept for a run that is continued."""
        return self.root / "evaluation_before.json"

    @property
    def result(self) -> Path:
        """What was measured; written last, so a stage with a result is done."""
        return self.root / "result.json"

    @property
    def generation(self) -> Path:
        """What `generation=auto` chose, for a run that is continued."""
        return self.root / "generation.json"

    @property
    def rehearsal(self) -> Path:
        """What the rehearsal took; a stage that has it does not rehearse again."""
        return self.root / "rehearsal.json"

    @property
    def rehearsing(self) -> Path:
        """The folder that the rehearsal works in, gone afterwards."""
        return self.root.with_name(f".rehearsal_{self.root.name}")

    @property
    def not_finite(self) -> Path:
        """The step at which loss or gradient was no number, and its rows."""
        return self.root / "not_finite.json"

    @property
    def halved(self) -> Path:
        """Steps whose passes were halved, because the device's memory did not suffice."""
        return self.root / "halved.json"

    @property
    def ranks(self) -> Path:
        """What each process of the attempt is doing, and why it ended."""
        return self.root / "ranks"

    def beats(self, node: int | str) -> Path:
        """What the processes of a machine are doing: host, pid, step, how far. With `*` for any of them, as below."""
        return self.ranks / f"node_{node}_beats"

    def error(self, rank: int | str) -> Path:
        """Why a process ended, for the one that started it."""
        return self.ranks / f"rank_{rank}_error.json"

    def exit_codes(self, node: int | str) -> Path:
        """With what the processes of a machine ended, as far as they failed."""
        return self.ranks / f"node_{node}_exit_codes.json"

    @property
    def stuck(self) -> Path:
        """There once one of the machines found that nothing gets on any more."""
        return self.ranks / "stuck"

    def ended(self, node: int) -> Path:
        """There once a machine of a SLURM job has ended its part by itself, however well."""
        return self.ranks / f"node_{node}_ended"

    @property
    def job_lock(self) -> Path:
        """A link that a SLURM job makes while it is at the stage; what it points to says which one."""
        return self.root / ".job"

    @property
    def script(self) -> Path:
        """What SLURM runs for this stage."""
        return self.root / "job.sh"

    @property
    def array_script(self) -> Path:
        """What SLURM runs for this stage of several points of a sweep."""
        return self.root / "array.sh"

    def job_log(self, pattern: str) -> Path:
        """What a SLURM job printed; `pattern` as sbatch knows them, or a job's id."""
        return self.root / "logs" / f"job_{pattern}.log"

    def logs(self, attempt: int) -> Path:
        return self.root / "logs" / f"attempt_{attempt}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """What a process of an attempt printed."""
        return self.logs(attempt) / f"rank_{rank}.log"

    def launch_log(self, attempt: int) -> Path:
        """What the one that starts the processes of an attempt printed."""
        return self.logs(attempt) / "torchrun.log"

    def node_log(self, node: int) -> Path:
        """What a machine printed that is not the first, whatever the attempt."""
        return self.root / "logs" / f"node_{node}.log"

    def last_attempt(self) -> int:
        """Number of the newest attempt, counted from 1; 0 before the first."""
        attempt = 0
        while self.logs(attempt + 1).exists():
            attempt += 1
        return attempt


@dataclass(frozen=True)
class RunPaths:
    """Files of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.root / PLAN

    @property
    def deepspeed(self) -> Path:
        """DeepSpeed's settings, where it is used."""
        return self.root / "deepspeed.json"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def tensorboard(self) -> Path:
        """Curves for TensorBoard, a folder for each stage, where it is a tracker."""
        return self.root / "tensorboard"

    @property
    def mlruns(self) -> Path:
        """What MLflow keeps, where it is a tracker and no server has it."""
        return self.root / "mlruns"

    @property
    def trackio(self) -> Path:
        """What Trackio keeps, where it is a tracker."""
        return self.root / "trackio"

    @property
    def trackers(self) -> Path:
        """Which run of each tracker a stage reports to."""
        return self.root / "trackers.json"

    @property
    def beforehand(self) -> Path:
        """Stages whose rows were looked at before the first of them trained, by their fingerprints."""
        return self.root / "beforehand.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    def stage(self, name: str) -> StagePaths:
        return StagePaths(self.root / name)

    def make_root(self, anew: bool = False) -> None:
        """Makes the folder of the run, for its owner alone: it holds data and what models said. One that is there keeps
        the rights it has.

        Raises:
            FileExistsError: It is there, though it was to be made `anew`.
            LaunchError: It cannot be made.
        """
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=not anew)
        except OSError as error:
            if anew and self.root.exists():
                raise
            raise LaunchError(f"cannot make {self.root}: {error.strerror}", "give another `run_dir`") from error
