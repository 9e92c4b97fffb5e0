"""The tokens that the files beside a vocabulary name, found as `transformers.AutoTokenizer` finds them.

    tokenizer_config.json      roles (`eos_token`, …), further special tokens, and `added_tokens_decoder`
    special_tokens_map.json    roles again, which count more; not read beside an `added_tokens_decoder`
    added_tokens.json          tokens beyond the vocabulary, by id; not read beside an `added_tokens_decoder`

A token is written as text or as an object with `content` and how it is matched. config.json and
generation_config.json name no tokens of a tokenizer: `AutoTokenizer` does not ask them either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken

CONFIG = "tokenizer_config.json"
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
SIDECARS = (CONFIG, _MAP, _ADDED)
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# No text, template or document mark is ever made of these.
_IDLE_ROLES = _ROLES[2:]
# What tokenizer classes of transformers take where no file says it: BOS and EOS.
_CLASS_DEFAULTS = {
    "LlamaTokenizer": ("<s>", "</s>"),
    "CodeLlamaTokenizer": ("<s>", "</s>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "Qwen2Tokenizer": (None, "<|endoftext|>"),
}
_PREFIX_ONCE = ("LlamaTokenizer", "CodeLlamaTokenizer")  # whose `legacy` is false unless it is given


@dataclass(frozen=True)
class Token:
    """A token beside the model's own: its text, and how it is found in a text."""

    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def added(self) -> AddedToken:
        """The same for the `tokenizers` library."""
        from tokenizers import AddedToken

        return AddedToken(**asdict(self))


@dataclass
class Named:
    """What the files say.

    Attributes:
        roles: `eos_token` and the like -> the token; None: the files say that there is none.
        numbered: id -> token.
        extra: further special tokens.
        tokenizer_class: of transformers, without "Fast"; empty: not said.
        legacy: what tokenizer_config.json says under this name; None: nothing.
    """

    roles: dict[str, Token | None] = field(default_factory=dict)
    numbered: dict[int, Token] = field(default_factory=dict)
    extra: list[Token] = field(default_factory=list)
    tokenizer_class: str = ""
    legacy: bool | None = None

    @property
    def prefixes_all(self) -> bool:
        """Whether what follows an added token gets SentencePiece's space in front, as what begins a text."""
        return self.tokenizer_class not in _PREFIX_ONCE if self.legacy is None else self.legacy

    def special(self) -> set[str]:
        """Texts of the tokens that have a role."""
        return {token.content for token in self.roles.values() if token is not None}

    def to_add(self, present: set[str]) -> list[Token]:
        """The tokens to be added to a vocabulary, in the order in which `AutoTokenizer` does it.

        Args:
            present: texts of the tokens that were added to it before. (One of them comes again where a file
                gives its id, for that file also says how it is matched.)
        """
        tokens = [token for _, token in sorted(self.numbered.items())]
        known = present | {token.content for token in tokens}
        roles = {name: self.roles.get(name) for name in _ROLES} | self.roles
        for token in [*roles.values(), *self.extra]:
            if token is not None and token.content not in known:
                tokens.append(token)
                known.add(token.content)
        named = self.special()
        return [replace(token, special=token.special or token.content in named) for token in tokens]

    def idle(self) -> set[str]:
        """Texts of tokens for padding and masks alone: where they are no part of the vocabulary, the weights
        need not have them."""
        idle = {token.content for name in _IDLE_ROLES if (token := self.roles.get(name)) is not None}
        used = {token.content for token in [*self.numbered.values(), *self.extra]}
        used |= {token.content for name, token in self.roles.items() if token and name not in _IDLE_ROLES}
        return idle - used

    def role(self, name: str, known: Callable[[str], bool], guesses: Sequence[str]) -> str | None:
        """The text of `bos_token` or `eos_token`: what the files say, else what their tokenizer class takes,
        else the first of the guesses that the vocabulary knows. None: there is none.
        """
        if name in self.roles:
            token = self.roles[name]
            return token.content if token is not None else None
        defaults = dict(
            zip(("bos_token", "eos_token"), _CLASS_DEFAULTS.get(self.tokenizer_class, ()), strict=False)
        )
        return next((text for text in [defaults.get(name), *guesses] if text and known(text)), None)


def sidecars(vocabulary: Path) -> list[Path]:
    """The files beside a vocabulary that name tokens."""
    return [path for name in SIDECARS if (path := vocabulary.with_name(name)).is_file()]


