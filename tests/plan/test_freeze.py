"""A run directory: what is written, what never is, and whose run it is."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.added import add_method

from alignctl.config.compose import compose, read_request
from alignctl.config.secrets import mask, mask_override
from alignctl.config.stages import stage_config
from alignctl.errors import LaunchError, RequestError
from alignctl.launch.slurm import plan_jobs
from alignctl.plan.freeze import (
    absolute_paths,
    find_run,
    fingerprints,
    freeze,
    link_stages,
    new_run_dir,
    read_plan,
    refuse_anothers_stage,
    refuse_left_behind,
    refuse_moved,
    refuse_other_inputs,
    refuse_other_run,
)
from alignctl.plan.plan import common_stages, make_plan
from alignctl.run.files import read_json, write_json
from alignctl.run.fingerprint import _identity
from alignctl.run.frozen import read_stage
from alignctl.run.paths import RunPaths
from alignctl.run.state import locked

PAIR = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


def config_of(*arguments):
    config, problems = compose(read_request(arguments))
    assert problems == []
    return config


def test_plan_is_pure_and_the_same_twice(tmp_path):
    config = config_of("recipe=sft_dpo_llama3")
    first = make_plan(config, "r", tmp_path / "run")
    assert first == make_plan(config, "r", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    sft, dpo = first.stages
    assert dpo.start == sft.output
    assert sft.start == "meta-llama/Llama-3.1-8B-Instruct"
    assert dpo.global_batch_size == 16  # 2 x 8, one device
    assert "HF_HUB_OFFLINE" not in sft.environment


@pytest.mark.parametrize(("mini_batches", "expected"), [(1, 32), (4, 8), (3, 11)])
def test_an_optimizer_step_of_ppo_takes_a_mini_batch(tmp_path, mini_batches, expected):
    (ppo,) = make_plan(
        config_of("recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null",
                  "ppo.per_device_train_batch_size=32", f"ppo.num_mini_batches={mini_batches}"),
        "r", tmp_path / "run",
    ).stages  # fmt: skip
    assert ppo.global_batch_size == expected


def test_local_runs_do_not_look_at_the_hub(tmp_path):
    plan = make_plan(config_of("recipe=quickstart"), "quickstart", tmp_path)
    for stage in plan.stages:
        assert stage.environment["HF_HUB_OFFLINE"] == "1"
        assert stage.environment["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_runs_that_are_shown_on_the_hub_look_at_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/curves")
    for tracker, offline in (("trackio", False), ("none", True)):
        (sft,) = make_plan(config_of("recipe=quickstart", "stages=[sft]", f"tracker={tracker}"), "r", tmp_path).stages
        assert ("HF_HUB_OFFLINE" in sft.environment) == offline


def test_a_stage_is_read_back_as_it_was_frozen(tmp_path):
    config = config_of("recipe=quickstart", "dpo.beta=0.3")
    plan = make_plan(config, "quickstart", tmp_path)
    freeze(plan, config, ["alignctl", "train"])
    model = str(tmp_path / "sft" / "model")
    assert read_stage(plan.paths, "dpo") == (stage_config(config, "dpo"), {"policy": model, "reference": model})
    assert read_stage(plan.paths, "sft") == (stage_config(config, "sft"), {"policy": None})
    provenance = read_json(plan.paths.provenance)[0]
    assert provenance["packages"]["trl"].startswith("1.")
    assert provenance["command"] == ["alignctl", "train"]


TOKEN = "hf_" + "aB3" * 8


def test_a_plan_is_read_back_and_stays_where_it_was_frozen(tmp_path):
    config = config_of("recipe=rlhf_quickstart", "launcher=slurm", "launcher.stages.sft.nodes=2")
    plan = make_plan(config, "rlhf_quickstart", tmp_path / "run")
    freeze(plan, config, [])
    assert read_plan(plan.paths) == plan
    assert [stage.config.launcher.nodes for stage in plan.stages] == [2, 1, 1]
    refuse_moved(plan.paths)
    plan.paths.root.rename(tmp_path / "moved")
    with pytest.raises(RequestError, match="was begun as .*/run"):
        refuse_moved(RunPaths(tmp_path / "moved"))


def test_points_of_a_sweep_share_what_is_the_same_and_leave_it_to_its_owner(tmp_path):
    first, second = (
        make_plan(config_of("recipe=quickstart", f"dpo.beta={beta}"), "quickstart", tmp_path / f"beta {beta}")
        for beta in (0.1, 0.2)
    )
    of_first, of_second = common_stages([first, second])
    assert (of_first, of_second) == ({}, {"sft": first.paths})
    for plan, shared in ((first, of_first), (second, of_second)):
        plan.paths.make_root()
        link_stages(plan, shared)
        link_stages(plan, shared)  # given the same command again
    assert second.paths.stage("sft").root.readlink() == Path("..", "beta 0.1", "sft")
    refuse_anothers_stage(first, "sft")
    refuse_anothers_stage(second, "dpo")
    with pytest.raises(LaunchError, match="stage `sft` of .*beta 0.2 is done in .*beta 0.1 for several runs"):
        refuse_anothers_stage(second, "sft")


def test_secrets_are_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", TOKEN)
    config = config_of("recipe=quickstart", "dpo.run_name=${oc.env:SOME_KEY}", f"sft.hub_token={TOKEN}")
    plan = make_plan(config, "quickstart", tmp_path / "run")
    freeze(plan, config, ["alignctl", "train", f"dpo.run_name={TOKEN}", "x.api_key=short"])
    written = "".join(file.read_text() for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert "run_name" in written
    assert TOKEN not in written
    assert "short" not in written


def test_what_counts_as_a_secret():
    assert mask({"a": {"hub_token": "x", "wandb_api_key": "y"}}) == {"a": {"hub_token": "***", "wandb_api_key": "***"}}
    assert mask({"eos_token": "</s>", "max_new_tokens": 5, "hub_token": None}) == {
        "eos_token": "</s>",
        "max_new_tokens": 5,
        "hub_token": None,
    }
    assert mask(("--key", TOKEN)) == ["--key", "***"]
    assert mask({"data": {"path": f"{TOKEN}/rows.jsonl"}}) == {"data": {"path": f"{TOKEN}/rows.jsonl"}}
    assert mask_override("+dpo.hub_token=x") == "+dpo.hub_token=***"
    assert mask_override("dpo.beta=0.1") == "dpo.beta=0.1"


def local(tmp_path, *more):
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "config.json").write_text("{}")
        rows.write_text(PAIR)
    return config_of("recipe=dpo_local", f"model.path={tmp_path / 'm'}", f"data.path={rows}", *more)


def test_fingerprint_follows_what_matters(tmp_path):
    def prints(*more):
        _identity.cache_clear()
        return fingerprints(make_plan(local(tmp_path, *more), "r", tmp_path / "run"))

    first = prints()
    assert prints() == first
    assert prints("log_every=3") == first
    assert prints("tracker.report_to=[dvclive]", "tracker.project=p", "tracker.tags=[a]", "dpo.run_name=n") == first
    assert prints("dpo.beta=0.3") != first
    assert prints("seed=1") != first
    (tmp_path / "rows.jsonl").write_text(PAIR * 2)
    assert prints() != first


def test_a_run_that_was_begun_before_trackers_were_a_section_is_read(tmp_path):
    config = config_of("recipe=quickstart")
    plan = make_plan(config, "quickstart", tmp_path / "run")
    freeze(plan, config, [])
    written = read_json(plan.paths.plan)
    for stage in written["stages"]:
        del stage["config"]["tracker"]
        stage["config"]["report_to"] = "dvclive"
    write_json(plan.paths.plan, written)
    assert read_stage(plan.paths, "sft")[0].tracker.names == ["dvclive"]


def test_an_earlier_stage_changes_those_that_start_from_it(tmp_path):
    one = fingerprints(make_plan(config_of("recipe=quickstart"), "q", tmp_path))
    two = fingerprints(make_plan(config_of("recipe=quickstart", "sft.learning_rate=1e-3"), "q", tmp_path))
    three = fingerprints(make_plan(config_of("recipe=quickstart", "dpo.beta=0.2"), "q", tmp_path))
    assert one["sft"] != two["sft"]
    assert one["dpo"] != two["dpo"]
    assert one["sft"] == three["sft"]


def test_rows_of_an_earlier_stage_are_planned_as_its_model_is(tmp_path, monkeypatch):
    """Their file is known before it is there; where it will be is nothing that a stage's result depends on."""
    add_method(monkeypatch, "pick", "sft", product="rows", makes="preferences")
    given = ("recipe=quickstart", "eval=default", "sft.method=pick", "dpo.from=null", "dpo.data.from=sft")

    def plan(folder, *more):
        config = config_of(*given, *more)
        return config, make_plan(config, "q", tmp_path / folder)

    config, one = plan("one")
    sft, dpo = one.stages
    assert (sft.output, sft.trained) == (str(tmp_path / "one" / "sft" / "rows"), "nothing")
    assert dpo.config.data.path == str(tmp_path / "one" / "sft" / "rows" / "rows.jsonl")
    assert dpo.environment["HF_HUB_OFFLINE"] == "1"
    freeze(one, config, [])
    assert read_plan(one.paths) == one
    assert fingerprints(plan("two")[1]) == fingerprints(one)
    assert common_stages([one, plan("two", "dpo.beta=0.2")[1]])[1] == {"sft": one.paths}
    _, three = plan("three", "sft.learning_rate=1e-3")
    assert [a.fingerprint == b.fingerprint for a, b in zip(one.stages, three.stages, strict=True)] == [False, False]


