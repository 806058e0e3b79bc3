"""Checks of what every stage gives transformers' trainer: what it would refuse once it is built. Torch-free."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignctl.config.schema import wants_bitsandbytes
from alignctl.config.suggest import did_you_mean
from alignctl.config.trl_fields import scheduler_arguments
from alignctl.config.warm_up import warm_up_problem
from alignctl.errors import Problem

# Parts of the names of optimizers, the module each needs, and how it is installed. bitsandbytes' are found elsewhere.
_OPTIMIZERS = {
    "galore": ("galore_torch", "galore-torch"), "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"), "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"), "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"), "adamw_torch_8bit": ("torchao", "torchao"),
    "anyprecision": ("torchdistx", "torchdistx"), "xla": ("torch_xla", "torch_xla"), "npu": ("torch_npu", "torch_npu"),
}  # fmt: skip
_WITHOUT_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adafactor")
_WITH_TARGETS = ("galore", "apollo")
# Of attention kernels, any of these has to be there; others come with torch, or from the Hub through `kernels`.
_KERNELS = {
    "eager": (), "sdpa": (), "flex_attention": (),
    "flash_attention_2": ("flash_attn", "kernels"), "flash_attention_3": ("flash_attn_interface", "kernels"),
    "flash_attention_4": ("flash_attn", "kernels"),
}  # fmt: skip
_CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
# Keys of `accelerator_config` that would divide batches otherwise than the plan says: the value that does, and what to
# set instead.
_CHANGES_BATCHES = {
    "split_batches": (True, "the rows of a batch are those of one process: set `{name}.per_device_train_batch_size`"),
    "dispatch_batches": (
        True,
        "take it out: each process reads its own rows; `{name}.dataloader_num_workers` reads them beside training",
    ),
    "even_batches": (
        False,
        "take it out: rows that fill the last batches count for nothing; `{name}.dataloader_drop_last=true` leaves the "
        "last ones out",
    ),
}
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_training(name: str, stage: Mapping[str, Any], processes: bool) -> Iterator[Problem]:
    """What a stage gives its trainer, whatever it trains.

    Args:
        processes: Whether several processes train together.
    """
    yield from _precision(name, stage)
    yield from _strategies(name, stage)
    for key in ("logging_steps", "eval_steps", "save_steps"):
        steps = stage.get(key)
        if isinstance(steps, float) and steps > 1 and not steps.is_integer():
            yield Problem(
                f"`{name}.{key}={steps}` must be a whole number, or a share of all steps below 1",
                f"set `{name}.{key}={round(steps)}`",
            )
    yield from _early_stopping(name, stage)
    yield from _optimizer(name, stage)
    yield from _schedule(name, stage)
    yield from _loading(name, stage)
    yield from _accelerator(name, stage)
    if stage.get("ddp_backend") and not processes:
        yield Problem(f"`{name}.ddp_backend` would have no effect: one process trains", "set `distributed=ddp`")
    given = stage.get("activation_checkpointing_kwargs")
    for argument in given if isinstance(given, Mapping) else ():
        if argument not in _CHECKPOINTING:
            key = f"{name}.activation_checkpointing_kwargs"
            yield Problem(f"`{key}` has no `{argument}`", did_you_mean(argument, _CHECKPOINTING))
    mode = stage.get("torch_compile_mode")
    if mode is not None and mode not in _COMPILE_MODES:
        yield Problem(f"`{name}.torch_compile_mode` has no value `{mode}`", did_you_mean(mode, _COMPILE_MODES))


def check_attention(model: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the attention kernel of a section `model` is one; those of the Hub have a `/` in their names."""
    kernel = model.get("attn_implementation")
    if isinstance(kernel, str) and "/" not in kernel and (known := kernel.removeprefix("paged|")) not in _KERNELS:
        hint = did_you_mean(known, _KERNELS, prefix="model.attn_implementation=")
        yield Problem(f"unknown `model.attn_implementation={kernel}`", hint)


