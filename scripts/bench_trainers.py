"""One contestant of bench_preference.py, in a process of its own: builds a trainer, trains, and says what a turn took.

It is given its work as JSON, and reads a line before it builds, before each turn and before it sums up; it answers each
with a line of JSON. Whatever else is printed goes to stderr.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_rows import VOCABULARY, make_tokenizer, rows_of

# Of Llamas: layers, width, inner width, heads, heads of keys and values, vocabulary, and whether the head is the
# embeddings.
LLAMA_3 = {
    "1b": (16, 2048, 8192, 32, 8, 128256, True),  # 3.2
    "8b": (32, 4096, 14336, 32, 8, 128256, False),  # 3.1
}
SHAPES = {
    "tiny": (2, 64, 172, 2, 2, VOCABULARY, True),
    "small": (6, 256, 688, 4, 4, VOCABULARY, True),
    **LLAMA_3,
}
# TRL's trainers, by method: the module, and the name before `Trainer` and `Config`.
TRL = {
    "dpo": ("trl", "DPO"), "reward": ("trl", "Reward"), "kto": ("trl", "KTO"), "sft": ("trl", "SFT"),
    "orpo": ("trl.experimental.orpo", "ORPO"), "simpo": ("trl.experimental.cpo", "CPO"),
}  # fmt: skip
_SIMPO = {"beta": 2.0, "gamma_beta_ratio": 0.5}
_SAME = {  # where their defaults differ
    "kto": {"desirable_weight": 1.0, "undesirable_weight": 1.0},
    "orpo": {"beta": 0.1},
}
_OURS = {"simpo": _SIMPO}
_THEIRS = {  # SimPO is a loss of CPO's, whose own part is left out
    "simpo": {
        "loss_type": "simpo", "cpo_alpha": 0.0, "beta": _SIMPO["beta"],
        "simpo_gamma": _SIMPO["gamma_beta_ratio"] * _SIMPO["beta"],
    }
}  # fmt: skip
_REFERENCE = ("dpo", "kto")


@dataclass(frozen=True)
class Work:
    """What is trained, the same for all contestants."""

    method: str
    data: str
    model: str
    peft: str
    """none, lora (conf/peft/lora_attention.yaml) or all-linear (conf/peft/lora.yaml)."""
    rows: int
    batch: int
    accumulation: int
    max_length: int
    length: int
    turn: int
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Contestant:
    """How it is trained."""

    ours: bool
    batches: int | None = None
    """How many batches a step is divided into; None for as many as are asked for."""
    checkpointed: bool | None = None
    """Whether activations are computed again in the backward pass. None: on a CPU not, and on a GPU as TRL's default
    has it, or as a rehearsal on the longest rows finds it, with the tokens of a pass, as in a stage of alignctl."""
    grouped: bool = False
    """Rows grouped by length, and the reference's log-probabilities computed beforehand."""
    packed: bool = False
    """SFT's rows are packed into sequences of the most tokens."""
    callbacks: bool = True
    """With what a stage puts around a step."""
    pass_tokens: int | None = None
    """Of ours, most tokens of a pass; None for the default."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ |= {"TQDM_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    asked = json.loads(sys.argv[1])
    work, contestant = Work(**asked["work"]), Contestant(**asked["contestant"])

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    import torch

    torch.set_num_threads(work.threads)
    turns, spent = turns_of(work, answer), [0.0]
    classes(work.method, contestant)  # imports them
    wait()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found, said = rehearse(work, contestant, f"{folder}/rehearsal")
        trainer = build(work, contestant, folder, found)
        if contestant.ours and contestant.callbacks:
            for callback in callbacks(work.method, folder):
                trainer.add_callback(timed(callback, spent))
        trainer.add_callback(turns)
        answer(built_s=time.perf_counter() - began)
        trainer.train()
    wait()
    gpu = work.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    from alignctl.engine.forward import bare

    model = bare(trainer.accelerator.unwrap_model(trainer.model))
    answer(
        done=True, peak_mib=peak / 2**20, losses=turns.losses,
        callbacks_s_per_step=spent[0] / trainer.state.global_step,
        attention=getattr(model, "packed_attention", None) or model.config._attn_implementation,
        notices=[*getattr(trainer, "notices", []), *said], useful_tokens_per_row=useful_tokens(trainer, work),
        operations_per_token=operations(model, work, contestant), matrix_rate=matrix_rate(work),
    )  # fmt: skip


def wait() -> None:
    """Until this process may go on; it ends with the one that asks."""
    if not sys.stdin.readline():
        raise SystemExit


def turns_of(work: Work, answer: Any) -> Any:
    """A callback that waits for its turn before a step. A turn ends where the next begins: after the last step's log,
    with the next batches at hand."""
    from transformers import TrainerCallback

    class TakesTurns(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.began: tuple[float, float] | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % work.turn == 0:
                self.end_turn()
                wait()
                self.began = time.perf_counter(), time.process_time()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.end_turn()

        def end_turn(self) -> None:
            if self.began is None:
                return
            if work.device == "cuda":
                import torch

                torch.cuda.synchronize()
            seconds, cpu_s = self.began
            answer(seconds=time.perf_counter() - seconds, cpu_s=time.process_time() - cpu_s)

    return TakesTurns()


def rehearse(work: Work, contestant: Contestant, folder: str) -> tuple[dict[str, Any], list[str]]:
    """What a stage of alignctl leaves to its rehearsal, and what is to be said of it: nothing but on a GPU."""
    if not contestant.ours or contestant.checkpointed is not None or work.device == "cpu":
        return {}, []
    import torch

    from alignctl.trainers.base.device import let_go
    from alignctl.trainers.base.fitting import Fitting

    fitting = Fitting(tokens=contestant.pass_tokens is None, checkpointing=True)
    trainer = build(work, contestant, folder, {"max_steps": 1}, longest=True)
    trainer.fitting = fitting
    trainer.train()
    del trainer
    let_go()
    torch.cuda.reset_peak_memory_stats()
    tries = fitting.to_dict().get("tries", [])
    return fitting.found, [f"rehearsal: {one}" for one in tries]


def build(work: Work, contestant: Contestant, folder: str, more: dict[str, Any], longest: bool = False) -> Any:
    """The trainer of a contestant, with a model whose weights are the same for all.

    Args:
        more: Settings besides.
        longest: Takes the longest rows, as many as a step has.
    """
    from datasets import Dataset

    method, gpu = work.method, work.device == "cuda"
    tokenizer = make_tokenizer(work.data)
    trainer_class, config_class = classes(method, contestant)
    step = work.batch * work.accumulation
    batch = work.batch if contestant.batches is None else -(-step // contestant.batches)
    settings: dict[str, Any] = _SAME.get(method, {}) | (_OURS if contestant.ours else _THEIRS).get(method, {})
    if contestant.grouped and method != "kto":  # whose batches have to stay in order
        settings["train_sampling_strategy"] = "group_by_length"
    if contestant.grouped and method in _REFERENCE:
        settings["precompute_ref_log_probs"] = True
    if contestant.packed:
        settings["packing"] = True
    if contestant.pass_tokens:
        settings["pass_tokens"] = contestant.pass_tokens
    if contestant.checkpointed is not None or not gpu:
        name = "activation_checkpointing" if contestant.ours else "gradient_checkpointing"
        settings[name] = bool(contestant.checkpointed)
    if work.peft != "none" and method != "sft":
        settings["disable_dropout"] = False  # the adapters' own
    args = config_class(
        output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=step // batch,
        max_length=work.max_length, bf16=work.dtype == "bfloat16" and gpu, use_cpu=not gpu, logging_steps=1,
        report_to="none", save_strategy="no", learning_rate=1e-6, lr_scheduler_type="constant", disable_tqdm=True,
        num_train_epochs=1, **settings | more,
    )  # fmt: skip
    chosen = rows_of(method, work.data, work.rows, work.max_length, work.length)
    rows = Dataset.from_list(sorted(chosen, key=lambda row: -len(str(row)))[:step] if longest else chosen)
    if method == "kto" and not contestant.ours:
        rows = rows.shuffle(seed=args.seed)  # as alignctl's trainer does
    given: dict[str, Any] = {}
    if contestant.ours:
        given |= kept_batches(method, args)
    if work.peft != "none":
        given["peft_config"] = lora(work)
    elif method in _REFERENCE:
        given["ref_model"] = make_model(work, tokenizer)
    trainer = trainer_class(
        model=make_model(work, tokenizer), args=args, train_dataset=rows, processing_class=tokenizer, **given
    )
    if contestant.packed:  # as many rows a step as the others, about
        args.per_device_train_batch_size = max(1, round(batch * len(trainer.train_dataset) / len(rows)))
    return trainer


def kept_batches(method: str, args: Any) -> dict[str, Any]:
    """As a stage tells the trainer which batches stay together."""
    from alignctl.methods.registry import methods

    mixes_rows = methods()[method].mixes_rows
    reason = mixes_rows(vars(args)) if mixes_rows else None
    return {"keeps_batches": reason} if reason else {}


def classes(method: str, contestant: Contestant) -> tuple[type, type]:
    """Of a trainer and its settings."""
    if contestant.ours:
        from alignctl.methods.registry import methods, resolve

        return resolve(methods()[method].trainer), resolve(methods()[method].config_class)
    from importlib import import_module

    module, name = TRL[method]
    trainer_class, config_class = (getattr(import_module(module), f"{name}{kind}") for kind in ("Trainer", "Config"))
    if not contestant.grouped or method == "kto":
        return trainer_class, config_class
    from alignctl.trainers.base.on_engine import ByLength

    class Grouped(trainer_class):  # TRL finds no lengths in rows of pairs
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return ByLength(train_dataset, size, self.args.seed, lambda: 0)

    return Grouped, config_class


def make_model(work: Work, tokenizer: Any) -> Any:
    """A Llama with random weights, made where it is trained: never all of it in float32 beside them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    layers, width, inner, heads, key_heads, vocabulary, tied = SHAPES[work.model]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied,
        max_position_embeddings=max(8192, work.length), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, work.dtype))
    try:
        with torch.device(work.device):
            model = (LlamaForSequenceClassification if work.method == "reward" else LlamaForCausalLM)(
                copy.deepcopy(config)
            )
    finally:
        torch.set_default_dtype(before)
    return model


