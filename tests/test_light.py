"""The light commands stay light: no heavy module, and an answer within the time people wait for."""

import ast
import resource
import subprocess
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import alignctl

PACKAGE = Path(alignctl.__file__).parent
HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate", "tokenizers", "pyarrow", "numpy", "pandas")

RUN_LIGHT = """
import sys
from alignctl.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as exited:
    code = exited.code
print("HEAVY", [m for m in {heavy!r} if m in sys.modules], "CODE", code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["recipes"], 0),
        (["methods"], 0),
        (["templates"], 0),
        (["templates", "qwen3", "--json"], 0),
        (["show", "recipe=quickstart", "--sources"], 0),
        (["train", "recipe=dpo_llama3", "--dry-run"], 0),
        (["train", "recipe=sft_dpo_llama3", "--dry-run", "--json"], 0),
        (["train", "recipe=dpo_llama3", "dpo.learning_rte=1", "dpo.beta=high", "model=x"], 2),
        (["train", "recipe=sft_kto_llama3", "peft=dora", "--dry-run"], 0),
        (["train", "recipe=dpo_llama3"], 3),  # no GPU here
        (["submit", "recipe=sft_dpo_llama3", "--dry-run"], 0),
        (["rehearse", "recipe=dpo_llama3", "--as", "3/2"], 2),
        (["status", "--all"], 0),
        (["cache", "list"], 0),
        (["data", "preview", "rows.jsonl"], 2),
    ],
    ids=str,
)
def test_imports_nothing_heavy(arguments, code, tmp_path):
    if code == 3 and list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU, so the launch would not be refused")
    script = RUN_LIGHT.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert f"HEAVY [] CODE {code}" in done.stderr, done.stderr
    assert not list(tmp_path.glob("runs/*/*")), "nothing ran, so there is no folder of a run"


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["train", "recipe=dpo_llama3", "--dry-run"], 4),
        (["train", "recipe=dpo_llama3", "dpo.learning_rte=1e-6", "dpo.beta=high"], 5),
    ],
    ids=["dry run", "mistakes"],
)
def test_answers_fast(alignctl, arguments, limit):
    """Against what importing Hydra and the display takes, 0.3 s: 2.8 times that where nothing else runs; where three
    tests share two cores a dry run took 3.7 times that, when it found Hydra's defaults twice. In processor time, in
    turns, and the best of each, for other work takes the clock, the caches and a part of each core, too."""
    took, imports = [], []
    for _ in range(6):
        imports.append(processor_s(lambda: run_python("import hydra, rich.console, click")))
        took.append(processor_s(lambda: alignctl(*arguments)))
    assert min(took) < limit * min(imports)


def processor_s(call: Callable[[], object]) -> float:
    """Seconds of processor time of the processes that a call starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def imports_of(path: Path) -> set[str]:
    """Modules a file imports at its top level or anywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


# Who may import whom inside the package: module or folder -> what it may touch beside itself.
ALLOWED = {
    "cache": {"errors"},
    "errors": set(),
    "engine": set(),
    "methods": {"errors"},
    "data": {"cache", "errors", "methods"},
    # config: of data only the settings of rows, and which templates there are
    "config": {"data", "errors", "methods"},
    # evaluate: for the checks the table of judges
    "checks": {"config", "data", "errors", "evaluate", "methods"},
    # run: of methods which there are
    "run": {"config", "data", "errors", "methods"},
    "plan": {"config", "data", "errors", "methods", "run"},
    # launch: of monitor only what knows no torch
    # and of methods the fields that say how long a stage takes
    "launch": {"config", "errors", "methods", "monitor", "plan", "run"},
    # config: of it only what is secret
    "agent": {"config", "errors", "monitor", "rendezvous", "run"},
    "rendezvous": set(),
    # monitor: of config the settings of a stage, which trackers are told
    "monitor": {"config", "errors", "run"},
    "models": {"config", "data", "engine", "errors", "methods", "run"},
    "rollout": {"cache", "config", "data", "engine", "errors", "models", "run"},
    "evaluate": {"config", "data", "engine", "errors", "models", "rollout"},
    # trainers: of monitor the table of common names
    "trainers": {"cache", "data", "engine", "errors", "models", "monitor", "rollout", "run"},
    "stage": {"config", "data", "errors", "evaluate", "methods", "models", "monitor", "run", "trainers"},
    "beforehand": {"config", "data", "errors", "methods", "models", "monitor", "run", "stage", "trainers"},
    "alone": {
        "config",
        "data",
        "errors",
        "methods",
        "models",
        "monitor",
        "plan",
        "rollout",
        "run",
        "stage",
        "trainers",
    },
    # worker: of stage only what the table of methods names
    "worker": {"cache", "config", "errors", "methods", "monitor", "run"},
    "cli": {"cache", "checks", "config", "data", "errors", "launch", "methods", "plan", "run"},
    "__main__": {"cli"},
}


def test_imports_go_down_only():
    """No part reaches itself through others; prepare() says round which parts it would go."""
    TopologicalSorter(ALLOWED).prepare()


def test_every_part_has_its_rule():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_who_imports_whom(part):
    used = set()
    files = list((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    for file in files:
        for module in imports_of(file):
            package, _, rest = module.partition(".")
            if package == "alignctl" and rest:
                other = rest.split(".")[0]
                assert other in ALLOWED[part] | {part}, f"{file.name} imports {module}"
                used.add(other)
    assert used >= ALLOWED[part], "what nobody needs is not allowed"


def test_only_compose_imports_hydra():
    users = {f.name for f in PACKAGE.rglob("*.py") if any(m.split(".")[0] == "hydra" for m in imports_of(f))}
    assert users == {"compose.py"}


def test_an_empty_folder_that_run_dir_names_stays(tmp_path):
    """Though the run does not begin: a user may have made it."""
    (tmp_path / "mine").mkdir()
    command = ["train", "recipe=dpo_llama3", "launcher=slurm", "launcher.nodes=2", "distributed=zero3", "run_dir=mine"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "alignctl", *command], cwd=tmp_path, env={"PATH": "/nowhere"}, capture_output=True
    )
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "mine").is_dir()
