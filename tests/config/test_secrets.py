"""What is secret stays the name of a variable in what is written, and is masked in what is printed."""

import json
import os
import subprocess
import sys

import pytest

from alignctl.checks.keys import check_secrets
from alignctl.checks.problems import find_problems
from alignctl.config.compose import compose, read_request
from alignctl.config.secrets import mask, mask_text, takes_variables
from alignctl.launch.slurm import plan_jobs
from alignctl.launch.slurm_script import render_script
from alignctl.plan.freeze import freeze, read_plan
from alignctl.plan.plan import make_plan
from alignctl.run.files import append_json_lines, write_json
from alignctl.run.frozen import read_stage

VALUE = 'op3n "sesame"/x'
TOKENS = (
    "github_pat_" + "a1B2" * 6, "glpat-" + "x-9_" * 5, "hf_" + "aB3" * 8, "sk-proj-" + "a_-9" * 8, "AKIA" + "ABCD" * 4,
    "ghp_" + "a1B2" * 6, "xoxb-" + "123-abc-" * 3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def door(monkeypatch):
    monkeypatch.setenv("DOOR_KEY", VALUE)
    monkeypatch.setenv("DOOR_NAME", "front door")


def composed(*overrides):
    config, problems = compose(read_request(["recipe=quickstart", *overrides]))
    assert problems == []
    return config


def test_a_secret_variable_stays_a_name_wherever_it_is_led_to(tmp_path):
    config = composed(
        "dpo.run_name=to ${oc.env:DOOR_KEY}", "sft.run_name=${dpo.run_name}", "stages=[sft,dpo]",
        "tracker.report_to=none", "model.tokenizer=${oc.env:DOOR_NAME}",
    )  # fmt: skip
    assert config["sft"]["run_name"] == config["dpo"]["run_name"] == "to ${oc.env:DOOR_KEY}"
    assert config["model"]["tokenizer"] == "front door"  # every other is resolved
    plan = make_plan(config, "r", tmp_path)
    freeze(plan, config, ["alignctl", "train", f"dpo.run_name=to {VALUE}"])
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "${oc.env:DOOR_KEY}" in written
    assert "sesame" not in written
    assert read_plan(plan.paths).stages[0].config.trainer["run_name"] == "to ${oc.env:DOOR_KEY}"
    assert read_stage(plan.paths, "sft")[0].trainer["run_name"] == f"to {VALUE}"


def test_a_variable_that_something_secret_takes_is_secret_whatever_it_is_called(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENER", "kept to ourselves")
    monkeypatch.setenv("JUDGES", "and this one too")
    config = composed("dpo.hub_token=${sft.run_name}", "sft.run_name=${oc.env:OPENER}", "+dpo.x={key_from: JUDGES}")
    assert config["dpo"]["hub_token"] == config["sft"]["run_name"] == "${oc.env:OPENER}"
    assert mask_text("kept to ourselves, and this one too") == "***, ***"


def test_the_check_says_whether_variables_are_there(monkeypatch):
    assert not any(
        "DOOR_KEY" in problem.message for problem in find_problems(composed("dpo.run_name=${oc.env:DOOR_KEY}"))
    )
    monkeypatch.delenv("DOOR_KEY")
    (problem,) = find_problems(composed("dpo.run_name=${oc.env:DOOR_KEY}"))
    assert problem.message == "`dpo.run_name`: the environment has no variable DOOR_KEY"
    assert problem.hint == "export DOOR_KEY=..."
    assert composed("dpo.run_name=${oc.env:DOOR_KEY,open}")["dpo"]["run_name"] == "open"


def test_a_worker_says_which_variable_it_misses(monkeypatch, tmp_path):
    config = composed("dpo.run_name=${oc.env:DOOR_KEY}")
    freeze(make_plan(config, "r", tmp_path), config, [])
    monkeypatch.delenv("DOOR_KEY")
    paths = make_plan(config, "r", tmp_path).paths
    assert len(read_plan(paths).stages) == 2
    with pytest.raises(Exception, match="`dpo` takes the variable DOOR_KEY of the environment, which is not set here"):
        read_stage(paths, "dpo")


def test_a_worker_needs_no_variable_that_only_a_setup_takes(monkeypatch, tmp_path):
    config = composed("launcher=slurm", "launcher.setup='export DOOR=\"${oc.env:DOOR_KEY}\"'")
    plan = make_plan(config, "r", tmp_path)
    freeze(plan, config, [])
    monkeypatch.delenv("DOOR_KEY", raising=False)
    stage, _ = read_stage(plan.paths, "dpo")
    assert stage.launcher == plan.stages[1].config.launcher


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"'dpo.run_name=\"{VALUE}\"'".replace('"', "").strip("'"), "`dpo.run_name` holds what looks like a token"),
        ("dpo.hub_token=short", "`dpo.hub_token` holds what looks like a token"),
        ("data.path=https://me:mine@example.com/rows.jsonl", "`data.path` holds what looks like a token"),
        (
            "tracker.project=p-${oc.env:DOOR_KEY}",
            "`tracker.project` is shown and written, and the variable DOOR_KEY is",
        ),
        ("data.path=${oc.env:DOOR_KEY}", "`data.path` is shown and written, and the variable DOOR_KEY is secret"),
        ("launcher.extra=['--comment=${oc.env:DOOR_KEY}']", "`launcher.extra` is shown and written"),
    ],
)
def test_secrets_are_refused_where_they_would_be_written(monkeypatch, override, expected):
    monkeypatch.setenv("DOOR_KEY", VALUE.replace('"', ""))
    messages = [problem.message for problem in find_problems(composed(override))]
    assert any(message.startswith(expected) for message in messages), messages


