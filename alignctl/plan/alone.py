"""A stage as one process of many rehearses it by itself (alone/): how many there are, what stands in for its inputs.

Pure; torch-free.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from alignctl.config.adapters import has_adapter
from alignctl.config.batches import with_batches
from alignctl.config.schema import QUANTIZED, LauncherSettings, ModelSettings
from alignctl.config.stages import StageConfig, stage_names
from alignctl.config.suggest import did_you_mean
from alignctl.config.trl_fields import config_fields
from alignctl.errors import RequestError
from alignctl.methods.registry import methods
from alignctl.plan.memory import Place, optimizer_of
from alignctl.plan.shapes import Shape, known_ids, saved_in, tensors, without_files
from alignctl.run.disk import shown_bytes

_STEPS = 2
_A_MACHINE = 8  # processes, where nothing says how many
_LONGEST = 131_072  # tokens that a model of the table is said to see: it costs nothing
_FUSED = {"adamw_torch_fused": "adamw_torch"}  # which keep the same, and need no numbers
_PASS_TOKENS = 16_384
"""Of a pass on a GPU, with activations computed again: where processes divide weights, so that a stage's own rehearsal
cannot try what fits."""
_LARGEST = 4_000_000_000
"""Bytes of all models of a stage that are made with numbers."""
_LENGTHS = ("max_length", "max_prompt_length")


def read_place(given: str) -> Place:
    """`RANK/N` as a user writes it.

    Raises:
        RequestError: It is not that, or there is no such rank.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    if found is None or int(found[2]) == 0:
        raise RequestError(f"`--as {given}` is not a rank and a number of processes", "for example `--as 5/64`")
    place = Place(int(found[1]), int(found[2]))
    if place.rank >= place.processes:
        raise RequestError(
            f"`--as {given}`: of {place.processes} processes the last has the rank {place.processes - 1}",
            f"`--as {place.processes - 1}/{place.processes}`",
        )
    return place


def check_machines(overrides: Sequence[str]) -> None:
    """Whether somebody says how many machines there are.

    Raises:
        RequestError: That would have no effect.
    """
    given = next((one for one in overrides if one.lstrip("+").startswith("launcher.nodes=")), None)
    if given is not None:
        raise RequestError(
            f"`{given}` would have no effect: N of `--as RANK/N` says how many machines there are",
            "leave it out; how large a machine is `launcher.gpus_per_node` says",
        )


