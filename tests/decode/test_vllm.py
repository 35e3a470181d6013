"""SidProcessor against the list of SIDs, in both ways that vLLM calls it, and in vLLM itself.

Without vllm its classes are stood in for by what they promise; the last test needs the engine.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument, PlumError
from plum.trie import SidTrie

from .tiny_models import tiny

BEGIN, END, VOCABULARY = 5, 2, 40
OFFSETS, SIZES = (10, 16, 22), (5, 5, 5)
FREE = list(range(VOCABULARY))
INSTALLED = importlib.util.find_spec("vllm") is not None


def follow(entries, update, new_state):
    """What vllm's process_dict_updates does: removed, added, then moved."""
    if update is None:
        return
    for index in update.removed:
        entries.pop(index, None)
    for index, params, prompt, output in update.added:
        entries[index] = new_state(params, prompt, output)
    for a, b, swap in update.moved:
        first, second = entries.pop(a, None), entries.pop(b, None)
        if first is not None:
            entries[b] = first
        if second is not None and swap:
            entries[a] = second


@pytest.fixture
def processor_class(monkeypatch):
    if not INSTALLED:
        for runner in ("vllm.v1.sample", "vllm.v1.worker.gpu.sample"):
            parts = runner.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if name not in sys.modules:
                    monkeypatch.setitem(sys.modules, name, ModuleType(name))
            stand_in = ModuleType(f"{runner}.logits_processor")
            stand_in.LogitsProcessor = type("LogitsProcessor", (), {})
            stand_in.process_dict_updates = follow
            monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
            sys.modules[runner].logits_processor = stand_in
        monkeypatch.delitem(sys.modules, "plum.decode.vllm", raising=False)
    return importlib.import_module("plum.decode.vllm").SidProcessor


@pytest.fixture
def trie(tmp_path) -> SidTrie:
    codes = np.random.default_rng(4).integers(0, 5, (30, 3))
    built = SidTrie.from_codes(codes, codebook_sizes=SIZES, token_offsets=OFFSETS)
    built.save(tmp_path / "trie")
    return built


def config(folder: Path, **settings) -> SimpleNamespace:
    plum = {"trie": str(folder / "trie"), "end_token_id": END, **settings}
    model = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
    return SimpleNamespace(additional_config={"plum": plum}, model_config=model)


def sids(trie: SidTrie) -> list[list[int]]:
    return (trie.codes_at(torch.arange(trie.num_sids)) + torch.tensor(OFFSETS)).tolist()


def legal(trie: SidTrie, tokens: list[int], begin: int | None) -> list[int]:
    """What may follow, by the docstring of the class: from the longest run of levels at the end."""
    taken = 0
    for level in reversed(range(3)):
        if tokens and OFFSETS[level] <= tokens[-1] < OFFSETS[level] + 5:
            taken = level + 1
    if begin is not None and not taken and tokens[-1:] != [begin]:
        return FREE
    if taken == 3:
        if begin is not None:
            return [END]
        taken = 0
    prefix = tokens[len(tokens) - taken :] if taken <= len(tokens) else None
    return sorted({sid[taken] for sid in sids(trie) if sid[:taken] == prefix}) or [END]


