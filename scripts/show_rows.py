"""Prints the rows of a stage as its trainer sees them, and what became of all rows; trains nothing.

    python scripts/show_rows.py recipe=dpo_local model.path=my_model data.path=pairs.jsonl
    python scripts/show_rows.py --rows 3 recipe=quickstart stages=[sft]

Arguments are those of `alignctl train`, for one stage. It does what `train` does up to the trainer, in a folder that is
removed. Exit code 2: refused, as `train` would.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from alignctl.checks.problems import checked
from alignctl.config.compose import read_request
from alignctl.data.tokenizing import cut
from alignctl.errors import AlignctlError, RequestError
from alignctl.methods.registry import methods
from alignctl.monitor.heartbeat import Heartbeat
from alignctl.monitor.stopping import StopSignal
from alignctl.plan.freeze import absolute_paths, freeze
from alignctl.plan.plan import make_plan
from alignctl.run.files import read_json
from alignctl.run.frozen import read_stage
from alignctl.run.paths import RunPaths
from alignctl.stage.build import build_trainer, rows_to_train_on
from alignctl.stage.job import Job, rank
from alignctl.stage.ledger import write_ledgers
from alignctl.stage.measure import Measuring
from alignctl.stage.run import prepare
from alignctl.trainers.base.managed import StageTrainer

_COMPLETIONS = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")


def main(arguments: list[str]) -> int:
    datasets.disable_progress_bars()
    count = 1
    if arguments[:1] == ["--rows"]:
        count, arguments = int(arguments[1]), arguments[2:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALIGNCTL_CACHE"] = str(Path(folder, "cache"))
        paths = RunPaths(Path(folder, "run").resolve())
        try:
            show(build(paths, arguments), count)
        except AlignctlError as error:
            print(f"refused: {error}")
            return 2
        finally:
            for progress in paths.root.glob("*/progress.json"):
                for notice in (read_json(progress) or {}).get("notices", ()):
                    print(f"notice: {notice}")
    return 0


def build(paths: RunPaths, arguments: list[str]) -> Job:
    """The only stage of a request, with its rows and tokenizer."""
    request = read_request(arguments)
    config = checked(request)
    if len(config["stages"]) > 1:
        raise RequestError("rows are shown of one stage at a time", f"`stages=[{config['stages'][0]}]`")
    freeze(make_plan(absolute_paths(config), request.recipe.name, paths.root), config, sys.argv)
    (name,) = config["stages"]
    if methods()[config[name]["method"]].product == "rows":
        raise RequestError(f"`{name}` makes rows and trains on none")
    stage, weights = read_stage(paths, name)
    folders = paths.stage(name)
    return prepare(stage, weights, folders, Heartbeat(folders, rank()), StopSignal())


def show(job: Job, count: int) -> None:
    """The first rows of each part, the ledger, and the first question that is asked."""
    rows, held_rows = rows_to_train_on(job)
    trainer = build_trainer(job, rows, held_rows)
    for part, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if dataset is not None:
            print(f"{part}: {len(dataset)} rows")
            for row in dataset.select(range(min(count, len(dataset)))):
                show_row(row, job.tokenizer, trainer)
    try:
        write_ledgers(job, trainer, rows, held_rows)
    finally:
        print("data.json:", json.dumps(read_json(job.paths.data), ensure_ascii=False))
    questions = Measuring(job, trainer).held_out.questions
    if questions:
        print("held-out question as asked:", repr(job.tokenizer.decode(questions.prompts[0])))


def show_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, trainer: StageTrainer) -> None:
    """A row in the trainer's columns, pairs and labelled completions cut as TRL's collators cut them."""
    row, lost = collated(row, trainer.args)
    for key, value in row.items():
        if key == "labels":
            print("   trained on:", repr(tokenizer.decode([token for token in value if token != -100])))
        elif key.endswith("_ids"):
            print(f"   {key}:", repr(tokenizer.decode(value)), list(value))
        elif key == "label" or key in trainer.row_columns:
            print(f"   {key}:", value)
    if lost:
        print(f"   cut: {lost} tokens")


def collated(row: dict[str, Any], args: Any) -> tuple[dict[str, Any], int]:
    """A row within `max_length`, and how many tokens it lost."""
    longest, mode = getattr(args, "max_length", None), getattr(args, "truncation_mode", "keep_start")
    if longest is None or "prompt_ids" not in row:
        return row, 0
    shown, lost = dict(row), 0
    for column in (column for column in _COMPLETIONS if row.get(column)):
        before, answer = row["prompt_ids"] + row[column], cut(row["prompt_ids"], row[column], longest, mode)
        if len(before) > longest:
            shown[column] = answer.completion if answer else []
            shown["prompt_ids"] = answer.prompt if answer else row["prompt_ids"][:longest]
            lost = max(lost, len(before) - longest)
    return shown, lost


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
