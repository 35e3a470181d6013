from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plum.errors import InvalidArgument, InvalidData
from plum.sid import SidVocabulary

SIZES = (3, 2, 12)


def test_tokens_are_onerecs_level_by_level():
    words = SidVocabulary(SIZES)
    assert words.tokens[:6] == ["<s_a_0>", "<s_a_1>", "<s_a_2>", "<s_b_0>", "<s_b_1>", "<s_c_0>"]
    assert words.tokens[-1] == "<s_c_11>"
    assert (words.num_tokens, len(words.tokens), words.offsets) == (17, 17, (0, 3, 5))
    assert words.all_tokens == [*words.tokens, "<|sid_begin|>", "<|sid_end|>"]


@given(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), st.integers(0, 3))
def test_spelled_and_read(sid, length):
    words = SidVocabulary(SIZES)
    tokens = words.tokens_of(sid[:length])
    assert [words.tokens.index(t) for t in tokens] == [
        words.offsets[level] + code for level, code in enumerate(sid[:length])
    ]
    assert words.codes_of(tokens) == sid[:length]
    assert words.codes_of([words.begin, *tokens, words.end]) == sid[:length]
    assert words.parse(f"seen {words.text_of(sid)}{words.text_of(sid)}.") == [sid, sid]


def test_text():
    words = SidVocabulary(SIZES)
    text = words.text_of(np.array([2, 0, 11], dtype=np.int32))
    assert text == "<|sid_begin|><s_a_2><s_b_0><s_c_11><|sid_end|>"


def test_parse_passes_over_what_is_no_sid():
    words = SidVocabulary(SIZES)
    text = (
        "<s_a_1> <s_b_1>\n<s_c_3> and <s_a_9><s_b_0><s_c_0>, <s_a_0><s_c_0>, <s_a_01><s_b_0><s_c_0>"
        "<s_a_0><s_a_2><s_b_0><s_c_1><s_b_1>"
    )
    assert words.parse(text) == [(1, 1, 3), (2, 0, 1)]
    assert words.parse("") == []
    assert SidVocabulary((20,)).parse("<s_a_19><s_a_20><s_a_3>") == [(19,), (3,)]
    # More digits than int() takes.
    assert SidVocabulary((20,)).parse(f"<s_a_{'1' * 5000}><s_a_3>") == [(3,)]


def test_other_templates():
    words = SidVocabulary((2, 2), "[{code}.{level}]*{x}")
    assert words.tokens == ["[0.a]*{x}", "[1.a]*{x}", "[0.b]*{x}", "[1.b]*{x}"]
    assert words.parse("[1.a]*{x}[0.b]*{x}") == [(1, 0)]
    assert words.codes_of(words.tokens_of((1, 0))) == (1, 0)


def test_dict():
    words = SidVocabulary(SIZES, "<{level}{code}>")
    again = SidVocabulary.from_dict(json.loads(json.dumps(words.to_dict())))
    assert again.tokens == words.tokens
    with pytest.raises(InvalidData, match="codebook_sizes and template"):
        SidVocabulary.from_dict({"codebook_sizes": [2]})
    with pytest.raises(InvalidData, match=r"vocabulary: .*codebook_sizes"):
        SidVocabulary.from_dict({"codebook_sizes": [0], "template": "<{level}{code}>"})
    for template in (None, 5, ["{level}", "{code}"]):
        with pytest.raises(InvalidData, match=r"vocabulary: .*template"):
            SidVocabulary.from_dict({"codebook_sizes": [2], "template": template})


def test_bad_input_is_named():
    words = SidVocabulary(SIZES)
    with pytest.raises(InvalidArgument, match=r"codes\[1\].*\[0, 2\), got 2"):
        words.tokens_of((0, 2, 0))
    with pytest.raises(InvalidArgument, match="at most 3"):
        words.tokens_of((0, 0, 0, 0))
    for wrong in ((1.5,), ("1",)):
        with pytest.raises(InvalidArgument, match=r"^codes: expected integers"):
            words.tokens_of(wrong)
    with pytest.raises(InvalidArgument, match="3 codes, got 2"):
        words.text_of((0, 0))
    with pytest.raises(InvalidData, match="level 1, as <s_b_0>, got '<s_a_0>'"):
        words.codes_of(["<s_a_0>", "<s_a_0>"])
    with pytest.raises(InvalidData, match="got 'hello'"):
        words.codes_of(["hello"])
    with pytest.raises(InvalidArgument, match="template"):
        SidVocabulary((2,), "<{code}>")
    assert SidVocabulary([4] * 26).tokens[-1] == "<s_z_3>"
    with pytest.raises(InvalidArgument, match="codebook_sizes"):
        SidVocabulary([4] * 27)
    with pytest.raises(InvalidArgument, match="codebook_sizes"):
        SidVocabulary(["4"])
