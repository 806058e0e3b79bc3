"""Our head under TRL's trainers is TRL's own to float noise, and leaves everything else of the model as it was."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from alignctl.trainers.base.heads import put_head_on

pytestmark = pytest.mark.train


def test_the_same_scores_as_trl_s_head(small):
    ours, theirs = small.model, small.model
    fields = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    add_fused_lm_head(theirs, outputs=fields)
    add_fused_lm_head(ours)  # as TRL's trainers do before ours is put on top
    put_head_on(ours, nullcontext)
    ids = torch.randint(4, 300, (3, 12))
    labels = ids.masked_fill(torch.rand(3, 12) < 0.4, -100)
    found, expected = (model(input_ids=ids, labels=labels, fused_lm_head=True) for model in (ours, theirs))
    for field in (*fields, "loss", "label_mask"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-5, atol=1e-6)


def test_the_plain_forward_stays(small):
    model, plain = small.model, small.model
    put_head_on(model, nullcontext)
    ids = torch.randint(4, 300, (2, 7))
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(
        model.generate(ids, max_new_tokens=3, do_sample=False), plain.generate(ids, max_new_tokens=3, do_sample=False)
    )


def test_of_a_reference_nothing_but_log_probabilities_is_computed(small):
    """A model of its own, or the policy in training without a gradient; when it is measured there are statistics."""
    own, policy, alone = small.model, small.model, small.model
    put_head_on(own, nullcontext, statistics=False)
    put_head_on(policy, nullcontext, has_reference=True)
    put_head_on(alone, nullcontext)
    ids = torch.randint(4, 300, (2, 7))

    def entropy(model, training):
        return model.train(training)(input_ids=ids, labels=ids, fused_lm_head=True).entropy

    assert entropy(own, False) is None
    assert entropy(policy, True) is not None
    with torch.no_grad():
        assert entropy(policy, True) is None
        assert entropy(policy, False) is not None
        assert entropy(alone, True) is not None


@pytest.mark.parametrize(("method", "is_logged"), [("dpo", True), ("orpo", False)])
def test_statistics_are_of_what_is_logged(small, method, is_logged):
    ids = torch.randint(4, 300, (2, 7))
    assert (small.trainer(method).model(input_ids=ids, labels=ids, fused_lm_head=True).entropy is not None) == is_logged


def test_put_on_once(small):
    trainer = small.trainer("dpo")
    forward = copy.copy(trainer.model.forward)
    trainer._put_engine_on()
    assert trainer.model.forward == forward
    assert trainer.ref_model.on_engine


def test_in_mixed_precision_policy_and_reference_are_the_same(small):
    """They are wrapped at different times; a reference in float32 would give DPO margins out of nothing."""
    trainer = small.trainer("dpo", bf16=True, learning_rate=0.0, max_steps=1, logging_steps=1, save_strategy="no")
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert log["rewards/margins"] == 0.0


def test_an_architecture_that_is_not_known_is_refused(small):
    from transformers import AutoConfig, AutoModelForCausalLM

    from alignctl.errors import RequestError

    config = AutoConfig.for_model(
        "roberta", vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        is_decoder=True,
    )  # fmt: skip
    with pytest.raises(RequestError, match="models of type `roberta` compute their logits in a way"):
        put_head_on(AutoModelForCausalLM.from_config(config), nullcontext)