def test_each_job_waits_for_the_rows_it_reads(tmp_path, monkeypatch):
    add_method(monkeypatch, "pick", "sft", product="rows", makes="preferences")
    config = config_of(
        "recipe=quickstart", "eval=default", "sft.method=pick", "dpo.from=null", "dpo.data.from=sft", "launcher=slurm"
    )
    first, second = plan_jobs([make_plan(config, "q", tmp_path / "run")])
    assert (first.after, second.after) == ((), ((0, 0),))


def test_the_newest_run_that_does_the_same_is_found(tmp_path):
    config = config_of("recipe=quickstart")
    other = config_of("recipe=quickstart", "dpo.beta=0.2")
    for name, what in (("1", config), ("2", config), ("3", other)):
        freeze(make_plan(what, "quickstart", tmp_path / "quickstart" / name), what, [])
    wanted = fingerprints(make_plan(config, "quickstart", tmp_path / "new"))
    assert find_run("quickstart", tmp_path, wanted) == tmp_path / "quickstart" / "2"
    assert find_run("another", tmp_path, wanted) is None


def test_the_newest_run_is_the_one_that_was_begun_last_whatever_the_clock_said(tmp_path):
    config = config_of("recipe=quickstart")
    for name in ("2031-01-01_00-00-00", "2026-11-28_12-00-00", "2027-01-01_00-00-00"):
        freeze(make_plan(config, "quickstart", tmp_path / "quickstart" / name), config, [])
    wanted = fingerprints(make_plan(config, "quickstart", tmp_path / "new"))
    assert find_run("quickstart", tmp_path, wanted).name == "2027-01-01_00-00-00"
    again = tmp_path / "quickstart" / "2026-11-28_12-00-00"
    freeze(make_plan(config, "quickstart", again), config, [])
    assert read_json(again / "plan.json")["number"] == 2  # of when it was begun


