from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from plum.errors import BackendUnavailable, InvalidArgument
from plum.ops.trie_mask import trie_mask, trie_mask_
from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie

from ..trie_backends import RUNNERS, running

INF = float("inf")


def masked_by_hand(logits, prefixes, codes, level, offset):
    out = torch.full_like(logits, -INF)
    sids = {tuple(sid) for sid in codes.tolist()}
    for row, prefix in enumerate(prefixes):
        for sid in sids:
            if list(sid[:level]) == prefix:
                out[row, sid[level] + offset] = logits[row, sid[level] + offset]
    return out


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 8),
    size=st.sampled_from([1, 2, 7, 90]),
    rows=st.sampled_from([1, 5, 40, 600]),
    vocabulary=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    runner=st.sampled_from(RUNNERS),
)
def test_only_legal_columns_stay(seed, depth, size, rows, vocabulary, dtype, runner):
    random = np.random.default_rng(seed)
    codes = random.integers(0, size, (rows, depth))
    offsets = (5 + size * np.arange(depth)).tolist()
    trie = SidTrie.from_codes(codes, codebook_sizes=[size] * depth, token_offsets=offsets)
    level = int(random.integers(0, depth))
    width = 5 + size * depth + 2 if vocabulary else size
    prefixes = [*random.permutation(codes)[:6, :level].tolist(), [size - 1] * level]
    states = trie_walk(torch.tensor(prefixes).view(len(prefixes), level).long(), trie)
    logits = torch.randn(len(prefixes), width).to(dtype)
    offset = offsets[level] if vocabulary else 0
    logits[torch.from_numpy(random.random(logits.shape) < 0.1)] = float("nan")
    expected = masked_by_hand(logits, prefixes, codes, level, offset)
    before = logits.clone()
    with running(runner, threads=int(random.integers(1, 4))) as backend:
        copy = trie_mask(logits, states, trie, level, backend=backend)
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(copy, expected, rtol=0, atol=0, equal_nan=True)
        result = trie_mask_(logits, states, trie, level, backend=backend)
    assert result is logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)


def test_leading_dimensions_strides_nan_and_the_dead_state():
    trie = SidTrie.from_codes([[0], [2]], codebook_sizes=[4])
    base = torch.arange(16.0).view(4, 2, 2).transpose(0, 2)
    base[0, 0, 0] = float("nan")
    states = trie.root_states(2).expand(2, 2, 2).clone()
    states[1, 1] = 0
    expected = base.clone()
    expected[..., [1, 3]] = -INF
    expected[1, 1] = -INF
    assert not base.is_contiguous()
    copy = trie_mask(base, states, trie, 0)
    assert copy.is_contiguous()
    torch.testing.assert_close(copy, expected, equal_nan=True)
    torch.testing.assert_close(trie_mask_(base, states, trie, 0), expected, equal_nan=True)
    shared = torch.randn(1, 1, 4).expand(2, 2, 4)
    assert torch.equal(trie_mask(shared, states, trie, 0)[0, 0, [0, 2]], shared[0, 0, [0, 2]])


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
def test_the_gradient_flows_to_what_is_legal(backend):
    trie = SidTrie.from_codes([[0], [2]], codebook_sizes=[4])
    states = trie.root_states(6).view(3, 2, 2)
    logits = torch.randn(4, 2, 3, requires_grad=True)
    masked = trie_mask(logits.permute(2, 1, 0), states, trie, 0, backend=backend)
    assert masked.is_contiguous()
    legal = torch.tensor([1, 0, 1, 0]).view(4, 1, 1)
    weight = torch.arange(24.0).view(3, 2, 4)
    masked.exp().mul(weight).sum().backward()
    torch.testing.assert_close(
        logits.grad, (logits.exp() * weight.permute(2, 1, 0) * legal).detach()
    )


