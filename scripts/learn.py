"""Does every method learn? Trains each one and measures it on held-out rows; exits with 1 if any does not.

    python scripts/learn.py                    # everything, most of an hour on 2 CPU cores
    python scripts/learn.py --part functions   # one part of it
    python scripts/learn.py --short            # half the epochs, looser limits; no hh-rlhf, no seed but one

On the quickstart world each preference method starts from the same SFT model and is compared with it by the world's own
judge; a reward model is asked which of two answers is chosen. On real pairs (llms_from_scratch and hh-rlhf, from a
folder given with --data) each preference method starts from stories260K, a pretrained Llama of 260,000 parameters, and
has to tell held-out pairs apart better than before. Where lengths differ as much as in hh-rlhf, plain log-probabilities
mostly say which answer is shorter, so there each method is asked by the reward that it trains: DPO, IPO and KTO by the
log-ratio to the reference, which at the start is a coin toss; ORPO and SimPO by the log-probability per token.

PPO is trained on reward functions too, with three seeds each: the mean score of every quarter of a run has to be above
that of the quarter before. On the quickstart world the function is the world's own judge; stories260K, asked the
questions of llms_from_scratch, learns short sentences. And the pipelines with a reward model (`rlhf_quickstart`,
`grpo_quickstart`, `rloo_quickstart`) are run as they are, with three seeds, and with the judge in place of the reward
model: each has to win, and to stay near the model that it started from in every rollout. GRPO has to find out by exact
answers alone that sums are wanted, from a model that answers `7+12=` with the sum, the difference, the larger or the
smaller number.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICKSTARTS = {
    "dpo": "sft_dpo_quickstart",
    "ipo": "sft_ipo_quickstart",
    "kto": "sft_kto_quickstart",
    "orpo": "orpo_quickstart",
    "simpo": "sft_simpo_quickstart",
}
# From an SFT model ORPO needs less than the eight epochs that its recipe gives random weights.
ORPO_AFTER_SFT = ("orpo.learning_rate=1e-3", "orpo.num_train_epochs=2")
# Rates that move 260,000 parameters, found by trying.
REAL = {
    "dpo": ("dpo.learning_rate=2e-3", "dpo.beta=0.05"),
    "ipo": ("ipo.learning_rate=2e-3", "ipo.beta=0.05"),
    "kto": ("kto.learning_rate=1e-3", "kto.beta=0.03"),
    "orpo": ("orpo.learning_rate=2e-3", "orpo.beta=2.0"),
    "simpo": ("simpo.learning_rate=2e-3",),
}
PARTS = ("quickstart", "rlhf", "judge", "addition", "functions", "llms", "hh")
SEEDS = (0, 1, 2)
PIPELINES = {"ppo": "rlhf_quickstart", "grpo": "grpo_quickstart", "rloo": "rloo_quickstart"}
# The judge's rewards are 0 to 1, a reward model's spread wider; GRPO divides both by their deviation.
BY_THE_JUDGE = {"ppo": ("ppo.kl_coef=0.05",), "grpo": (), "rloo": ("rloo.beta=0.1",)}
WINS, NEAR = 0.75, 2.5  # share that they have to win, and nats per completion that they may go away from the start
FEW, MOST = 0.30, 0.80  # right sums, before and after
NUMBERS = range(1, 16)  # with 0 the sum is the difference, too
EDGE = 5  # rollouts at the start and at the end of a run, 80 prompts
PLAIN, PER_TOKEN, LOG_RATIO = "preference_accuracy", "preference_accuracy_per_token", "reward_accuracy"
OWN_REWARD = {"dpo": LOG_RATIO, "ipo": LOG_RATIO, "kto": LOG_RATIO, "orpo": PER_TOKEN, "simpo": PER_TOKEN}


@dataclass(frozen=True)
class Learnt:
    """What one run measured."""

    data: str
    method: str
    metric: str
    before: float | None
    after: float
    limit: float
    """What `after` has to be above."""

    @property
    def passed(self) -> bool:
        return self.after > self.limit

    def __str__(self) -> str:
        before = "" if self.before is None else f"{self.before:.1%}"
        verdict = "learnt" if self.passed else "DID NOT LEARN"
        return (
            f"{self.data:<24} {self.method:<7} {self.metric:<30} {before:>7} {self.after:>7.1%}  "
            f"above {self.limit:.1%}: {verdict}"
        )


@dataclass(frozen=True)
class Rising:
    """Mean scores of a run of PPO, in equal parts one after the other."""

    data: str
    seed: int
    means: list[float]

    @property
    def passed(self) -> bool:
        return all(before < after for before, after in pairwise(self.means))

    def __str__(self) -> str:
        means = " ".join(f"{mean:.3f}" for mean in self.means)
        verdict = "learnt" if self.passed else "DID NOT LEARN"
        return f"{self.data:<24} ppo     seed {self.seed}, mean scores {means}: {verdict}"


@dataclass(frozen=True)
class Won:
    """A method that draws, from an SFT model, on the quickstart world."""

    rewarded_by: str
    method: str
    seed: int
    win_rate: float
    highest_kl: float
    """Of any rollout, nats per completion (k1)."""
    seconds: float

    @property
    def passed(self) -> bool:
        return self.win_rate > WINS and self.highest_kl < NEAR

    def __str__(self) -> str:
        verdict = "learnt" if self.passed else "DID NOT LEARN"
        return (
            f"{self.rewarded_by:<24} {self.method:<7} seed {self.seed}, win rate {self.win_rate:.1%} above "
            f"{WINS:.1%}, KL {self.highest_kl:.2f} below {NEAR:.2f}, {self.seconds:.0f} s: {verdict}"
        )


@dataclass(frozen=True)
class Added:
    """GRPO on sums: the share of answers that are right, in the first rollouts and in the last ones."""

    seed: int
    first: float
    last: float

    @property
    def passed(self) -> bool:
        return self.first < FEW and self.last > MOST

    def __str__(self) -> str:
        verdict = "learnt" if self.passed else "DID NOT LEARN"
        return (
            f"{'addition':<24} grpo    seed {self.seed}, right answers {self.first:.1%} below {FEW:.0%}, then "
            f"{self.last:.1%} above {MOST:.0%}: {verdict}"
        )


Result = Learnt | Rising | Won | Added


def short_sentences(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function: sentences for each ten words."""
    return [10 * sum(text.count(end) for end in ".!?") / max(len(text.split()), 1) for text in completions]


