"""What is said of rows: section `data` of a recipe. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

RENAMED = {"max_too_long": "max_lost"}
"""Former names of these settings, which are still taken, and their names."""


@dataclass
class MixedSource:
    """An entry of `data.mix`. What it does not say is as in `data`, but for its limit."""

    path: str | list[str]
    """As `data.path`."""
    weight: float | None = None
    """Its share of the mixture, as a part of the sum of all weights; all entries have one, or none."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set."""
    limit: int | None = None
    """Take the first rows only, at most this many."""
    format: str = "auto"
    """Name of a row format."""
    columns: dict[str, str] | None = None
    """Which column of the file is meant."""
    template: str | None = None
    """Jinja that makes the prompt of a row's columns."""
    use: Literal["chosen"] | None = None
    """`chosen`: of preferences, imitate the chosen completions."""


@dataclass
class DataSettings:
    """Section `data`: rows to train on and rows held out."""

    path: str | list[str] | None = "???"  # OmegaConf's word for what the user has to give
    """A .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file, a folder of such files, a pattern (`rows/*.jsonl`) or
    a list of them, an address (`https://...`, `s3://...`), a Hub id `owner/name`, or `builtin:quickstart`. Files but
    .parquet and .arrow may be compressed: .gz, .xz, .zst."""
    rows_from: str | None = field(default=None, metadata={"key": "from"})
    """A stage before this one that makes rows, in place of `path`: they are trained on."""
    mix: list[dict[str, Any]] | None = None
    """Several sources in place of `path`: `[{path: a.jsonl, weight: 0.7}, {path: b.jsonl, weight: 0.3}]`. Each may have
    its own name, split, limit, format, columns, template and use. Without weights all rows of all of them, once."""
    mix_by: Literal["rows", "tokens"] = "rows"
    """What weights are shares of: rows, or the tokens of their texts."""
    mix_stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """`first_exhausted`: no row is there twice, so that the source that is the first to run out ends the mixture;
    `all_exhausted`: every row is there, and sources that run out begin anew."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set to train on, or a part of one, which a command line has in quotes:
    `'data.split="train[:5%]"'`."""
    eval_path: str | list[str] | None = None
    """Held-out rows: as `path`."""
    eval: dict[str, str | list[str]] | None = None
    """Held-out rows of several sets, each as `path`, and measured under its name: `{maths: a.jsonl, chat: b.jsonl}`
    gives `eval_maths_loss`."""
    eval_split: str | None = None
    """Held-out split of the Hub data set in `path`."""
    eval_rows: float = 256
    """Rows to hold out of `path`, whole prompts at a time, when no held-out rows are named: so many, but at most a
    fifth of them; or below 1 that share of them, `0.05`; 0 for none."""
    limit: int | None = None
    """Train on the first rows only, at most this many."""
    eval_limit: int | None = None
    """Evaluate on the first held-out rows only, at most this many."""
    holds: Literal["demonstrations", "preferences", "feedback", "prompts"] | None = None
    """What the rows are, so that a data set on the Hub can be checked against the method before it is fetched."""
    format: str = "auto"
    """Name of a row format (docs/data.md); auto detects it from the first row that has any."""
    use: Literal["chosen"] | None = None
    """`chosen`: of preferences, imitate the chosen completions. For supervised fine-tuning."""
    columns: dict[str, str] | None = None
    """Which column of the file is meant: `{prompt: question, chosen: good}`; with points for what is inside of another
    one, `{prompt: input.question}`. Of held-out rows too."""
    template: str | None = None
    """Jinja that makes the prompt of a row's columns: `"{{ context }}\\n\\n{{ question }}"`."""
    max_pairs: int = 36
    """Of scored or ranked completions of a prompt, at most so many pairs, those furthest apart first. 36 are all pairs
    of nine, the most that arXiv:2203.02155 ranked."""
    on_bad_row: Literal["skip", "fail"] = "skip"
    """What to do with a row that cannot be used. Skipped rows are counted and listed in the stage's data.json."""
    margin: str | list[str] | None = None
    """Column that says how much better the chosen completion is, or two columns, `[better, worse]`, to subtract. For
    reward models; None takes the column `margin` where there is one. Where one column is named, a missing value
    counts 0; where two are, the row cannot be used."""
    max_skipped: float = 0.01
    """Largest share of the rows that may be skipped, because they or their template are not as they should be; one row
    always may."""
    max_lost: float = 0.05
    """Largest share of the training rows that may be lost because `max_length` leaves nothing of a prompt or a
    completion."""
    max_truncated: float | None = None
    """Largest share of the training rows that may be cut to `max_length`, and are not lost; None for any."""