@pytest.mark.parametrize("size", [1000, 2**25])
def test_weights_are_known_by_their_content_and_not_by_their_time(tmp_path, size):
    def prints():
        _identity.cache_clear()
        return fingerprints(make_plan(local(tmp_path), "r", tmp_path / "run"))

    local(tmp_path)
    weights = tmp_path / "m" / "other.bin"  # no check reads it
    weights.write_bytes(bytes(size))
    first, times = prints(), weights.stat()
    os.utime(weights, (1, 1))
    assert prints() == first
    weights.write_bytes(bytes([1]) * size)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prints() != first


def test_inputs_that_were_replaced_are_named_and_refused_as_by_the_whole_command(tmp_path, monkeypatch):
    monkeypatch.setattr("alignctl.run.fingerprint._identity", _identity.__wrapped__)
    config = local(tmp_path)
    plan = make_plan(config, "dpo_local", tmp_path / "run")
    freeze(plan, config, [])
    refuse_other_inputs(read_plan(plan.paths))
    rows, weights = tmp_path / "rows.jsonl", tmp_path / "m" / "config.json"
    rows.write_text(PAIR * 2)
    with pytest.raises(RequestError, match=f"have changed: the content of {rows} has changed"):
        refuse_other_inputs(read_plan(plan.paths))
    write_json(plan.paths.stage("dpo").result, {})
    for refuse in (
        lambda: refuse_other_inputs(read_plan(plan.paths)),
        lambda: refuse_other_run(make_plan(config, "dpo_local", tmp_path / "run"), config),
    ):
        with pytest.raises(RequestError, match=f"was begun otherwise: the content of {rows} has changed"):
            refuse()
    rows.write_text(PAIR)
    refuse_other_inputs(read_plan(plan.paths))
    weights.unlink()
    with pytest.raises(RequestError, match=f"was begun otherwise: {weights} is gone"):
        refuse_other_inputs(read_plan(plan.paths))


