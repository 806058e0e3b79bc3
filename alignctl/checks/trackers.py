"""Checks of the trackers that a run reports to. Torch-free."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.checks.combinations import runs_elsewhere
from alignctl.checks.values import check_choice
from alignctl.errors import Problem

# Reporting integrations of transformers: the module of each, and the package that has it.
_TRACKERS = {
    "none": None, "azure_ml": ("azureml", "azureml-core"), "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"), "comet_ml": ("comet_ml", "comet_ml"),
    "dagshub": ("dagshub", "dagshub"), "dvclive": ("dvclive", "dvclive"), "flyte": ("flytekit", "flytekit"),
    # The whole of mlflow wants older pandas and pyarrow than datasets; what reports is in this part of it.
    "mlflow": ("mlflow", "mlflow-skinny"),
    "neptune": ("neptune", "neptune"), "swanlab": ("swanlab", "swanlab"), "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"), "wandb": ("wandb", "wandb"),
}  # fmt: skip


def check_trackers(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the trackers exist, each once, and their packages are installed where the run uses this environment. What
    is neither a name nor a list of names is told by the check of types."""
    tracker = config.get("tracker")
    given = tracker.get("report_to", "none") if isinstance(tracker, Mapping) else "none"
    names = [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]
    for name, count in Counter(names).items():
        yield from check_choice("tracker.report_to", name, _TRACKERS)
        if count > 1:
            yield Problem(f"`tracker.report_to` names `{name}` {count} times", "take all but one of them out")
        if (needed := _TRACKERS.get(name)) and not runs_elsewhere(config):
            module, package = needed
            if importlib.util.find_spec(module) is None:
                yield Problem(f"`tracker.report_to={name}` needs the package `{package}`", f"pip install {package}")
    if "none" in names and len(set(names)) > 1:
        others = ",".join(name for name in dict.fromkeys(names) if name != "none")
        yield Problem("`tracker.report_to` names `none` beside others", f"`tracker.report_to=[{others}]`")
