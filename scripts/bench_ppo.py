"""How fast is alignctl's PPO beside TRL's last one? Trains the same models on the same prompts with both, in turns.

    python scripts/bench_ppo.py

TRL removed its PPOTrainer in 1.13; the script installs TRL 1.12 by itself into a folder of its own (from the package
index) and runs it with the torch and transformers that are here. Policy, reference, value model and reward model are
stories260K (a Llama of 260,000 parameters, given with --model) and the prompts are of its kind; both draw completions
of the same length and go through each rollout the same number of times. The contestants take turns of one rollout, each
in a process of its own, on one thread; the first turn is a warm-up.

Stories hardly ever end within 64 tokens. With `--stop .` a full stop ends a completion, as answers end: after 12 tokens
or so.

The shared base trains adapters (LoRA, r=8) where the others train all weights; its reward model is an adapter that has
no effect yet, with the head of the others', so all are scored alike.

A model of that size hardly counts beside what Python and its packages take. `--hidden 768 --layers 12` takes a Llama
of that shape with random weights instead, for the memory of models. With `--device cuda` weights are bfloat16 and the
memory is what torch allocates on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRL = "1.12.0"
CONTESTANTS = {  # and the `sharing` of ours
    "TRL": None,
    "alignctl": "separate",
    "alignctl, shared value": "shared_value",
    "alignctl, shared base": "shared_base",
}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shared() / "models" / "stories260K")
    parser.add_argument("--hidden", type=int, help="width of a model with random weights, instead of --model")
    parser.add_argument("--layers", type=int, default=12, help="of that model")
    parser.add_argument("--vocabulary", type=int, help="of that model, in tokens; as the tokenizer's where not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--turns", type=int, default=8, help="rollouts of each contestant, the warm-up included")
    parser.add_argument("--batch", type=int, default=32, help="completions of a rollout")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="new tokens of a completion")
    parser.add_argument("--stop", help="token that ends a completion, besides the end of a text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--reward-model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"trl=={TRL}"]
        subprocess.run(install, check=True)
        if arguments.hidden:
            arguments.model = make_model(arguments, Path(folder, "model"))
        arguments.reward_model = make_reward_model(arguments, Path(folder, "reward"))
        result = compare(arguments, folder)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def shared() -> Path:
    return Path(os.environ.get("ALIGNCTL_SHARED", ROOT.parent / "shared"), "data")


def make_model(arguments: argparse.Namespace, folder: Path) -> Path:
    """Saves a Llama with random weights and the tokenizer of the model that was given."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(folder)
    given = LlamaConfig.from_pretrained(arguments.model)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary or given.vocab_size, hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64, pad_token_id=given.pad_token_id, bos_token_id=given.bos_token_id,
        eos_token_id=given.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, DTYPES[arguments.device]))
    print(f"{model.num_parameters() / 1e6:.1f} million parameters", file=sys.stderr)
    model.save_pretrained(folder)
    return folder


def make_reward_model(arguments: argparse.Namespace, folder: Path) -> Path:
    """Saves a reward model with a random head, and in `adapter/` the same as an adapter over the model."""
    from peft import LoraConfig, get_peft_model

    reward_model = load(arguments.model, arguments.device, scores=True)
    reward_model.save_pretrained(folder)
    get_peft_model(reward_model, LoraConfig(task_type="SEQ_CLS", **LORA)).save_pretrained(folder / "adapter")
    return folder


