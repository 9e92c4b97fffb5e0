"""The chat template that a recipe's conversations go through, and what is made of them with it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.data.chat_template import DEFAULT, TemplateFiles
from hlat.data.example_text import WHERE, Reader
from hlat.data.joint import Joint
from hlat.data.messages import Conversations, are_messages
from hlat.errors import UserError
from hlat.paths import existing_file

if TYPE_CHECKING:
    from hlat.data.tokenizer import Tokenizer
    from hlat.recipe import Recipe

KEY = "data.chat_template"
_FILE = "chat_template.jinja"
BUILTIN = {
    "plain": "{% for message in messages %}{{ '# ' + message.role + '\\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant\\n' }}{% endif %}"
}
"""Templates by name. `plain` needs no special token but EOS, so that any tokenizer will do."""
_LONGEST = 1 << 20  # bytes of a template


class Chat:
    """Says whether the examples of a recipe are conversations, when their first record is known.

    Attributes:
        joint: encodes what the template makes of conversations; None: there were none.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        assert recipe.data.examples is not None
        self._section, self._path, self._tokenizer = (
            recipe.data.examples,
            recipe.data.chat_template,
            tokenizer,
        )
        self._decided: bool | None = None
        self._reader: Conversations | None = None
        self.joint: Joint | None = None

    def reader(self, first: Mapping[str, Any]) -> Reader | None:
        """What reads a source with this first record; None: the templates of the recipe. Held-out examples of
        their own are read as the others.

        Raises UserError for a template that is missing or cannot be read.
        """
        if self._decided is None:
            self._decided = self._are_conversations(first)
        if not self._decided:
            return None
        if self._reader is None:
            self._open()
        assert self._reader is not None
        return self._reader.read

    def _are_conversations(self, first: Mapping[str, Any]) -> bool:
        if self._section.format != "auto":
            return self._section.format == "messages"
        if self._path is not None:
            return True
        return not self._section.own_templates() and are_messages(first)

    def _open(self) -> None:
        templates = self._named() if self._path is not None else self._of_tokenizer()
        known = {"bos_token": self._tokenizer.bos_id, "eos_token": self._tokenizer.eos_id}
        pieces = self._tokenizer.pieces()
        own = {name: pieces[index] for name, index in known.items() if index in pieces}
        templates.tokens = {**own, **templates.tokens}
        self.joint = Joint(self._tokenizer, templates.text, begin=False)
        control = list(self.joint.encoder.control)
        renderer = templates.renderer(control, frozen=True)
        self._reader = Conversations(renderer, control, self._section.group_field)

    def _of_tokenizer(self) -> TemplateFiles:
        files = self._tokenizer.files()
        found = TemplateFiles.read(files[0].parent) if files else None
        if found is None:
            what = f"the tokenizer '{self._tokenizer.spec}' has no chat template, which conversations need"
            raise UserError(what, where=WHERE, fix=f"name a Jinja file: {KEY}")
        found.choose()
        return found

    def _named(self) -> TemplateFiles:
        """The recipe's template. From here on it is that of the tokenizer, and goes where that goes."""
        assert self._path is not None
        text = BUILTIN.get(self._path) or _read(existing_file(self._path, KEY, "name a Jinja file"))
        files = self._tokenizer.files()
        tokens = TemplateFiles.special_tokens(files[0].parent) if files else {}
        if files:
            folder = Path(tempfile.mkdtemp(prefix="hlat-chat-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            (folder / _FILE).write_text(text, encoding="utf-8", newline="")
            others = (path for path in self._tokenizer.companions if path.name != _FILE)
            self._tokenizer.companions = (*others, folder / _FILE)
        return TemplateFiles({DEFAULT: text}, tokens, Path(self._path))


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise UserError(f"no such file '{path}'", where=KEY, fix="name a Jinja file")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}' cannot be read ({reason})", where=KEY, fix="name a Jinja file") from error
    if len(content) > _LONGEST:
        raise UserError(f"'{path}' has {len(content):,} bytes", where=KEY, fix="name a Jinja file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text", where=KEY, fix="name a Jinja file") from error
