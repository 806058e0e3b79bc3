"""Bytes of weights, gradients and optimizer state that each process holds, and what it sends in a step. Pure;
torch-free.

FSDP2 (torch.distributed.fsdp.fully_shard) divides each tensor by its first dimension into as many pieces as there are
processes, all as large as the first; where several divide the matrices of layers, each part of one among the others.
DeepSpeed (arXiv:1910.02054, Sec. 5) divides the numbers of all tensors evenly: the optimizer's from stage 1 on,
gradients from stage 2 on, weights in stage 3. What passes need beside these is not counted here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignctl.config.adapters import HEADS, changes_base, has_adapter, matches
from alignctl.config.schema import ZERO_STAGES
from alignctl.config.stages import StageConfig
from alignctl.methods.registry import methods
from alignctl.plan.shapes import Shape, Tensor, tensors

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32 = 4
_EMBEDDINGS = "embed_tokens"
_GIVE, _TAKE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
"""Matrices of a layer that processes divide by what they give, and by what they take."""
_OUTSIDE = (_EMBEDDINGS, "norm", *HEADS)
_MOMENTS = {"adamw": 2, "sgd": 0}
"""Numbers that an optimizer keeps of each weight, by how transformers' name of it begins."""
_PEFT_CHOOSES = {"phi3": ("qkv_proj",)}
_QUERIES_AND_VALUES = ("q_proj", "v_proj")
"""What peft (0.21) puts adapters on where it is not told."""
_PERSISTENT = 100_000
"""Numbers of the largest tensor that ZeRO-3 leaves whole, where `stage3_param_persistence_threshold` is not given."""


@dataclass(frozen=True)
class Place:
    """Which process of how many."""

    rank: int
    processes: int

    def __str__(self) -> str:
        return f"{self.rank}/{self.processes}"