def test_what_is_run_is_made_of_settings_and_not_what_the_plan_says(tmp_path):
    config = config_of("recipe=quickstart")
    plan = make_plan(config, "quickstart", tmp_path)
    freeze(plan, config, [])
    written = read_json(plan.paths.plan)
    for stage in written["stages"]:
        stage |= {"command": ["touch", str(tmp_path / "ran")], "environment": {"LD_PRELOAD": "evil.so"}, "new": 1}
    write_json(plan.paths.plan, written)
    assert read_plan(plan.paths) == plan


def test_a_run_directory_holds_one_run(tmp_path):
    first = config_of("recipe=quickstart")
    plan = make_plan(first, "quickstart", tmp_path)
    freeze(plan, first, [])
    other = config_of("recipe=quickstart", "dpo.beta=0.2")
    changed = make_plan(other, "quickstart", tmp_path)
    refuse_other_run(changed, other)  # nothing was begun yet
    write_json(plan.paths.stage("sft").result, {})
    refuse_other_run(changed, other)  # the stage that was begun is the same
    write_json(plan.paths.stage("dpo").result, {})
    with pytest.raises(RequestError, match=r"stage `dpo` was begun otherwise: `dpo.beta`: 0.5 -> 0.2"):
        refuse_other_run(changed, other)
    fewer = config_of("recipe=quickstart", "stages=[sft]")  # would forget what dpo was begun with
    with pytest.raises(RequestError, match="stage `dpo` was begun otherwise: `stages`"):
        refuse_other_run(make_plan(fewer, "quickstart", tmp_path), fewer)


@pytest.mark.parametrize(("more", "begun_otherwise"), [("grpo.reward_retries=9", False), ("grpo.beta=0.1", True)])
def test_a_rollout_that_no_server_scored_is_of_its_settings_but_for_patience(tmp_path, more, begun_otherwise):
    given = "recipe=grpo_local", "model.path=owner/model", "data.path=owner/rows", "grpo.reward_funcs=[http://a/b]"
    config, other = config_of(*given), config_of(*given, more)
    plan = make_plan(config, "grpo_local", tmp_path)
    freeze(plan, config, [])
    write_json(plan.paths.stage("grpo").drawn(0), {})
    with pytest.raises(RequestError, match="was begun otherwise") if begun_otherwise else nullcontext():
        refuse_other_run(make_plan(other, "grpo_local", tmp_path), other)