def finite(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def sequences(trie: SidTrie) -> list[list[int]]:
    sid, other = sids(trie)[7], sids(trie)[11]
    return [
        [1, 30, 31, BEGIN],
        [1, 30, BEGIN, sid[0]],
        [BEGIN, *sid[:2]],
        [30, BEGIN, *sid],
        [*other, *sid],
        [*other, *sid[:1]],
        [1, *other, 30],
        [30, 31, sid[1]],  # a code of the second level without one of the first
        [BEGIN, sid[0], 15],  # a token that is no code
        [sid[2]],
        [1],
    ]


@pytest.mark.parametrize("begin", [BEGIN, None])
def test_the_first_model_runner(processor_class, trie, tmp_path, begin):
    processor = processor_class(config(tmp_path, begin_token_id=begin), torch.device("cpu"), False)
    rows = sequences(trie)
    # Beams come as prompts; what is generated is appended to a list that vLLM holds.
    prompts = [row[: len(row) // 2] for row in rows]
    outputs = [row[len(row) // 2 :] for row in rows]
    added = [(i, None, p, o) for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))]
    added[3] = (3, None, None, rows[3])
    processor.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
    logits = torch.randn(len(rows), VOCABULARY)
    masked = processor.apply(logits.clone())
    expected = [legal(trie, row, begin) for row in rows]
    assert finite(masked) == expected
    assert torch.equal(masked[masked.isfinite()], logits[masked.isfinite()])
    outputs[0].append(sids(trie)[3][0])
    processor.update_state(None)
    assert finite(processor.apply(logits.clone()))[0] == legal(trie, [BEGIN, outputs[0][-1]], begin)


def test_rows_move_with_their_requests(processor_class, trie, tmp_path):
    processor = processor_class(config(tmp_path, begin_token_id=BEGIN), torch.device("cpu"), False)
    if INSTALLED:
        from vllm.v1.sample.logits_processor import MoveDirectionality

        swap, one_way = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    else:
        swap, one_way = True, False
    rows = sequences(trie)[:4]
    added = [(i, None, row, []) for i, row in enumerate(rows)]
    processor.update_state(SimpleNamespace(removed=[], added=added, moved=[(0, 2, swap)]))
    logits = torch.randn(4, VOCABULARY)
    expected = [legal(trie, rows[i], BEGIN) for i in (2, 1, 0, 3)]
    assert finite(processor.apply(logits.clone())) == expected
    processor.update_state(SimpleNamespace(removed=[1], added=[], moved=[(3, 1, one_way)]))
    assert finite(processor.apply(logits[:3].clone())) == [expected[i] for i in (0, 3, 2)]


@pytest.mark.parametrize("begin", [BEGIN, None])
def test_the_second_model_runner(processor_class, trie, tmp_path, begin):
    rows = sequences(trie)
    slots = torch.randperm(len(rows) + 4)[: len(rows)].int()
    tokens = torch.full((len(rows) + 4, 12), 10, dtype=torch.int32)
    for slot, row in zip(slots.tolist(), rows, strict=True):
        tokens[slot, : len(row)] = torch.tensor(row)
    state = SimpleNamespace(device=torch.device("cpu"), all_token_ids=SimpleNamespace(gpu=tokens))
    processor = processor_class(config(tmp_path, begin_token_id=begin), state)
    context = SimpleNamespace(
        expanded_idx_mapping=slots,
        pos=torch.tensor([len(row) - 1 for row in rows]),
        input_ids=torch.tensor([row[-1] for row in rows], dtype=torch.int32),
        expanded_local_pos=torch.zeros(len(rows), dtype=torch.int32),
    )
    logits = torch.randn(len(rows), VOCABULARY)
    assert finite(processor.apply(logits.clone(), context)) == [legal(trie, r, begin) for r in rows]


def test_drafts_are_read_from_the_inputs(processor_class, trie, tmp_path):
    """Two requests: what is committed, and a row for each token that is drafted after it."""
    sid = sids(trie)[7]
    committed = [[30, 31, 32, BEGIN], [30, BEGIN, sid[0]]]
    drafts = [[sid[0], sid[1]], [sid[1]]]
    tokens = torch.full((2, 12), 10, dtype=torch.int32)
    rows, slots, local, place = [], [], [], []
    for slot, (before, drafted) in enumerate(zip(committed, drafts, strict=True)):
        tokens[slot, : len(before)] = torch.tensor(before)
        for number in range(len(drafted) + 1):
            rows.append([*before, *drafted[:number]])
            slots.append(slot)
            local.append(number)
            place.append(len(rows[-1]) - 1)
    state = SimpleNamespace(device=torch.device("cpu"), all_token_ids=SimpleNamespace(gpu=tokens))
    processor = processor_class(config(tmp_path, begin_token_id=BEGIN), state)
    context = SimpleNamespace(
        expanded_idx_mapping=torch.tensor(slots),
        pos=torch.tensor(place),
        input_ids=torch.tensor([row[-1] for row in rows]),
        expanded_local_pos=torch.tensor(local),
    )
    result = finite(processor.apply(torch.randn(len(rows), VOCABULARY), context))
    assert result == [legal(trie, row, BEGIN) for row in rows]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"end_token_id": VOCABULARY}, r"end_token_id: expected a token id in \[0, 40\), got 40"),
        ({"end_token_id": None}, "end_token_id: expected a token id"),
        ({"end_token_id": True}, "end_token_id: expected a token id"),
        ({"begin_token_id": -1}, "begin_token_id: expected a token id"),
        ({"begin_token_id": 10}, "begin_token_id: expected a token that is no code, got 10"),
        ({"end_token_id": 26}, "end_token_id: expected a token that is no code, got 26"),
        ({"begin": 1}, "expected keys trie, end_token_id and.*got begin, end_token_id, trie"),
        ({"trie": 3}, "trie: expected the path of a file, got 3"),
    ],
)
def test_wrong_settings(processor_class, trie, tmp_path, settings, message):
    with pytest.raises(InvalidArgument, match=message):
        processor_class(config(tmp_path, **settings), torch.device("cpu"), False)