def lora(work: Work) -> Any:
    from peft import LoraConfig

    target: Any = "all-linear" if work.peft == "all-linear" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    task = "SEQ_CLS" if work.method == "reward" else "CAUSAL_LM"
    dropout = 0.05 if work.peft == "lora" else 0.0
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=target, task_type=task)


def useful_tokens(trainer: Any, work: Work) -> float | None:
    """Mean tokens of a row without padding and with its prompt counted once; None where a trainer's batches do not show
    it."""
    from alignctl.engine.layout import pack_rows

    blocks = 1 if work.method in ("kto", "sft") else 2
    total = 0
    for batch in trainer.get_train_dataloader():
        if "input_ids" not in batch or "attention_mask" not in batch:
            return None
        total += pack_rows(batch["input_ids"], batch["attention_mask"], blocks).input_ids.numel()
    return total / work.rows


def operations(model: Any, work: Work, contestant: Contestant) -> float:
    """What a useful token costs: two operations for each weight of the layers forward, four backward, or two where the
    weights are frozen and only adapters are trained, and two under a reference; KTO's estimate of the KL divergence is
    another forward pass of both. Head and attention, which depend on the rows, and the adapters themselves are left
    out."""
    weights = sum(
        parameter.numel() for name, parameter in model.base_model.layers.named_parameters() if "lora_" not in name
    )
    kl = work.method == "kto"
    each = 2 + (4 if work.peft == "none" else 2) + 2 * kl
    if work.method in _REFERENCE and not contestant.grouped:
        each += 2 + 2 * kl
    return each * weights