def test_a_run_that_an_older_alignctl_began_is_not_continued(tmp_path, alignctl):
    config = config_of("recipe=quickstart")
    plan = make_plan(config, "quickstart", tmp_path)
    freeze(plan, config, [])
    older = {key: value for key, value in read_json(plan.paths.plan).items() if key != "version"}
    write_json(plan.paths.plan, older)
    refuse_other_run(plan, config)  # nothing was begun yet
    write_json(plan.paths.stage("sft").result, {})
    reason = r"was begun by alignctl .* \(its plan.json is of version 1, and this alignctl writes version 6\)"
    with pytest.raises(RequestError, match=reason):
        refuse_other_run(plan, config)
    done = alignctl("resume", str(tmp_path))
    assert done.code == 2
    assert alignctl("status", str(tmp_path)).code == 0


def test_without_a_run_dir_what_an_older_alignctl_began_is_not_begun_anew_silently(tmp_path, alignctl):
    given = ("train", "recipe=quickstart", "stages=[sft]", "sft.max_steps=1")
    config = config_of(*given[1:])
    plan = make_plan(config, "quickstart", tmp_path / "runs" / "quickstart" / "1")
    freeze(plan, config, [])
    older = {key: value for key, value in read_json(plan.paths.plan).items() if key != "version"}
    write_json(plan.paths.plan, older)
    write_json(plan.paths.stage("sft").evaluation_before, {})
    done = alignctl(*given)
    assert done.code == 2
    assert "was begun by alignctl" in done.err
    assert "`--new`" in done.err
    assert alignctl(*given, "sft.max_steps=2", "--dry-run").code == 0  # another run
    assert alignctl(*given, "--new", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("more", "another"),
    [
        (["sft.run_name=x", "tracker.tags=[x]", "launcher=slurm"], False),
        (["sft.per_device_train_batch_size=2", "sft.gradient_accumulation_steps=4"], False),
        (["sft.per_device_train_batch_size=2"], True),
    ],
)
def test_what_an_older_alignctl_began_is_known_by_what_counts(tmp_path, more, another):
    """Neither whom it told nor a key that was not there yet makes it another run; the batch does."""
    given = (
        "recipe=quickstart", "stages=[sft]", "sft.per_device_train_batch_size=4", "sft.gradient_accumulation_steps=2",
    )  # fmt: skip
    config, now = config_of(*given, "tracker.project=y"), config_of(*given, *more)
    plan = make_plan(config, "quickstart", tmp_path / "quickstart" / "1")
    del config["global_batch_size"], config["eval"]["temperature"]
    freeze(plan, config, [])
    write_json(plan.paths.plan, read_json(plan.paths.plan) | {"version": 5})
    write_json(plan.paths.stage("sft").evaluation_before, {})
    with nullcontext() if another else pytest.raises(RequestError, match="was begun by alignctl"):
        refuse_left_behind(make_plan(now, "quickstart", tmp_path / "quickstart" / "2"), tmp_path, now)


def test_a_changed_batch_is_named_and_nothing_that_does_not_count(tmp_path):
    config = config_of("recipe=quickstart")
    plan = make_plan(config, "quickstart", tmp_path)
    freeze(plan, config, [])
    write_json(plan.paths.stage("sft").result, {})
    other = config_of("recipe=quickstart", "sft.gradient_accumulation_steps=3", "sft.run_name=x")
    with pytest.raises(RequestError) as refused:
        refuse_other_run(make_plan(other, "quickstart", tmp_path), other)
    assert refused.value.problems[0].message.endswith("begun otherwise: `sft.global_batch_size`: 32 -> 96")


def test_a_folder_of_other_things_is_not_taken(tmp_path):
    config = config_of("recipe=quickstart")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RequestError, match="holds other things than a run"):
        refuse_other_run(make_plan(config, "quickstart", tmp_path), config)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LaunchError, match="cannot make"), locked(RunPaths(tmp_path / "file" / "run")):
        pass


