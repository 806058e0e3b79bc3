"""How fast is alignctl beside bare TRL? Trains the same rows with both and prints rates, memory and ratios.

    python scripts/bench_preference.py                                # everything, about two hours on one CPU core
    python scripts/bench_preference.py --method dpo --data harmless   # one comparison
    python scripts/bench_preference.py --method dpo --data harmless --batch 2 --accumulation 8
    python scripts/bench_preference.py --gpu --json measured.json     # what a GPU is for, in about eight minutes
    python scripts/bench_preference.py --families                     # how each family of models is computed

Contestants train one epoch over the same rows, each in a process of its own that waits while another one works: the
bare trainer of TRL as it comes; with rows grouped by length and the reference's log-probabilities computed beforehand;
with the whole optimizer step as one batch, or as two; SFT's with packed rows; and alignctl's. It has its callbacks on,
as in a stage; a contestant with them off, and a clock around each of them, say what they cost. They take turns of a few
steps, so a machine whose speed drifts drifts for all of them, and each ratio is of the same rows. On a GPU they have
the card one after another instead, because each may fill it. The first turn is a warm-up. Times are CPU seconds on a
CPU, so that other work on the machine counts little, and wall time on a GPU.

`--data` is hh-rlhf's harmless-base and helpful-base, from the folder named by ALIGNCTL_SHARED or from the Hub, or made:
`unshared`, pairs that share no prompt and rows of one length, for the engine nothing to gain; `ultrafeedback`, rows of
UltraFeedback's lengths; `long`, rows of `--length` tokens whose prompts are half of it.

MFU is what the layers' weights cost over the useful tokens (bench_trainers.py, `operations`), beside the rate of a
product of large matrices measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from select import select
from shutil import which
from typing import Any

from bench_rows import MADE, REAL
from bench_trainers import SHAPES, TRL, Contestant, Work

SCRIPT = Path(__file__).with_name("bench_trainers.py")
CONTESTANTS = {
    "TRL": Contestant(ours=False),
    "TRL, grouped": Contestant(ours=False, grouped=True),
    "TRL, one batch": Contestant(ours=False, batches=1),
    "TRL, two batches, not checkpointed": Contestant(ours=False, batches=2, checkpointed=False),
    "TRL, packed": Contestant(ours=False, packed=True),
    "alignctl": Contestant(ours=True),
    "alignctl, grouped": Contestant(ours=True, grouped=True),
    "alignctl, checkpointed": Contestant(ours=True, checkpointed=True),
    "alignctl, no callbacks": Contestant(ours=True, callbacks=False),
}
USUAL = ("TRL", "TRL, grouped", "TRL, packed", "alignctl", "alignctl, grouped", "alignctl, no callbacks")
_GRACE_S, _LONGEST_S = 60, 3600  # for a turn that was begun in time, and for any
OTHER_ROWS = ("TRL, packed",)
"""Whose steps are not of the same rows as those of the others."""


@dataclass(frozen=True)
class Comparison:
    """What is trained, and who trains it."""

    work: Work
    contestants: tuple[str, ...]
    alone: bool
    """One after another instead of in turns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=TRL, nargs="+", default=list(TRL))
    parser.add_argument("--data", choices=(*REAL, *MADE), nargs="+", default=["harmless", "helpful", "unshared"])
    parser.add_argument("--contestant", choices=CONTESTANTS, nargs="+", default=USUAL)
    parser.add_argument("--pass-tokens", type=int, nargs="+", default=[], help="alignctl with passes of so many, too")
    parser.add_argument("--rows", type=int, default=64, help="pairs, or other rows, of the epoch")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--accumulation", type=int, default=1, help="batches of a step")
    parser.add_argument("--turn", type=int, default=1, help="steps of a turn")
    parser.add_argument("--max-length", type=int, default=512, help="tokens, prompt and completion")
    parser.add_argument("--length", type=int, help="tokens of the rows of `long`, which are a step each")
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--peft", choices=("none", "lora", "all-linear"), default="none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; by default the device's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="contestants one after another, as always on a GPU")
    parser.add_argument("--gpu", action="store_true", help="the comparisons for a GPU, whatever else is said")
    parser.add_argument("--families", action="store_true", help="how each family of models is computed, no more")
    parser.add_argument("--minutes", type=float, help="begin nothing that late; 8 with --gpu")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    arguments = parser.parse_args()
    if arguments.families:
        from families import table as table_of_families

        print(table_of_families(arguments.device))
        return
    for tokens in arguments.pass_tokens:
        CONTESTANTS[f"alignctl, passes of {tokens:,}"] = Contestant(ours=True, pass_tokens=tokens)
    minutes = arguments.minutes or (8 if arguments.gpu else float("inf"))
    ends = time.monotonic() + 60 * minutes
    comparisons = list(for_a_gpu() if arguments.gpu else asked_for(arguments))
    work = comparisons[0].work
    machine = describe_machine(work.device, work.threads)
    print(machine, flush=True)
    results = []
    # The few for a GPU are imported while others have the card, which they do not touch before their turn.
    started = [start(comparison, ends) for comparison in comparisons] if arguments.gpu else []
    for number, comparison in enumerate(comparisons):
        result = compare(comparison, started[number] if started else start(comparison, ends))
        results.append(result)
        print(table(result), flush=True)
        if arguments.json:
            content = {"machine": machine, "results": results}
            arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def asked_for(arguments: argparse.Namespace) -> Iterator[Comparison]:
    data = ["long"] if arguments.length else arguments.data
    gpu = arguments.device == "cuda"
    for method, rows in product(arguments.method, data):
        work = Work(
            method=method, data=rows, model=arguments.model, peft=arguments.peft, rows=arguments.rows,
            batch=1 if arguments.length else arguments.batch,
            accumulation=1 if arguments.length else arguments.accumulation,
            max_length=arguments.length or arguments.max_length, length=arguments.length or 0, turn=arguments.turn,
            device=arguments.device, dtype=arguments.dtype or ("bfloat16" if gpu else "float32"),
            threads=arguments.threads,
        )  # fmt: skip
        names = [*arguments.contestant, *(f"alignctl, passes of {tokens:,}" for tokens in arguments.pass_tokens)]
        contestants = tuple(name for name in names if method == "sft" or name not in OTHER_ROWS)
        yield Comparison(work, contestants, arguments.alone or gpu)


