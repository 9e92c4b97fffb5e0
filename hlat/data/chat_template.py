"""The chat templates that come with a tokenizer: how messages become the one text that a model knows."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from hlat.data.chat_renderer import Renderer
from hlat.data.special_tokens import read_object
from hlat.errors import UserError
from hlat.paths import expand

DEFAULT = "default"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateFiles:
    """The templates of a tokenizer's files.

    Args:
        templates: by name; most have one, `default`.
        tokens: text of the special tokens, by name (`bos_token`, …).
        folder: where they come from.
    """

    def __init__(self, templates: dict[str, str], tokens: dict[str, str], folder: Path) -> None:
        self.templates, self.tokens, self.folder = templates, tokens, folder
        self.name = DEFAULT

    @classmethod
    def read(cls, folder: str | Path | None) -> Self | None:
        """Those of a folder (or of the folder a file lies in); None where there are none. Files come first,
        as for `AutoTokenizer`: chat_template.jinja and additional_chat_templates/NAME.jinja, else
        `chat_template` of tokenizer_config.json.

        Raises UserError for files that cannot be read.
        """
        if folder is None:
            return None
        place = expand(folder)
        place = place if place.is_dir() else place.parent
        config = read_object(place / "tokenizer_config.json")
        templates = _files(place) or _named(config.get("chat_template"))
        if not templates:
            return None
        for name, text in templates.items():
            try:
                (name + text).encode("utf-8")
            except UnicodeEncodeError:
                what = "a chat template is not Unicode text (lone surrogate)"
                raise UserError(what, where=str(place), fix="repair the file") from None
        return cls(templates, cls.special_tokens(place), place)

    @staticmethod
    def special_tokens(folder: Path) -> dict[str, str]:
        """The special tokens that a folder's files name, by their names there. Raises UserError as `read`."""
        config = read_object(folder / "tokenizer_config.json")
        named = {**read_object(folder / "special_tokens_map.json"), **config}
        values = {name: named.get(name) for name in _TOKENS}
        texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in values.items()}
        return {n: text for n, text in texts.items() if isinstance(text, str)}

    def choose(self, name: str | None = None) -> str:
        """Use a template by its name, or the default one; returns its text. Raises UserError for no such
        name.
        """
        wanted = name or DEFAULT
        if name is not None and list(self.templates) == [DEFAULT]:
            wanted = DEFAULT  # as the harness does: there is nothing to choose from
        if wanted not in self.templates:
            what = f"the tokenizer has no chat template named '{wanted}'"
            raise UserError(
                what, where=str(self.folder), fix=f"there are: {', '.join(sorted(self.templates))}"
            )
        self.name = wanted
        return self.text

    @property
    def text(self) -> str:
        """The chosen template."""
        return self.templates[self.name]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the chosen template."""
        return sha256(self.text.encode()).hexdigest()

    def renderer(self, control: Sequence[str] = (), frozen: bool = False) -> Renderer:
        """The chosen template in a process of its own: see `Renderer`."""
        return Renderer(self.text, self.tokens, control, str(self.folder), frozen)


def _files(folder: Path) -> dict[str, str]:
    found = {}
    paths = [(DEFAULT, folder / "chat_template.jinja")]
    paths += [(path.stem, path) for path in sorted(folder.glob("additional_chat_templates/*.jinja"))]
    for name, path in paths:
        if path.is_file():
            try:
                found[name] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise UserError(f"cannot be read ({error})", where=str(path)) from error
    return found


def _named(value: Any) -> dict[str, str]:
    """Templates as tokenizer_config.json has them: one text, or a list of names and texts."""
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = value if isinstance(value, list) else []
    pairs = [(e.get("name"), e.get("template")) for e in entries if isinstance(e, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
