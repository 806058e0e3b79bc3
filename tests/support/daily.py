"""What is too much for one night is spread over several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def of_today(items: Sequence[Item], nights: int) -> list[Item]:
    """A part of the items, another one each day: after so many nights all of them were taken."""
    return list(items[int(time.strftime("%j")) % nights :: nights])
