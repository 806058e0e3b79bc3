"""Which rows of the last batch of an epoch are a process's own."""

from __future__ import annotations

from transformers import Trainer


def rows_of_last(trainer: Trainer, rows: int) -> int | None:
    """How many rows there are in the batches that all processes read last: where the rows of an epoch do not fill them,
    accelerate does with rows that were trained on already. None where they are full.

    Args:
        rows: Of an epoch.
    """
    accelerator, args = trainer.accelerator, trainer.args
    left = rows % (accelerator.num_processes * args.train_batch_size)
    filled = accelerator.num_processes > 1 and not args.dataloader_drop_last
    if not (filled and left and accelerator.gradient_state.end_of_dataloader):
        return None
    return left


def own_rows_of_last(trainer: Trainer, rows: int) -> int | None:
    """How many rows of the batch that was read last are this process's; see `rows_of_last`."""
    left = rows_of_last(trainer, rows)
    return None if left is None else own_rows(trainer, left)


def own_rows(trainer: Trainer, left: int) -> int:
    """How many of so many rows, which do not fill the batches of all processes, are this process's."""
    batch = trainer.args.train_batch_size
    return min(max(left - trainer.accelerator.process_index * batch, 0), batch)