@dataclass(frozen=True)
class Held:
    """What a process holds and sends, in bytes; None where that is not known here."""

    weights: dict[str, int]
    """Of each role."""
    gradients: int
    """Before the optimizer steps."""
    optimizer: int | None
    """Once it has stepped; with DeepSpeed the weights in float32 that it steps with, too."""
    gathered: dict[str, int] | None
    """Weights of each role that come together whenever its model is run."""
    gathered_again: int
    """Weights that come together once more in a backward pass."""
    reduced: int | None
    """Gradients that are added up at once."""
    reduced_each_pass: bool = False
    """Whether that is in every pass of a step, or in its last one."""

    def gathered_in(self, runs: Mapping[str, int], passes: int) -> int | None:
        """Weights that come together in a step.

        Args:
            runs: How often the model of each role is run in it.
            passes: How many of these have a backward pass.
        """
        if self.gathered is None:
            return None
        return sum(self.gathered[role] * count for role, count in runs.items()) + self.gathered_again * passes

    def reduced_in(self, passes: int) -> int | None:
        """Gradients that are added up in a step of so many passes."""
        if self.reduced is None:
            return None
        return self.reduced * (passes if self.reduced_each_pass else 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Part:
    """Tensors of a model that are held in one type and learn, or do not."""

    tensors: Sequence[Tensor]
    size: int
    """Bytes of a number."""
    learns: bool


def held(stage: StageConfig, shape: Shape, place: Place) -> Held | None:
    """What a stage (plan/alone.py) takes of one of its processes; None for a model or an adapter that is not known
    here."""
    models = models_of(stage, shape)
    if models is None:
        return None
    kind, mixed = stage.distributed.type, bool(stage.trainer.get("bf16") or stage.trainer.get("fp16"))
    if kind in ZERO_STAGES:
        return _by_deepspeed(stage, models, place, mixed)
    divided = Divided(place, stage.distributed.tp_size) if kind == "fsdp2" else Divided(Place(0, 1))
    trained = [(part, one) for parts in models.values() for part in parts if part.learns for one in part.tensors]
    come = {role: _come_together(divided, parts, 2 if mixed else None) for role, parts in models.items()}
    return Held(
        weights={
            role: sum(divided.piece(one, part.size) for part in parts for one in part.tensors)
            for role, parts in models.items()
        },
        gradients=sum(divided.piece(one, part.size) for part, one in trained),
        optimizer=_state(stage, [(divided.own(one), part.size, one.count) for part, one in trained]),
        gathered={role: run for role, (run, _) in come.items()} if kind == "fsdp2" else None,
        gathered_again=come[methods()[stage.method].trained][1],
        reduced=sum(divided.together(one, _FLOAT32 if mixed else part.size) for part, one in trained)
        if kind != "none"
        else None,
        reduced_each_pass=kind == "fsdp2",
    )


def writes(stage: StageConfig, place: Place, trained: int, optimizer: int) -> dict[str, Any]:
    """The files that a process writes of a checkpoint, but for what is small and the first one's, and their bytes.

    Args:
        trained: Bytes of the weights that learn: of its share under FSDP2, elsewhere of all.
        optimizer: Of the optimizer's state.
    """
    kind, rank = stage.distributed.type, place.rank
    stem = "adapter_model" if has_adapter(stage.peft) else "model"
    random = f"rng_state_{rank}.pth" if place.processes > 1 else "rng_state.pth"
    if kind == "fsdp2":
        share = f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        return {"files": [share, f"optimizer/{share}", random], "bytes": trained + optimizer}
    by_layers = ZERO_STAGES.get(kind) == 3 and stem == "model"
    model = [f"{stem}{'-*' if by_layers else ''}.safetensors"] if rank == 0 else []
    if kind in ZERO_STAGES:
        state = f"global_step*/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        return {"files": [*model, state, random], "bytes": optimizer + (trained if model else 0)}
    own = [*model, "optimizer.pt"] if model else []
    return {"files": [*own, random], "bytes": trained + optimizer if model else 0}


@dataclass(frozen=True)
class Divided:
    """Tensors among processes, each by its first dimension, and before that the matrices of layers."""

    place: Place
    matrix: int = 1
    """Processes that divide a matrix."""

    def piece(self, tensor: Tensor, size: int) -> int:
        """Bytes that each process holds."""
        _, width, _ = self._part(tensor)
        return self._most(tensor) * width * tensor.count * size

    def together(self, tensor: Tensor, size: int) -> int:
        """Bytes of all pieces of what is this process's of a matrix."""
        return self.piece(tensor, size) * self._part(tensor)[2]

    def own(self, tensor: Tensor) -> int:
        """Numbers of the tensor itself in the piece of this process; what fills up the last pieces left out."""
        rows, width, pieces = self._part(tensor)
        number = self.place.rank * pieces // self.place.processes
        return min(self._most(tensor), max(0, rows - number * self._most(tensor))) * width * tensor.count

    def _most(self, tensor: Tensor) -> int:
        """Rows of the largest piece."""
        rows, _, pieces = self._part(tensor)
        return math.ceil(rows / pieces)

    def _part(self, tensor: Tensor) -> tuple[int, int, int]:
        """Rows and their width of what is this process's of a matrix, and how many pieces are made of that."""
        rows, width, pieces = tensor.shape[0], math.prod(tensor.shape[1:]), self.place.processes
        if self.matrix == 1 or tensor.module in _OUTSIDE:
            return rows, width, pieces
        if tensor.module in _GIVE:
            rows //= self.matrix
        elif tensor.module in _TAKE and tensor.linear:
            width //= self.matrix
        return rows, width, pieces // self.matrix


def _by_deepspeed(stage: StageConfig, models: Mapping[str, list[Part]], place: Place, mixed: bool) -> Held:
    zero, processes = ZERO_STAGES[stage.distributed.type], place.processes
    trained = [one for parts in models.values() for part in parts if part.learns for one in part.tensors]
    numbers = sum(one.numbers * one.count for one in trained)
    given = stage.distributed.config.get("zero_optimization", {})
    whole, by_parts = given.get("stage3_param_persistence_threshold", _PERSISTENT), _run_by_parts(stage, models)

    def size(part: Part) -> int:
        return 2 if mixed else part.size

    def piece(role: str, one: Tensor) -> int:
        part = math.ceil(one.numbers / processes) if zero == 3 else 0
        small = one.numbers <= whole and role not in by_parts
        return one.count * (part + (one.numbers if zero < 3 or small else 0))

    each = math.ceil(numbers / processes)
    state = _state(stage, [(each, _FLOAT32, 1)])
    return Held(
        weights={
            role: sum(piece(role, one) * size(part) for part in parts for one in part.tensors)
            for role, parts in models.items()
        },
        gradients=each * (2 if mixed else _FLOAT32),  # stage 1 holds all until they are added up
        optimizer=None if state is None else state + _FLOAT32 * each,
        gathered=None,
        gathered_again=0,
        reduced=numbers * (2 if mixed else _FLOAT32),
        reduced_each_pass=zero > 1,
    )


def _run_by_parts(stage: StageConfig, models: Mapping[str, list[Part]]) -> set[str]:
    """Roles of whose models the layers and the head are run, and never the model as one: those that judge completions.
    DeepSpeed (0.19.8) keeps small tensors whole from the second time on that it sees all of a model run."""
    if methods()[stage.method].data_kind != "prompts":
        return set()
    return {role for role, parts in models.items() if not any(part.learns for part in parts)}


def optimizer_of(stage: StageConfig) -> str:
    """transformers' name of the optimizer; its default (5.23) where the stage names none."""
    return str(stage.trainer.get("optim") or "adamw_torch_fused")


def _state(stage: StageConfig, trained: Sequence[tuple[int, int, int]]) -> int | None:
    """What an optimizer keeps of numbers of so many bytes each, in so many tensors, each with its count of steps."""
    name = optimizer_of(stage)
    if "8bit" in name or "4bit" in name:
        return None
    moments = next((count for begin, count in _MOMENTS.items() if name.startswith(begin)), None)
    if not moments:
        return moments
    return sum(moments * numbers * size + _FLOAT32 * count for numbers, size, count in trained)


def models_of(stage: StageConfig, shape: Shape) -> dict[str, list[Part]] | None:
    """The models of a stage's roles."""
    method, adapter = methods()[stage.method], has_adapter(stage.peft)
    models: dict[str, list[Part]] = {}
    for role in method.roles:
        whole = tensors(shape, scores=role in ("reward_model", "value_model"))
        if whole is None:
            return None
        size, learns = _BYTES.get(stage.model.dtype, _FLOAT32), role in (method.trained, "value_model")
        if learns and adapter:
            beside = _adapter(stage.peft, shape, whole)
            if beside is None:
                return None
            beside += [one for one in whole if one.module == "score"]  # which peft trains whole
            models[role] = [Part(whole, size, learns=False), Part(beside, _FLOAT32, learns=True)]
        elif role != "reference" or _has_reference(stage):
            models[role] = [Part(whole, size, learns)]
    return models


def _has_reference(stage: StageConfig) -> bool:
    """Whether the reference is a model of its own while training."""
    if stage.trainer.get("precompute_ref_log_probs") or methods()[stage.method].does_without_reference(stage.trainer):
        return False
    return not has_adapter(stage.peft) or changes_base(stage.peft) is not None


def _come_together(divided: Divided, parts: Sequence[Part], size: int | None) -> tuple[int, int]:
    """Bytes of weights that come together when a model is run, and in its backward pass. Embeddings that are tied to a
    head do for either; others are not looked at in a backward pass, but for a copy that learns.

    Args:
        size: Of a number; None for that of each part.
    """
    found = [(one.module, divided.together(one, size or own)) for one, own in _run(parts)]
    whole = sum(count for _, count in found)
    embeddings = sum(count for module, count in found if module == _EMBEDDINGS)
    if not any(module in HEADS for module, _ in found):
        return whole + embeddings, whole
    copied = any(one.module == _EMBEDDINGS for part in parts[1:] for one in part.tensors)
    return whole, whole - (0 if copied else embeddings)


def _run(parts: Sequence[Part]) -> Iterator[tuple[Tensor, int]]:
    """The tensors that are looked at when a model is run, with the bytes of a number: not those of which there is a
    copy that learns."""
    copied = {one for part in parts[1:] for one in part.tensors}
    for number, part in enumerate(parts):
        yield from ((one, part.size) for one in part.tensors if number or one not in copied)


def _adapter(peft: Mapping[str, Any], shape: Shape, whole: Sequence[Tensor]) -> list[Tensor] | None:
    """Tensors of a low-rank adapter (arXiv:2106.09685), and of what is trained whole beside it."""
    if peft.get("rank_pattern") or peft.get("layers_to_transform") or peft.get("target_parameters"):
        return None
    targets, rank = peft.get("target_modules"), int(peft.get("r", 8))
    found = []
    for one in _linear(whole):
        named = one.module not in HEADS if targets == "all-linear" else matches(one.module, targets or _chosen(shape))
        if named and not matches(one.module, peft.get("exclude_modules")):
            out, into = one.shape
            found += [Tensor(one.module, (rank, into), one.count), Tensor(one.module, (out, rank), one.count)]
            if peft.get("use_dora"):
                found.append(Tensor(one.module, (out,), one.count))
    saved = peft.get("modules_to_save")
    return found + [one for one in whole if saved and matches(one.module, saved)]


def _linear(whole: Sequence[Tensor]) -> Iterator[Tensor]:
    return (one for one in whole if one.linear)


def _chosen(shape: Shape) -> Sequence[str]:
    return _PEFT_CHOOSES.get(shape["model_type"], _QUERIES_AND_VALUES)
