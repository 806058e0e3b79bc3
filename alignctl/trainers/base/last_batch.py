"""Which rows of the last batch of an epoch are a process's own."""

from __future__ import annotations

from transformers import Trainer


def own_rows_of_last(trainer: Trainer, rows: int) -> int | None:
    """How many rows of the batch that was read last are this process's: where the rows of an epoch do not fill the
    batches of all processes, accelerate fills the last ones with rows that were trained on already. None where all are.

    Args:
        rows: Of an epoch.
    """
    accelerator, args = trainer.accelerator, trainer.args
    left = rows % (accelerator.num_processes * args.train_batch_size)
    filled = accelerator.num_processes > 1 and not args.dataloader_drop_last
    if not (filled and left and accelerator.gradient_state.end_of_dataloader):
        return None
    return min(max(left - accelerator.process_index * args.train_batch_size, 0), args.train_batch_size)
