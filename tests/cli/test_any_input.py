"""Whatever a user types or has lying about, the answer is a result or a sentence: never a traceback, never a wait."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.any_input import Hangs, Maker, answer, changed, flaw
from support.in_process import frozen

from alignctl.checks.problems import find_problems
from alignctl.config.compose import compose, group_options, read_request
from alignctl.config.flat import flatten
from alignctl.config.trl_fields import config_fields
from alignctl.methods.registry import methods
from alignctl.plan.freeze import absolute_paths
from alignctl.plan.plan import make_plan

COUNTS = {"overrides": 350, "lines": 250, "recipes": 300, "runs": 450, "models": 250, "values": 700}
"""Inputs of each kind."""
BY_DAY = 9
"""One of so many is tried in the ordinary lane, the others by night."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "torch_dtype": "float32", "bos_token_id": 1,
    "eos_token_id": 2, "id2label": {"0": "a"}, "rope_scaling": None,
}  # fmt: skip
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": "{{ messages }}",
    "model_max_length": 128, "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
}  # fmt: skip
TEMPLATES = (
    "{{ 1 / 0 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{% include 'x' %}", "{% import 'x' as y %}",
    "{{", "{% for i in range(10**9) %}{% endfor %}", "{{ 'x' * 10**6 }}", "{% if %}", "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m['content'] }}", "\x00", "{{ ''.__class__ }}", "{{ messages }}" * 20_000,
    "{% extends 'x' %}", "{{ [[[" + "[" * 3000, "{{ a.b.c }}",
)  # fmt: skip
HEADERS = ("", "a", "\x10\0\0\0\0\0\0\0{}", "\x7f" * 8, "\x02\0\0\0\0\0\0\0{}", "\x02\0\0\0\0\0\0\0[]",
           "\x04\0\0\0\0\0\0\0null")  # fmt: skip
MINE = ("recipe=sft_local", "model.path=m", "data.path=rows.jsonl", "sft.max_length=64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, and a model of which everything is there but weights that could be loaded."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 4)
    (folder / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 4)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    model = folder / "m"
    model.mkdir()
    files = {"config": CONFIG, "tokenizer_config": TOKENIZER, "generation_config": {"eos_token_id": [2]}}
    for name, content in files.items():
        (model / f"{name}.json").write_text(json.dumps(content))
    tensor = {"dtype": "F32", "shape": [64, 32], "data_offsets": [0, 8192]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8192))
    return folder


@pytest.fixture(scope="module")
def maker():
    request = read_request(["recipe=sft_local"])
    keys, groups = list(flatten(compose(request)[0])), list(group_options(request))
    fields = list(config_fields(methods()["sft"].config_class))
    return lambda seed: Maker(seed, keys, groups, fields)


