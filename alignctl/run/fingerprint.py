"""Tells whether a stage would do the same as one that was run before. Torch-free."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from alignctl.config.schema import SECTIONS
from alignctl.config.stages import StageConfig

VERSION = 6
"""Of what a stage's settings mean and its checkpoints hold. One that was begun under another version cannot be
continued: raise it where a change of the code would go on with an old stage otherwise, or could not."""
_CHUNK = 2**20
_PARTS, _PART = 64, 2**16  # of a large file, and bytes of each: little, for every command looks at all files
_DIVIDES = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "pass_tokens", "activation_checkpointing",
    "activation_checkpointing_kwargs", "compile",
)  # fmt: skip
_PATIENCE = ("reward_timeout", "reward_retries", "reward_workers")
_SAID_OF_BATCHES = ("global_batch_size", "batch_for")  # what the batch is counts by itself
_TOLD = ("run_name", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_LEFT_OUT = (*_DIVIDES, *_PATIENCE, *_SAID_OF_BATCHES, *_TOLD)  # of a trainer's settings
_AROUND = ("tracker", "rehearse", "distributed", "launcher")  # where a stage runs, and whom it tells
_OF_THE_RUN = (*_AROUND, "run_dir", "log_every", "global_batch_size", "report_to")  # the last is `tracker` as it was


def stage_fingerprint(stage: StageConfig, upstream: Sequence[str], global_batch_size: int) -> str:
    """A hash of everything a stage's result depends on: settings, local inputs, and the stages it builds on.

    Data files count by content; checkpoint folders by the names and sizes of their files and parts of their content,
    because weights are too many bytes to read for this. How a global batch is divided among processes and passes
    changes nothing but the rounding, nor do what is kept of a pass, where it runs, whom it tells, and how long it waits
    for rewards. A setting of a section at its default is left out, so that one that is new in alignctl changes no stage
    that was begun before.
    """
    settings = stage.to_dict()
    for key in (*_AROUND, "taken_by"):
        del settings[key]
    for section in SECTIONS:
        settings[section] = _given(getattr(stage, section))
    settings["trainer"] = {key: value for key, value in stage.trainer.items() if key not in _LEFT_OUT}
    settings["global_batch_size"] = global_batch_size
    inputs = {key: _identity(path) for key, path in stage.inputs.items()}
    return _hash(json.dumps([VERSION, settings, inputs, list(upstream)], sort_keys=True).encode())


def counts(key: str) -> bool:
    """Whether a setting, by its dotted key in a config, is part of fingerprints. Those of batches are by what follows
    from them, the sequences of an optimizer step."""
    first, *rest = key.split(".")
    return first not in _OF_THE_RUN and rest[:1] not in [[name] for name in _LEFT_OUT]


def _given(section: Any) -> dict[str, Any]:
    """A section without what is at its default."""
    fields = dataclasses.fields(section)
    return {one.name: value for one in fields if (value := getattr(section, one.name)) != one.default}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file in a folder and those below it, by relative name."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in files
    }


def input_files(inputs: Mapping[str, str]) -> dict[str, str]:
    """What the local files of a stage's inputs are known by, as its fingerprint takes them.

    Args:
        inputs: Files, folders and Hub ids.
    """
    found: dict[str, str] = {}
    for path in inputs.values():
        identity = _identity(path)
        if isinstance(identity, list):
            found |= {str(Path(path, name)): f"{size} bytes, {digest}" for name, size, digest in identity}
        elif identity != path:
            found[path] = identity
    return found


@cache
def _identity(path: str) -> Any:
    place = Path(path)
    if not place.exists():
        return path
    if place.is_file():
        return file_digest(place)
    files = sorted(file for file in place.rglob("*") if file.is_file())
    return [(file.relative_to(place).as_posix(), file.stat().st_size, _digest_of_parts(file)) for file in files]


def _digest_of_parts(path: Path) -> str:
    """A hash of a file's content: of all of it, or of parts from its beginning to its end where it is large. Weights
    are too many bytes to read for this, and others are others everywhere; their times say nothing, which copies change.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= _PARTS * _PART:
            digest.update(file.read())
        else:
            for number in range(_PARTS):
                file.seek((size - _PART) * number // (_PARTS - 1))
                digest.update(file.read(_PART))
    return digest.hexdigest()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
