"""How fast is alignctl beside bare TRL? Trains the same pairs with both, in turns, and prints rates, memory and ratios.

    python scripts/bench_preference.py                                # everything, about half an hour on one CPU core
    python scripts/bench_preference.py --method dpo --data harmless   # one comparison
    python scripts/bench_preference.py --method dpo --data harmless --device cuda --model 1b --max-length 4096

Four contestants train one epoch over the same rows, each in a process of its own that waits while another one works:
the bare trainer of TRL as it comes, the same with rows grouped by length and the reference's log-probabilities computed
beforehand (its best), and alignctl's trainer with either settings. alignctl's has its callbacks on, as in a stage; a
fifth contestant, with them off, and a clock around each of them say what they cost. They take turns of a few steps, so
a machine whose speed drifts drifts for all of them, and each ratio is of the same batches. The first turn is a warm-up.

Rows are hh-rlhf's harmless-base and helpful-base, from the folder named by ALIGNCTL_SHARED or from the Hub, and a made
set whose pairs share no prompt and whose rows are all of one length: nothing for the engine to gain.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("dpo", "reward", "kto", "sft")
DATA = ("harmless", "helpful", "unshared")
# Llamas with random weights: layers, width, inner width, heads, heads of keys and values.
SHAPES = {"small": (6, 256, 688, 4, 4), "1b": (16, 2048, 8192, 32, 8)}
GROUPED = {"train_sampling_strategy": "group_by_length"}
TRL_BEST, SAME_SETTINGS = "TRL, its best", "alignctl, the same settings"
CONTESTANTS = ("TRL", TRL_BEST, "alignctl", SAME_SETTINGS, "alignctl, no callbacks")
UNSHARED_TOKENS = 200
VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--data", choices=DATA, nargs="+", default=DATA)
    parser.add_argument("--contestant", choices=CONTESTANTS, nargs="+", default=CONTESTANTS)
    parser.add_argument("--rows", type=int, default=64, help="pairs, or other rows, of the epoch")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--turn", type=int, default=1, help="steps of a turn")
    parser.add_argument("--max-length", type=int, default=512, help="tokens, prompt and completion")
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train(arguments)
        return
    results = []
    print(describe_machine(arguments), flush=True)
    for method in arguments.method:
        for data in arguments.data:
            result = compare(arguments, method, data)
            results.append(result)
            print(table(result), flush=True)
    if arguments.json:
        content = {"machine": describe_machine(arguments), "results": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe_machine(arguments: argparse.Namespace) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    return (
        f"{_processor()}, {arguments.threads} thread(s), {arguments.device}, Python {platform.python_version()}, "
        f"{packages}; model {arguments.model}, batches of {arguments.batch}, at most {arguments.max_length} tokens"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# The parent: lets its children take turns.


def compare(arguments: argparse.Namespace, method: str, data: str) -> dict[str, Any]:
    """Trains every contestant and returns what each measured, and the ratios."""
    children: dict[str, subprocess.Popen[str]] = {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.contestant}
    try:
        for name in arguments.contestant:
            children[name] = _start(arguments, method, data, name)
        for name, child in children.items():
            if not child.stdout.readline():
                raise SystemExit(f"`{name}` did not start: exit code {child.wait()}")
        while children:
            for name, child in list(children.items()):
                answer = _ask(child)
                if "done" in answer:
                    turns[name].append(answer)
                    child.wait()
                    del children[name]
                else:
                    turns[name].append(answer)
    finally:
        for child in children.values():
            child.kill()
    measured = {name: _summary(answers) for name, answers in turns.items()}
    return {"method": method, "data": data, "measured": measured, "ratios": _ratios(measured)}


def _start(arguments: argparse.Namespace, method: str, data: str, name: str) -> subprocess.Popen[str]:
    threads = str(arguments.threads)
    options = ("rows", "batch", "turn", "max_length", "model", "device", "threads")
    values = [word for key in options for word in (f"--{key.replace('_', '-')}", str(getattr(arguments, key)))]
    command = [sys.executable, __file__, "--child", name, "--method", method, "--data", data, *values]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(child: subprocess.Popen[str]) -> dict[str, Any]:
    child.stdin.write("go\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"a contestant failed with exit code {child.wait()}")
    return json.loads(line)


def _summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    *turns, end = answers
    steps = len(end["losses"]) / len(turns)  # of a turn
    counted = turns[1:]  # the first is the warm-up
    seconds = sum(turn["seconds"] for turn in counted)
    rows_per_s = sum(turn["rows"] for turn in counted) / seconds
    return {
        "rows_per_s": rows_per_s,
        "tokens_per_s": sum(turn["tokens"] for turn in counted) / seconds,
        "mfu": rows_per_s / end["rows_per_s_at_full_rate"],
        "callbacks_share": end["callbacks_s_per_step"] * len(counted) * steps / seconds,
        "turns_s": [turn["seconds"] for turn in counted],
        **{key: end[key] for key in ("peak_mib", "losses", "attention", "useful_tokens_per_row")},
    }


def _ratios(measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of speed, alignctl's over TRL's, turn by turn on the same batches, and of peak memory."""
    found = []
    pairs = (
        ("alignctl", "TRL", True),
        (SAME_SETTINGS, TRL_BEST, True),
        ("alignctl", TRL_BEST, False),
        ("alignctl", "alignctl, no callbacks", True),
    )
    for ours, theirs, same_batches in pairs:
        if ours not in measured or theirs not in measured:
            continue
        a, b = measured[ours], measured[theirs]
        speed = [b_s / a_s for a_s, b_s in zip(a["turns_s"], b["turns_s"], strict=True)]
        found.append(
            {
                "of": ours,
                "to": theirs,
                "epoch": a["rows_per_s"] / b["rows_per_s"],
                "median": statistics.median(speed) if same_batches else None,
                "min": min(speed) if same_batches else None,
                "max": max(speed) if same_batches else None,
                "memory": a["peak_mib"] / b["peak_mib"],
                "largest_loss_difference": max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))
                if same_batches
                else None,
            }
        )
    return found