def for_a_gpu() -> Iterator[Comparison]:
    """The settings of `recipe=dpo_llama3` on an 8B model; long rows of a 1B model, computed again in the backward pass
    by both."""
    work = Work(
        method="dpo", data="ultrafeedback", model="8b", peft="lora", rows=16 * 7, batch=2, accumulation=8,
        max_length=1024, length=0, turn=1, device="cuda", dtype="bfloat16", threads=8,
    )  # fmt: skip
    theirs = ("TRL", "TRL, one batch", "TRL, two batches, not checkpointed")
    yield Comparison(work, (*theirs, "alignctl"), alone=True)
    for length in (8192, 16384, 32768):
        rows = replace(
            work, data="long", model="1b", peft="all-linear", rows=4, batch=1, accumulation=1, max_length=length,
            length=length,
        )  # fmt: skip
        yield Comparison(rows, ("TRL", "alignctl, checkpointed", "alignctl"), alone=True)


def describe_machine(device: str, threads: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    return f"{_processor(device)}, {threads} thread(s), Python {platform.python_version()}, {packages}"


def _processor(device: str) -> str:
    if device == "cuda":
        if which("nvidia-smi") is None:
            return "a GPU"
        asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Failed(Exception):
    """A contestant ended before its time; says why."""


class Process:
    """A contestant at work (bench_trainers.py). What it prints is kept for when it fails."""

    def __init__(self, work: Work, contestant: Contestant, ends: float):
        self._ends, self._log = ends, tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        asked = json.dumps({"work": asdict(work), "contestant": asdict(contestant)})
        offline = {"HF_HUB_OFFLINE": "1"} if work.data in MADE else {}
        environment = os.environ | offline | {"OMP_NUM_THREADS": str(work.threads), "HF_HUB_DISABLE_TELEMETRY": "1"}
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT, asked], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment,
        )  # fmt: skip

    def ask(self) -> dict[str, Any]:
        """Lets it go on to its next answer.

        Raises:
            Failed: It ended, or the time is over.
        """
        left = self._ends - time.monotonic()
        if left < 0:
            raise Failed("there was no time left for it")
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            if not select([self._process.stdout], [], [], min(left + _GRACE_S, _LONGEST_S))[0]:
                raise Failed("it took too long")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = [line for line in self._log.read().splitlines() if line.strip()]
            raise Failed(f"exit code {code}: {said[-1].strip()[:300] if said else 'it said nothing'}")
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def start(comparison: Comparison, ends: float) -> dict[str, Process]:
    """The contestants, which wait until they are asked."""
    return {name: Process(comparison.work, CONTESTANTS[name], ends) for name in comparison.contestants}


def compare(comparison: Comparison, processes: dict[str, Process]) -> dict[str, Any]:
    """Trains every contestant and returns what each measured, why others failed, and the ratios."""
    names = comparison.contestants
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    try:
        for together in [[name] for name in names] if comparison.alone else [list(names)]:
            while together:
                for name in list(together):
                    try:
                        answers[name].append(processes[name].ask())
                    except Failed as error:
                        failed[name] = str(error)
                        together.remove(name)
                    else:
                        if "done" in answers[name][-1]:
                            together.remove(name)
                    if name not in together:
                        processes[name].end()
    finally:
        for process in processes.values():
            process.end()
    finished = {name: answers[name] for name in names if name not in failed}
    useful = max((one[-1]["useful_tokens_per_row"] or 0 for one in finished.values()), default=0)
    measured = {name: _summary(one, comparison.work, useful) for name, one in finished.items()}
    return {
        "work": asdict(comparison.work), "useful_tokens_per_row": useful, "measured": measured, "failed": failed,
        "ratios": list(_ratios(measured)),
    }  # fmt: skip