def with_processes(config: Mapping[str, Any], place: Place, run_dir: str) -> dict[str, Any]:
    """A composed config whose launcher starts so many processes, on machines as large as it says.

    Raises:
        RequestError: They do not fill the machines, or have nothing to work together by.
    """
    kind = (config.get("distributed") or {}).get("type", "none")
    if kind == "none" and place.processes > 1:
        raise RequestError(
            f"`--as {place}` is one of {place.processes} processes, and `distributed` is none",
            "add `distributed=ddp`, or zero1, zero2, zero3 or fsdp2",
        )
    launcher = dict(config.get("launcher") or {})
    launcher["stages"] = {}
    key = "processes" if launcher.get("processes") else "gpus_per_node"
    each = launcher.get(key)
    if not isinstance(each, int) or each < 1:
        each = min(place.processes, _A_MACHINE)
    if place.processes % each:
        raise RequestError(
            f"`--as {place}`: {place.processes} processes do not fill machines of {each} (`launcher.{key}`)",
            f"give a multiple of {each}, or another `launcher.{key}`",
        )
    launcher |= {key: each, "nodes": place.processes // each, "node_rank": 0}
    if launcher.get("type", "local") == "local" and launcher["nodes"] > 1:
        launcher["rdzv_endpoint"] = launcher.get("rdzv_endpoint") or "localhost:29500"  # nobody is going to meet there
    return with_batches(dict(config) | {"launcher": launcher, "run_dir": run_dir})


def without_vllm(config: Mapping[str, Any]) -> dict[str, Any]:
    """A composed config whose stages draw without vLLM: it is a program beside the training, which need not be here."""
    return dict(config) | {name: _without_vllm(config[name]) for name in stage_names(config)}


def _without_vllm(stage: Mapping[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in stage.items() if key != "use_vllm" and not key.startswith("vllm_")}
    return left | ({"generation": "transformers"} if "generation" in left else {})


def check_can_be_made(stage: StageConfig, shape: Shape | None) -> Shape:
    """Whether a stage can be rehearsed without its files.

    Raises:
        RequestError: It cannot.
    """
    if stage.peft.get("type") in QUANTIZED:
        raise RequestError(
            f"`peft.type={stage.peft['type']}` packs the weights of a checkpoint in 4 bits, and here they are made up",
            "rehearse it with `peft=lora`, whose weights take four times as much",
        )
    if stage.trainer.get("sharing") == "shared_base" and "reward_model" in (*stage.roles_from, *stage.role_paths):
        raise RequestError(
            f"`{stage.name}.sharing=shared_base` puts the adapter of a reward model on the policy, and there is none",
            f"rehearse it with `{stage.name}.sharing=separate`",
        )
    if shape is None:
        raise RequestError(
            f"`model.path={stage.model.path}`: the shape of this model is not known here",
            did_you_mean(str(stage.model.path), known_ids()) or "give a folder with its config.json as `model.path`",
        )
    return shape


def stood_in(stage: StageConfig, shape: Shape) -> StageConfig:
    """A stage as the child builds it: random weights of a shape, on CPUs what GPUs would do, two steps, nothing
    measured or saved."""
    launcher, given = stage.launcher, stage.trainer
    on_gpus = bool(launcher.gpus_per_node)
    stands = {
        "max_steps": _STEPS, "warmup_steps": 0, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no",
        "load_best_model_at_end": False, "early_stopping_patience": None, "push_to_hub": False,
        "dataloader_num_workers": 0, "dataset_num_proc": None, "compile": "off",
        "optim": _FUSED.get(optimizer_of(stage), optimizer_of(stage)),
    }  # fmt: skip
    if given.get("reward_funcs"):
        # Whoever wrote those that the stage names expects other prompts.
        count = len(given["reward_funcs"])
        stands["reward_funcs"] = [{"repetition": 3, "name": f"reward_{number}"} for number in range(count)]
    known = config_fields(methods()[stage.method].config_class)
    fields = given | {key: value for key, value in stands.items() if key in known}
    if on_gpus:
        fields["bf16"] = given.get("bf16", not given.get("fp16", False))
        if given.get("activation_checkpointing") in (None, "auto"):
            fields["activation_checkpointing"] = True
        if given.get("pass_tokens") in (None, "auto"):
            fields["pass_tokens"] = _PASS_TOKENS
    config = without_files(shape)
    vocabulary = config.pop("vocab_size")
    if stage.model.scratch is None:
        config["max_position_embeddings"] = max(config.get("max_position_embeddings", 0), _LONGEST)
    dtype = stage.model.dtype
    if dtype == "auto":
        dtype = saved_in(shape) if has_adapter(stage.peft) and stage.model.scratch is None else "float32"
    return dataclasses.replace(
        stage,
        start_from=None,
        roles_from={},
        role_paths={},
        model=ModelSettings(
            scratch={"vocab_size": vocabulary, "config": config},
            dtype=dtype,
            attn_implementation=stage.model.attn_implementation,
            merge=stage.model.merge,
        ),
        launcher=LauncherSettings(nodes=launcher.nodes, processes=launcher.processes_per_node),
        rehearse=False,
        trainer=fields,
    )


def draws(stage: StageConfig) -> bool:
    """Whether a stage learns from completions that it draws itself."""
    return methods()[stage.method].data_kind == "prompts"


def has_reward_model(stage: StageConfig) -> bool:
    """Whether a stage that was prepared here holds a reward model; it is read from a folder, as any other."""
    return "reward_model" in methods()[stage.method].roles[1:] and not stage.trainer.get("reward_funcs")


def is_numberless(stage: StageConfig, shape: Shape) -> bool:
    """Whether a stage is rehearsed with weights that have no numbers, which may be of any size.

    Raises:
        RequestError: It cannot be, and its weights are too large to be made.
    """
    kind, judged = stage.distributed.type, has_reward_model(stage)
    if kind == "fsdp2" and not judged:
        return True
    whole = tensors(shape)
    size = 4 * len(methods()[stage.method].roles) * sum(one.numbers * one.count for one in whole or ())
    if size > _LARGEST:
        reason = "a reward model is read from a file" if judged else f"`distributed={kind}` moves their numbers"
        less = f"`{stage.name}.reward_funcs` and no reward model" if judged else "`distributed=fsdp2`"
        raise RequestError(
            f"weights of {shown_bytes(size)} would have to be made, because {reason}; the most is "
            f"{shown_bytes(_LARGEST)}",
            f"rehearse a smaller model of the family, by `model.path`, or this one with {less}, whose weights need no "
            "numbers",
        )
    return False


def longest(stage: StageConfig) -> int | None:
    """Most tokens of a sequence that a stage does not leave out or cut; None where there is no such limit."""
    fields = config_fields(methods()[stage.method].config_class)
    given = (stage.trainer.get(key, fields[key].default if key in fields else None) for key in _LENGTHS)
    return next((int(one) for one in given if isinstance(one, int)), None)