def table(result: dict[str, Any]) -> str:
    lines = [f"\n{result['method']} on {result['data']}"]
    lines.append(f"  {'':28} {'rows/s':>8} {'tokens/s':>9} {'peak MiB':>9} {'MFU':>6}")
    for name, one in result["measured"].items():
        attention = f"  ({one['attention']})" if one["attention"] else ""
        rates = f"{one['rows_per_s']:8.2f} {one['tokens_per_s']:9.0f} {one['peak_mib']:9.0f}"
        share = f"  callbacks take {one['callbacks_share']:.2%}" if one["callbacks_share"] else ""
        lines.append(f"  {name:28} {rates} {one['mfu']:6.1%}{attention}{share}")
    for ratio in result["ratios"]:
        speed = f"{ratio['epoch']:.2f} times the speed"
        if ratio["median"] is not None:
            speed += f" (by turns: median {ratio['median']:.2f}, {ratio['min']:.2f} to {ratio['max']:.2f})"
            speed += f", losses within {ratio['largest_loss_difference']:.1e}"
        lines.append(f"  {ratio['of']} : {ratio['to']} = {speed}, {ratio['memory']:.2f} of the memory")
    return "\n".join(lines)


# A child: trains, and answers "go" with what a turn took.


def train(arguments: argparse.Namespace) -> None:
    """Trains one contestant; the parent says when it may go on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(arguments.threads)
    (method,), (data,) = arguments.method, arguments.data

    class TakesTurns(TrainerCallback):
        """A turn ends where the next begins: after the last step's log, with the next batch at hand."""

        def __init__(self) -> None:
            self.losses: list[float] = []
            self.tokens = self.tokens_before = 0.0
            self.began: float | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % arguments.turn == 0:
                self.end_turn()
                sys.stdin.readline()
                self.began = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])
                self.tokens = logs["num_tokens"]

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.end_turn()

        def end_turn(self) -> None:
            if self.began is None:
                return
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.began
            tokens, self.tokens_before = self.tokens - self.tokens_before, self.tokens
            turn = {"seconds": seconds, "rows": arguments.turn * arguments.batch, "tokens": tokens}
            print(json.dumps(turn), file=answers, flush=True)

    turns, spent = TakesTurns(), [0.0]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(arguments, method, data, folder)
        if arguments.child in ("alignctl", SAME_SETTINGS):
            for callback in callbacks(method, folder):
                trainer.add_callback(timed(callback, spent))
        trainer.add_callback(turns)
        print("ready", file=answers, flush=True)
        trainer.train()
    sys.stdin.readline()
    gpu = arguments.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    end = {
        "done": True,
        "peak_mib": peak / 2**20,
        "losses": turns.losses,
        "callbacks_s_per_step": spent[0] / trainer.state.global_step,
        "attention": getattr(trainer.accelerator.unwrap_model(trainer.model), "packed_attention", None),
    }
    print(json.dumps(end | compute(trainer, arguments, method)), file=answers, flush=True)


