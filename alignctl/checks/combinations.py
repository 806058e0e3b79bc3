"""Checks of settings that exclude each other, or of which one would have no effect. Torch-free."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.checks.bounds import check_numbers
from alignctl.checks.shared_base import check_shared_base
from alignctl.checks.training import check_attention, check_packages, check_training
from alignctl.checks.values import check_choice, distributed_type, method_of
from alignctl.config.checkpoints import describe_model
from alignctl.config.schema import MISSING, QUANTIZED, ZERO_STAGES, wants_bitsandbytes
from alignctl.config.stages import first_stage, merged_section, names_rows
from alignctl.config.trl_fields import config_fields
from alignctl.errors import Problem
from alignctl.evaluate.judges import JUDGES
from alignctl.methods.registry import methods


def check_combinations(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Settings that exclude each other, or of which one would have no effect."""
    stage = config[name]
    peft = merged_section(config, name, "peft")
    method = method_of(config, name)
    assert method is not None
    default = config_fields(method.config_class).get("disable_dropout")
    disable_dropout = stage.get("disable_dropout", default.default if default else False)
    if peft.get("lora_dropout") and disable_dropout:
        yield Problem(
            f"`peft.lora_dropout={peft['lora_dropout']}` would have no effect: `{name}.disable_dropout` is true",
            f"set `{name}.disable_dropout=false`, or `peft.lora_dropout=0`",
        )
    yield from check_training(name, stage, distributed_type(config) != "none")
    model = merged_section(config, first_stage(config, name), "model")
    if not runs_elsewhere(config):
        yield from check_packages(name, stage, model)
        yield from _bitsandbytes(name, stage, peft)
    yield from check_attention(model)
    attention = model.get("attn_implementation")
    if stage.get("engine") == "shared_prefix" and attention not in (None, "sdpa"):
        yield Problem(
            f"`{name}.engine=shared_prefix` and `model.attn_implementation={attention}` exclude each other: the engine "
            "has an attention of its own",
            f"set `{name}.engine=padded`, or `model.attn_implementation=null`",
        )
    for key in ("neftune_noise_alpha", "label_smoothing_factor"):
        if stage.get("engine") == "shared_prefix" and stage.get(key):
            yield Problem(
                f"`{name}.engine=shared_prefix` and `{name}.{key}` exclude each other: that is defined for padded rows",
                f"set `{name}.engine=auto`",
            )
    theirs = [key for key in ("torch_compile", "torch_compile_backend", "torch_compile_mode") if stage.get(key)]
    if theirs and stage.get("compile") not in (None, False, "off"):
        yield Problem(
            f"`{name}.compile` and `{name}.{theirs[0]}` exclude each other: one compiles the parts of each layer, the "
            "other the whole model",
            f"take one of them out, `~{name}.{theirs[0]}`",
        )
    kind = distributed_type(config)
    if stage.get("compile") in (True, "on") and peft.get("type") in QUANTIZED:
        yield Problem(
            f"`{name}.compile=on` and `peft={peft['type']}` exclude each other: weights in 4 bits are not compiled",
            f"set `{name}.compile=auto`",
        )
    if stage.get("compile") in (True, "on") and (ZERO_STAGES.get(kind) == 3 or kind == "fsdp2"):
        yield Problem(
            f"`{name}.compile=on` and `distributed={kind}` exclude each other: processes divide the weights of a layer",
            f"set `{name}.compile=auto`, or `distributed=zero2`",
        )
    weights, losses = stage.get("loss_weights"), stage.get("loss_type")
    losses = [losses] if isinstance(losses, str) else losses
    if losses == []:
        yield Problem(f"`{name}.loss_type` names no loss", f"take it out, or set `{name}.loss_type=[sigmoid]`")
    elif isinstance(weights, list) and isinstance(losses, list) and len(weights) != len(losses):
        yield Problem(
            f"`{name}.loss_weights` has {len(weights)} values for {len(losses)} in `{name}.loss_type`",
            f"set `{name}.loss_weights=null`, or a weight for each",
        )
    if stage.get("pass_tokens", "auto") != "auto" and method.mixes_rows is not None:
        fields = {key: field.default for key, field in config_fields(method.config_class).items()}
        if reason := method.mixes_rows(fields | stage):
            yield Problem(
                f"`{name}.pass_tokens` would have no effect: {reason}",
                f"take it out: each batch is a pass, so `{name}.per_device_train_batch_size` decides",
            )
    if method.check is not None:
        yield from method.check(name, dict(stage) | {"peft": peft, "processes": distributed_type(config) != "none"})
    if merged_section(config, name, "data").get("margin") is not None and not method.declares("margin"):
        takers = ", ".join(f"`{other.name}`" for other in methods().values() if other.declares("margin"))
        yield Problem(f"`data.margin` would have no effect on `{name}`: only the method {takers} uses margins")
    if stage.get("sharing") == "shared_base":
        yield from check_shared_base(config, name, peft)
    yield from check_numbers(name, stage, method.bounds)
    judge = merged_section(config, name, "eval").get("judge")
    if judge is not None:
        problems = list(check_choice("eval.judge", judge, JUDGES))
        yield from problems
        source = f"builtin:{judge}"
        data = merged_section(config, name, "data")
        if not problems and (data.get("eval_path") or data.get("path")) != source:
            yield Problem(f"`eval.judge={judge}` can only judge prompts of `{source}`", "set `eval.judge=null`")
    yield from _length(config, name)


