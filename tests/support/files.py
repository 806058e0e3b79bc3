"""What a run leaves in its folder, as tests compare it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def read(path: Path):
    """The content of a .json file, or the rows of a .jsonl file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes rows as JSON lines; returns the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def weights(model: Path) -> str:
    """Hash of a saved model's weights: equal where they are, bit for bit."""
    files = sorted(model.glob("*model*.safetensors"))  # one or several, of an adapter, too
    assert files, f"there are no weights in {model}"
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def metrics(stage: Path) -> list[dict]:
    """What a stage logged, row by row."""
    return read(stage / "metrics.jsonl")


def outcome(stage: Path, facts: tuple[str, ...] = ("step", "loss", "learning_rate", "grad_norm")) -> tuple[str, list]:
    """Hash of a stage's weights, and what it logged of these facts: none of them depends on the clock."""
    return weights(stage / "model"), [[row.get(fact) for fact in facts] for row in metrics(stage)]
