"""Token ids that are made in batches are those that TRL makes row by row, of every kind of rows and tokenizers."""

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from datasets import Dataset, Features, Json, List, Value
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignctl.data.cores import write_converted
from alignctl.data.encoding import Encoder, tokenizer_key
from alignctl.data.kept import read_rows, write_rows
from alignctl.data.token_columns import AnswerIds, LabelledIds, PairIds, ScoredIds
from alignctl.trainers.base.tokenising import tokenised, with_others_answers

pytestmark = pytest.mark.train

ROWS = 12
LONGEST = 120  # tokens: some rows are cut, and some dropped
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
HARD = (
    "", " ", "  ", "\n", "\n  \n", " \n\n", "'", "'s", " a", "a", " \xe9", "e\u0301", "\u0301",
    "\U0001f469\u200d\U0001f467", "<|im_end|>", "1 2", "\u3000x",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["gpt2", "llama3", "stories260K"])
def tokenizer(request, shared_data):
    if request.param == "stories260K":
        made = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
        made.chat_template = CHAT
        return made
    folder = shared_data / "tokenizers" / "gpt2"
    bpe = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if request.param != "gpt2":
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        bpe.normalizer = normalizers.NFC()  # Qwen's
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    if request.param == "llama3":
        end = bpe.token_to_id("<|endoftext|>")
        bpe.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def pairs(shared_data):
    """Real conversations, plain and as messages, and prompts that end in the middle of things."""
    file = shared_data / "preference" / "hh_harmless_base" / "test.jsonl"
    plain, messages = [], []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        (prompt, mark, chosen), (other, _, rejected) = (
            row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")
        )
        if prompt == other and chosen and rejected and len(plain) < ROWS:
            plain.append({"prompt": prompt + mark, "chosen": chosen, "rejected": rejected})
            messages.append({
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            })  # fmt: skip
    begins = "It was a long day for all of them, and nobody knew what would come of it in the end"
    hard = [
        {"prompt": begins + a, "chosen": b + "x", "rejected": b + "\n"}
        for i, a in enumerate(HARD)
        for b in HARD[i % 4 :: 4]
    ]
    return {"plain": Dataset.from_list(plain + hard), "messages": Dataset.from_list(messages)}


def unpaired(rows):
    return Dataset.from_list([
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows for side in ("chosen", "rejected")
    ])  # fmt: skip


def by_trl(trainer, config, rows, tokenizer, **settings):
    """What a trainer of TRL makes of rows, without a model."""
    more = (settings.pop("packing"), None) if "packing" in settings else ()
    itself = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0,
        completion_only_loss=settings.get("completion_only_loss"),
    )  # fmt: skip
    args = config(report_to="none", use_cpu=True, bf16=False, **settings)
    return trainer._prepare_dataset(itself, rows, tokenizer, args, *more, "train")


def ours(rows, tokenizer, columns, processes=None):
    return tokenised(rows, tokenizer, columns, None, processes, lambda more: None).rows


def assert_same(made, trl_rows, names):
    assert len(made) == len(trl_rows)
    for name in names:
        assert made[name] == trl_rows[name], name


@pytest.mark.parametrize("form", ["plain", "messages"])
def test_ids_of_pairs_and_labelled_completions(pairs, tokenizer, form, tmp_path):
    rows, answers = pairs[form], unpaired(pairs[form])
    settings = {"output_dir": str(tmp_path), "max_length": LONGEST}
    expected = by_trl(trl.DPOTrainer, trl.DPOConfig, rows, tokenizer, truncation_mode="keep_start", **settings)
    assert_same(ours(rows, tokenizer, PairIds(LONGEST, "keep_start")), expected, PairIds.names)
    expected = by_trl(trl.RewardTrainer, trl.RewardConfig, rows, tokenizer, **settings)
    assert_same(ours(rows, tokenizer, ScoredIds(LONGEST)), expected, ScoredIds.names)
    expected = by_trl(trl.KTOTrainer, trl.KTOConfig, answers, tokenizer, per_device_train_batch_size=3, **settings)
    made = with_others_answers(ours(answers, tokenizer, AnswerIds(LONGEST)), 3)
    assert_same(made, expected, [*AnswerIds.names, "KL_completion_ids", "label"])


