"""The changes of ``docs/drop_in.md``, applied to the systems: the same codes, the same beams."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import PeerAbsent, drop_in

from .doc_blocks import blocks_of

SMALL = drop_in.Sizes(rows=600, width=16, codes=32, beams=7, sids=3_000, words=100)


@pytest.mark.parametrize("name", drop_in.LOOPS)
def test_the_loop_with_the_change_gives_the_same(name):
    try:
        expected = drop_in.LOOPS[name](False, SMALL).run()
        loop = drop_in.LOOPS[name](True, SMALL)
    except (PeerAbsent, ImportError) as error:
        pytest.skip(str(error))
    found = loop.run().long()
    assert found.shape == expected.shape
    assert expected.flatten(0, -2).unique(dim=0).shape[0] > 5
    assert (found == expected).all()
    assert (loop.run().long() == found).all()


def test_every_system_of_the_page_has_a_loop():
    titles = re.findall(r"^## (.+)$", drop_in.PAGE.read_text(), re.MULTILINE)
    systems = {name.split(",")[0] for name in drop_in.LOOPS}
    for title in titles:
        assert any(title.startswith(system) or system in title for system in systems), title
    assert len(titles) == len(systems) == 7


def test_code_that_needs_a_checkout_says_which():
    needed = [block.repository for block in blocks_of(drop_in.PAGE) if block.repository]
    assert sorted(needed) == sorted([drop_in.GRID, drop_in.RECOMMENDER, drop_in.MINIONEREC])
    with pytest.raises(ValueError, match="not enough values"):
        drop_in.section("no such system")


def test_a_wrong_change_is_noticed(monkeypatch):
    """The proof can fail: a change that gives another answer is not the same."""
    right = drop_in.change("STATIC")["sparse_transition"]

    def wrong(*arguments):
        return right(*arguments).flip(1)

    monkeypatch.setattr(drop_in, "change", lambda *_: {"sparse_transition": wrong})
    try:
        expected = drop_in.static_decode(False, SMALL).run()
    except PeerAbsent as error:
        pytest.skip(str(error))
    assert not (drop_in.static_decode(True, SMALL).run() == expected).all()


def test_the_index_of_a_real_catalog_is_read_in_the_tokenizers_order(shared_data, tmp_path):
    import json
    import lzma

    packed = shared_data / "amazon-2018-minionerec" / "Office_Products.index.json.xz"
    path = tmp_path / "Office_Products.index.json"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    index = json.loads(path.read_text())
    added = sorted({token for sid in index.values() for token in sid})

    class Tokenizer:
        def convert_tokens_to_ids(self, tokens):
            return [500 + added.index(token) for token in tokens]

    trie = drop_in.change("LC-Rec-style code and its index.json")["trie_of_index"](
        path, Tokenizer()
    )
    assert trie.num_items == len(index) == 3_459
    row = trie.rows(["17"])
    spelled = [trie.token_offsets[level] + code for level, code in enumerate(trie.codes_at(row)[0])]
    assert [added[int(token) - 500] for token in spelled] == index["17"]
