"""Documents, their targets, and rows in which they are packed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument, InvalidData
from plum.lm import ItemTexts, load_generator
from plum.lm.corpus import (
    Document,
    Documents,
    PackedBatches,
    behavior_documents,
    general_documents,
    metadata_documents,
    pack,
    packed_batch,
    tokenize,
)
from plum.lm.pretraining import check_packing
from plum.sid import SidVocabulary

from ..text_base import build_text_base

SIDS = ["<a>", "<b>", "<c>", "<d>"]
VOCABULARY = SidVocabulary((4, 5, 3))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return build_text_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def reader(base):
    return load_generator(base, VOCABULARY, seed=1)


def test_histories_are_written_with_attributes_between_the_items():
    history = [np.array([0, 1, 2, 3, 0]), np.array([2]), np.array([], dtype=int)]
    found = list(behavior_documents(SIDS, ["x", "", "z", "w"], history, 2))
    assert found == [
        Document("behavior", "wh =<c> z<d> w ||", "<a>"),
        Document("behavior", "wh =<a> x<b> ||", "<c>"),
    ]


@pytest.mark.parametrize("length", [2, 3, 6, 7, 8, 20])
@pytest.mark.parametrize("most", [1, 3, 50])
def test_transitions_are_told_once_each(length, most):
    sids = [f"<{n}>" for n in range(length)]
    documents = list(behavior_documents(sids, [""] * length, [np.arange(length)], most))
    runs = [d.prompt.removeprefix("wh =").removesuffix(" ||") + d.target for d in documents]
    items = [[int(part) for part in run.strip("<>").split("><")] for run in runs]
    pairs = sorted(pair for run in items for pair in itertools.pairwise(run))
    assert pairs == [(n, n + 1) for n in range(length - 1)]
    assert max(map(len, items)) <= most + 1 and items[0][-1] == length - 1


def test_items_are_told_both_ways():
    items = ItemTexts(["tent (red)", ""], {"title": ["tent", "lamp"], "kind": [None, "light"]}, [])
    assert list(metadata_documents(SIDS[:2], items, [1, 0])) == [
        Document("sid_to_text", "Item<b> has title:", " lamp"),
        Document("sid_to_text", "Item<b> has kind:", " light"),
        Document("sid_to_text", "Item<a> has title:", " tent"),
        Document("text_to_sid", "tent (red) is item", "<a>"),
    ]


def test_targets_are_found_and_decode_to_themselves(reader):
    sid = "".join(VOCABULARY.tokens_of((1, 2, 0)))
    documents = [
        Document("behavior", f"wh ={sid} café{sid} ||", sid),
        Document("sid_to_text", f"Item{sid} has title:", " a café"),
        *general_documents("one text\n\n\n\nanother"),
    ]
    tokens = tokenize(iter(documents), reader.tokenizer, 96, targets=True)
    rows = np.split(tokens.tokens, tokens.offsets[1:-1])
    bos, eos = reader.tokenizer.bos_token_id, reader.tokenizer.eos_token_id
    assert [row[0] for row in rows] == [bos] * 4
    assert [row[-1] == eos for row in rows] == [True, True, False, False]
    # A SID is one token a level.
    assert (
        rows[0][tokens.targets[0] : -1].tolist() == np.add(reader.token_offsets, (1, 2, 0)).tolist()
    )
    for row, start, document in zip(rows, tokens.targets, documents, strict=True):
        stop = len(row) - (row[-1] == eos)
        assert reader.tokenizer.decode(row[1:start]) == document.prompt
        assert reader.tokenizer.decode(row[start:stop]) == document.target


def test_long_documents_are_cut(reader):
    document = Document("sid_to_text", "p" * 30, "t" * 10)
    whole = tokenize(iter([document]), reader.tokenizer, 12)
    assert whole.lengths.tolist() == [12, 12, 12, 6]
    held_out = tokenize(iter([document]), reader.tokenizer, 15, targets=True)
    assert held_out.lengths.tolist() == [15] and held_out.targets.tolist() == [4]
    assert reader.tokenizer.decode(held_out.tokens[4:-1]) == document.target


def test_a_tokenizer_that_knows_only_sids_is_refused():
    scratch = load_generator("scratch:tiny", VOCABULARY)
    with pytest.raises(InvalidArgument, match=r"base: expected a model whose tokenizer reads text"):
        tokenize(iter([Document("text_to_sid", "a red tent", "")]), scratch.tokenizer, 64)


def test_targets_need_a_tokenizer_that_says_where_tokens_begin():
    from transformers import ByT5Tokenizer

    document = Document("sid_to_text", "ab", "cd")
    assert tokenize(iter([document]), ByT5Tokenizer(), 64).lengths.tolist() == [5]
    with pytest.raises(InvalidArgument, match=r"base: .* a fast tokenizer.* got ByT5Tokenizer"):
        tokenize(iter([document]), ByT5Tokenizer(), 64, targets=True)


def documents_of(lengths: list[int], task: str = "behavior", first: int = 1) -> Documents:
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(first, first + offsets[-1])
    return Documents(tokens, offsets, np.ones(len(lengths), dtype=int), [task] * len(lengths))


def test_rows_hold_whole_documents_in_order():
    documents = documents_of([3, 4, 5, 1, 8, 2])
    order = np.array([5, 0, 4, 1, 3, 2])
    rows = pack(documents, order, 8)
    assert [row.tolist() for row in rows] == [[5, 0], [4], [1, 3], [2]]
    assert pack(documents_of([]), np.array([], dtype=int), 8) == []


def test_a_batch_keeps_documents_apart():
    documents = documents_of([3, 2, 4])
    batch = packed_batch(documents, [np.array([1, 0]), np.array([2])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[4, 5, 1, 2, 3], [6, 7, 8, 9, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 5, -100, 2, 3], [-100, 7, 8, 9, -100]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_of_a_packed_document_are_those_of_the_document_alone(reader, kind, attention):
    model = reader.model
    if kind == "gpt2":
        model = load_generator("scratch:tiny", VOCABULARY, seed=3).model
    model.set_attn_implementation(attention)
    documents = documents_of([5, 3, 1, 4, 2])
    rows = [np.array([0, 1, 2]), np.array([3, 4])]
    batch = packed_batch(documents, rows, pad_token_id=0)
    del batch["labels"]
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        for place, row in enumerate(rows):
            low = 0
            for document in row:
                ids = torch.from_numpy(
                    np.split(documents.tokens, documents.offsets[1:-1])[document]
                )
                alone = model(ids[None]).logits[0]
                torch.testing.assert_close(packed[place, low : low + len(ids)], alone)
                low += len(ids)
        # Without positions of its own a document does see the one before it.
        mixed = model(batch["input_ids"]).logits
    assert not torch.allclose(mixed[0, 5:8], packed[0, 5:8], atol=1e-3)


def test_a_model_that_mixes_documents_is_refused(reader):
    check_packing(reader.model)
    forward = reader.model.forward

    def deaf(position_ids=None, **inputs):
        return forward(**inputs)

    reader.model.forward = deaf
    with pytest.raises(InvalidArgument, match="keeps packed documents apart"):
        check_packing(reader.model)


def mixture(share: float, seed: int = 0, batch_size: int = 4) -> PackedBatches:
    rng = np.random.default_rng(3)
    behavior = documents_of(rng.integers(20, 40, 60).tolist())
    metadata = documents_of(rng.integers(3, 9, 50).tolist(), "sid_to_text", 10_000)
    return PackedBatches(
        behavior, metadata, behavior_share=share, sequence_length=48, batch_size=batch_size,
        pad_token_id=0, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_tokens_are_mixed_by_their_share(share):
    batches = mixture(share)
    ids = np.concatenate([batches.batch_at(step)["input_ids"].ravel() for step in range(200)])
    ids = ids[ids > 0]
    assert (ids < 10_000).mean() == pytest.approx(share, abs=0.01)


def test_batches_are_a_function_of_seed_and_step():
    steps = 3 * mixture(0.5).steps_per_epoch
    one, two, other = mixture(0.5), mixture(0.5), mixture(0.5, seed=1)
    forward = [one.batch_at(step)["input_ids"] for step in range(steps)]
    backward = [two.batch_at(step)["input_ids"] for step in reversed(range(steps))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert any(not torch.equal(other.batch_at(s)["input_ids"], forward[s]) for s in range(steps))


def test_an_epoch_sees_every_document_once():
    batches = mixture(1.0, batch_size=1)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        ids = np.concatenate([batches.batch_at(step)["input_ids"].ravel() for step in steps])
        assert (
            sorted(ids[ids > 0])
            == batches.documents.tokens[batches.documents.tokens < 10_000].tolist()
        )


def test_a_kind_without_documents_is_named():
    with pytest.raises(
        InvalidData, match=r"metadata: expected at least one document for its share"
    ):
        PackedBatches(
            documents_of([3]), documents_of([]), behavior_share=0.5, sequence_length=8,
            batch_size=1, pad_token_id=0, seed=0,
        )  # fmt: skip