@pytest.mark.parametrize("key", ["launcher.setup", "launcher.stages.sft.setup"])
def test_a_setup_takes_them_from_the_environment_of_the_job(tmp_path, key):
    config = composed("launcher=slurm", f"{key}='export DOOR=\"${{oc.env:DOOR_KEY}}\"'")
    assert list(check_secrets(config)) == []
    plan = make_plan(config, "r", tmp_path)
    assert 'export DOOR="${DOOR_KEY}"\n' in render_script(plan.stages[0], plan.run_dir, plan.paths.stage("sft"))


def test_sbatch_hands_them_on_by_name(tmp_path):
    """Also where nothing else is handed on. Another stage's are its own."""
    config = composed("launcher=slurm", "launcher.extra=['--export=NONE']", "sft.run_name='${oc.env:DOOR_KEY}'")
    first, *others = plan_jobs([make_plan(config, "r", tmp_path)])
    assert first.options[-1] == "--export=DOOR_KEY"
    assert "--export=NONE" not in first.options
    assert all("--export=NONE" in job.options for job in others)


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_of_services_are_masked(token):
    assert mask_text(f"with {token}, and") == "with ***, and"
    assert mask({"a": [f"x{os.sep}{token}"]}) == {"a": [f"x{os.sep}***"]}


def test_what_is_no_secret_is_left(monkeypatch, tmp_path):
    text = "step 123456 of hf_model, sk-learn, https://host:80/a@b, <|eos_token|>, eos_token=</s>"
    monkeypatch.setenv("PUBLIC_KEY", str(tmp_path))  # a file's name is not the key in it
    monkeypatch.setenv("SHORT_KEY", "step")
    monkeypatch.setenv("NUMBER_KEY", "123456")
    assert mask_text(text) == text
    assert mask({"eos_token": "</s>", "path": str(tmp_path)}) == {"eos_token": "</s>", "path": str(tmp_path)}


def test_paths_stay_as_they_are_whatever_is_in_them(monkeypatch, tmp_path):
    """A worker has to find its weights below /home/jupyter, also where JUPYTER_TOKEN is `jupyter`."""
    home = tmp_path / "a jupyter"
    home.mkdir()
    monkeypatch.setenv("JUPYTER_TOKEN", "jupyter")
    config = composed("stages=[sft,dpo]", f"model.path={home}", f"dpo.reference={home}")
    plan = make_plan(config, "r", home / "run")
    freeze(plan, config, [])
    assert read_stage(plan.paths, "dpo")[1] == {"policy": f"{home}/run/sft/model", "reference": str(home)}
    assert mask({"data": {"eval": {"held": f"{home}/x"}}}) == {"data": {"eval": {"held": f"{home}/x"}}}
    name = tmp_path.name
    monkeypatch.setenv("JUPYTER_TOKEN", name)
    assert (
        mask_text(f"cannot read '{tmp_path}/new', {tmp_path}: {name}")
        == f"cannot read '{tmp_path}/new', {tmp_path}: ***"
    )
    assert mask_text(f"GET /nowhere/{name}") == "GET /nowhere/***"


def test_numbers_under_what_is_secret_are_masked():
    assert mask({"api_key": [1, 2], "ids": (1, 2.5, True)}) == {"api_key": ["***", "***"], "ids": [1, 2.5, True]}


def test_passwords_in_addresses_are_masked():
    assert mask_text("proxy http://me:p%40ss@host:80/") == "proxy http://***@host:80/"


def test_files_are_masked_and_stay_json(tmp_path):
    write_json(tmp_path / "one.json", {"error": f"was {VALUE}", "step": 3, "log": "/somewhere"})
    append_json_lines(tmp_path / "lines.jsonl", [{"text": VALUE}])
    assert json.loads((tmp_path / "one.json").read_text()) == {"error": "was ***", "step": 3, "log": "/somewhere"}
    assert json.loads((tmp_path / "lines.jsonl").read_text()) == {"text": "***"}


def test_no_command_prints_one(alignctl):
    """As text, as JSON, and in an error."""
    shown = alignctl("show", "recipe=quickstart", "dpo.run_name=${oc.env:DOOR_KEY}", "--json")
    assert json.loads(shown.out)["dpo"]["run_name"] == "${oc.env:DOOR_KEY}"
    told = alignctl("train", "recipe=quickstart", "--dry-run", "dpo.run_name='op3n \"sesame\"/x'")
    assert told.code == 2
    assert "sesame" not in told.out + told.err
    assert "`dpo.run_name` holds what looks like a token" in told.err
    typo = alignctl("train", 'recipe=op3n "sesame"/x', "--debug")
    assert "unknown recipe `***`" in typo.err
    assert "sesame" not in typo.err


def test_what_a_process_prints_is_masked_whichever_way(tmp_path):
    """Its tracebacks, its loggers and what it prints, whose streams have to be streams still."""
    script = tmp_path / "script.py"
    script.write_text(
        "import faulthandler, logging, os, signal, sys, warnings\n"
        "from alignctl.config.secrets import masked_output\n"
        "with masked_output():\n"
        "    faulthandler.register(signal.SIGUSR2)\n"
        "    logging.warning(os.environ['DOOR_KEY']); warnings.warn(os.environ['DOOR_KEY'])\n"
        "    print('printed', os.environ['DOOR_KEY'], flush=True)\n"
        "    os.write(sys.stdout.fileno(), b'whole')\n"
        "    try: raise ValueError(os.environ['DOOR_KEY'])\n"
        "    except ValueError: import traceback; traceback.print_exc()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "printed ***\nwhole"
    assert "sesame" not in done.stderr
    assert "ValueError: ***" in done.stderr
    assert "WARNING:root:***" in done.stderr


def test_names_that_are_noted_stay_noted():
    takes_variables({"DOOR_NAME"})
    assert mask_text("at the front door") == "at the ***"
