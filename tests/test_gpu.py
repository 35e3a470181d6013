"""Whole parts of plum on a GPU beside the same on the CPU."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from plum._library import OPS, PROVEN
from plum.decode import SidBeamSearch
from plum.ops import codebook_sums, forced_tail, residual_quantize, trie_beam_step
from plum.quantize import KMeans, ResidualQuantizer
from plum.trie import SidTrie

pytestmark = pytest.mark.gpu
# Twice the rounding of sums of exponentials, over the levels of a search.
NEAR = 1e-4


def searched(trie: SidTrie, logits: list[torch.Tensor], score: str, backend: str):
    """Scores ``[B, W]`` and SIDs ``[B, W, L]`` of a search with prepared logits, on the CPU."""
    batch, width = logits[-1].shape[:2]
    states = trie.root_states(batch)
    scores = torch.zeros(batch, 1, device=trie.device)
    options = {"k": width, "score": score, "backend": backend}
    for level, rows in enumerate(logits):
        step = trie_beam_step(rows, scores, states, trie, level, **options)
        states, scores = step.states, step.scores
    return scores.cpu(), trie.codes_at(states[..., 0].flatten()).view(batch, width, -1).cpu()


@pytest.mark.parametrize("score", ["full", "valid"])
def test_ten_thousand_searches_as_on_the_cpu(score):
    batch, width, size, levels = 1000, 16, 256, 4
    codes = np.random.default_rng(0).integers(0, size, (20_000, levels))
    here = SidTrie.from_codes(codes, codebook_sizes=[size] * levels)
    there = SidTrie.from_codes(codes, codebook_sizes=[size] * levels).to("cuda")
    generator = torch.Generator().manual_seed(0)
    clear = total = 0
    for _ in range(10):
        shapes = [(batch, width if level else 1, size) for level in range(levels)]
        logits = [3 * torch.randn(shape, generator=generator) for shape in shapes]
        scores, sids = searched(here, logits, score, "cpu")
        found = searched(there, [rows.cuda() for rows in logits], score, "triton")
        torch.testing.assert_close(found[0], scores, rtol=0, atol=NEAR)
        gap = (scores[:, :-1] - scores[:, 1:]).amin(dim=1)
        total += batch
        clear += int((gap > NEAR).sum())
        # The last place may change with a child, just as near, that is not among those kept.
        assert torch.equal(found[1][gap > NEAR, :-1], sids[gap > NEAR, :-1])
    assert clear > 0.9 * total


def test_tails_as_on_the_cpu():
    codes = np.random.default_rng(0).integers(0, 64, (5000, 6))
    here = SidTrie.from_codes(codes, codebook_sizes=[64] * 6)
    there = SidTrie.from_codes(codes, codebook_sizes=[64] * 6).to("cuda")
    rows = torch.arange(here.num_sids)
    states = torch.stack((rows, rows + 1), dim=-1)
    expected = forced_tail(states, here, 3)
    found = forced_tail(states.cuda(), there, 3)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b)


def test_a_search_with_a_model_as_on_the_cpu():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    codes = np.random.default_rng(0).integers(0, 64, (2000, 4))
    offsets = [10, 74, 138, 202]
    build = {"codebook_sizes": [64] * 4, "token_offsets": offsets}
    prompts = torch.randint(3, 300, (8, 40), generator=torch.Generator().manual_seed(1))
    expected = SidBeamSearch(model, SidTrie.from_codes(codes, **build)).search(
        prompts, num_beams=16
    )
    trie = SidTrie.from_codes(codes, **build).to("cuda")
    found = SidBeamSearch(model.to("cuda"), trie).search(prompts.cuda(), num_beams=16)
    torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=0, atol=2e-3)
    same = (found.sids.cpu() == expected.sids).all(dim=-1).float().mean()
    assert same > 0.95


@pytest.mark.parametrize("score", ["full", "valid"])
def test_a_search_in_a_graph_is_the_search(score):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4
    )
    model = transformers.GPT2LMHeadModel(config).eval().to("cuda")
    codes = np.random.default_rng(0).integers(0, 64, (2000, 4))
    build = {"codebook_sizes": [64] * 4, "token_offsets": [10, 74, 138, 202]}
    trie = SidTrie.from_codes(codes, **build).to("cuda")
    plain = SidBeamSearch(model, trie, score=score)
    captured = SidBeamSearch(model, trie, score=score, cuda_graphs=True)
    prompts = torch.randint(3, 300, (3, 8, 40), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(prompts[0])
    mask[2, :7] = 0
    for prompt in prompts:
        for beams in (16, 5):
            expected = plain.search(prompt, mask, num_beams=beams)
            found = captured.search(prompt, mask, num_beams=beams)
            torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=2e-3)
            assert (found.sids == expected.sids).all(dim=-1).float().mean() > 0.95
    # What is found is the caller's: the next search leaves it.
    kept = found.scores.clone()
    captured.search(prompts[0], mask, num_beams=5)
    assert torch.equal(found.scores, kept)
    for deny in (found.item_ids, [[0]] * 8, [[]] * 8):
        limited = {"num_beams": 5, "deny": deny, "allow": range(1500)}
        expected = plain.search(prompts[0], mask, **limited)
        again = captured.search(prompts[0], mask, **limited)
        torch.testing.assert_close(again.scores, expected.scores, rtol=0, atol=2e-3)
        for items, denied in zip(again.item_ids, deny, strict=True):
            assert not set(items) & set(denied) and max(items) < 1500


@pytest.mark.parametrize("mostly", [False, True])
def test_sums_as_on_the_cpu(mostly):
    """Of more rows than are sorted at a time, also where most are on one code."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300_000, 96, generator=generator)
    books = [torch.randn(size, 96, generator=generator) for size in (256, 64)]
    codes = torch.stack([torch.randint(len(b), (len(x),), generator=generator) for b in books], 1)
    if mostly:
        codes[::2] = 3
    expected = codebook_sums(x, codes, books)
    there = [book.cuda() for book in books]
    found = codebook_sums(x.cuda(), codes.cuda(), there, backend="triton")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-8)
    again = codebook_sums(x.cuda(), codes.cuda(), there, backend="triton")
    assert torch.equal(found, again)