def matrix_rate(work: Work) -> float:
    """Operations a second of this machine in a product of large matrices, the best of some."""
    import torch

    gpu = work.device == "cuda"
    size = 8192 if gpu else 2048
    square = torch.randn(size, size, device=work.device, dtype=getattr(torch, work.dtype))
    best, clock = float("inf"), time.perf_counter if gpu else time.process_time
    for _ in range(10 if gpu else 5):
        began = clock()
        square @ square
        if gpu:
            torch.cuda.synchronize()
        best = min(best, clock() - began)
    return 2 * size**3 / best


def callbacks(method: str, folder: str) -> Iterator[Any]:
    """What a stage puts around a step."""
    from alignctl.methods.registry import methods
    from alignctl.monitor.callbacks import MetricsFile, ProgressFile, StopOnRequest
    from alignctl.monitor.heartbeat import Heartbeat
    from alignctl.monitor.stopping import StopSignal
    from alignctl.run.paths import StagePaths

    paths = StagePaths(Path(folder))
    progress = ProgressFile(paths, methods()[method].key_metrics, Heartbeat(paths, 0))
    yield from (MetricsFile(paths), progress, StopOnRequest(StopSignal()))


def timed(callback: Any, spent: list[float]) -> Any:
    """Adds to `spent`, in seconds, what a callback takes."""

    def clocked(plain: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - began

        return call

    for event in [name for name in dir(callback) if name.startswith("on_")]:
        setattr(callback, event, clocked(getattr(callback, event)))
    return callback


if __name__ == "__main__":
    main()