def check_packages(name: str, stage: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the packages of an optimizer and of kernels are there, where the stage runs in this environment."""
    if stage.get("use_liger_kernel"):
        yield from _needs(f"{name}.use_liger_kernel=true", ("liger_kernel",), "liger-kernel")
    optimizer, kernel = stage.get("optim"), model.get("attn_implementation")
    if isinstance(optimizer, str) and not wants_bitsandbytes(name, {}, optimizer):
        for part, (module, package) in _OPTIMIZERS.items():
            if part in optimizer:
                yield from _needs(f"{name}.optim={optimizer}", (module,), package)
    if isinstance(kernel, str):
        setting = f"model.attn_implementation={kernel}"
        if "/" in kernel:
            yield from _needs(setting, ("kernels",), "kernels")
        elif packages := _KERNELS.get(kernel.removeprefix("paged|")):
            yield from _needs(setting, packages, "flash-attn")


def _precision(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    for one, other in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if stage.get(one) and stage.get(other):
            yield Problem(f"`{name}.{one}` and `{name}.{other}` exclude each other", f"set `{name}.{other}=false`")


def _strategies(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """When is evaluated and saved."""
    evaluates, saves = stage.get("eval_strategy", "no"), stage.get("save_strategy", "steps")
    schedule = stage.get("lr_scheduler_type")
    if schedule in ("reduce_lr_on_plateau", "greedy") and evaluates == "no":
        yield Problem(
            f"`{name}.lr_scheduler_type={schedule}` needs evaluations to go by", f"set `{name}.eval_strategy=steps`"
        )
    if saves == "best" and not (stage.get("metric_for_best_model") or stage.get("early_stopping_patience")):
        yield Problem(
            f"`{name}.save_strategy=best` needs to know what is best", f"set `{name}.metric_for_best_model=loss`"
        )
    if not stage.get("load_best_model_at_end"):
        return
    if evaluates == "no":
        yield Problem(
            f"`{name}.load_best_model_at_end` needs evaluations to compare", f"set `{name}.eval_strategy=steps`"
        )
    elif saves not in (evaluates, "best"):
        yield Problem(
            f"`{name}.load_best_model_at_end` compares what is saved: `{name}.eval_strategy={evaluates}` and "
            f"`{name}.save_strategy={saves}` have to be the same",
            f"set `{name}.save_strategy={evaluates}`",
        )
    elif saves == "steps":
        save_every = stage.get("save_steps", 500)
        eval_every = stage.get("eval_steps", stage.get("logging_steps", 500))
        whole = all(isinstance(steps, int) and steps > 0 for steps in (save_every, eval_every))
        if whole and save_every % eval_every:
            yield Problem(
                f"`{name}.load_best_model_at_end` compares what is saved: `{name}.save_steps={save_every}` is no "
                f"multiple of `{name}.eval_steps={eval_every}`",
                f"set `{name}.save_steps={eval_every}`",
            )


def _early_stopping(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether there is what early stopping looks at: evaluations of held-out rows."""
    patience, threshold = stage.get("early_stopping_patience"), stage.get("early_stopping_threshold")
    if patience is None:
        if threshold:
            yield Problem(
                f"`{name}.early_stopping_threshold` would have no effect", f"set `{name}.early_stopping_patience`"
            )
        return
    if stage.get("eval_strategy", "no") == "no":
        yield Problem(
            f"`{name}.early_stopping_patience` counts evaluations, and there are none",
            f"set `{name}.eval_strategy=steps` and `{name}.eval_steps`",
        )


def _optimizer(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    optimizer, arguments = stage.get("optim"), stage.get("optim_args")
    if stage.get("optim_target_modules") and not str(optimizer).startswith(_WITH_TARGETS):
        yield Problem(f"`{name}.optim_target_modules` would have no effect: only GaLore and APOLLO look at it")
    elif str(optimizer).startswith(_WITH_TARGETS) and not stage.get("optim_target_modules"):
        yield Problem(
            f"`{name}.optim={optimizer}` needs `{name}.optim_target_modules`: the layers it works on",
            f"set `{name}.optim_target_modules=all-linear`",
        )
    if arguments and (optimizer or "adamw_torch") in _WITHOUT_ARGUMENTS:
        yield Problem(
            f"`{name}.optim_args` would have no effect: the optimizer `{optimizer or 'adamw_torch'}` takes none",
            "its numbers are fields of the stage: `adam_beta1`, `adam_beta2`, `adam_epsilon`, `weight_decay`",
        )
    elif isinstance(arguments, str) and not all("=" in part for part in arguments.replace(" ", "").split(",")):
        yield Problem(
            f"`{name}.optim_args={arguments}` has another form than `name=value,name=value`",
            f"""for example `'{name}.optim_args="eps=1e-8"'`""",
        )


def _schedule(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    schedule, given = stage.get("lr_scheduler_type", "linear"), stage.get("lr_scheduler_kwargs") or {}
    takes = scheduler_arguments().get(schedule) if isinstance(schedule, str) else None
    where = f"{name}.lr_scheduler_kwargs"
    steps = stage.get("max_steps")
    if isinstance(steps, int) and steps > 0 and (problem := warm_up_problem(name, stage, steps)):
        yield problem
    if not isinstance(given, Mapping):
        yield Problem(f"`{where}` must be a mapping, got `{given}`", f"for example `{where}.num_cycles=1`")
    elif takes is not None:
        for key in given if not takes.any else ():
            if key not in (*takes.required, *takes.optional):
                yield Problem(
                    f"the schedule `{schedule}` has no `{where}.{key}`",
                    did_you_mean(key, (*takes.required, *takes.optional), prefix=f"{where}."),
                )
        for key in takes.required:
            if key not in given:
                yield Problem(f"the schedule `{schedule}` needs `{where}.{key}`", f"set `{where}.{key}=...`")
        if "min_lr_rate" in takes.optional and not {"min_lr", "min_lr_rate"} & given.keys():
            yield Problem(f"the schedule `{schedule}` needs `{where}.min_lr_rate`", f"set `{where}.min_lr_rate=0.1`")


def _loading(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Rows are loaded by processes of their own, or these settings are for nothing."""
    if stage.get("dataloader_num_workers"):
        return
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if stage.get(key):
            yield Problem(
                f"`{name}.{key}` would have no effect: no processes load rows", f"set `{name}.dataloader_num_workers=2`"
            )


def _accelerator(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether accelerate would divide batches as the plan says. Its settings are a mapping, or a JSON file of one."""
    where, given = f"{name}.accelerator_config", stage.get("accelerator_config")
    if isinstance(given, str):
        where = f"{where}={given}"
        try:
            given = json.loads(Path(given).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield Problem(f"`{where}` cannot be read: {error}", f"give a mapping, `{name}.accelerator_config={{...}}`")
            return
    if not isinstance(given, Mapping):
        return
    for key, (value, instead) in _CHANGES_BATCHES.items():
        if given.get(key) is not None and bool(given[key]) == value:
            yield Problem(
                f"`{where}`: `{key}={str(value).lower()}` would make other batches than the plan says",
                instead.format(name=name),
            )
    accumulation = given.get("gradient_accumulation_kwargs")
    if isinstance(accumulation, Mapping) and accumulation.get("num_steps") is not None:
        yield Problem(
            f"`{where}`: `num_steps={accumulation['num_steps']}` would make other batches than the plan says",
            f"set `{name}.gradient_accumulation_steps`",
        )


def _needs(setting: str, modules: tuple[str, ...], package: str) -> Iterator[Problem]:
    if not any(importlib.util.find_spec(module) for module in modules):
        yield Problem(f"`{setting}` needs the package `{package}`", f"pip install {package}")
