"""How codes are spelled as tokens of a language model."""

from __future__ import annotations

import operator
import re
import string
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from plum.errors import InvalidArgument, InvalidData
from plum.sid.codes import as_sizes

DEFAULT_TEMPLATE = "<s_{level}_{code}>"
BEGIN, END = "<|sid_begin|>", "<|sid_end|>"


class SidVocabulary:
    """The tokens that spell SIDs: one for each code of each level, in one contiguous run.

    With the default template they are those of OneRec: ``<s_a_0>``, ``<s_a_1>``, ..., ``<s_b_0>``,
    and so on, with ``<|sid_begin|>`` and ``<|sid_end|>`` around a SID in text.

    Attributes:
        codebook_sizes: ``K_l`` of each level.
        template: The spelling, with ``{level}`` (a, b, c, ...) and ``{code}``.
        tokens: ``ΣK`` tokens, level by level.
        offsets: Position in :attr:`tokens` of the first token of each level.
        begin: The token that opens a SID.
        end: The token that closes a SID.
    """

    begin = BEGIN
    end = END

    def __init__(self, codebook_sizes: Sequence[int], template: str = DEFAULT_TEMPLATE) -> None:
        """Spells all tokens.

        Args:
            codebook_sizes: ``K_l`` of each of at most 26 levels.
            template: Holds ``{level}`` and ``{code}`` once each.

        Raises:
            InvalidArgument: the sizes or the template are not as above, or the template spells two
                codes alike.
        """
        sizes = as_sizes(codebook_sizes)
        if len(sizes) > len(string.ascii_lowercase):
            raise InvalidArgument("codebook_sizes", "at most 26 sizes", len(sizes))
        holds = isinstance(template, str) and all(
            template.count(place) == 1 for place in ("{level}", "{code}")
        )
        if not holds:
            raise InvalidArgument("template", "{level} and {code}, once each", repr(template))
        self.codebook_sizes = sizes
        self.template = template
        self.offsets = tuple(accumulate(sizes[:-1], initial=0))
        self.tokens = [
            self._spell(level, code) for level, size in enumerate(sizes) for code in range(size)
        ]
        self._index = {token: index for index, token in enumerate(self.tokens)}
        if len(self._index) != len(self.tokens):
            raise InvalidArgument("template", "a distinct token for every code", repr(template))
        self._sid = re.compile(r"\s*".join(self._pattern(level) for level in range(len(sizes))))

    @property
    def num_levels(self) -> int:
        """The number of levels ``L``."""
        return len(self.codebook_sizes)

    @property
    def num_tokens(self) -> int:
        """The number of tokens that spell codes, ``ΣK``."""
        return len(self.tokens)

    @property
    def all_tokens(self) -> list[str]:
        """The tokens that spell codes, then the two that open and close a SID."""
        return [*self.tokens, BEGIN, END]

    def tokens_of(self, codes: Sequence[int]) -> list[str]:
        """Spells the codes of one SID, or of a prefix of it, without opening and closing.

        Raises:
            InvalidArgument: there are more codes than levels, or a code is no integer or out of
                range.
        """
        try:
            codes = [operator.index(code) for code in codes]
        except TypeError:
            raise InvalidArgument("codes", "integers", repr(codes)) from None
        if len(codes) > self.num_levels:
            raise InvalidArgument("codes", f"at most {self.num_levels} codes", len(codes))
        for level, code in enumerate(codes):
            if not 0 <= code < self.codebook_sizes[level]:
                raise InvalidArgument(
                    f"codes[{level}]", f"a code in [0, {self.codebook_sizes[level]})", code
                )
        return [self.tokens[self.offsets[level] + code] for level, code in enumerate(codes)]

    def text_of(self, codes: Sequence[int]) -> str:
        """Spells a whole SID as text, opened and closed.

        Raises:
            InvalidArgument: there are not as many codes as levels, or a code is out of range.
        """
        if len(codes) != self.num_levels:
            raise InvalidArgument("codes", f"{self.num_levels} codes", len(codes))
        return "".join([BEGIN, *self.tokens_of(codes), END])

    def codes_of(self, tokens: Sequence[str]) -> tuple[int, ...]:
        """Reads the codes of one SID, or of a prefix of it; opening and closing may be there.

        Raises:
            InvalidData: a token is unknown or not of its level.
        """
        body = list(tokens)
        if body[:1] == [BEGIN]:
            body = body[1:]
        if body[-1:] == [END]:
            body = body[:-1]
        if len(body) > self.num_levels:
            raise InvalidData("tokens", f"at most {self.num_levels} codes", len(body))
        codes = []
        for level, token in enumerate(body):
            code = self._index.get(token, -1) - self.offsets[level]
            if not 0 <= code < self.codebook_sizes[level]:
                example = self._spell(level, 0)
                raise InvalidData("tokens", f"a token of level {level}, as {example}", repr(token))
            codes.append(code)
        return tuple(codes)

    def parse(self, text: str) -> list[tuple[int, ...]]:
        """Finds the whole SIDs in a text, in order.

        A SID is one token of each level in a row, with nothing but white space between them;
        anything else, codes out of range included, is passed over.
        """
        found = [tuple(map(int, match.groups())) for match in self._sid.finditer(text)]
        sizes = self.codebook_sizes
        return [sid for sid in found if all(c < k for c, k in zip(sid, sizes, strict=True))]

    def to_dict(self) -> dict[str, Any]:
        """Returns what :meth:`from_dict` needs, as JSON."""
        return {"codebook_sizes": list(self.codebook_sizes), "template": self.template}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SidVocabulary:
        """Builds the vocabulary that :meth:`to_dict` described.

        Raises:
            InvalidData: a key is missing or unknown, or a value is not as the constructor needs.
        """
        if set(value) != {"codebook_sizes", "template"}:
            raise InvalidData("vocabulary", "keys codebook_sizes and template", sorted(value))
        try:
            return cls(**value)
        except InvalidArgument as error:
            raise InvalidData("vocabulary", "sizes and a template that fit", error) from None

    def _spell(self, level: int, code: int) -> str:
        # Not str.format: a template may hold other braces.
        letter = string.ascii_lowercase[level]
        return self.template.replace("{level}", letter).replace("{code}", str(code))

    def _pattern(self, level: int) -> str:
        before, after = self.template.split("{code}")
        letter = string.ascii_lowercase[level]
        before, after = (re.escape(part.replace("{level}", letter)) for part in (before, after))
        # No code has more than ten digits, and int() refuses thousands of them.
        return f"{before}(0|[1-9][0-9]{{0,9}}){after}"
