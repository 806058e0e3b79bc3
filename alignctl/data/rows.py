"""Rows in a trainer's form, and what became of those of their source. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from datasets import Dataset

from alignctl.data.formats import Format
from alignctl.data.places import NOWHERE, Places
from alignctl.methods.registry import RowColumn


@dataclass(frozen=True)
class Part:
    """What one of several sources has of all rows."""

    source: str
    format: str
    read: int
    """Rows of the source."""
    rows: int = 0
    """Rows among those that are trained on or measured on; one that is there twice counts twice."""
    tokens: int | None = None
    """Of those, where a mixture is by tokens."""
    share: float = 0.0
    """Of all of them, in rows or in tokens."""
    weight: float | None = None
    """What its share was to be, as a part of the sum of all weights."""
    name: str | None = None
    """Of rows that are measured on by name."""
    agreement: float | None = None
    """As the ledger of one source has it."""


@dataclass(frozen=True)
class Ledger:
    """What became of the rows of a source: those kept, skipped, tied, held out and left over are all that
    were read."""

    source: str
    format: str
    read: int
    kept: int
    """Of which there is something to be trained on, though a row may give several."""
    skipped: dict[int, str]
    """Row number, counted from 1, and why the row cannot be used."""
    unused: list[str] = field(default_factory=list)
    """Columns that rows have and nothing looks at."""
    held_out: int = 0
    """Rows that were taken out to measure on."""
    left_over: int = 0
    """Rows that the weights of a mixture leave no room for."""
    parts: list[Part] = field(default_factory=list)
    """Of several sources, what each has."""
    shared_prompts: int = 0
    """Of held-out rows, those whose prompt training rows have, too."""
    partly: dict[int, str] = field(default_factory=dict)
    """Of the rows that are kept, those that give several of which some cannot be used, and why."""
    ties: list[int] = field(default_factory=list)
    """Rows, counted from 1, of which no completion is better than another: they are left out, and are no bad rows."""
    agreement: float | None = None
    """Where rows have votes of several people, the share of pairs of people who say the same, in the mean of rows."""


def said_of(ledger: Ledger) -> str:
    """Names the format of rows, and what of them is not used."""
    said = [f"{ledger.source}: rows of the format `{ledger.format}`"]
    if ledger.agreement is not None:
        said.append(f"two people say the same of {ledger.agreement:.0%}")
    if ledger.ties:
        said.append(f"{len(ledger.ties):,} of {ledger.read:,} are left out, because no completion is better")
    if ledger.unused:
        said.append("not used: " + ", ".join(f"`{name}`" for name in ledger.unused))
    if ledger.parts:
        said.append(f"a mixture: {shares_said(ledger)}")
    return "; ".join(said)


def shares_said(ledger: Ledger) -> str:
    """What each of several sources has."""
    what = "rows" if ledger.parts[0].tokens is None else "tokens"
    return ", ".join(f"{part.source} {part.share:.1%} of the {what} ({part.rows:,} rows)" for part in ledger.parts)


def shared_said(ledger: Ledger) -> str:
    """What held-out rows have in common with those that are trained on."""
    return (
        f"{ledger.source}: {ledger.shared_prompts:,} of {ledger.kept:,} held-out rows have a prompt that training rows "
        "have, too: what is measured on them says little about other prompts"
    )


@dataclass(frozen=True)
class Rows:
    """Rows in a trainer's form."""

    dataset: Dataset
    format: Format
    ledger: Ledger
    numbers: list[int]
    """Which row of the source each row was, counted from 1."""
    columns: tuple[RowColumn, ...] = ()
    """What the rows have beside their texts for the method that they were read for."""
    places: Places = NOWHERE
    """Where the rows of the source stand."""

    def select(self, indices: list[int]) -> Rows:
        """Some of the rows, in the order of their indices."""
        return replace(self, dataset=self.dataset.select(indices), numbers=[self.numbers[i] for i in indices])
