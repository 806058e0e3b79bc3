"""No method holds the logits of a whole batch: peak memory of one optimizer step with a vocabulary of 128k. What a long
row keeps for the backward pass grows as its tokens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.methods import METHODS

pytestmark = pytest.mark.train

VOCABULARY, LENGTH, SEQUENCES = 128_256, 256, 8
FULL_LOGITS = SEQUENCES * LENGTH * VOCABULARY * 4  # bytes in float32: 1.05 GB

# In a process of its own: the peak of one step, less what was there before it, in bytes.
STEP = """
import resource, sys
from pathlib import Path
from support.methods import METHODS
from support.small import Small
name, folder, length, sequences, vocabulary = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
from datasets import Dataset
from transformers import LlamaForCausalLM
import torch
small = Small(Path(folder))
config = small.config()
config.vocab_size, config.max_position_embeddings = vocabulary, 2 * length
a = len(small.tokenizer(" dog")["input_ids"])
long = " dog" * ((length - 8) // a)
prompt = [{"role": "user", "content": "hi"}]
def said(text):
    return [{"role": "assistant", "content": text}]
from alignctl.methods.registry import methods
method = methods()[name]
row = {
    "demonstrations": {"prompt": prompt, "completion": said(long)},
    "preferences": {"prompt": prompt, "chosen": said(long), "rejected": said("b" + long)},
    "feedback": {"prompt": prompt, "completion": said(long), "label": True},
}[method.data_kind]
count = sequences // 2 if method.data_kind == "preferences" else sequences
rows = [dict(row) for _ in range(count)]
if method.data_kind == "feedback":
    rows = [dict(row, label=i % 2 == 0) for i, row in enumerate(rows)]
model = LlamaForCausalLM(config)
roles = {"ref_model": LlamaForCausalLM(config)} if "reference" in method.roles else {}
from alignctl.methods.registry import resolve
args = small.arguments(
    resolve(method.config_class), per_device_train_batch_size=count, max_length=length, max_steps=1,
    gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, **METHODS[name].memory,
)
trainer = resolve(method.trainer)(
    model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=small.tokenizer, **roles
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trainer.train()
print("PEAK", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


# KTO, IPO and SimPO run as these do; a reward model has no logits over a vocabulary.
@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.memory is not None])
def test_one_step_stays_below_the_full_logits(tmp_path, name, root):
    quiet = {"OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STEP, name, str(tmp_path), *map(str, (LENGTH, SEQUENCES, VOCABULARY))],
        cwd=root, env=os.environ | quiet | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.rpartition("PEAK")[2])
    print(f"{name}: {peak / 2**20:,.0f} MiB above what was loaded; full logits {FULL_LOGITS / 2**20:,.0f} MiB")
    # Who makes the full logits holds them at least once, and their gradient beside them. Seen: 440 to 540 MiB.
    assert peak < 0.75 * FULL_LOGITS


def kept_per_token(small, name, tokens, dropout):
    """Bytes that an optimizer step keeps for its backward pass, by tokens of a row."""
    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM

    config = small.config()
    config.max_position_embeddings, config.attention_dropout = 2 * tokens, dropout
    word = len(small.tokenizer(" dog")["input_ids"])
    prompt, answer = (" dog" * (count // word) for count in (tokens * 3 // 4, tokens // 4 - 8))
    row = {"prompt": prompt, "chosen": answer, "rejected": " cat" + answer}
    if name == "sft":
        row = {"prompt": prompt, "completion": answer}
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    trainer = small.trainer(
        name, model=model, rows=Dataset.from_list([row]), max_length=tokens, max_steps=1, save_strategy="no",
        per_device_train_batch_size=1, disable_tqdm=True,
    )  # fmt: skip
    storages, step = {}, trainer.training_step

    def kept(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def watched(*args, **options):
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            return step(*args, **options)

    trainer.training_step = watched
    trainer.train()
    assert trainer.model.packed_attention == "sdpa"
    return sum(storages.values()) / tokens


@pytest.mark.parametrize("longest", [8192, pytest.param(32768, marks=pytest.mark.night)])
@pytest.mark.parametrize(("name", "dropout"), [("dpo", 0.0), ("sft", 0.1)], ids=["pairs", "with dropout"])
def test_what_a_long_row_keeps_for_its_backward_pass_grows_as_its_tokens(tmp_path, name, dropout, longest):
    from support.small import Small

    short, long = (kept_per_token(Small(tmp_path), name, tokens, dropout) for tokens in (2048, longest))
    print(f"{name}: {short:,.0f} and {long:,.0f} bytes a token")
    assert long < 1.1 * short  # a mask of 8,192 tokens in every layer would be 3 times as much
