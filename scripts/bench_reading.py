"""What rows cost before anything is trained: a made file of pairs is read, counted, looked at and tokenised, as a stage
of DPO does it.

    python scripts/bench_reading.py              # 2 GB of .jsonl
    python scripts/bench_reading.py --gb 0.2     # less

An eighth of the file, then all of it, each in a process and with a cache of its own: processor seconds, and
the most memory at any time beyond what imports take, with the processes that tokenise. Files that are mapped into
memory are no part of it, for the system takes those pages back whenever it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench_rows import rows_of

PARTS = (8, 1)
_DIFFERENT = 2_000  # rows that are made; the others are these under other numbers
_VOCABULARY = 4096
_LONGEST = 4096  # tokens; no row is lost
_LOOK_EVERY_S = 0.3
_MB = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the file")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-reading-") as folder:
        write_model(Path(folder, "model"))
        for part in PARTS:
            file = Path(folder, "rows.jsonl")
            rows = write_rows(file, int(given.gb * 10**9 / part))
            found.append({"bytes": file.stat().st_size, "rows": rows} | measured(Path(folder)))
            print(line(found[-1]), flush=True)
    grown = found[-1]["peak_mb"] - found[0]["peak_mb"]
    print(f"from an eighth to all of it, the peak grows by {grown:,.0f} MB")
    if given.json:
        given.json.write_text(json.dumps({"results": found}, indent=2), encoding="utf-8")


def write_rows(file: Path, size: int) -> int:
    """Writes pairs with the lengths of UltraFeedback, no prompt twice, until there are so many bytes. How many rows."""
    made = [json.dumps(row) for row in rows_of("dpo", "ultrafeedback", _DIFFERENT, 1024, 0)]
    count = written = 0
    with file.open("w", encoding="utf-8") as out:
        while written < size:
            # The prompt is the first value of each.
            written += out.write(made[count % _DIFFERENT].replace('": "', f'": "{count} ', 1) + "\n")
            count += 1
    return count


def write_model(folder: Path) -> None:
    """A folder with a tokenizer (byte-level BPE, learnt from the rows) and a config; weights are not read."""
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    from alignctl.models.tokenizer import train_tokenizer

    texts = [row["chosen"] for row in rows_of("dpo", "ultrafeedback", 200, 1024, 0)]
    tokenizer = train_tokenizer(texts, _VOCABULARY)
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=_LONGEST).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")


def measured(folder: Path) -> dict[str, Any]:
    """What a process of its own says of the file in a folder."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = os.environ | {"ALIGNCTL_CACHE": cache, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--measure", folder], env=environment, stdout=subprocess.PIPE, check=True
        )
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path) -> dict[str, Any]:
    """Makes the rows of the file ready, in this process."""
    import datasets

    from alignctl.beforehand.looking import Line
    from alignctl.checks.problems import checked
    from alignctl.config.compose import read_request
    from alignctl.data.reading import read_split
    from alignctl.methods.registry import methods, resolve
    from alignctl.monitor.stopping import StopSignal
    from alignctl.plan.plan import make_plan
    from alignctl.run.files import write_json
    from alignctl.run.frozen import read_stage
    from alignctl.run.paths import RunPaths

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        paths = RunPaths(Path(scratch))
        words = ["recipe=dpo_local", f"model.path={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}"]
        words.append(f"dpo.max_length={_LONGEST}")
        write_json(paths.plan, make_plan(checked(read_request(words)), "dpo_local", paths.root).to_dict())
        stage, _ = read_stage(paths, "dpo")
        method = methods()[stage.method]
        resolve(method.trainer)  # what it imports is no part of it
        peak, took = Peak(), []
        with peak:
            began = processor_s()
            read_split(stage.data, method.data_kind, stage.seed, method.row_columns)
            took.append(processor_s() - began)
            ready = Line(paths, StopSignal()).ready("dpo")
            took.append(processor_s() - began - took[0])
        return {
            "ready": len(ready.trainer.train_dataset) + len(ready.held_rows.dataset),
            "read_s": round(took[0], 1),
            "looked_at_and_tokenised_s": round(took[1], 1),
            "peak_mb": round(peak.most / _MB, 1),
        }


def processor_s() -> float:
    """Seconds of processor time of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Peak:
    """The most memory of this process and its children while something is done, beyond what it had before: bytes that
    are not of files, those that processes share counted once."""

    def __enter__(self) -> Peak:
        self._before, self.most, self._on = held(), 0, True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._on = False
        self._thread.join()

    def _look(self) -> None:
        while self._on:
            self.most = max(self.most, held() - self._before)
            time.sleep(_LOOK_EVERY_S)


def held() -> int:
    """Bytes of memory of this process and its children that are of no file."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    found = 0
    for process in ("self", *children):
        with suppress(OSError):  # it has ended
            lines = Path("/proc", process, "smaps_rollup").read_text(encoding="ascii").splitlines()
            found += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return found


def line(one: dict[str, Any]) -> str:
    return (
        f"{one['bytes'] / _MB:,.0f} MB, {one['rows']:,} rows: read in {one['read_s']:,.1f} processor seconds, looked "
        f"at and tokenised in {one['looked_at_and_tokenised_s']:,.1f}; {one['peak_mb']:,.0f} MB beyond imports"
    )


if __name__ == "__main__":
    main()
