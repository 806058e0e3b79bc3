"""What people should know of a composed config with nothing wrong in it, a line each. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignctl.config.batches import GLOBAL, PER_DEVICE, batch_of
from alignctl.methods.registry import methods


def find_notices(config: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    """Of these stages."""
    return [line for name in stages for line in (*_of_batch(config, name), *_of_method(config, name))]


def _of_method(config: Mapping[str, Any], name: str) -> Iterator[str]:
    method = methods()[config[name]["method"]]
    return method.notices(name, config[name]) if method.notices else iter(())


def _of_batch(config: Mapping[str, Any], name: str) -> Iterator[str]:
    """Whether the learning rate is one for other batches than the stage takes."""
    batch, published = batch_of(config, name), config[name].get("batch_for")
    if batch is None or published in (None, batch.rows):
        return
    instead = [f"scale `{name}.learning_rate`"]
    size = batch.smaller_part(published)
    if published % batch.unit == 0:
        instead.append(f"set `{name}.{GLOBAL}={published}`")
    elif size:
        instead.append(f"set `{name}.{GLOBAL}={published}` and `{name}.{PER_DEVICE}={size}`")
    yield (
        f"the learning rate of `{name}` was published for batches of {published:,} {batch.what}, and this run takes "
        f"{batch.rows:,}: {', or '.join(instead)}"
    )