def train(out: Path, *arguments: str) -> dict:
    """Runs a recipe into a folder and returns its summary; the log goes beside it."""
    command = [sys.executable, "-P", "-m", "alignctl", "train", *arguments, f"run_dir={out}", "--json"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}; see {log.name}")
    return json.loads(done.stdout)["stages"]


def quickstart_model(out: Path, short: bool) -> str:
    """The folder of the SFT model that the others start from."""
    sft = ("sft.num_train_epochs=6",) if short else ()
    return train(out / "sft", "recipe=sft_quickstart", "eval.prompts=0", *sft)["sft"]["model"]


def quickstart_world(out: Path, short: bool) -> Iterator[Learnt]:
    """Each method from the same SFT model: wins against it, judged on held-out questions."""
    size = ("eval.prompts=150",) if short else ()
    here = (f"model.path={quickstart_model(out, short)}", "model.scratch=null", *size)
    for method, recipe in QUICKSTARTS.items():
        alone = (f"recipe={recipe}", f"stages=[{method}]", f"{method}.from=null", *here)
        more = ORPO_AFTER_SFT if method == "orpo" else ()
        once = (f"{method}.num_train_epochs=1",) if short else ()
        result = train(out / method, *alone, *more, *once)[method]
        yield Learnt("quickstart", method, "win rate", None, result["win_rate"], 0.65)
    once = ("rm.num_train_epochs=1",) if short else ()
    rm = train(out / "rm", "recipe=sft_rm_quickstart", "stages=[rm]", "rm.from=null", *here, *once)["rm"]
    limit = 0.80 if short else 0.90
    yield Learnt("quickstart", "reward", "accuracy", rm["before"]["accuracy"], rm["after"]["accuracy"], limit)
    for method, recipe in PIPELINES.items():
        alone = (f"recipe={recipe}", f"stages=[{method}]", f"{method}.from=null", *here)
        half = (f"{method}.num_train_epochs=0.5",) if short else ()
        result = train(out / method, *alone, f"{method}.reward_model={rm['model']}", *half)[method]
        yield Learnt("quickstart", method, "win rate", None, result["win_rate"], 0.65 if short else WINS)


