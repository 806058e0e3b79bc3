"""Packed rows hold every token once, and give each sequence the hidden states it has by itself."""

import random

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from alignctl.engine import layout as engine  # noqa: E402


def sequences_of(*rows):
    return [torch.tensor(row) for row in rows]


PAIR = sequences_of([5, 6, 7, 8, 9], [5, 6, 7, 20])
ODD = sequences_of(
    [5, 6, 7, 8], [5, 6, 7, 8],  # the same twice
    [5, 6], [5, 6, 9, 9],  # one begins the other
    [1], [2],  # nothing in common
    [4, 4, 4, 4, 4, 4],  # by itself
)  # fmt: skip
ODD_GROUPS = [(0, 1), (2, 3), (4, 5), (6,)]


def test_a_pair_by_hand():
    packed = engine.pack(PAIR, [(0, 1)])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 20]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert packed.where.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]
    assert packed.groups == (engine.Group(0, 3, (2, 1)),)


def random_groups(seed):
    """Sequences of ragged lengths in groups of one to four, with beginnings in common of 0 to 12 tokens."""
    draw = random.Random(seed)
    rows, groups = [], []
    for _ in range(4):
        common = [draw.randrange(4, 60) for _ in range(draw.randrange(0, 13))]
        members = range(len(rows), len(rows) + draw.randrange(1, 5))
        rows += [common + [draw.randrange(4, 60) for _ in range(draw.randrange(1, 9))] for _ in members]
        groups.append(tuple(members))
    draw.shuffle(groups)
    return sequences_of(*rows), groups


# By themselves, and some of one length side by side.
ALONE = sequences_of([5, 6, 7], [8, 9, 10], [11, 12], [13, 14], [15, 16], [17], [18, 19, 20])
CASES = [
    (PAIR, [(0, 1)]),
    (ODD, ODD_GROUPS),
    (ALONE, [(number,) for number in range(len(ALONE))]),
    *map(random_groups, range(4)),
]


@pytest.mark.parametrize(("rows", "groups"), CASES)
def test_every_token_is_found_again(rows, groups):
    packed = engine.pack(rows, groups)
    for row, where in zip(rows, packed.where, strict=True):
        assert packed.input_ids[0, where[: len(row)]].tolist() == row.tolist()
        assert packed.position_ids[0, where[: len(row)]].tolist() == list(range(len(row)))


@pytest.mark.parametrize(("rows", "groups"), CASES)
def test_the_mask_says_who_looks_at_whom(rows, groups):
    """A token looks at what stands before it in a sequence that both are in, and at nothing else."""
    packed = engine.pack(rows, groups)
    length = packed.input_ids.numel()
    expected = torch.zeros(length, length, dtype=torch.bool)
    for row, where in zip(rows, packed.where, strict=True):
        for end in range(len(row)):
            expected[where[end], where[: end + 1]] = True
    query, key = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(packed.block_mask.mask_mod(0, 0, query, key), expected)


@pytest.mark.parametrize(("rows", "groups"), CASES)
def test_hidden_states_are_those_of_each_sequence_alone(rows, groups):
    from support.models import tiny

    from alignctl.engine.forward import last_hidden
    from alignctl.models.packing import put_packed_attention_on

    plain, model = tiny("llama").double(), tiny("llama").double()
    assert put_packed_attention_on(model, torch.device("cpu")) is None
    packed = engine.pack(rows, groups)
    with torch.no_grad():
        hidden = last_hidden(model, packed)
        for row, where in zip(rows, packed.where, strict=True):
            alone = plain.base_model(row[None]).last_hidden_state[0]
            torch.testing.assert_close(hidden[where[: len(row)]], alone, rtol=1e-10, atol=1e-10)


