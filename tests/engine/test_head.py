"""The chunked head gives the numbers and gradients of the full logits."""

import pytest
from support.models import tiny

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train


def narrow(**options):
    return tiny(hidden_size=16, intermediate_size=32, num_hidden_layers=1, **options).double()


@pytest.mark.parametrize("chunk", [1, 3, 10, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_numbers_and_gradients_whatever_the_chunk(monkeypatch, chunk, tied):
    from alignctl.engine import head

    monkeypatch.setattr(head, "_LOGITS_CPU", 64 * chunk)
    model = narrow(tie_word_embeddings=tied)
    ids = torch.randint(0, 64, (2, 6))
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].reshape(10, 16)
    scores = head.score_tokens(model, hidden, ids[:, 1:].reshape(10), statistics=True)
    weights = torch.arange(1.0, 11.0)
    (scores.logps * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    logits = model(input_ids=ids).logits[:, :-1].reshape(10, 64)
    full = logits.log_softmax(-1)
    logps = full.gather(1, ids[:, 1:].reshape(10, 1)).squeeze(1)
    (logps * weights).sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5}  # logits are float32 in the head
    torch.testing.assert_close(scores.logps.double(), logps, **close)
    torch.testing.assert_close(scores.entropy.double(), -(full.exp() * full).sum(-1), **close)
    torch.testing.assert_close(scores.mean_logits.double(), logits.mean(-1), **close)
    torch.testing.assert_close(scores.log_sum_sq_probs.double(), (2 * full).logsumexp(-1), **close)
    assert (scores.is_top1 == (logits.argmax(-1) == ids[:, 1:].reshape(10))).all()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize(("cap", "temperature"), [(None, 1.0), (0.5, 0.1)])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_head_that_is_not_trained_gives_the_same_gradient(monkeypatch, chunk, cap, temperature, mixed):
    """It is taken in the forward pass. In mixed precision it is rounded, but not otherwise than by autograd."""
    from alignctl.engine import head

    monkeypatch.setattr(head, "_LOGITS_CPU", 64 * chunk)
    model = narrow().float()
    model.config.final_logit_softcapping = cap
    torch.manual_seed(1)
    hidden, targets, weights = torch.randn(10, 16, requires_grad=True), torch.randint(0, 64, (10,)), torch.randn(10)
    found = {}
    for trained in (True, False):
        model.lm_head.requires_grad_(trained)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            scores = head.score_tokens(model, hidden, targets, True, temperature)
        assert not any(one.requires_grad for one in scores[1:])
        # not the same weight for all, as in a loss that is not a sum
        found[trained] = [*scores, *torch.autograd.grad((scores.logps * weights).sigmoid().sum(), hidden)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if mixed else 1e-5, atol=2e-3 if mixed else 1e-6)


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 4)])
def test_logits_are_made_once_where_the_head_is_not_trained(monkeypatch, trained, products):
    """Matrix products of the size of the head: there and back; a trained head has a gradient too, and chunks again."""
    from torch.utils.flop_counter import FlopCounterMode

    from alignctl.engine import head

    monkeypatch.setattr(head, "_LOGITS_CPU", 64 * 3)
    model = narrow()
    model.lm_head.requires_grad_(trained)
    hidden = torch.randn(10, 16, dtype=torch.double, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        head.score_tokens(model, hidden, torch.arange(10), True).logps.sum().backward()
    assert counted.get_total_flops() == products * 2 * 10 * 16 * 64


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_the_entropy_s_gradient_is_that_of_the_full_logits(monkeypatch, chunk, cap):
    from alignctl.engine import head

    monkeypatch.setattr(head, "_LOGITS_CPU", 64 * chunk)
    model = narrow()
    model.config.final_logit_softcapping = cap
    ids = torch.randint(0, 64, (2, 6))
    targets, weights = ids[:, 1:].reshape(10), torch.arange(1.0, 11.0)
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].reshape(10, 16)
    scores = head.score_tokens(model, hidden, targets, True, temperature=0.1, entropy_gradient=True)
    (scores.entropy * weights + scores.logps).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].reshape(10, 16)
    logits = model.lm_head(hidden)
    full = ((torch.tanh(logits / cap) * cap if cap else logits) / 0.1).log_softmax(-1)
    entropy = -(full.exp() * full).sum(-1)
    (entropy * weights + full.gather(1, targets[:, None]).squeeze(1)).sum().backward()
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm() > 0
        # logits are float32 in the head
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 100])
def test_the_entropy_s_gradient_keeps_no_more_than_the_logits(monkeypatch, chunk):
    """Bytes that autograd keeps: with the gradient of the entropy at most a few more per token."""
    from alignctl.engine import head

    monkeypatch.setattr(head, "_LOGITS_CPU", 64 * chunk)
    model, kept = narrow(), []
    for entropy_gradient in (False, True):
        found = {}

        def keep(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hidden = torch.randn(10, 16, dtype=torch.double, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = head.score_tokens(model, hidden, torch.arange(10), True, entropy_gradient=entropy_gradient)
        kept.append(sum(found.values()))
        del scores
    assert kept[1] <= kept[0] + 10 * 16  # bytes: less than the logits of one token


def test_the_entropy_s_gradient_in_float64():
    from alignctl.engine.head import _EntropyGradient

    def entropy(logits):
        log_probs = logits.detach().log_softmax(-1)
        return _EntropyGradient.apply(logits, log_probs, -(log_probs.exp() * log_probs).sum(-1))

    assert torch.autograd.gradcheck(entropy, torch.randn(5, 7, dtype=torch.float64, requires_grad=True) * 3)


def test_without_being_asked_for_the_entropy_has_no_gradient():
    from alignctl.engine.head import score_tokens

    model = narrow()
    scores = score_tokens(model, torch.randn(4, 16, dtype=torch.double, requires_grad=True), torch.arange(4), True)
    assert scores.logps.requires_grad
    assert not scores.entropy.requires_grad


def test_no_tokens_give_no_scores_and_keep_the_graph():
    from alignctl.engine.head import score_tokens

    model = narrow()
    hidden = torch.zeros(0, 16, dtype=torch.double, requires_grad=True)
    scores = score_tokens(model, hidden, torch.zeros(0, dtype=torch.long))
    assert scores.logps.shape == (0,)
    scores.logps.sum().backward()