def whole_pipelines(out: Path) -> Iterator[Won]:
    for method, recipe in PIPELINES.items():
        for seed in SEEDS:
            yield won("reward model", method, seed, out / recipe / str(seed), f"recipe={recipe}")


def rewarded_by_the_judge(out: Path, quickstart_sft: str) -> Iterator[Won]:
    """Half an epoch each."""
    for method, recipe in PIPELINES.items():
        alone = (
            f"recipe={recipe}", f"stages=[{method}]", f"{method}.from=null", f"{method}.reward_model=null",
            f"model.path={quickstart_sft}", "model.scratch=null", f"{method}.normalize_rewards=none",
            f"{method}.reward_funcs=[alignctl.data.quickstart:reward]", f"{method}.max_steps=112",
        )  # fmt: skip
        for seed in SEEDS:
            yield won("judge", method, seed, out / method / str(seed), *alone, *BY_THE_JUDGE[method])


def won(rewarded_by: str, method: str, seed: int, folder: Path, *arguments: str) -> Won:
    began = time.perf_counter()
    win_rate = train(folder, *arguments, f"seed={seed}")[method]["win_rate"]
    seconds = time.perf_counter() - began
    highest_kl = max(row["rollout/kl"] for row in log(folder / method) if "rollout/kl" in row)
    return Won(rewarded_by, method, seed, win_rate, highest_kl, seconds)


def addition(out: Path, short: bool) -> Iterator[Added]:
    for seed in SEEDS[:1] if short else SEEDS:
        folder = out / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_sums(folder, seed)
        common = (f"seed={seed}", "data.eval_rows=0", "eval.prompts=0")
        sft = train(
            folder / "sft", "recipe=sft_local", "model=quickstart", "model.scratch.vocab_size=280",
            f"data.path={folder / 'said.jsonl'}", "sft.max_length=24", "sft.per_device_train_batch_size=64",
            "sft.learning_rate=5e-3", "sft.num_train_epochs=10", "sft.bf16=false", *common,
        )["sft"]["model"]  # fmt: skip
        train(
            folder / "grpo", "recipe=grpo_local", f"model.path={sft}", f"data.path={folder / 'sums.jsonl'}",
            "grpo.max_prompt_length=16", "grpo.max_completion_length=4", "grpo.num_generations=16",
            "grpo.per_device_train_batch_size=256", "grpo.learning_rate=1e-3", "grpo.lr_scheduler_type=constant",
            "grpo.bf16=false", "grpo.max_steps=250", *common,
        )  # fmt: skip
        right = [row["rewards/exact_match/mean"] for row in log(folder / "grpo" / "grpo") if "reward" in row]
        yield Added(seed, sum(right[:EDGE]) / EDGE, sum(right[-EDGE:]) / EDGE)


