"""Loading a generator: from scratch, from a pretrained base, and what cannot be loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument, InvalidData
from plum.lm import load_generator
from plum.sid import SidVocabulary

SIZES = (4, 5, 3)
VOCABULARY = SidVocabulary(SIZES)


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request, tmp_path_factory):
    """A small Llama with a byte-level tokenizer of its own, as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp(request.param)
    letters = {chr(97 + i): i for i in range(26)} | {"</s>": 26}
    words = Tokenizer(models.WordLevel(letters, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    config = LlamaConfig(
        # More rows than tokens, as many published models have.
        vocab_size=30,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        tie_word_embeddings=request.param == "tied",
        eos_token_id=26,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 1e5), ("small", 8e5), ("base", 14e6)])
def test_scratch_sizes(size, parameters):
    generator = load_generator(f"scratch:{size}", SidVocabulary((256,) * 3), max_length=200)
    count = sum(p.numel() for p in generator.model.parameters())
    assert parameters < count < 2 * parameters
    assert not generator.model.training
    embeddings = generator.model.get_input_embeddings().weight
    assert embeddings is generator.model.get_output_embeddings().weight
    assert embeddings.shape[0] == len(generator.tokenizer) == 3 * 256 + 4
    assert generator.model.config.max_position_embeddings == 200


def test_scratch_is_seeded_and_leaves_the_global_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (
        load_generator("scratch:tiny", VOCABULARY, seed=seed).model.state_dict()
        for seed in (4, 4, 5)
    )
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


@pytest.mark.parametrize("template", ["<s_{level}_{code}>", "[{level}{code}]"])
def test_scratch_tokens(template):
    vocabulary = SidVocabulary(SIZES, template)
    generator = load_generator("scratch:tiny", vocabulary)
    tokenizer, offsets = generator.tokenizer, generator.token_offsets
    for level, size in enumerate(SIZES):
        tokens = vocabulary.tokens[vocabulary.offsets[level] :][:size]
        expected = list(range(offsets[level], offsets[level] + size))
        assert tokenizer.convert_tokens_to_ids(tokens) == expected
    sid = (3, 0, 2)
    wanted = [offset + code for offset, code in zip(offsets, sid, strict=True)]
    text = vocabulary.text_of(sid)
    assert tokenizer(text).input_ids[1:-1] == wanted
    assert tokenizer(" ".join(vocabulary.tokens_of(sid))).input_ids == wanted
    assert vocabulary.codes_of(tokenizer.convert_ids_to_tokens(wanted)) == sid


def test_plain_transformers_reloads_what_is_saved(tmp_path, generator):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    generator.model.save_pretrained(tmp_path)
    generator.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = (
        kind.from_pretrained(tmp_path) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = torch.tensor([tokenizer("<|sid_begin|><s_a_1><s_b_2><s_c_0>").input_ids])
    assert ids.tolist()[0][1:] == np.add(generator.token_offsets, (1, 2, 0)).tolist()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, generator.model(ids).logits)
    again = load_generator(str(tmp_path), VOCABULARY)
    assert again.token_offsets == generator.token_offsets
    before, after = generator.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pretrained_base_keeps_its_rows_and_gets_new_ones_near_their_mean(base):
    from transformers import AutoModelForCausalLM

    old = AutoModelForCausalLM.from_pretrained(base)
    generator = load_generator(str(base), VOCABULARY, seed=2, max_length=40)
    assert generator.token_offsets == (27, 31, 36)
    assert generator.tokenizer.convert_tokens_to_ids("<|sid_end|>") == 27 + 12 + 1
    pairs = [
        (old.get_input_embeddings().weight, generator.model.get_input_embeddings().weight),
        (old.get_output_embeddings().weight, generator.model.get_output_embeddings().weight),
    ]
    for before, after in pairs:
        assert after.shape[0] == len(generator.tokenizer) == 41
        assert torch.equal(before[:27], after[:27])
        noise = (after[27:] - before[:27].mean(0)) / before[:27].std(0)
        assert 0.08 < noise.std() < 0.12
        assert len(torch.unique(after[27:], dim=0)) == 14
    again = load_generator(str(base), VOCABULARY, seed=2)
    assert torch.equal(pairs[0][1], again.model.get_input_embeddings().weight)
    assert generator.tokenizer.pad_token_id is not None


def test_loading_a_grown_base_again_changes_nothing(base, tmp_path):
    first = load_generator(str(base), VOCABULARY)
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    second = load_generator(str(tmp_path), VOCABULARY, seed=9)
    before, after = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert second.token_offsets == first.token_offsets


