"""What is too much for one night is spread over several; `ALIGNCTL_NIGHTS=all` takes all of it at once."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def of_today(items: Sequence[Item], nights: int) -> list[Item]:
    """A part of the items, another one each day: after so many nights all of them were taken."""
    if os.environ.get("ALIGNCTL_NIGHTS") == "all":
        return list(items)
    return list(items[int(time.strftime("%j")) % nights :: nights])