def read_named(vocabulary: Path) -> Named:
    """What the files beside a vocabulary say. Raises UserError for one that cannot be read as that."""
    config = read_object(vocabulary.with_name(CONFIG))
    where = str(vocabulary.with_name(CONFIG))
    numbered = config.get("added_tokens_decoder")
    values, places = dict(config), dict.fromkeys(config, where)
    if numbered is None:
        over = vocabulary.with_name(_MAP)
        said = read_object(over)
        values |= said
        places |= dict.fromkeys(said, str(over))
    named = Named(tokenizer_class=str(config.get("tokenizer_class") or "").removesuffix("Fast"))
    legacy = config.get("legacy")
    named.legacy = legacy if isinstance(legacy, bool) else None
    for key, value in values.items():
        if key in _ROLES:
            named.roles[key] = _role(key, value, places[key])
        elif key.endswith("_token") and isinstance(value, str):
            named.roles[key] = Token(value)
    _further(named, values, places)
    if numbered is None:
        path = vocabulary.with_name(_ADDED)
        special = named.special() | {token.content for token in named.extra}
        for text, index in read_object(path).items():
            marked = text in special
            _number(named, index, Token(text, special=marked, normalized=not marked), str(path))
    else:
        if not isinstance(numbered, dict):
            raise _wrong("added_tokens_decoder", numbered, where, "an object: id to token")
        for key, value in numbered.items():
            index = int(key) if key.isdecimal() and len(key) < 10 else key
            _number(named, index, _token(f"added_tokens_decoder.{key}", value, where, special=False), where)
    by_text = {token.content: token for token in named.numbered.values()}
    named.roles = {name: by_text.get(t.content, t) if t else None for name, t in named.roles.items()}
    return named


def _role(key: str, value: Any, where: str) -> Token | None:
    return None if value is None else _token(key, value, where)


def _further(named: Named, values: Mapping[str, Any], places: Mapping[str, str]) -> None:
    """`extra_special_tokens`, which earlier versions call `additional_special_tokens`."""
    key = "extra_special_tokens" if values.get("extra_special_tokens") else "additional_special_tokens"
    found = values.get(key)
    if not found:
        return
    where = places[key]
    if isinstance(found, dict):  # names of roles that only this model has
        for name, value in found.items():
            named.roles[name] = _token(f"{key}.{name}", value, where)
    elif isinstance(found, list):
        named.extra = [_token(f"{key}[{n}]", value, where) for n, value in enumerate(found)]
    else:
        raise _wrong(key, found, where, "a list of tokens")


def _token(key: str, value: Any, where: str, special: bool = True) -> Token:
    if isinstance(value, str) and value:
        return Token(value, special=special)
    if isinstance(value, dict) and isinstance(value.get("content"), str) and value["content"]:
        names = ("special", "normalized", "lstrip", "rstrip", "single_word")
        flags = {name: value[name] for name in names if value.get(name) is not None}
        if all(isinstance(flag, bool) for flag in flags.values()):
            flags.setdefault("special", special)
            flags.setdefault("normalized", not flags["special"])
            return Token(value["content"], **flags)
    raise _wrong(key, value, where, 'the token as text, or {"content": "…"}')


def _number(named: Named, index: Any, token: Token, where: str) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**31 or not token.content:
        raise _wrong(f"the id of '{token.content}'", index, where, "a whole number, at least 0")
    if index in named.numbered:
        both = f"'{named.numbered[index].content}' and '{token.content}'"
        raise UserError(f"{both} have one id, {index}", where=where, fix="give each token its own")
    named.numbered[index] = token


def _wrong(key: str, value: Any, where: str, wanted: str) -> UserError:
    text = json.dumps(value, ensure_ascii=False)
    return UserError(f"{key} is {text[:60]}", where=where, fix=f"write {wanted}")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file. Raises UserError for something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise UserError(what, where=str(path), fix="make it readable") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=str(path), fix="repair or remove the file") from error
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path), fix="repair or remove the file")
    return value


def complete(backend: Any, named: Named, where: str) -> set[int]:
    """Add the tokens to a `tokenizers` object, as `AutoTokenizer` does.

    Returns the ids beyond the vocabulary that are there for padding and masks alone. Raises UserError when a
    file gives a new token another id than the next one.
    """
    before = backend.get_vocab(with_added_tokens=True)
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token.added() for token in named.to_add(present)])
    for index, token in named.numbered.items():
        found = backend.token_to_id(token.content)
        if token.content not in before and found != index:
            raise misnumbered(token.content, index, found, where)
    idle = named.idle() - before.keys()
    return {index for text in idle if (index := backend.token_to_id(text)) is not None}


def decided_beside(backend: Any, definition: Mapping[str, Any], vocab_size: int) -> str:
    """What of the ids of a `tokenizers` object its tokenizer.json does not decide, as text; empty: nothing.

    Args:
        definition: content of the tokenizer.json.
        vocab_size: ids from here on do not count.
    """
    own = {token["content"]: token for token in definition.get("added_tokens") or []}
    base, found = backend.get_vocab(with_added_tokens=False), []
    for index, token in sorted(backend.get_added_tokens_decoder().items()):
        values = {entry.name: getattr(token, entry.name) for entry in fields(Token)}
        before = own.get(token.content)
        if before is None:
            matters = index < vocab_size and (token.content not in base or not token.special)
        else:  # two that are special are not found in texts, however they are matched
            changed = any(before.get(name) != value for name, value in values.items())
            matters = changed and not (token.special and before.get("special"))
        if matters:
            found.append([index, values])
    return "\0" + json.dumps(found, ensure_ascii=False, sort_keys=True) if found else ""


def misnumbered(text: str, said: int, found: int | None, where: str) -> UserError:
    """The error for a further token whose id is not the next one of its vocabulary."""
    return UserError(
        f"the files beside it give '{text}' the id {said}, and its next free one is {found}",
        where=where,
        fix="save the tokenizer again with transformers, so that its files agree",
    )