def test_the_two_kernels_agree():
    """FlexAttention runs without a GPU too, but there it has no gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    from alignctl.engine.attention import sdpa_by_parts

    rows, groups = random_groups(7)
    packed = engine.pack(rows, groups)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, packed.input_ids.numel(), 16) for heads in (4, 2, 2))
    flex = flex_attention(query, key, value, block_mask=packed.block_mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(sdpa_by_parts(query, key, value, packed, 0.3, 0.0), flex, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a gradient on GPUs alone")
@pytest.mark.parametrize("seed", range(3))
def test_flex_attention_has_the_gradient_of_padded_rows(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignctl.engine.forward import last_hidden
    from alignctl.models.packing import put_packed_attention_on

    rows, groups = random_groups(seed)
    device = torch.device("cuda")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    gradients = []
    for packed in (True, False):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(device)
        if packed:
            assert put_packed_attention_on(model, device) is None
            assert model.packed_attention == "flex"  # the flash kernel has no float32
        layout = engine.pack(rows, groups, device) if packed else engine.pad(rows, 0, device)
        hidden = last_hidden(model, layout)
        loss = sum(hidden[where[: len(row)]].square().sum() for row, where in zip(rows, layout.where, strict=True))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.base_model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()  # float32


def span_by_span(query, key, value, spans, scale):
    """What a kernel for sequences of several lengths does, one after the other and in plain torch."""
    ends = zip(spans.query_ends.tolist(), spans.key_ends.tolist(), strict=True)
    parts, (first, first_key) = [], next(ends)
    for end, end_key in ends:
        queries, keys = end - first, end_key - first_key
        assert 0 < queries <= min(spans.longest_query, keys)
        assert keys <= spans.longest_key
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)  # aligned at the end
        q, k, v = (
            one[begin:until].transpose(0, 1)
            for one, begin, until in ((query, first, end), (key, first_key, end_key), (value, first_key, end_key))
        )
        attention = torch.nn.functional.scaled_dot_product_attention
        parts.append(attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(0, 1))
        first, first_key = end, end_key
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize(("rows", "groups"), CASES)
def test_joined_parts_have_the_output_and_gradients_of_masked_ones(rows, groups, dtype):
    from alignctl.engine.attention import joined, sdpa_by_parts

    packed = engine.pack(rows, groups)
    torch.manual_seed(0)
    exact = [
        torch.randn(1, heads, packed.input_ids.numel(), 16, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    weights = torch.randn(1, 4, packed.input_ids.numel(), 16)

    def run(attend, dtype):
        out = attend(*(one.to(dtype) for one in exact))
        return [out, *torch.autograd.grad((out * weights).sum(), exact)]

    right = run(lambda *inputs: sdpa_by_parts(*inputs, packed, 0.3, 0.0), torch.float64)
    found = run(lambda *inputs: joined(*inputs, packed, 0.3), dtype)
    rounded = 1e-12 if dtype == torch.float64 else 2**-7  # bfloat16 keeps 8 bits, and what is joined is rounded twice
    for one, other in zip(found, right, strict=True):
        assert (one.double() - other).norm() <= rounded * other.norm()


@pytest.mark.parametrize(("rows", "groups"), CASES)
def test_by_spans_a_row_and_its_gradients_are_those_part_by_part(rows, groups):
    from alignctl.engine.attention import by_spans, sdpa_by_parts

    packed = engine.pack(rows, groups)
    assert (packed.spans.keys is None) == (not any(group.branches and group.shared for group in packed.groups))
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, packed.input_ids.numel(), 16, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(1, 4, packed.input_ids.numel(), 16)
    expected = sdpa_by_parts(*inputs, packed, 0.3, 0.0)
    found = by_spans(*inputs, packed, 0.3, span_by_span)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad((one * weights).sum(), inputs) for one in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_the_flash_kernel_is_called_as_this_torch_has_it():
    """Without a GPU it knows shapes alone: lengths, fewer heads of keys, and that it has a gradient."""
    from alignctl.engine.attention import by_spans, flash

    packed = engine.pack(*random_groups(7), device=torch.device("meta"))
    length = packed.input_ids.numel()
    inputs = [
        torch.empty(1, heads, length, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for heads in (4, 2, 2)
    ]
    found = by_spans(*inputs, packed, 0.3, flash)
    assert found.shape == (1, 4, length, 16)
    found.sum().backward()
    assert [one.grad.shape for one in inputs] == [one.shape for one in inputs]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernel runs on GPUs alone")
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("seed", range(3))
def test_the_flash_kernel_errs_no_more_than_flex_attention(seed, head_size):
    from torch.nn.attention.flex_attention import flex_attention

    from alignctl.engine.attention import by_spans, flash, sdpa_by_parts

    rows, groups = random_groups(seed)
    packed = engine.pack(rows, groups, torch.device("cuda"))
    torch.manual_seed(seed)
    exact = [
        torch.randn(1, heads, packed.input_ids.numel(), head_size, device="cuda", requires_grad=True)
        for heads in (4, 2, 2)
    ]
    weights = torch.randn_like(exact[0])

    def run(attend, dtype):
        inputs = [one.to(dtype) for one in exact]
        out = attend(*inputs)
        return [out, *torch.autograd.grad((out.float() * weights).sum(), exact)]

    expected = run(lambda *inputs: sdpa_by_parts(*inputs, packed, None, 0.0), torch.float64)
    ours = run(lambda *inputs: by_spans(*inputs, packed, None, flash), torch.bfloat16)
    options = {"block_mask": packed.block_mask, "enable_gqa": True}
    flex = run(lambda *inputs: torch.compile(flex_attention)(*inputs, **options), torch.bfloat16)
    for one, other, right in zip(ours, flex, expected, strict=True):
        # a tenth more for the order of additions, of few values here
        assert (one - right).norm() <= 1.1 * (other - right).norm()


def test_padded_batches_are_found_in_the_row():
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0], [5, 6, 11, 12, 0], [8, 9, 10, 0, 0]])
    packed = engine.pack_rows(ids, (ids != 0).long(), blocks=2)
    assert packed.input_ids.tolist() == [[5, 6, 7, 11, 12, 8, 9, 10]]
    assert packed.where.shape == ids.shape
    for row, where in zip(ids, packed.where, strict=True):
        assert torch.equal(packed.input_ids[0, where][row != 0], row[row != 0])


def test_rows_that_are_packed_already():
    ids, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 0, 1, 2]])
    packed = engine.packed_already(ids, positions)
    assert packed.groups == (engine.Group(0, 2, ()), engine.Group(2, 3, ()))
    assert packed.where.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("padded", "expected"), [(False, [[1], [3, 0], [2, 4]]), (True, [[1], [3], [0, 2], [4]])], ids=["packed", "padded"]
)
def test_passes_hold_a_budget_of_tokens(padded, expected):
    # The largest first; one that is larger than the budget has a pass to itself.
    assert list(engine.bins([4, 12, 3, 6, 3], budget=10, padded=padded)) == expected
