"""How fast are alignctl's GRPO and RLOO beside TRL's? Trains the same model on the same prompts with both, in turns.

    python scripts/bench_rl.py                              # everything, some minutes on one CPU core
    python scripts/bench_rl.py --method grpo --part update  # one comparison
    python scripts/bench_rl.py --json measured.json

A Llama of 6 layers with random weights (width 256, vocabulary 8,192), prompts of 256 tokens and 8 completions of 64
tokens to each; the settings of both are TRL's defaults. Of two parts each is measured by itself:

- `update`: the completions are put in, the same ones for both, and what is measured is all that follows: scoring, the
  log-probabilities of policy and reference that a method needs, and the optimizer step. That both do the same shows in
  the norms of their gradients.
- `step`: each draws its own completions, as it does while it trains, with transformers: what vLLM would do is left out.

Every contestant is a process of its own, and the two of a comparison take turns of one step; the first is a warm-up.
Times are CPU seconds on a CPU, so that other work on the machine counts little, and wall time on a GPU. Memory is the
most that a process held, less what it held once everything was imported; on a GPU what torch allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_preference import describe_machine
from bench_rows import VOCABULARY, make_tokenizer

METHODS, PARTS, CONTESTANTS = ("grpo", "rloo"), ("update", "step"), ("TRL", "alignctl")
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
SHAPES = {"tiny": (2, 64, 2), "small": (6, 256, 4)}
"""Layers, width and heads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--prompts", type=int, default=1, help="of a step")
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--turns", type=int, default=8, help="steps of each contestant, the warm-up included")
    parser.add_argument("--device", choices=tuple(DTYPES), default="cpu")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train(arguments)
        return
    machine = describe_machine(arguments.device, threads=1)
    print(machine, flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        make_model(arguments, arguments.folder)
        for method in arguments.method:
            for part in arguments.part:
                results.append(compare(arguments, method, part))
                print(table(results[-1]), flush=True)
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "child", "folder")}
        content = {"machine": machine, "settings": settings, "results": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_model(arguments: argparse.Namespace, folder: Path) -> None:
    """Saves a Llama with random weights and a tokenizer whose words are a token each: TRL loads its reference anew."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, heads = SHAPES[arguments.model]
    tokenizer = make_tokenizer("long")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, DTYPES[arguments.device])).save_pretrained(folder)


def compare(arguments: argparse.Namespace, method: str, part: str) -> dict[str, Any]:
    """What each contestant measured, and alignctl's speed and memory over TRL's."""
    options = ("model", "prompts", "prompt_length", "generations", "length", "turns", "device", "folder")
    words = [word for key in options for word in (f"--{key.replace('_', '-')}", str(getattr(arguments, key)))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    children: dict[str, subprocess.Popen[str]] = {}
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    try:
        for name in CONTESTANTS:
            children[name] = subprocess.Popen(
                [sys.executable, __file__, "--child", name, "--method", method, "--part", part, *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip
        for _ in range(arguments.turns):
            for name, child in children.items():
                child.stdin.write("go\n")
                child.stdin.flush()
                line = child.stdout.readline()
                if not line:
                    raise SystemExit(f"`{name}` failed with exit code {child.wait()}")
                answers[name].append(json.loads(line))
        for child in children.values():  # has nothing left to train, and removes its folder
            child.stdin.close()
            child.wait()
    finally:
        for child in children.values():
            child.kill()
    return {"method": method, "part": part} | summary(answers, arguments.prompts * arguments.generations)


def summary(answers: dict[str, list[dict[str, float]]], completions: int) -> dict[str, Any]:
    """The speed is the median of that of each turn but the first.

    Args:
        completions: Of a step.
    """
    measured = {
        name: {
            "turns_s": [turn["seconds"] for turn in turns[1:]],
            "completions_per_s": completions / statistics.median(turn["seconds"] for turn in turns[1:]),
            "grad_norms": [turn["grad_norm"] for turn in turns],
            "memory_mib": turns[-1]["memory_mib"],
        }
        for name, turns in answers.items()
    }
    theirs, ours = (measured[name] for name in CONTESTANTS)
    speeds = [b / a for a, b in zip(ours["turns_s"], theirs["turns_s"], strict=True)]
    norms = zip(ours["grad_norms"], theirs["grad_norms"], strict=True)
    return {
        "measured": measured, "speed": statistics.median(speeds), "speed_min": min(speeds), "speed_max": max(speeds),
        "memory": ours["memory_mib"] / theirs["memory_mib"],
        "largest_norm_difference": max(abs(a - b) / b for a, b in norms),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [f"\n{result['method']}, {result['part']:26} {'completions/s':>14} {'s a turn':>9} {'MiB':>7}"]
    for name, one in result["measured"].items():
        seconds = statistics.median(one["turns_s"])
        lines.append(f"  {name:30} {one['completions_per_s']:14.2f} {seconds:9.2f} {one['memory_mib']:7.0f}")
    said = f", norms of gradients within {result['largest_norm_difference']:.1e}" if result["part"] == "update" else ""
    lines.append(
        f"  {result['speed']:.2f} times the speed ({result['speed_min']:.2f} to {result['speed_max']:.2f}), "
        f"{result['memory']:.2f} of the memory{said}"
    )
    return "\n".join(lines)


# A contestant


def train(arguments: argparse.Namespace) -> None:
    """Trains; the parent says when the next step may be made."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(1)
    gpu = arguments.device == "cuda"
    build = prepare_trl(arguments) if arguments.child == "TRL" else prepare_ours(arguments)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if gpu else time.process_time()

    class TakesTurns(TrainerCallback):
        """A turn is over when its step was logged."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            sys.stdin.readline()
            self.began = now()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "grad_norm" not in logs:
                return
            seconds = now() - self.began
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - imported
            if gpu:
                memory = torch.cuda.max_memory_allocated() / 2**20
                torch.cuda.empty_cache()  # for the other contestant
            answer = {"seconds": seconds, "memory_mib": memory, "grad_norm": float(logs["grad_norm"])}
            print(json.dumps(answer), file=answers, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder)
        trainer.add_callback(TakesTurns())
        trainer.train()


def words(count: int, seed: str) -> str:
    """So many tokens."""
    return " ".join(f"w{number}" for number in random.Random(seed).choices(range(VOCABULARY - 8), k=count))


def rows(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Those of a step, which every step has again."""
    return [{"prompt": words(arguments.prompt_length, str(number))} for number in range(arguments.prompts)]


def completions_to(prompts: list[str], arguments: argparse.Namespace) -> list[str]:
    """What is put in: other words to each prompt, and each time that it stands there."""
    return [
        words(arguments.length, f"{prompt} {place % arguments.generations}") for place, prompt in enumerate(prompts)
    ]


def odd(completions: list[str], **others: Any) -> list[float]:
    """The reward: the part of the words whose number is odd."""
    return [sum(int(word[1:]) % 2 for word in text.split()) / 64 for text in completions]


def settings(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": f"{folder}/out", "num_generations": arguments.generations,
        "per_device_train_batch_size": arguments.prompts * arguments.generations,
        "max_steps": arguments.turns, "learning_rate": 1e-6, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": arguments.device == "cpu", "bf16": False, "disable_tqdm": True,
    }  # fmt: skip


def load(arguments: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=DTYPES[arguments.device])


def prepare_trl(arguments: argparse.Namespace) -> Any:
    """Imports what is needed, and returns what builds the trainer."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    (method,), (part,) = arguments.method, arguments.part
    trainer_class, config_class = (getattr(trl, f"{method.upper()}{kind}") for kind in ("Trainer", "Config"))

    class PutIn(trainer_class):
        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            texts = completions_to(prompts, arguments)
            prompt_ids, ids = (self.processing_class(text=some)["input_ids"] for some in (prompts, texts))
            return (prompt_ids, ids, texts) if method == "rloo" else (prompt_ids, ids, None, texts, None, {}, None, [])

    def build(folder: str) -> Any:
        return (PutIn if part == "update" else trainer_class)(
            model=load(arguments), reward_funcs=odd, train_dataset=Dataset.from_list(rows(arguments)),
            args=config_class(
                max_completion_length=arguments.length, gradient_checkpointing=False, **settings(arguments, folder)
            ),
            processing_class=AutoTokenizer.from_pretrained(arguments.folder),
        )  # fmt: skip

    return build


def prepare_ours(arguments: argparse.Namespace) -> Any:
    """Imports what is needed, and returns what builds the trainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from alignctl.methods.registry import methods, resolve
    from alignctl.rollout.drawing import Drawn

    (name,), (part,) = arguments.method, arguments.part
    trainer_class, config_class = (resolve(one) for one in (methods()[name].trainer, methods()[name].config_class))

    class PutIn(trainer_class):
        def _roll_out(self, inputs: dict[str, Any], drawn: Drawn | None = None) -> Any:
            texts = completions_to(inputs["prompt"], arguments)
            return super()._roll_out(
                inputs, Drawn(self.processing_class(text=texts)["input_ids"], [False] * len(texts))
            )

    def build(folder: str) -> Any:
        args = config_class(
            response_length=arguments.length, max_prompt_length=arguments.prompt_length, generation="transformers",
            reward_funcs=[f"{__file__}:odd"], **settings(arguments, folder),
        )  # fmt: skip
        return (PutIn if part == "update" else trainer_class)(
            model=load(arguments), args=args, train_dataset=Dataset.from_list(rows(arguments)),
            processing_class=AutoTokenizer.from_pretrained(arguments.folder),
            ref_model=load(arguments) if args.beta else None,
        )  # fmt: skip

    return build


if __name__ == "__main__":
    main()
