"""A stage that would fill the disk is refused, and one whose disk fills up ends with what was complete before."""

from __future__ import annotations

import resource
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.files import weights
from support.in_process import NeverStops, run_stages
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from alignctl.errors import AlignctlError, LaunchError
from alignctl.run.checkpoints import STAGING, complete_checkpoints
from alignctl.trainers.base.room import checkpoints_at_a_time, writes_of

pytestmark = pytest.mark.train

SMALL = (
    "data.limit=32", "data.eval_limit=8", "eval.prompts=0", "model.scratch.vocab_size=400",
    "model.scratch.config.hidden_size=64", "model.scratch.config.intermediate_size=128",
)  # fmt: skip
SFT = (
    "recipe=sft_quickstart", *SMALL, "sft.per_device_train_batch_size=8", "sft.max_steps=6", "sft.save_steps=2",
    "sft.logging_steps=1",
)  # fmt: skip
FILES = ("model.safetensors", "adapter_model.safetensors", "optimizer.pt")


class DiskFills(NeverStops):
    """During step 4, files may no longer become larger than one of the first checkpoint's is, less a little.

    A limit on the size of files is what works everywhere as a disk that is full: a small file system needs rights to
    mount it.
    """

    def __init__(self, stage, file):
        self.waits = False
        self._looks, self._file = 0, stage / "checkpoints" / "checkpoint-2" / file

    @property
    def requested(self):
        self._looks += 1
        time.sleep(0.2)  # while what was saved is written
        if self._looks == 4:
            limit = self._file.stat().st_size - 1000
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return False


@pytest.fixture
def limit_lifted():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run_stages(tmp_path_factory.mktemp("undisturbed"), *SFT) / "sft"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])  # written by safetensors and by torch
def test_a_disk_that_fills_up(tmp_path, undisturbed, limit_lifted, file):
    stage = tmp_path / "sft"
    with pytest.raises(AlignctlError, match="there is no room left to write to: File too large") as caught:
        run_stages(tmp_path, *SFT, signal=DiskFills(stage, file))
    limit_lifted()
    assert caught.value.exit_code == 1
    assert f"{stage}/checkpoints/checkpoint-2 is complete" in str(caught.value)
    assert [one.step for one in complete_checkpoints(stage / "checkpoints")] == [2]
    assert not (stage / "checkpoints" / STAGING).exists()
    run_stages(tmp_path, *SFT)
    assert weights(stage / "model") == weights(undisturbed / "model")


def test_other_failures_keep_their_traceback(tmp_path):
    class Breaks(NeverStops):
        @property
        def requested(self):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_stages(tmp_path, *SFT, signal=Breaks())


def test_too_much_is_refused_before_anything_is_done(tmp_path):
    arguments = (*SFT, "sft.max_steps=1000000000000", "sft.save_steps=1", "sft.save_total_limit=null")
    with pytest.raises(LaunchError, match="TB are needed: 1,000,000,000,000 checkpoints of 1.3 MB") as caught:
        run_stages(tmp_path, *arguments)
    assert "`sft.save_total_limit=1`" in caught.value.problems[0].hint
    assert not list((tmp_path / "sft").rglob("*.safetensors"))
    assert not (tmp_path / "sft" / "evaluation_before.json").exists()  # so that other settings may be given