def write_sums(folder: Path, seed: int) -> None:
    """Writes 8,000 questions with what a model shall say at first, and all sums often enough."""
    draw, pairs = random.Random(seed), [(a, b) for a in NUMBERS for b in NUMBERS]
    some = [draw.choice(pairs) for _ in range(8_000)]
    said = ((a, b, draw.choice([a + b, abs(a - b), max(a, b), min(a, b)])) for a, b in some)
    sums = ((a, b, a + b) for _ in range(20) for a, b in draw.sample(pairs, len(pairs)))
    for name, column, rows in (("said", "completion", said), ("sums", "answer", sums)):
        lines = (json.dumps({"prompt": f"{a}+{b}=", column: str(answer)}) + "\n" for a, b, answer in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def log(stage: Path) -> list[dict]:
    """What a stage logged."""
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def reward_functions(out: Path, data: Path, quickstart_sft: str) -> Iterator[Rising]:
    """PPO on reward functions: scores rise from each quarter of a run to the next."""
    common = (
        "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null", "model.scratch=null",
        "ppo.normalize_rewards=none", "ppo.kl_coef=0.05", "ppo.max_steps=16", "eval.prompts=0",
    )  # fmt: skip
    worlds = {
        "quickstart": (f"model.path={quickstart_sft}", "ppo.reward_funcs=[alignctl.data.quickstart:reward]"),
        "stories260K": (
            f"model.path={data / 'models' / 'stories260K'}", "data.eval_rows=0", "eval=default",
            f"data.path={data / 'sft' / 'llms_from_scratch' / 'train.jsonl'}", "data.max_lost=0.3",
            f"ppo.reward_funcs=[{Path(__file__).resolve()}:short_sentences]", "ppo.missing_eos_penalty=null",
            "ppo.max_prompt_length=128", "ppo.per_device_train_batch_size=48",
        ),
    }  # fmt: skip
    for name, own in worlds.items():
        for seed in SEEDS:
            folder = out / f"{name}_{seed}"
            train(folder, *common, *own, f"seed={seed}")
            scores = [row["score"] for row in log(folder / "ppo")]
            part = len(scores) // 4
            yield Rising(name, seed, [sum(scores[i : i + part]) / part for i in range(0, 4 * part, part)])


def real_pairs(
    name: str, out: Path, data: Path, settings: tuple[str, ...], metrics: dict[str, str]
) -> Iterator[Learnt]:
    """Each preference method on real pairs from a pretrained model: held-out pairs told apart better than before."""
    folder = data / "preference" / name
    common = (
        f"model.path={data / 'models' / 'stories260K'}", f"data.path={folder / 'train.jsonl'}",
        f"data.eval_path={folder / 'test.jsonl'}", "eval.prompts=0", *settings,
    )  # fmt: skip
    for method, own in REAL.items():
        metric = metrics[method]
        lengths = (f"{method}.max_length=256",)
        result = train(out / method, f"recipe={method}_local", *common, *own, *lengths)[method]
        before = 0.5 if metric == LOG_RATIO else result["before"][metric]
        yield Learnt(name, method, metric, before, result["after"][metric], before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer rows and looser limits")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/learn"), help="folder of the runs; continued if it is there"
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with the real rows")
    parser.add_argument("--part", choices=PARTS, action="append", help="train only this; may be given several times")
    options = parser.parse_args()
    out = options.out / ("short" if options.short else "full")
    results = []
    for learnt in everything(out, options.data, options.short, options.part or PARTS):
        print(learnt, flush=True)
        results.append(learnt)
    return 0 if results and all(learnt.passed for learnt in results) else 1


def everything(out: Path, data: Path, short: bool, parts: Sequence[str]) -> Iterator[Result]:
    """All runs, one after the other."""
    if "quickstart" in parts:
        yield from quickstart_world(out / "quickstart", short)
    if "rlhf" in parts and not short:
        yield from whole_pipelines(out / "rlhf")
    if "judge" in parts and not short:
        yield from rewarded_by_the_judge(out / "judge", quickstart_model(out / "quickstart", short))
    if "addition" in parts:
        yield from addition(out / "addition", short)
    if not data.is_dir():
        print(f"no real rows at {data}")
        return
    if "functions" in parts and not short:
        yield from reward_functions(out / "functions", data, quickstart_model(out / "quickstart", short))
    if "llms" in parts:
        yield from real_pairs("llms_from_scratch_pref", out / "llms", data, (), dict.fromkeys(REAL, PLAIN))
    if "hh" in parts and not short:
        # KTO cannot keep the end of a long dialogue, so it loses those that fill max_length before the answer.
        settings = ("data.limit=960", "data.eval_limit=400", "data.max_lost=0.6")
        yield from real_pairs("hh_harmless_base", out / "hh", data, settings, OWN_REWARD)


if __name__ == "__main__":
    sys.exit(main())