def _bitsandbytes(name: str, stage: Mapping[str, Any], peft: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether 4-bit weights and 8-bit optimizers have their package, and something to quantize."""
    if importlib.util.find_spec("bitsandbytes") is None:
        for setting in wants_bitsandbytes(name, peft, stage.get("optim")):
            yield Problem(f"`{setting}` needs the package `bitsandbytes`", 'pip install "alignctl[bitsandbytes]"')


def runs_elsewhere(config: Mapping[str, Any]) -> bool:
    """Whether the packages are those of a container or of another Python, which only the worker sees."""
    launcher = config.get("launcher")
    return isinstance(launcher, Mapping) and any(launcher.get(key) for key in ("container", "python", "srun"))


def check_unused(config: Mapping[str, Any], stages: list[str]) -> Iterator[Problem]:
    """A data set at the top that no stage would read."""
    data = config.get("data")
    path = data.get("path", MISSING) if isinstance(data, Mapping) else MISSING
    if (
        path != MISSING
        and stages
        and all(names_rows(merged_section({name: config[name]}, name, "data")) for name in stages)
    ):
        targets = " or ".join(f"`{name}.data.path=...`" for name in stages)
        yield Problem("`data.path` would have no effect: every stage has data of its own", f"give {targets}")


def _length(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Whether sequences fit into the model, as far as its config is on this machine."""
    described = describe_model(merged_section(config, first_stage(config, name), "model")) or {}
    limit = described.get("max_position_embeddings")
    if not isinstance(limit, int):
        return
    wanted = config[name].get("max_length")
    if isinstance(wanted, int) and wanted > limit:
        yield Problem(
            f"`{name}.max_length={wanted}` is longer than the model can see: {limit} tokens",
            f"set `{name}.max_length={limit}`",
        )
    method = method_of(config, name)
    fields = config_fields(method.config_class) if method else {}
    if not {"max_prompt_length", "response_length"} <= fields.keys():
        return
    drawn = [config[name].get(key, fields[key].default) for key in ("max_prompt_length", "response_length")]
    if all(isinstance(one, int) for one in drawn) and sum(drawn) > limit:
        prompt, response = drawn
        yield Problem(
            f"`{name}.max_prompt_length={prompt}` and `{name}.response_length={response}` together are longer than the "
            f"model can see: {limit} tokens",
            f"set `{name}.max_prompt_length={max(limit - response, 1)}`",
        )
