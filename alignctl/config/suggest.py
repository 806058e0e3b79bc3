"""Names a user may have meant. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names that other tools, and older versions of TRL and transformers, use for the same thing.
ALIASES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accum": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "evaluation_strategy": "eval_strategy",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "lora_rank": "r",
    "lora_r": "r",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "model_name_or_path": "path",
    "base_model": "path",
    "torch_dtype": "dtype",
    "dataset": "path",
    "simpo_gamma": "gamma_beta_ratio",
    "cpo_alpha": "sft_weight",
    "reward_model_path": "reward_model",
    "ref_model": "reference",
    "train_files": "path",
}
NOTES = {"simpo_gamma": "gamma divided by beta", "warmup_ratio": "below 1 it is a share of all steps"}


def closest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The options nearest to `name`, best first; none if nothing is near."""
    options = list(options)
    alias = ALIASES.get(name)
    first = [alias] if alias in options else []
    near = difflib.get_close_matches(name, options, n=count, cutoff=0.6)
    near = near or [option for option in options if len(name) > 1 and option.startswith(name)]
    return (first + [option for option in near if option not in first])[:count]


def did_you_mean(name: str, options: Iterable[str], prefix: str = "") -> str | None:
    """A hint that names what was probably meant, else lists the options when they are few."""
    name, options = str(name), sorted(set(options))
    near = closest(name, options)
    if near:
        note = f" ({NOTES[name]})" if name in NOTES else ""
        return "did you mean " + " or ".join(f"`{prefix}{option}`" for option in near) + "?" + note
    if 0 < len(options) <= 24:
        return "there is " + ", ".join(f"`{prefix}{option}`" for option in options)
    return None