@pytest.mark.parametrize("additional", [None, {}, {"plum": "trie"}])
def test_no_settings(processor_class, additional):
    with pytest.raises(InvalidArgument, match="expected the settings of plum's logits processor"):
        processor_class(SimpleNamespace(additional_config=additional), torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (None, "expected a trie that knows the model's token ids"),
        ((10, 12, 22), "expected tokens of their own for each level"),
        ((10, 16, 36), "expected tokens below 40, the model's vocabulary, got token 40"),
    ],
)
def test_tries_that_do_not_fit(processor_class, tmp_path, offsets, message):
    SidTrie.from_codes([[0, 1, 2]], codebook_sizes=SIZES, token_offsets=offsets).save(
        tmp_path / "trie"
    )
    with pytest.raises(InvalidArgument, match=message):
        processor_class(config(tmp_path), torch.device("cpu"), False)


def test_a_folder_that_is_no_trie(processor_class, tmp_path):
    with pytest.raises(PlumError):
        processor_class(config(tmp_path), torch.device("cpu"), False)


ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

if __name__ == "__main__":
    folder, settings, prompts, width = json.loads(sys.argv[1])
    llm = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=64, max_logprobs=2 * width,
        logprobs_mode="processed_logprobs", logits_processors=["plum.decode.vllm:SidProcessor"],
        additional_config={"plum": settings},
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = BeamSearchParams(beam_width=width, max_tokens=3, length_penalty=0.0)
    beams = [
        [(beam.tokens[-3:], beam.cum_logprob) for beam in output.sequences]
        for output in llm.beam_search(prompts, params)
    ]
    params = SamplingParams(n=8, max_tokens=4, seed=0, detokenize=False)
    drawn = [
        [list(choice.token_ids) for choice in output.outputs]
        for output in llm.generate(prompts, params)
    ]
    print("RESULT", json.dumps([beams, drawn]))
"""


@pytest.mark.skipif(not INSTALLED, reason="vllm is not installed")
@pytest.mark.parametrize("begin", [BEGIN, None])
def test_the_engine_finds_what_sid_beam_search_finds(trie, tmp_path, begin):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from plum.decode import SidBeamSearch

    model = tiny("qwen3", VOCABULARY, head_dim=32, max_position_embeddings=64).eval()
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t4"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2").save_pretrained(
        tmp_path / "model"
    )
    before = [1, 30, *sids(trie)[9]] if begin is None else [1, 30, 31, BEGIN]
    prompts, width = [before, [1, *before]], 16
    settings = config(tmp_path, begin_token_id=begin).additional_config["plum"]
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            ENGINE,
            json.dumps([str(tmp_path / "model"), settings, prompts, width]),
        ],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    beams, drawn = json.loads(lines[-1].removeprefix("RESULT "))
    search, offsets = SidBeamSearch(model, trie, score="valid"), torch.tensor(OFFSETS)
    for prompt, found in zip(prompts, beams, strict=True):
        expected = search.search(torch.tensor([prompt]), num_beams=width)
        assert [sid for sid, _ in found] == (expected.sids[0] + offsets).tolist()
        scores = torch.tensor([score for _, score in found])
        torch.testing.assert_close(scores, expected.scores[0].float(), rtol=0, atol=1e-4)
    after = END if begin is not None else None
    for rows in drawn:
        assert all(row[:3] in sids(trie) for row in rows)
        assert all(after is None or row[3:] == [after] for row in rows)