@pytest.fixture(params=[pytest.param(True, id="by_day"), pytest.param(False, id="by_night", marks=pytest.mark.night)])
def count(request) -> Callable[[str], range]:
    """Seeds of a kind of input."""
    by_day = {kind: count // BY_DAY for kind, count in COUNTS.items()}
    return lambda kind: range(by_day[kind]) if request.param else range(by_day[kind], COUNTS[kind])


class Told:
    """Answers that nobody could act on."""

    def __init__(self, folder: Path):
        self._folder, self._flaws = folder, []

    def look(self, arguments: Sequence[str], named: Sequence[str], given: str = "") -> None:
        """Gives a command, and notes what is wrong with the answer.

        Args:
            named: Words of which a refusal has to have one.
            given: What else it was about.
        """
        try:
            found = answer(arguments, self._folder)
            wrong, said = flaw(found, named), found.err[-1500:]
        except Hangs:
            wrong, said = "hangs", ""
        if wrong:
            self._flaws.append(f"{wrong}: {[str(one)[:100] for one in arguments]} {given[:300]!r}\n{said}")

    def check(self) -> None:
        assert not self._flaws, f"{len(self._flaws)} answers\n" + "\n".join(self._flaws)


@pytest.fixture
def told(folder):
    told = Told(folder)
    yield told
    told.check()


SEEN = (
    ("~sft", "sft"), ("sft=null", "sft"), ("sft.from=[a]", "from"), ("model=3", "model"), ("peft=[1]", "peft"),
    ("model.path=" + "x" * 300, "long"), ("model.path='~no.one/x'", "user"), ("run_dir='~no.one/x'", "user"),
    ("seed=" + "9" * 5000, "5,000 digits"), ("model.chat_template=/", "chat_template"), ("seed=4294967296", "seed"),
    ("sft.warmup_steps=-1", "warmup"), ("sft.adam_beta1=2", "adam_beta1"), ("sft.save_steps=1.5", "save_steps"),
    ("sft.optim_args=x", "optim_args"), ("sft.lr_scheduler_kwargs.x=1", "kwargs.x"), ("peft.r=-1", "peft.r"),
    ("sft.loss_type=[]", "loss_type"), ("model.attn_implementation=nope", "nope"), ("+seed=1", "write `seed=1`"),
    ("hydra.searchpath=[pkg://antigravity]", "hydra"), ("a=${b}", "`a=${b}`"), ("stages=[1]", "stages"),
    ("launcher.stages.sft=3", "launcher.stages"), ("data.mix=[1]", "data.mix"), ("data.columns=[a]", "data.columns"),
    ("global_batch_size=[1]", "global_batch_size"), ("global_batch_size=3", "`global_batch_size=3`"),
    ("sft.global_batch_size=9223372036854775807", "sft.global_batch_size"), ("sft.batch_for=-1", "batch_for"),
    ("x=" + "[" * 900 + "]" * 900, "x="),
)  # fmt: skip
"""Overrides that ended in a traceback once, or could have, and a word of the answer."""


@pytest.mark.parametrize(("override", "word"), SEEN, ids=[override[:30] for override, _ in SEEN])
def test_what_was_seen(folder, override, word):
    found = answer(["train", "--dry-run", *MINE, override], folder)
    assert not flaw(found, [word])
    assert found.code == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--multirun", *MINE, "seed=range(1,1)"], "no values"),
        (["--multirun", *MINE, "seed=range(1,3,0)"], "step is 0"),
        (["--multirun", *MINE, "seed=range(1,100000000)"], "more than"),
        ([*MINE[:1], *MINE[2:], "model=quickstart", "model.scratch.config.hidden_size=97"], "hidden_size=97"),
        (
            ["recipe=dpo_local", "model.path=m", "data.path=pairs.jsonl", "dpo.max_length=64", "dpo.loss_type=[]"],
            "loss_t",
        ),
        (
            ["recipe=dpo_local", "model.path=m", "data.path=pairs.jsonl", "dpo.max_length=64", "dpo.loss_weights=1"],
            "list",
        ),
    ],
    ids=["range(1,1)", "range(1,3,0)", "a range of many", "hidden_size=97", "loss_type=[]", "loss_weights=1"],
)
def test_other_lines_that_were_seen(folder, arguments, word):
    found = answer(["train", "--dry-run", *arguments], folder)
    assert not flaw(found, [word])
    assert found.code == 2


@pytest.mark.parametrize("stages", ["-0.5", "abc", "[[a],sft]", "null"])
def test_a_config_is_shown_whatever_its_stages_are(folder, stages):
    """To whoever looks for what is wrong with it."""
    found = answer(["show", *MINE, f"++stages={stages}"], folder)
    assert not flaw(found, [])
    assert found.code == 0


