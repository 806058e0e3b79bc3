"""`alignctl cache list` and `alignctl cache clear`: what runs share on this machine. Torch-free."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from alignctl.cache import PARTS, Entry, cache_dir, entries, remove
from alignctl.cli.display import duration
from alignctl.config.suggest import did_you_mean
from alignctl.errors import RequestError
from alignctl.run.disk import shown_bytes

_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DAYS_FROM = 2 * _SECONDS["d"]
_UNKNOWN = "(not known)"


def describe_cache() -> dict[str, Any]:
    """The folder, and what lies in it of each kind: things, bytes, seconds since one was taken, and of which rows."""
    kinds = []
    for part, holds in PARTS.items():
        found = entries(part)
        sources = sorted({entry.made_of or _UNKNOWN for entry in found}) if part == "rows" else []
        made_of = {source: _summed([one for one in found if (one.made_of or _UNKNOWN) == source]) for source in sources}
        kinds.append({"kind": part, "holds": holds} | _summed(found) | {"made_of": made_of})
    return {"folder": str(cache_dir()), "bytes": sum(kind["bytes"] for kind in kinds), "kinds": kinds}


def print_cache() -> None:
    """The same as a table."""
    described = describe_cache()
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("kind", "things", "size", "taken", ""):
        table.add_column(heading, overflow="fold")
    for kind in described["kinds"]:
        table.add_row(kind["kind"], *_cells(kind), kind["holds"])
        for source, one in kind["made_of"].items():
            table.add_row("", *_cells(one), f"of {source}")
    click.echo(f"{described['folder']}: {shown_bytes(described['bytes'])}")
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width of its own
    console.print(table)


def clear_command(kind: str | None, older_than: str | None, as_json: bool) -> None:
    """Removes what is kept, and says how much that was.

    Raises:
        RequestError: There is no such kind, or no such age.
    """
    if kind is not None and kind not in PARTS:
        hint = did_you_mean(kind, PARTS) or f"kinds are {', '.join(PARTS)}"
        raise RequestError(f"the cache has no kind `{kind}`", hint)
    before = time.time() - (_age(older_than) if older_than else 0)
    found = [entry for part in PARTS if kind in (part, None) for entry in entries(part)]
    old = [entry for entry in found if not older_than or entry.used < before]
    removed = [entry for entry in old if remove(entry)]
    freed, busy = sum(entry.bytes for entry in removed), len(old) - len(removed)
    if as_json:
        click.echo(json.dumps({"removed": len(removed), "bytes": freed, "left_alone": busy}))
        return
    click.echo(f"removed {len(removed):,} of {len(found):,}, {shown_bytes(freed)}, from {cache_dir()}")
    if busy:
        click.echo(f"left alone, because they are being made: {busy:,}")


def _summed(found: Sequence[Entry]) -> dict[str, Any]:
    taken = max((entry.used for entry in found), default=None)
    return {
        "things": len(found),
        "bytes": sum(entry.bytes for entry in found),
        "taken_s": None if taken is None else max(0, round(time.time() - taken)),
    }


def _cells(summed: dict[str, Any]) -> tuple[str, str, str]:
    taken = summed["taken_s"]
    return f"{summed['things']:,}", shown_bytes(summed["bytes"]), "" if taken is None else f"{_shown(taken)} ago"


def _shown(seconds: int) -> str:
    return f"{seconds // _SECONDS['d']} days" if seconds >= _DAYS_FROM else duration(seconds)


def _age(given: str) -> int:
    """Seconds of an age as a user writes it.

    Raises:
        RequestError: It is none.
    """
    found = re.fullmatch(r"(\d+)([mhdw])", given)
    if found is None:
        raise RequestError(f"`--older-than {given}` is no age", "a number with m, h, d or w: `--older-than 30d`")
    return int(found[1]) * _SECONDS[found[2]]