def test_one_process_at_a_time(tmp_path):
    with locked(RunPaths(tmp_path)), pytest.raises(LaunchError, match="another alignctl"), locked(RunPaths(tmp_path)):
        pass
    with locked(RunPaths(tmp_path)):
        pass


def test_only_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "rows.csv").write_text("x")
    config = {
        "model": {"path": "train"},
        "data": {"path": "rows.csv", "split": "train"},
        "dpo": {"run_name": "train", "data": {"eval_path": "rows.csv", "path": "owner/name"}},
    }
    absolute = absolute_paths(config)
    assert absolute["model"]["path"] == str(tmp_path / "train")
    assert absolute["data"] == {"path": str(tmp_path / "rows.csv"), "split": "train"}
    assert absolute["dpo"] == {
        "run_name": "train",
        "data": {"eval_path": str(tmp_path / "rows.csv"), "path": "owner/name"},
    }


def test_a_chat_template_by_name_or_as_text_is_no_path(tmp_path, monkeypatch):
    """Also where a file is called so, and where the text would be too long a name for one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chatml").touch()
    (tmp_path / "mine").touch()
    text = "{{ messages }}" * 100
    for given, then in (("chatml", "chatml"), (text, text), ("mine", str(tmp_path / "mine"))):
        assert absolute_paths({"model": {"chat_template": given}})["model"]["chat_template"] == then
        config = config_of("recipe=quickstart") | {"model": {"scratch": {}, "chat_template": given}}
        assert make_plan(absolute_paths(config), "quickstart", tmp_path / "run").stages


@pytest.mark.parametrize(
    "given", ["rewards.py:short", ["rewards.py:short", "alignctl.data.quickstart:reward"]], ids=str
)
def test_files_of_functions_are_paths_too(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def short(completions): return [-len(one) for one in completions]")
    named = {"function": "rewards.py:short", "name": "brief"}
    assert absolute_paths({"ppo": {"reward_funcs": [named, "http://a/rewards.py:80", "format"]}})["ppo"] == {
        "reward_funcs": [named | {"function": f"{tmp_path / 'rewards.py'}:short"}, "http://a/rewards.py:80", "format"]
    }
    modules = [] if isinstance(given, str) else given[1:]
    assert absolute_paths({"ppo": {"reward_funcs": given}})["ppo"]["reward_funcs"] == [
        f"{tmp_path / 'rewards.py'}:short",
        *modules,
    ]


def test_a_changed_reward_function_is_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "rewards.py"
    alone = ("ppo.from=null", "ppo.reward_model=null", "ppo.reward_funcs=[rewards.py:short]")
    prints = set()
    for sign in ("", "-"):
        file.write_text(f"def short(completions): return [{sign}1.0 for one in completions]")
        _identity.cache_clear()  # which is kept for as long as a command takes
        config, _ = compose(read_request(["recipe=rlhf_quickstart", "stages=[ppo]", *alone]))
        (stage,) = make_plan(absolute_paths(config), "rlhf_quickstart", tmp_path / "run").stages
        prints.add(stage.fingerprint)
    assert len(prints) == 2


def test_a_run_directory_is_for_its_owner_alone(tmp_path):
    paths = RunPaths(tmp_path / "runs" / "mine")
    with locked(paths):
        assert paths.root.stat().st_mode & 0o777 == 0o700
    assert paths.root.parent.stat().st_mode & 0o777 != 0o700  # a folder of other runs, too
    paths.root.chmod(0o750)
    with locked(paths):
        assert paths.root.stat().st_mode & 0o777 == 0o750  # given to the group on purpose


def test_runs_that_start_in_the_same_second_each_get_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as at_once:
        folders = list(at_once.map(lambda _: new_run_dir("sft_local", tmp_path, make=True), range(8)))
    assert len(set(folders)) == 8
    assert sorted(folders) == sorted((tmp_path / "sft_local").iterdir())


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(LaunchError, match="cannot make"):
        new_run_dir("sft_local", tmp_path / "runs", make=True)