def test_what_cannot_be_loaded_is_named(base, tmp_path):
    with pytest.raises(
        InvalidArgument, match=r"base: expected one of scratch:tiny.*'scratch:huge'"
    ):
        load_generator("scratch:huge", VOCABULARY)
    with pytest.raises(InvalidArgument, match=r"base: .*nobody/nothing.*download the model first"):
        load_generator("nobody/nothing", VOCABULARY)
    with pytest.raises(InvalidArgument, match=r"base: expected scratch.*empty"):
        (tmp_path / "empty").mkdir()
        load_generator(str(tmp_path / "empty"), VOCABULARY)
    shutil.copytree(base, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InvalidArgument, match=r"base: expected scratch.*torn.*header"):
        load_generator(str(tmp_path / "torn"), VOCABULARY)
    config = shutil.copytree(base, tmp_path / "other") / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(InvalidArgument, match=r"base: expected scratch.*other' .*mismatched"):
        load_generator(str(tmp_path / "other"), VOCABULARY)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        file = shutil.copytree(base, tmp_path / f"odd-{name}") / name
        for text in ("[]", '"x"', "{"):
            file.write_text(text)
            with pytest.raises(InvalidData, match=f"odd-{name}/{name}: expected "):
                load_generator(str(file.parent), VOCABULARY)
    file = tmp_path / "odd-tokenizer.json" / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(InvalidData, match=r"tokenizer.json: expected what .* got \{\}; get the fo"):
        load_generator(str(file.parent), VOCABULARY)
    with pytest.raises(
        InvalidArgument, match="context of at least 41 tokens, got 40; lower max_it"
    ):
        load_generator(str(base), VOCABULARY, max_length=41)
    with pytest.raises(InvalidArgument, match="max_length: expected an int >= 2, got 1"):
        load_generator("scratch:tiny", VOCABULARY, max_length=1)


def test_what_a_base_lacks_is_drawn_from_the_seed(base, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(base).save_pretrained(tmp_path)
    # The tokenizer has more tokens than the model has rows.
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<{n}>" for n in range(9)])
    tokenizer.save_pretrained(tmp_path)
    first, again, other = (
        load_generator(str(tmp_path), VOCABULARY, seed=seed).model.state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    rows = "model.embed_tokens.weight"
    assert torch.equal(first[rows][:30], other[rows][:30])
    assert not torch.equal(first[rows][30:36], other[rows][30:36])


@pytest.mark.parametrize("causal", [True, False])
def test_a_base_whose_tokens_see_the_next_ones_is_refused(base, tmp_path, causal):
    from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=30, num_hidden_layers=2, is_decoder=causal, **shape)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    if causal:
        load_generator(str(tmp_path), VOCABULARY)
        return
    with pytest.raises(InvalidArgument, match=r"base: expected a causal or .* got BertLMHeadModel"):
        load_generator(str(tmp_path), VOCABULARY)


def test_a_base_is_tried_out_without_a_warning(tmp_path, generator, monkeypatch):
    generator.model.save_pretrained(tmp_path)
    generator.tokenizer.save_pretrained(tmp_path)
    masks = []
    monkeypatch.setattr(
        type(generator.model.transformer),
        "warn_if_padding_and_no_attention_mask",
        lambda self, ids, mask: masks.append(mask),
    )
    load_generator(str(tmp_path), VOCABULARY)
    assert masks and None not in masks


def test_a_base_with_another_tables_tokens_is_refused(tmp_path, generator):
    generator.model.save_pretrained(tmp_path)
    generator.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvalidData, match="SID tokens with consecutive ids, got gaps"):
        load_generator(str(tmp_path), SidVocabulary((4, 6, 3)))


def test_the_format_uses_the_models_tokens(generator, codes):
    form = generator.format(codes, max_items=3)
    tokens = generator.tokenizer.convert_ids_to_tokens(form.prompt(np.array([7])).tolist())
    assert tokens == [VOCABULARY.begin, *VOCABULARY.tokens_of(codes[7])]
    assert form.pad_token_id == generator.tokenizer.pad_token_id
    with pytest.raises(InvalidArgument, match=r"shape \[N, 3\], got int32 of shape \[30, 2\]"):
        generator.format(codes[:, :2], max_items=3)
    with pytest.raises(InvalidArgument, match=r"codes: expected integers .*, got float64 of"):
        generator.format(codes + 0.5, max_items=3)
    with pytest.raises(
        InvalidArgument, match=r"codes: expected codes of level 1 in \[0, 5\), got 5"
    ):
        generator.format(codes + np.array([0, 5 - codes[0, 1], 0]), max_items=3)


def test_importing_does_not_import_transformers():
    program = "import sys, plum.lm, plum.eval; print({'transformers', 'scipy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
