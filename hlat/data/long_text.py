"""Where a long text may be cut so that its parts give the ids of the whole.

An encoding takes some hundred bytes per token while it is built, so texts above `SPLIT_ABOVE` characters are
encoded in parts, a few at a time, with tokenizers of which it is proved that this changes nothing; others get
the whole text.

The cut is after a line feed that stands between two visible characters, of which the second is no slash. The
proof, for byte-level tokenizers that first divide a text into words and then encode each word alone:

1. No added token that is matched spans the cut, or takes white space beside it (`_plain`).
2. The words come from regular expressions that are lists of `_ALTERNATIVES`. None of these can match a line
   feed and the character after it, so no word spans the cut, and what follows the cut is read as at the start
   of a text (no alternative looks back).
3. But for `\\s+(?!\\S)` none looks ahead. A match that does not reach the cut is therefore found with what
   follows and without it. `\\s+(?!\\S)` can match the line feed only at the end of the part, where it gives
   the word that `\\s+` gives in the whole text: the run of white space is this one character. So a list with
   the former must have the latter, and some step must have it, for the line feed to end a word at all.
4. Further steps (`Digits`, `ByteLevel`) look at one character at a time, and steps refine each other's words.
5. NFC joins no line feed with anything; other normalizers are not looked into.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SPLIT_ABOVE = 4 * 2**20
AT_ONCE = 4  # parts encoded at once: no more text than may be encoded whole
_CUT = re.compile(r"(?<=\S)\n(?=[^\s/])")

_SPACES = r"\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_ANY_CASE = "(?i:" + "|".join(_ENDINGS) + ")"
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_ALTERNATIVES = {
    *_ENDINGS,
    _ANY_CASE,
    r"'(?i:[sdmt]|ll|ve|re)",
    # words of letters
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    _PUNCTUATION + "[A-Za-z]+",
    *(
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]{first}[{_LOWER}]{second}{ending}"
        for first, second in ("*+", "+*")
        for ending in ("", f"{_ANY_CASE}?")
    ),
    "[一-龥぀-ゟ゠-ヿ]+",
    "[一-龥\u0800-一가-\ud7ff]+",
    # numbers
    r" ?\p{N}+",
    r"\p{N}+",
    r"\p{N}",
    r"\p{N}{1,2}",
    r"\p{N}{1,3}",
    r"\d{1,3}",
    # signs
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    # white space
    r"\s*[\r\n]+",
    r"\s*[\r\n]",
    r"[\r\n]",
    r"\s+(?!\S)",
    _SPACES,
}
_LOOKS_AHEAD = r"\s+(?!\S)"


def cuts_are_safe(definition: Mapping[str, Any], matched: Iterable[Any]) -> bool:
    """Whether parts give the ids of the whole: see the module.

    Args:
        definition: content of the tokenizer.json.
        matched: the added tokens (`tokenizers.AddedToken`) that may be found in a text.
    """
    normalizer = (definition.get("normalizer") or {"type": "NFC"}).get("type")
    before = definition.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [] if before.get("type") == "Sequence" else [before]
    if normalizer != "NFC" or not all(map(_plain, matched)):
        return False
    if (definition.get("model") or {}).get("dropout"):  # other ids each time
        return False
    if any(step.get("type") == "ByteLevel" for step in steps[:-1]):  # what follows would see no line feeds
        return False
    ends = [_ends_words(step) for step in steps]
    return None not in ends and any(ends)


def _plain(token: Any) -> bool:
    return not (token.lstrip or token.rstrip or token.single_word or re.search(r"\s", token.content))


def _ends_words(step: Mapping[str, Any]) -> bool | None:
    """Whether a step ends a word at every cut; None for a step that is not known to be safe."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return None if step.get("add_prefix_space", True) else bool(step.get("use_regex", True))
    if kind == "Digits":
        return False
    if kind != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    pattern = step.get("pattern")
    pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
    found = set(_alternatives(pattern)) if isinstance(pattern, str) else {""}
    if not found <= _ALTERNATIVES or (_LOOKS_AHEAD in found and _SPACES not in found):
        return None
    return _SPACES in found


def _alternatives(pattern: str) -> Iterator[str]:
    """The parts of a regular expression between the bars that stand outside brackets and groups."""
    start, depth, inside, skip = 0, 0, False, False
    for at, sign in enumerate(pattern):
        if skip or sign == "\\":
            skip = not skip
        elif inside:
            inside = sign != "]"
        elif sign == "[":
            inside = True
        elif sign in "()":
            depth += 1 if sign == "(" else -1
        elif sign == "|" and not depth:
            yield pattern[start:at]
            start = at + 1
    yield pattern[start:]


def parts(text: str) -> list[str]:
    """The text in parts of at least SPLIT_ABOVE / AT_ONCE characters, cut as the module says; one part where
    there is no such place.
    """
    found, start, wanted = [], 0, SPLIT_ABOVE // AT_ONCE
    while len(text) - start > wanted and (cut := _CUT.search(text, start + wanted)):
        found.append(text[start : cut.end()])
        start = cut.end()
    return [*found, text[start:]]