RECIPE = """defaults: [/base, {/data: local}, {/method@sft: sft}, _self_]
stages: [sft]
model: {path: m}
data: {path: rows.jsonl}
sft: {max_length: 64}
"""
LETTERS = "abcdefghi"
ALIASES = "a: &a [x]\n" + "".join(
    f"{letter}: &{letter} [{','.join([f'*{before}'] * 9)}]\n"
    for before, letter in zip(LETTERS, LETTERS[1:], strict=False)
)
INTERPOLATIONS = "x0: aaaaaaaaaa\n" + "".join(f"x{i + 1}: {f'${{x{i}}}' * 10}\n" for i in range(9))
LISTS = "x0: aaaaaaaaaa\n" + "".join(f"x{i + 1}: [{', '.join([repr(f'${{x{i}}}')] * 10)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        (RECIPE.replace("[/base, {/data: local}, {/method@sft: sft}, _self_]", "a"), "`defaults` is a list"),
        (RECIPE.replace("[/base, {/data: local}, {/method@sft: sft}, _self_]", "null"), "`defaults` is a list"),
        (RECIPE.replace("{/data: local}", "{/data: local, /model: local}"), "one `group: option`"),
        (RECIPE + "hydra: null\n", "line 6"),
        ("# @package hydra\n" + RECIPE, "hydra"),
        (RECIPE.replace("max_length: 64", "1: 64"), "line 5"),
        (RECIPE + "x: !!binary aGk=\n", "`!!binary`"),
        (RECIPE + 'run_dir: "a\\0b"\n', "NUL"),
        (RECIPE + f"seed: {'9' * 5000}\n", "5,000 digits"),
        (RECIPE.replace("sft:", f"{'s' * 300}:"), "line"),
        (RECIPE.replace("@sft", "@seed").replace("[sft]", "[seed]").replace("\nsft:", "\nseed:"), "`seed` cannot be"),
        (RECIPE + f"x: {'[' * 3000}\n", "nested"),
        (ALIASES + RECIPE, "aliases"),
        ("x: &x [*x]\n" + RECIPE, "stands in"),
        (RECIPE + INTERPOLATIONS, "characters"),
        (RECIPE + LISTS, "characters"),
        (RECIPE + "x: ${y}\ny: ${x}\n", "itself"),
        (RECIPE + "x: ${${y}}\ny: seed\n", "`x`"),
        (RECIPE + f"x: {'a' * 300_000}\n", "bytes"),
    ],
    ids=["defaults: text", "defaults: null", "two keys", "hydra: null", "package hydra", "a number as key", "!!binary",
         "NUL", "digits", "a long key", "a stage called seed", "nested", "aliases", "an alias of itself",
         "interpolations", "lists of interpolations", "a circle", "an interpolation in another", "large"],
)  # fmt: skip
def test_recipes_that_were_seen(folder, recipe, word):
    (folder / "seen.yaml").write_text(recipe)
    for command in (["train", "--dry-run"], ["show", "--sources"]):
        found = answer([*command, "recipe=./seen.yaml"], folder)
        assert not flaw(found, [word])
        assert found.code == 2 or command[0] == "show"  # which checks no stage


def test_overrides(told, maker, count):
    for seed in count("overrides"):
        made = maker(seed)
        given = [made.override() for _ in range(made.some.choice((1, 1, 2)))]
        command = made.some.choice(
            (["show"], ["show", "--sources"], ["submit", "--dry-run"], ["train", "--dry-run", "--multirun"],
             *[["train", "--dry-run"]] * 4)
        )  # fmt: skip
        named = [word for _, words in given for word in words]
        told.look([*command, *MINE, *(text for text, _ in given)], named)


def test_command_lines(told, maker, count):
    for seed in count("lines"):
        told.look(maker(seed).line(), [""])


def test_values(folder, maker, count, monkeypatch):
    """What is wrong with a config is found whatever it holds, and what has no problem can be planned."""
    monkeypatch.chdir(folder)
    config, _ = compose(read_request(MINE))
    refused = 0
    for seed in count("values"):
        odd = maker(seed).config(config)
        if problems := find_problems(odd):
            assert all(problem.message for problem in problems)
            refused += 1
        else:
            make_plan(absolute_paths(odd), "any", folder / "none")
    assert refused


def test_recipes(folder, told, maker, count):
    commands = ["show"], ["show", "--sources"], ["train", "--dry-run"], ["recipes", "--recipe-dir", "."]
    for seed in count("recipes"):
        made = maker(seed)
        file = folder / "made.yaml"
        file.write_text(made.recipe(), encoding="utf-8")
        command = made.some.choice(commands)
        told.look(
            [*command, *(["recipe=./made.yaml"] if "recipes" not in command else [])], ["made", "`"], file.read_text()
        )


