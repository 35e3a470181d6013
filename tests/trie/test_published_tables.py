"""Tries of published tables of SIDs, and of tables in every format that can be read."""

from __future__ import annotations

import pytest
import torch

from plum.sid import SidTable, read_sids, write_sids
from plum.trie import SidTrie

FILES = [
    "amazon-beauty-2014/letter.index.json.gz",
    "amazon-2018-minionerec/Industrial_and_Scientific.index.json.xz",
    "amazon-2018-minionerec/Office_Products.index.json.xz",
    "published-sids/letter_instruments.index.json.gz",
    "published-sids/mql4grec_instruments.index_image.json.gz",
]


def build(table: SidTable) -> SidTrie:
    return SidTrie.from_codes(table.codes, table.item_ids, table.codebook_sizes)


@pytest.mark.parametrize("name", FILES)
def test_items_lead_to_their_sids_and_sids_to_their_items(shared_data, tmp_path, name):
    table = read_sids(shared_data / name)
    trie = build(table)
    rows = trie.rows(table.item_ids)
    assert torch.equal(trie.codes_at(rows), torch.as_tensor(table.codes).long())
    items = trie.items(torch.stack((rows, rows + 1), dim=1))
    assert all(item in on_sid for item, on_sid in zip(table.item_ids, items, strict=True))
    assert sum(map(len, trie.items(rows.unique().unsqueeze(1) + torch.tensor([0, 1])))) == len(rows)
    for copy in ("table.parquet", "table.csv", "table.index.json"):
        write_sids(table, tmp_path / copy)
        again = build(read_sids(tmp_path / copy, codebook_sizes=table.codebook_sizes))
        assert all(torch.equal(x, y) for x, y in zip(trie.index, again.index, strict=True))
        assert torch.equal(again.rows(table.item_ids), rows)