def compare(arguments: argparse.Namespace, trl: str) -> dict[str, Any]:
    """What each contestant measured: seconds of every turn but the first, mean reward of each, peak memory."""
    children: dict[str, subprocess.Popen[str]] = {}
    measured: dict[str, dict[str, Any]] = {name: {"turns_s": [], "rewards": []} for name in CONTESTANTS}
    try:
        for name in CONTESTANTS:
            options = ("model", "reward_model", "turns", "batch", "epochs", "length", "device")
            words = [word for key in options for word in (f"--{key.replace('_', '-')}", str(getattr(arguments, key)))]
            words += ["--stop", arguments.stop] if arguments.stop else []
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
            if name == "TRL":
                environment["PYTHONPATH"] = os.pathsep.join([trl, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
            children[name] = subprocess.Popen(
                [sys.executable, __file__, "--child", name, *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip
        for name, child in children.items():
            if not child.stdout.readline():
                raise SystemExit(f"`{name}` did not start: exit code {child.wait()}")
        for turn in range(arguments.turns):
            for name, child in children.items():
                child.stdin.write("go\n")
                child.stdin.flush()
                line = child.stdout.readline()
                if not line:
                    raise SystemExit(f"`{name}` failed with exit code {child.wait()}")
                answer = json.loads(line)
                if turn:
                    measured[name]["turns_s"].append(answer["seconds"])
                measured[name]["rewards"].append(answer["reward"])
                measured[name]["peak_mib"] = answer["peak_mib"]
        for child in children.values():  # has nothing left to train, and removes its folder
            child.stdin.close()
            child.wait()
    finally:
        for child in children.values():
            child.kill()
    for one in measured.values():
        one["episodes_per_s"] = arguments.batch / statistics.median(one["turns_s"])
    return {"settings": {key: str(value) for key, value in vars(arguments).items()}, "measured": measured}


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':24} {'episodes/s':>10} {'peak MiB':>9}  mean reward of the first and the last two rollouts"]
    for name, one in result["measured"].items():
        first, last = statistics.fmean(one["rewards"][:2]), statistics.fmean(one["rewards"][-2:])
        lines.append(f"{name:24} {one['episodes_per_s']:10.2f} {one['peak_mib']:9.0f}  {first:.3f} {last:.3f}")
    theirs = result["measured"]["TRL"]
    for name in list(CONTESTANTS)[1:]:
        ours = result["measured"][name]
        ratios = [b / a for a, b in zip(ours["turns_s"], theirs["turns_s"], strict=True)]
        lines.append(
            f"{name} : TRL = {statistics.median(ratios):.2f} times the speed ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{ours['peak_mib'] / theirs['peak_mib']:.2f} of the memory"
        )
    return "\n".join(lines)


def train(arguments: argparse.Namespace) -> None:
    """Trains one contestant; the parent says when it may draw its next rollout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(1)
    torch.manual_seed(0)

    class TakesTurns(TrainerCallback):
        """A turn is over when the step has ended and was logged, in whichever order."""

        def __init__(self) -> None:
            self.reward: float | None = None
            self.ended = False

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.wait()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            reward = logs.get("objective/scores", logs.get("score"))
            if reward is not None:
                self.reward = float(reward)
                self.end()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended = True
            self.end()

        def end(self) -> None:
            if self.ended and self.reward is not None:
                seconds = time.perf_counter() - self.began
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                if arguments.device == "cuda":
                    torch.cuda.empty_cache()  # for the next contestant
                    peak = torch.cuda.max_memory_allocated() / 2**20
                answer = {"seconds": seconds, "reward": self.reward, "peak_mib": peak}
                print(json.dumps(answer), file=answers, flush=True)
                self.ended, self.reward = False, None
                self.wait()

        def wait(self) -> None:
            sys.stdin.readline()
            self.began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        trainer = (build_trl if arguments.child == "TRL" else build_ours)(arguments, folder)
        trainer.add_callback(TakesTurns())
        print("ready", file=answers, flush=True)
        trainer.train()


OPENINGS = ("Once upon a time", "One day a little", "There was a small", "Tom and Lily went to", "The dog saw a big")
NAMES = ("girl", "boy", "cat", "bird", "bear", "fox", "duck", "frog")


def prompts(count: int) -> list[str]:
    """Beginnings of small stories."""
    return [f"{OPENINGS[i % 5]} {NAMES[i % 8]} and" for i in range(count)]


def load(path: Path, device: str, scores: bool = False) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    if scores:
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=DTYPES[device])
    return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[device])


def build_trl(arguments: argparse.Namespace, folder: str) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    device = arguments.device
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    rows = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts(arguments.turns * arguments.batch)]
    args = PPOConfig(
        output_dir=folder, per_device_train_batch_size=arguments.batch, gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=arguments.epochs, total_episodes=arguments.turns * arguments.batch,
        response_length=arguments.length, local_rollout_forward_batch_size=arguments.batch, num_sample_generations=0,
        **(  # it draws until the last completion has ended, and cuts what follows the stop token
            {"stop_token_id": stop_token(tokenizer, arguments.stop)} if arguments.stop else {"stop_token": "eos"}
        ),
        **common(device),
    )  # fmt: skip
    return PPOTrainer(
        args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:1]), model=load(arguments.model, device),
        ref_model=load(arguments.model, device), reward_model=load(arguments.reward_model, device, scores=True),
        value_model=load(arguments.model, device, scores=True),
    )  # fmt: skip


def build_ours(arguments: argparse.Namespace, folder: str) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from alignctl.models.adapters import load_score_adapter
    from alignctl.trainers.on_policy.ppo.config import PPOConfig
    from alignctl.trainers.on_policy.ppo.trainer import PPOTrainer

    device = arguments.device
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = [{"prompt": prompt} for prompt in prompts(arguments.turns * arguments.batch)]
    args = PPOConfig(
        output_dir=f"{folder}/out", per_device_train_batch_size=arguments.batch, num_mini_batches=1,
        num_ppo_epochs=arguments.epochs, num_train_epochs=1, response_length=arguments.length, max_prompt_length=64,
        sharing=CONTESTANTS[arguments.child], **common(device),
    )  # fmt: skip
    given: dict[str, Any] = {"model": load(arguments.model, device)}
    if arguments.stop:
        ends = [tokenizer.eos_token_id, stop_token(tokenizer, arguments.stop)]
        given["model"].generation_config.eos_token_id = ends
    if args.sharing == "shared_base":
        given["reward_adapter"] = load_score_adapter(str(arguments.reward_model / "adapter"), None)
        given["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **LORA)
    else:
        given["ref_model"] = load(arguments.model, device)
        given["reward_model"] = load(arguments.reward_model, device, scores=True)
    if args.sharing == "separate":
        given["value_model"] = load(arguments.model, device, scores=True)
    return PPOTrainer(args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), **given)


def stop_token(tokenizer: Any, text: str) -> int:
    return tokenizer(text, add_special_tokens=False)["input_ids"][-1]


def common(device: str) -> dict[str, Any]:
    return {
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "temperature": 1.0, "kl_coef": 0.05, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": device == "cpu", "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip


if __name__ == "__main__":
    main()