@pytest.fixture(scope="module")
def run(folder):
    """A run with all files that one has, which no machine without GPUs goes on with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        paths = frozen(folder / "run", *MINE, "sft.bf16=true", f"run_dir={folder / 'run'}").paths
    stage = paths.stage("sft")
    counts = dict.fromkeys(("read", "kept", "held_out", "lost", "partly", "num_skipped", "ties", "cut"), 4)
    reason = {"what": "cut", "why": "long", "count": 1, "first": [{"row": 1}]}
    ledger = {
        "source": "rows.jsonl",
        "format": "text",
        "skipped": {"3": "empty"},
        "agreement": None,
        "reasons": [reason],
    }
    training = {"phase": "training", "notices": ["a"], "step": 2, "max_steps": 4, "metrics": {"loss": 0.5},
    "samples": [],
                "tokens_per_s": 3.0, "seconds_left": 1.0}  # fmt: skip
    listed = {"rows.jsonl": {"bytes": 1, "sha256": "a"}}
    of_stage = {"state": "running", "attempts": 1, "seconds": 1.0, "error": None}
    files = {
        paths.status: {"state": "running", "host": "h", "pid": 1, "updated": "now", "stages": {"sft": of_stage}},
        paths.beforehand: {"sft": "a"},
        stage.data: {"train": ledger | counts | {"lengths": {"limit": 24, "max": 7}}},
        stage.progress: {"phase": "saving", "notices": [], "trained": training},
        stage.result: {"steps": 4, "before": {"loss": 1.0}, "after": {"loss": 0.5}, "product": "model"},
        stage.evaluation_before: {"loss": 1.0},
        stage.rehearsal: {"seconds": 1.0},
        stage.inputs: {"rows_from": "sft", "files": listed},
        stage.rows.manifest: {"kind": "prompts", "count": 1, "columns": ["prompt"], "files": listed, "stage": "sft",
                              "method": "sft", "alignctl": "0"},
        stage.model / "manifest.json": {"files": listed},
        stage.checkpoints / "checkpoint-2" / "MANIFEST.json": {
            "step": 2, "kind": {"processes": 1, "zero_stage": 0}, "files": {}
        },
        stage.exit_codes(0): {"0": 1},
    }  # fmt: skip
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    stage.metrics.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    stage.rank_log(1, 0).parent.mkdir(parents=True)
    stage.rank_log(1, 0).write_text("hello\n")
    yield paths.root
    shutil.rmtree(paths.root)


def test_damaged_runs(told, run, maker, count):
    again = ["train", *MINE, "sft.bf16=true", "run_dir=run"]
    commands = (["status", "run"], ["status", "run", "--json"], ["status", "--all"], ["logs", "run"], ["resume", "run"],
                ["cancel", "run"], ["data", "preview", "run"], ["logs", "run", "--rank", "0"], again,
                [*again, "--dry-run"])  # fmt: skip
    files = sorted(file for file in run.rglob("*") if file.suffix in (".json", ".jsonl", ".yaml"))
    result = run / "sft" / "result.json"
    for seed in count("runs"):
        made = maker(seed)
        file = made.some.choice(files)
        text = made.damaged(file.read_text()) if file.suffix != ".yaml" else made.recipe()
        is_done = file == result or made.some.randrange(2)
        with changed(file, text), changed(result, result.read_text()):
            if not is_done:
                result.unlink()
            told.look(made.some.choice(commands), [file.name, str(run), "GPU", "run"], f"{file.name}: {text}")


def test_damaged_models(folder, told, maker, count):
    model = folder / "m"
    names = ("config.json", "config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors", "")
    asked = ([], ["peft=lora"], ["peft=lora", "peft.target_modules=[q_proj]"], ["model.tokenizer=m"],
             ["model.merge_into=m"])  # fmt: skip
    for seed in count("models"):
        made = maker(seed)
        some = made.some
        file, data, more = model / some.choice(names), "rows.jsonl", []
        if file == model:
            file, data, template = model / "tokenizer_config.json", "chats.jsonl", some.choice(TEMPLATES)
            text = json.dumps(TOKENIZER | {"chat_template": template})
            if some.randrange(2) and "\0" not in template:
                text, more = file.read_text(), [f"model.chat_template={json.dumps(template[:2000])}"]
        elif file.name == "model.safetensors":
            text = some.choice(HEADERS)
        else:
            text = made.damaged(file.read_text())
        arguments = ["train", "--dry-run", *MINE[:2], f"data.path={data}", *MINE[3:], *some.choice(asked), *more]
        with changed(file, text):
            told.look(arguments, ["m", "model"], f"{file.name}: {text}")
