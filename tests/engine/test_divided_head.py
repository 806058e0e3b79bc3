"""A head that ZeRO-3 divides among processes whose completions are of different lengths."""

from __future__ import annotations

import pytest
from support.processes import run_script

pytestmark = [pytest.mark.train, pytest.mark.slow]

SCRIPT = """
import torch
from torch import distributed, nn
from transformers import LlamaConfig, LlamaForCausalLM

from alignctl.engine import head
from alignctl.models.sharding import start_deepspeed_on_cpu

start_deepspeed_on_cpu()
import deepspeed

head._LOGITS_CPU = 64 * 3  # three tokens a piece: four pieces in one process, and two in the other
IDS = [torch.arange(3, 15)[None], torch.arange(20, 25)[None]]
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0},
}


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, with_entropy):
        hidden = self.model.base_model(input_ids=ids).last_hidden_state[0, :-1]
        scores = head.score_tokens(self.model, hidden, ids[0, 1:], True, entropy_gradient=with_entropy)
        return -scores.logps.sum() - (scores.entropy.sum() if with_entropy else 0)


def tiny(tied):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **size))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


for tied, with_entropy in ((True, False), (False, True)):
    whole, divided = (Loss(tiny(tied)) for _ in range(2))
    (sum(whole(ids, with_entropy) for ids in IDS) / 2).backward()
    sgd(whole).step()
    engine, *_ = deepspeed.initialize(model=divided, optimizer=sgd(divided), config=SETTINGS)
    with torch.no_grad():
        engine(IDS[distributed.get_rank()], with_entropy)  # as a reference is run
    engine.backward(engine(IDS[distributed.get_rank()], with_entropy))
    assert divided.model.get_output_embeddings().weight.numel() == 0, "it was let go of"
    engine.step()
    with deepspeed.zero.GatheredParameters(list(divided.parameters())):
        for found, expected in zip(divided.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
"""


def test_each_scores_its_pieces_in_one_run(tmp_path):
    """The gradient is that of a head that is whole, and no process waits for others."""
    run_script(SCRIPT, tmp_path, processes=2)