def test_forward_derivatives_flow_to_what_is_legal():
    trie = SidTrie.from_codes([[0], [2]], codebook_sizes=[4])
    state, tangent = trie.root_states(1)[0], torch.arange(1.0, 5.0)[None]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.zeros(1, 4), tangent)
        found = forward_ad.unpack_dual(trie_mask(dual, state, trie, 0))
    assert found.primal.tolist() == [[0, -INF, 0, -INF]]
    assert found.tangent.tolist() == [[1, 0, 3, 0]]
    _, found = torch.func.jvp(lambda x: trie_mask(x, state, trie, 0), (dual * 0,), (tangent,))
    assert found.tolist() == [[1, 0, 3, 0]]


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
def test_autograd_notices_that_what_it_saved_was_masked(backend):
    trie = SidTrie.from_codes([[0], [2]], codebook_sizes=[4])
    saved = torch.zeros(1, 4, requires_grad=True).exp()
    with torch.no_grad():
        trie_mask_(saved, trie.root_states(1)[0], trie, 0, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    with torch.inference_mode():
        logits = torch.zeros(1, 4)
        trie_mask_(logits, trie.root_states(1)[0], trie, 0, backend=backend)
    assert logits.tolist() == [[0, -INF, 0, -INF]]


@pytest.mark.parametrize("runner", RUNNERS)
def test_rows_at_any_distance(runner):
    random = np.random.default_rng(3)
    trie = SidTrie.from_codes(random.integers(0, 40, (70, 2)), codebook_sizes=[40, 40])
    states = trie_walk((torch.arange(90) % 40).view(90, 1), trie)
    whole = torch.randn(5, 4, 3, 9, 40)
    for view in (whole[:, :, 0, 0], whole[:, 1:3, 2], whole[1, ..., 3, :].transpose(0, 1)):
        before, below = whole.clone(), states[: view[..., 0].numel()].view(*view.shape[:-1], 2)
        expected = trie_mask_(view.contiguous(), below, trie, 1, backend="reference")
        with running(runner) as backend:
            trie_mask_(view, below, trie, 1, backend=backend)
        assert torch.equal(view, expected)
        changed = int((whole != before).sum())
        assert changed == int((expected == -INF).sum()) > 0
        whole.copy_(before)


def test_rows_behind_2_to_the_31():
    trie = SidTrie.from_codes([[0], [2]], codebook_sizes=[3])
    step = (1 << 31) + 5
    # Only the pages that are written become memory.
    rows = torch.empty(step + 3, dtype=torch.bfloat16).as_strided((2, 3), (step, 1))
    rows.fill_(1)
    trie_mask_(rows, trie.root_states(2)[:, 0], trie, 0, backend="cpu")
    assert rows.tolist() == [[1, -INF, 1]] * 2


def test_many_rows_on_several_threads():
    random = np.random.default_rng(4)
    codes = random.integers(0, 300, (3000, 2))
    trie = SidTrie.from_codes(codes, codebook_sizes=[300, 300])
    states = trie_walk(torch.from_numpy(codes[:2000, :1]), trie)
    logits = torch.randn(2000, 300)
    expected = trie_mask_(logits.clone(), states, trie, 1, backend="reference")
    with running(RUNNERS[-1], threads=3) as backend:
        assert torch.equal(trie_mask_(logits, states, trie, 1, backend=backend), expected)


def test_one_memory_for_several_rows_is_refused():
    trie = SidTrie.from_codes([[0], [2]], codebook_sizes=[3])
    states = trie.root_states(2)[:, 0]
    for shared in (torch.zeros(1, 3).expand(2, 3), torch.zeros(5).as_strided((2, 3), (2, 1))):
        with pytest.raises(InvalidArgument, match="logits: expected rows with memory of their own"):
            trie_mask_(shared, states, trie, 0)
    apart = torch.zeros(7).as_strided((2, 3), (4, 1))
    assert (trie_mask_(apart, states, trie, 0) == 0).tolist() == [[True, False, True]] * 2


def test_the_arrays_of_a_trie_may_move():
    trie = SidTrie.from_codes([[0, 1], [2, 0]], codebook_sizes=[3, 3])
    states = trie.root_states(1)[:, 0]
    expected = trie_mask(torch.zeros(1, 3), states, trie, 0)
    before = [tensor.data_ptr() for tensor in trie.index]
    for tensor in trie.index:  # as when a trie is sent to another process
        tensor.share_memory_()
    assert any(tensor.data_ptr() != at for tensor, at in zip(trie.index, before, strict=True))
    assert torch.equal(trie_mask(torch.zeros(1, 3), states, trie, 0), expected)
    trie.insert([[1, 1]], [2])
    assert (trie_mask(torch.zeros(1, 3), trie.root_states(1)[:, 0], trie, 0) == 0).all()


def test_refuses_what_does_not_fit():
    trie = SidTrie.from_codes([[0, 1], [2, 0]], codebook_sizes=[3, 4])
    root = trie.root_states(1)[:, 0]
    with pytest.raises(InvalidArgument, match="expected 3 columns, the codes of level 0, got 9"):
        trie_mask_(torch.zeros(1, 9), root, trie, 0)
    with pytest.raises(InvalidArgument, match="logits: expected float32, bfloat16 or float16"):
        trie_mask_(torch.zeros(1, 3, dtype=torch.int64), root, trie, 0)
    with pytest.raises(InvalidArgument, match="logits: expected shape"):
        trie_mask_(torch.zeros(2, 3), root, trie, 0)
    with pytest.raises(InvalidArgument, match="without gradient"):
        trie_mask_(torch.zeros(1, 3, requires_grad=True) * 1, root, trie, 0)
    with pytest.raises(InvalidArgument, match="backend: expected one of"):
        trie_mask_(torch.zeros(1, 3), root, trie, 0, backend="fastest")
    with pytest.raises(BackendUnavailable, match="trie_mask_"):
        trie_mask_(torch.zeros(1, 3), root, trie, 0, backend="cuda")
    tokens = SidTrie.from_codes([[0, 1], [2, 0]], codebook_sizes=[3, 4], token_offsets=[10, 13])
    with pytest.raises(InvalidArgument, match="a column for token 16 of level 1, got 16 columns"):
        trie_mask_(torch.zeros(1, 16), root, tokens, 1)


def test_opcheck_and_compile():
    trie = SidTrie.from_codes(np.random.default_rng(0).integers(0, 9, (60, 2)))
    states, logits = trie.root_states(3)[:, 0], torch.randn(3, 9)
    args = (logits.clone(), states, list(trie.index), 0, None, [0, 0])
    torch.library.opcheck(torch.ops.plum.trie_mask_.default, args)
    torch.library.opcheck(torch.ops.plum.trie_mask.default, args)
    compiled = torch.compile(lambda x, s: trie_mask_(x * 2, s, trie, 0), fullgraph=True)
    assert torch.equal(compiled(logits, states), trie_mask_(logits * 2, states, trie, 0))