@pytest.mark.parametrize("form", ["plain", "messages"])
def test_ids_of_demonstrations(pairs, tokenizer, form, tmp_path):
    rows = unpaired(pairs[form]).remove_columns("label")
    whole = (
        Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows])
        if form == "plain"
        else Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in rows])
    )
    for some, only, mode, length in (
        (rows, True, "keep_start", LONGEST), (rows, False, "keep_end", LONGEST), (rows, True, "keep_end", None),
        (whole, False, "keep_start", LONGEST),
    ):  # fmt: skip
        columns = LabelledIds(length, mode, only, packed=False)
        if mode == "keep_end" and length:
            some = some.filter(lambda row, columns=columns: columns.fits(tokenizer, row))  # TRL trains on them all
        expected = by_trl(
            trl.SFTTrainer, trl.SFTConfig, some, tokenizer, output_dir=str(tmp_path), max_length=length,
            truncation_mode=mode, completion_only_loss=only, packing=False,
        )  # fmt: skip
        assert_same(ours(some, tokenizer, columns), expected, columns.names)


def test_what_rows_begin_with_is_encoded_once(pairs, tokenizer):
    """Of tokenizers that split texts between words; of others nothing is cut."""
    texts = [[row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]] for row in pairs["plain"]]
    encoder = Encoder(tokenizer, texts)
    assert encoder._cuts == (tokenizer.vocab_size > 512)
    assert encoder(texts, special=True) == encoder._plain(texts, special=True)


@pytest.mark.parametrize("tokenizer", ["gpt2"], indirect=True)
def test_a_tokenizer_is_the_same_whatever_it_was_asked_before(tokenizer):
    key = tokenizer_key(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_key(tokenizer) == key
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages }}"
    assert tokenizer_key(tokenizer) != key
    tokenizer.chat_template = template


@pytest.mark.parametrize("tokenizer", ["gpt2"], indirect=True)
@pytest.mark.parametrize("fails", [False, True])
def test_several_processes_make_the_same(pairs, tokenizer, tmp_path, fails):
    """Also where one of them dies: its rows are made by the first."""
    rows, parent, told = pairs["plain"], os.getpid(), []
    columns = PairIds(LONGEST, "keep_start")
    alone = ours(rows, tokenizer, columns, processes=1)

    def convert(batch):
        if fails and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        encoder = Encoder(tokenizer, [])
        made = [columns.of(ids) for ids in encoder(columns.written(tokenizer, batch, None), special=True)]
        fit = [ids for ids in made if columns.needed(ids)[0] <= LONGEST]
        return {name: [ids[i] for ids in fit] for i, name in enumerate(columns.names)}

    write_converted(tmp_path, rows, convert, alone.features, 3, told.append)
    files = sorted(tmp_path.glob("*.arrow"))
    assert len(files) == 3
    assert_same(read_rows(*files), alone, columns.names)
    assert sum(told) == len(rows)


@pytest.mark.parametrize("tokenizer", ["gpt2"], indirect=True)
def test_what_lies_beside_rows_that_are_kept_is_none_of_them(pairs, tokenizer):
    """TRL and the datasets library keep what they make of rows where these lie."""
    rows, columns = pairs["messages"], ScoredIds(LONGEST)
    made = ours(rows, tokenizer, columns)
    beside = Path(made.cache_files[0]["filename"]).with_name("cache-1.arrow")
    write_rows(beside, Features({"other": Value("int64")}), [{"other": [1, 2, 3]}])
    again = ours(rows, tokenizer, columns)
    assert (again.column_names, len(again)) == (made.column_names, len(made))


TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CALLS = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"


def test_tools_are_written_as_trl_writes_them(tokenizer, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TOOLS + CALLS + CHAT)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": {"enum": [1, 2.5]}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    made = [row | {"tools": [tool] if i % 2 else None} for i, row in enumerate(pairs["messages"])]
    made[0]["chosen"] = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    file = tmp_path / "rows.arrow"
    features = Features({name: Json() if name == "tools" else List(Json()) for name in made[0]})
    write_rows(file, features, [{name: [row[name] for row in made] for name in made[0]}])
    rows = read_rows(file)
    theirs = by_trl(trl.DPOTrainer, trl.DPOConfig, rows, tokenizer, max_length=None)
    assert_same(ours(rows, tokenizer, PairIds(None, "keep_start")), theirs, PairIds.names)
    with_tools, with_call = (re.sub("[ \u0120]", "", tokenizer.decode(theirs[i]["chosen_ids"])) for i in (1, 0))
    assert '"enum":[1,2.5]' in re.sub("[ \u0120]", "", tokenizer.decode(theirs[1]["prompt_ids"])) + with_tools
    assert '"arguments":{"x":1}' in with_call
