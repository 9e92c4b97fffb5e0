"""The chat template that comes with a tokenizer: a list of messages as the one text a model was tuned on.

Templates are programs in Jinja's language, written by whoever published the model. They run in Jinja's
sandbox, with the few names that `transformers` gives them, and see nothing but the messages and the
tokenizer's special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from hlat.errors import UserError
from hlat.paths import expand

DEFAULT = "default"
OLDEST_JINJA = (3, 1, 6)  # older ones have known ways out of the sandbox
_END = "<<hlat: the message goes on here>>"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplates:
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
    def read(cls, folder: str | Path | None) -> ChatTemplates | None:
        """Those of a folder (or of the folder a file lies in); None where there are none. Files come first,
        as for `AutoTokenizer`: chat_template.jinja and additional_chat_templates/NAME.jinja, else
        `chat_template` of tokenizer_config.json.

        Raises UserError for files that cannot be read.
        """
        if folder is None:
            return None
        place = expand(folder)
        place = place if place.is_dir() else place.parent
        config = _json(place / "tokenizer_config.json")
        templates = _files(place) or _named(config.get("chat_template"))
        if not templates:
            return None
        named = {**_json(place / "special_tokens_map.json"), **config}
        values = {name: named.get(name) for name in _TOKENS}
        texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in values.items()}
        return cls(templates, {n: text for n, text in texts.items() if isinstance(text, str)}, place)

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

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of messages (`role`, `content`), ending where the model's answer begins; without
        add_generation_prompt the last message is the beginning of that answer, and nothing follows it.

        Raises UserError for a template that is no valid one or refuses the messages.
        """
        chat = [dict(message) for message in messages]
        if not add_generation_prompt and chat:
            chat[-1]["content"] = f"{chat[-1]['content']}{_END} "
        try:
            text: str = self._compiled.render(
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )
        except Exception as error:  # whatever a stranger's program throws
            raise self._refused(error) from error
        if add_generation_prompt:
            return text
        if _END not in text:
            raise UserError("the chat template does not show the last message", where=str(self.folder))
        before, _, after = text.rpartition(_END)
        return before if after.startswith(" ") else before.rstrip()  # this one trims its messages

    @cached_property
    def _environment(self) -> Any:
        return _sandbox()

    @property
    def _compiled(self) -> Any:
        return self._environment.from_string(self.text)  # Jinja keeps what it has compiled

    def _refused(self, error: Exception) -> UserError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"the chat template cannot be applied ({reason})"
        return UserError(what, where=str(self.folder), fix="repair it, or evaluate without it")


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
    return {str(e["name"]): str(e["template"]) for e in entries if {"name", "template"} <= set(e)}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"not JSON ({error})", where=str(path), fix="repair or remove the file") from error
    return value if isinstance(value, dict) else {}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@cache
def _sandbox() -> Any:
    """Jinja's sandbox with what `transformers` offers a template. Raises UserError for an old Jinja."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdecimal()) < OLDEST_JINJA:
        oldest = ".".join(map(str, OLDEST_JINJA))
        what = f"Jinja {jinja2.__version__} cannot keep a chat template in its sandbox"
        raise UserError(what, fix=f"run: pip install 'jinja2>={oldest}'")

    class Generation(Extension):
        """`{% generation %}` marks the assistant's tokens for training; its text is all that counts here."""

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Names(jinja2.utils.Namespace):
        """What a template stores; names that Python gives a meaning to are none of its business."""

        def __init__(*args: Any, **names: Any) -> None:
            for name in dict(*args[1:], **names):
                Names.check(name)
            jinja2.utils.Namespace.__init__(*args, **names)

        def __setitem__(self, name: str, value: Any) -> None:
            Names.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not store {name!r}")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["namespace"] = Names
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made