def wide(small, peft):
    """A model whose numbers weigh more than the headers of its files."""
    config = small.config()
    config.hidden_size, config.intermediate_size = 256, 512
    model = LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=64)) if peft else model


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_finished_model_is_counted_in_the_type_it_is_saved_in(small, peft, dtype):
    model = wide(small, peft)
    trainer = small.trainer("sft", model=model, max_steps=1)
    writes = writes_of(trainer, 1, trainer.model, dtype)
    alone = writes_of(trainer, 1, trainer.model, dtype, merge=False)
    adapter = 0
    if peft:
        trainer.model.save_pretrained(small.folder / "adapter")
        adapter = (small.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    whole = trainer.model.merge_and_unload() if peft else trainer.model
    whole.to(dtype or torch.float32).save_pretrained(small.folder / "model")
    saved = (small.folder / "model" / "model.safetensors").stat().st_size
    assert writes.finished == pytest.approx(saved + adapter, rel=0.02)
    assert alone.finished == pytest.approx(adapter or saved, rel=0.02)


def test_four_bits_are_counted_as_what_they_are_merged_into(small):
    pytest.importorskip("bitsandbytes")
    config = small.config()
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 128
    whole = LlamaForCausalLM(config)
    whole.to(torch.bfloat16).save_pretrained(small.folder / "whole")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(small.folder / "whole", quantization_config=four_bits)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1))
    trainer = small.trainer("sft", model=model, max_steps=1)
    saved = (small.folder / "whole" / "model.safetensors").stat().st_size
    for dtype, times in ((None, 1), (torch.bfloat16, 1), (torch.float32, 2)):
        assert writes_of(trainer, 1, trainer.model, dtype).finished == pytest.approx(times * saved, rel=0.02)


@pytest.mark.parametrize(
    ("wanted", "size"),
    [("float32", "431.4 kB"), ("bfloat16", "215.7 kB")],
)
def test_the_type_that_is_wanted_is_what_room_is_needed_for(tmp_path, wanted, size):
    arguments = (*SFT, "sft.max_steps=1000000000000", "sft.save_steps=1", "sft.save_total_limit=null")
    with pytest.raises(LaunchError, match=f"and {size} for the finished model"):
        run_stages(tmp_path, *arguments, f"model.save_dtype={wanted}")


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("settings", [{}, {"save_only_model": True}], ids=str)
def test_what_is_computed_is_what_is_written(small, peft, settings):
    """Files of weights and of the optimizer's state, to a twentieth: their headers are beside the numbers."""
    model = wide(small, peft)
    trainer = small.trainer("sft", model=model, max_steps=1, save_steps=1, **settings)
    writes = writes_of(trainer, 1, trainer.model)
    trainer.train()

    def size(folder):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.name in FILES)

    assert size(small.folder / "checkpoint-1") == pytest.approx(writes.checkpoint, rel=0.05)
    trainer.model.save_pretrained(small.folder / "finished" / "adapter")
    if peft:
        trainer.model.merge_and_unload().save_pretrained(small.folder / "finished" / "model")
    assert size(small.folder / "finished") == pytest.approx(writes.finished, rel=0.05)


def test_room_for_a_conversion(small):
    """As much as was seen on a disk: 12.46 MB at a time, for a Llama of about this shape (418,184 numbers)."""
    config = small.config()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size = 128, 256, 2, 703
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 4, 32
    config.tie_word_embeddings = True
    trainer = small.trainer("sft", model=LlamaForCausalLM(config), max_steps=1)
    assert writes_of(trainer, 1, trainer.model).conversion == pytest.approx(12.46e6, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "keep_last", "checkpoints"),
    [
        ({"max_steps": 10, "save_steps": 4}, None, 3),  # the last step is saved, too
        ({"max_steps": 10, "save_steps": 0.25}, None, 4),
        ({"max_steps": 10, "save_steps": 1}, 2, 3),
        ({"max_steps": 10, "save_steps": 8}, 2, 2),
        ({"num_train_epochs": 3, "save_steps": 1}, None, 6),  # 16 rows, 8 at a time
        ({"num_train_epochs": 3, "save_strategy": "epoch"}, None, 3),
        ({"max_steps": 3, "save_strategy": "epoch"}, None, 2),
        ({"max_steps": 10, "save_strategy": "no"}, None, 1),
    ],
)
def test_checkpoints_at_a_time(small, settings, keep_last, checkpoints):
    trainer = small.trainer("sft", rows=small.rows("demonstrations", 16), **settings)
    assert checkpoints_at_a_time(trainer.args, len(trainer.train_dataset), keep_last) == checkpoints