def build(arguments: argparse.Namespace, method: str, data: str, folder: str) -> Any:
    """The trainer of a contestant, with a model whose weights are the same for all."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    layers, width, inner, heads, key_heads = SHAPES[arguments.model]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=8192,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, num_labels=1,
    )  # fmt: skip
    gpu = arguments.device == "cuda"

    def model() -> Any:
        torch.manual_seed(0)
        model_class = LlamaForSequenceClassification if method == "reward" else LlamaForCausalLM
        with torch.device(arguments.device):
            made = model_class(copy.deepcopy(config))
        return made.to(torch.bfloat16) if gpu else made

    ours, best = arguments.child.startswith("alignctl"), arguments.child in (TRL_BEST, SAME_SETTINGS)
    settings: dict[str, Any] = {}
    if best and method != "kto":  # whose batches have to stay in order
        settings |= GROUPED
    if best and method in ("dpo", "kto"):
        settings["precompute_ref_log_probs"] = True
    names = {"dpo": "DPO", "reward": "Reward", "kto": "KTO", "sft": "SFT"}
    if ours:
        from alignctl.methods.registry import methods, resolve

        trainer_class, config_class = resolve(methods()[method].trainer), resolve(methods()[method].config_class)
    else:
        trainer_class, config_class = getattr(trl, f"{names[method]}Trainer"), getattr(trl, f"{names[method]}Config")
        if best and method != "kto":
            from alignctl.trainers.base.on_engine import ByLength

            class Grouped(trainer_class):  # TRL finds no lengths in rows of pairs
                def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                    return ByLength(train_dataset, self.args.train_batch_size, self.args.seed)

            trainer_class = Grouped
    if method == "kto":
        settings |= {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    args = config_class(
        output_dir=folder, per_device_train_batch_size=arguments.batch, max_length=arguments.max_length, bf16=gpu,
        use_cpu=not gpu, gradient_checkpointing=False, logging_steps=1, report_to="none", save_strategy="no",
        learning_rate=1e-6, lr_scheduler_type="constant", disable_tqdm=True, num_train_epochs=1, **settings,
    )  # fmt: skip
    data_set = Dataset.from_list(rows_of(arguments, method, data, tokenizer))
    if method == "kto" and not ours:
        data_set = data_set.shuffle(seed=args.seed)  # as alignctl's trainer does
    roles = {"ref_model": model()} if method in ("dpo", "kto") else {}
    return trainer_class(model=model(), args=args, train_dataset=data_set, processing_class=tokenizer, **roles)


def compute(trainer: Any, arguments: argparse.Namespace, method: str) -> dict[str, float]:
    """What the useful part of a row costs, and what the machine could do.

    Useful tokens are those of a row without padding and with its prompt counted once. A token costs two operations for
    each weight of the layers forward and four backward, and two more under a reference; head and attention, which
    depend on the rows, are left out.
    """
    import torch

    from alignctl.engine.layout import pack_rows

    batches = list(trainer.get_train_dataloader())
    blocks = 2 if method in ("dpo", "reward") else 1
    tokens = sum(pack_rows(b["input_ids"], b["attention_mask"], blocks).input_ids.numel() for b in batches)
    layers = trainer.accelerator.unwrap_model(trainer.model).base_model.layers
    weights = sum(parameter.numel() for parameter in layers.parameters())
    passes = 3 + (method == "kto")  # forward, twice that backward, and KTO's estimate of the KL divergence
    if method in ("dpo", "kto") and not trainer.precompute_ref_logps:
        passes += 1 + (method == "kto")
    gpu = arguments.device == "cuda"
    size = 8192 if gpu else 2048
    square = torch.randn(size, size, device=arguments.device, dtype=torch.bfloat16 if gpu else torch.float32)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        square @ square
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    operations_per_row = 2 * passes * weights * tokens / arguments.rows
    return {
        "useful_tokens_per_row": tokens / arguments.rows,
        "rows_per_s_at_full_rate": 2 * size**3 / best / operations_per_row,
    }


def callbacks(method: str, folder: str) -> list[Any]:
    """What a stage puts around a step."""
    from alignctl.methods.registry import methods
    from alignctl.monitor.callbacks import MetricsFile, ProgressFile, StopOnRequest
    from alignctl.monitor.heartbeat import Heartbeat
    from alignctl.monitor.stopping import StopSignal
    from alignctl.run.paths import StagePaths

    paths = StagePaths(Path(folder))
    progress = ProgressFile(paths, methods()[method].key_metrics, Heartbeat(paths, 0))
    return [MetricsFile(paths), progress, StopOnRequest(StopSignal())]


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


def make_tokenizer() -> Any:
    """Byte-level BPE learnt from hh-rlhf itself, the same for all contestants."""
    from alignctl.models.tokenizer import train_tokenizer

    return train_tokenizer((line["chosen"] for data in ("harmless", "helpful") for line in hh_lines(data)), VOCABULARY)


def hh_lines(data: str) -> list[dict[str, str]]:
    """The first rows of a part of hh-rlhf."""
    file = shared(f"preference/hh_{data}_base/train.jsonl")
    if file is not None:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    from datasets import load_dataset

    return list(load_dataset("Anthropic/hh-rlhf", data_dir=f"{data}-base", split="train[:2000]"))


def shared(path: str) -> Path | None:
    found = Path(os.environ.get("ALIGNCTL_SHARED", ROOT.parent / "shared"), "data", path)
    return found if found.exists() else None


def rows_of(arguments: argparse.Namespace, method: str, data: str, tokenizer: Any) -> list[dict[str, Any]]:
    pairs = unshared_pairs(arguments, tokenizer) if data == "unshared" else real_pairs(arguments, data)
    return [as_row(method, pair, wanted=index % 2 == 0) for index, pair in enumerate(pairs)]


def real_pairs(arguments: argparse.Namespace, data: str) -> list[dict[str, str]]:
    """The first rows of hh-rlhf whose completions differ from the last turn on and that need not be cut."""
    pairs = []
    for line in hh_lines(data):
        (prompt, mark, chosen), (same, _, rejected) = (
            line[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")
        )
        fits = max(map(len, (line["chosen"], line["rejected"]))) < 3 * arguments.max_length  # a token is longer
        if prompt == same and fits and chosen.strip() and rejected.strip():
            pairs.append({"prompt": prompt + mark, "chosen": chosen, "rejected": rejected})
        if len(pairs) == arguments.rows:
            break
    return pairs


def as_row(method: str, pair: dict[str, Any], wanted: bool) -> dict[str, Any]:
    if method in ("dpo", "reward"):
        return pair
    row = {"prompt": pair["prompt"], "completion": pair["chosen" if wanted or method == "sft" else "rejected"]}
    return row | {"label": wanted} if method == "kto" else row


def unshared_pairs(arguments: argparse.Namespace, tokenizer: Any) -> list[dict[str, str]]:
    """Rows of one length whose prompts are one word, and of pairs a different one for each completion."""
    import random

    random.seed(0)
    words = sorted(
        word.replace("\u0120", " ") for word in tokenizer.get_vocab() if re.fullmatch("\u0120[a-z]{5}", word)
    )

    def text() -> str:
        return "".join(random.choice(words) for _ in range(UNSHARED_TOKENS))

    return [{"prompt": random.choice(words), "chosen": text(), "rejected": text()} for _ in range(arguments.rows)]


if __name__ == "__main__":
    main()