def _summary(answers: list[dict[str, Any]], work: Work, useful: float) -> dict[str, Any]:
    built, *turns, end = answers
    kind = "seconds" if work.device == "cuda" else "cpu_s"
    counted = turns[1:]  # the first is the warm-up
    rows = work.rows / len(turns)
    rate = rows / statistics.median(turn[kind] for turn in counted)
    return {
        "rows_per_s": rate,
        "useful_tokens_per_s": rate * useful,
        "mfu": rate * useful * end["operations_per_token"] / end["matrix_rate"],
        "first_step_s": built["built_s"] + turns[0]["seconds"],
        "callbacks_share": end["callbacks_s_per_step"] * work.turn / statistics.median(t["seconds"] for t in counted),
        "turns_s": [turn[kind] for turn in counted],
        "turns_wall_s": [turn["seconds"] for turn in counted],
        **{key: end[key] for key in ("peak_mib", "losses", "attention", "notices", "matrix_rate")},
    }


def _ratios(measured: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of speed, alignctl's over TRL's by turns, and of peak memory: each of ours to TRL with the same settings, and to
    the fastest of TRL's."""
    theirs = [name for name in measured if not CONTESTANTS[name].ours]
    fastest = max(theirs, key=lambda name: measured[name]["rows_per_s"], default=None)
    for ours in measured:
        if not CONTESTANTS[ours].ours:
            continue
        same = "TRL, grouped" if CONTESTANTS[ours].grouped else "TRL"
        others = [same, fastest, *(["alignctl, no callbacks"] if ours == "alignctl" else [])]
        for other in dict.fromkeys(name for name in others if name in measured):
            a, b = measured[ours], measured[other]
            yield {
                "of": ours,
                "to": other,
                "speed": a["rows_per_s"] / b["rows_per_s"],
                "memory": a["peak_mib"] / b["peak_mib"],
                **(_by_turns(a, b) if _same_rows(ours, other) else {}),
            }


def _same_rows(one: str, other: str) -> bool:
    """Whether turns are of the same rows."""
    return CONTESTANTS[one].grouped == CONTESTANTS[other].grouped and other not in OTHER_ROWS


def _by_turns(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """The speed is the median of that of each turn."""
    ratios = [b / a for a, b in zip(ours["turns_s"], theirs["turns_s"], strict=True)]
    return {
        "speed": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "largest_loss_difference": max(abs(x - y) for x, y in zip(ours["losses"], theirs["losses"], strict=True)),
    }


def table(result: dict[str, Any]) -> str:
    work = result["work"]
    what = f"{work['method']} on {work['data']}"
    if work["length"]:
        what += f", {work['length']:,} tokens a row"
    adapters = "" if work["peft"] == "none" else f" with adapters ({work['peft']})"
    lines = [
        f"\n{what}: {work['batch']} x {work['accumulation']} rows a step, at most {work['max_length']:,} tokens, "
        f"{work['model']}{adapters}, {work['dtype']}; {result['useful_tokens_per_row']:.0f} useful tokens a row",
        f"  {'':34} {'rows/s':>8} {'tokens/s':>9} {'s a turn':>9} {'wall':>7} {'peak MiB':>9} {'MFU':>6} first step",
    ]
    for name, one in result["measured"].items():
        lines.append(
            f"  {name:34} {one['rows_per_s']:8.2f} {one['useful_tokens_per_s']:9.0f} "
            f"{statistics.median(one['turns_s']):9.2f} {statistics.median(one['turns_wall_s']):7.2f} "
            f"{one['peak_mib']:9.0f} {one['mfu']:6.1%} {one['first_step_s']:8.1f} s"
            f"  ({one['attention']})" + (f" callbacks {one['callbacks_share']:.2%}" if one["callbacks_share"] else "")
        )
    lines += [f"  {name:34} failed: {reason}" for name, reason in result["failed"].items()]
    for ratio in result["ratios"]:
        speed = f"{ratio['speed']:.2f} times the speed"
        if "min" in ratio:
            speed += f" ({ratio['min']:.2f} to {ratio['max']:.2f})"
            speed += f", losses within {ratio['largest_loss_difference']:.1e}"
        lines.append(f"  {ratio['of']} : {ratio['to']} = {speed}, {ratio['memory']:.2f} of the memory")
    notices = {notice: None for one in result["measured"].values() for notice in one["notices"]}
    lines += [f"  {notice}" for notice in notices]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