def test_k_means_and_a_quantizer_are_trained():
    generator = torch.Generator().manual_seed(0)
    centers = 4 * torch.randn(32, 24, generator=generator)
    x = centers.repeat(64, 1) + 0.1 * torch.randn(2048, 24, generator=generator)
    means = KMeans(32, seed=0).fit(x.cuda())
    assert means.centroids.is_cuda and means.inertia < 2048 * 24 * 0.1**2 * 1.05
    quantizer = ResidualQuantizer(24, [32, 16]).cuda().train()
    quantizer.init_codebooks(x.cuda())
    for _ in range(30):
        output = quantizer(x.cuda())
    # The noise is what is left.
    assert output.residual.square().mean() < 0.1**2
    quantizer.eval()
    books = [book.cpu() for book in quantizer.codebooks]
    expected = residual_quantize(x, books).codes
    assert torch.equal(quantizer.encode(x.cuda()).cpu(), expected)


def test_what_is_taken_by_default():
    """On a GPU that the kernels are proven on; others warn and take the reference."""
    if torch.cuda.get_device_capability()[0] not in PROVEN:
        pytest.skip("no kernel is the default on this GPU")
    for name, op in OPS.items():
        if any(backend.device == "cuda" and backend.proven for backend in op.backends.values()):
            assert op.default_backend("cuda") in ("cuda", "wgmma", "triton"), name
    generator = torch.Generator().manual_seed(0)
    # The last is wider than the CUDA search takes.
    for width in (32, 384, 768):
        x = torch.randn(1000, width, generator=generator)
        books = [torch.randn(64, width, generator=generator) for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = residual_quantize(x.cuda(), [book.cuda() for book in books])
        assert torch.equal(found.codes.cpu(), residual_quantize(x, books).codes)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_kernels_run_where_their_tensors_are():
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    codes = np.random.default_rng(0).integers(0, 64, (5000, 3))
    trie = SidTrie.from_codes(codes, codebook_sizes=[64] * 3)
    logits = torch.randn(2, 1, 64)
    args = torch.zeros(2, 1), trie.root_states(2), trie, 0
    expected = trie_beam_step(logits, *args, k=8)
    there = trie.to(last)
    step = trie_beam_step(
        logits.to(last), torch.zeros(2, 1, device=last), there.root_states(2), there, 0, k=8
    )
    assert step.scores.device == last
    torch.testing.assert_close(step.scores.cpu(), expected.scores, rtol=0, atol=NEAR)
