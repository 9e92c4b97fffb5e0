"""The parser of the command line: what is wrong with it is one line that says what to write instead."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from hlat.cli_examples import epilog
from hlat.errors import UserError
from hlat.registry import did_you_mean

_TYPES = {"int": "a whole number", "float": "a number"}


class Parser(argparse.ArgumentParser):
    """argparse's parser, which raises UserError in place of printing its usage, and knows overrides."""

    verbs: Any = None

    def add_subparsers(self, **options: Any) -> Any:
        """As argparse's."""
        self.verbs = super().add_subparsers(**options)
        return self.verbs

    def format_help(self) -> str:
        """As argparse's, with examples at its end."""
        return super().format_help() + epilog(self.prog)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments in `words`; `key=value` may stand before and behind options.

        Raises UserError for what is unknown, missing, or of the wrong type.
        """
        inner, own = self._chosen(words)
        inner._refuse_unknown(own)
        args, rest = self.parse_known_args(words)
        rest = [word for word in rest if word != "--"]
        wrong = next((word for word in rest if word.startswith("-") or not hasattr(args, "overrides")), None)
        if wrong is not None:
            inner._unknown(wrong, own)
        if rest:  # argparse takes positional arguments from one place only: the others stand behind an option
            args.overrides = [*args.overrides, *rest]
        return args

    def error(self, message: str) -> NoReturn:
        """Raise UserError for what argparse found."""
        _, missing, names = message.partition("arguments are required: ")
        if missing and self.verbs is not None:
            self._refuse(f"no {self.verbs.dest} is given", f"write one of {', '.join(self.verbs.choices)}")
        if missing:
            self._refuse(f"missing: {names}", f"write: {self._least()}")
        text = message.removeprefix("argument ")
        wrong = re.fullmatch(r"(.*): invalid (int|float) value: (.*)", text, re.DOTALL)
        self._refuse(f"{wrong[1]}: expected {_TYPES[wrong[2]]}, got {wrong[3]}" if wrong else text)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """A value of its type. What a type raises itself is told with the name of its option."""
        name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
        try:
            value = super()._get_value(action, arg_string)
        except UserError as error:
            raise UserError(error.what, where=name, fix=error.fix) from error
        if isinstance(value, float) and not math.isfinite(value):  # no option means anything by inf or nan
            self._refuse(f"{name}: expected a number, got {arg_string!r}")
        return value

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        fix = did_you_mean(str(value), list(action.choices))
        if action is self.verbs:
            self._refuse(f"unknown {action.dest} {value!r}", fix)
        self._refuse(f"{'/'.join(action.option_strings) or action.dest}: unknown value {value!r}", fix)

    def _chosen(self, words: Sequence[str]) -> tuple[Parser, Sequence[str]]:
        """The parser of the verb and action that are named, and the words behind their names."""
        if self.verbs is not None:
            for number, word in enumerate(words):
                if word in self.verbs.choices:
                    inner: Parser = self.verbs.choices[word]
                    return inner._chosen(words[number + 1 :])
        return self, words

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """A misspelt option comes before a missing one, which it explains."""
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            option = name.startswith("--") and " " not in word  # with a space it is a text, as for argparse
            if option and not any(known.startswith(name) for known in self._option_string_actions):
                self._unknown(word, words)

    def _unknown(self, word: str, words: Sequence[str]) -> NoReturn:
        name, equals, value = word.partition("=")
        if not name.startswith("-"):
            self._refuse(f"{word!r} is one argument too many")
        key = _recipe_key(name.lstrip("-")) if any(a.dest == "overrides" for a in self._actions) else ""
        if key:
            following = words[words.index(word) + 1 : words.index(word) + 2]
            value = value if equals else "".join(w for w in following if not w.startswith("-")) or "..."
            self._refuse(f"unknown option {name}", f"recipe values are given without dashes: {key}={value}")
        # The dashes are left out: they would make short names look alike.
        known = [option.lstrip("-") for option in self._option_string_actions]
        near = difflib.get_close_matches(name.lstrip("-"), known, n=1)
        self._refuse(f"unknown option {name}", f"did you mean '--{near[0]}'?" if near else "")

    def _least(self) -> str:
        """The shortest command line that is complete."""
        words = [self.prog]
        for action in self._actions:
            if action.required:
                words += [*action.option_strings[-1:], str(action.metavar or action.dest).upper()]
        return " ".join(words)

    def _refuse(self, what: str, fix: str = "") -> NoReturn:
        see = f"see: {self.prog} --help"
        joined = f"{fix} ({see})" if fix.endswith("?") else f"{fix}; {see}" if fix else see
        raise UserError(what, fix=joined)


def _recipe_key(name: str) -> str:
    """The dotted recipe key that somebody means by the option --name; empty for none."""
    from hlat.recipe import Recipe
    from hlat.recipe_errors import annotation, is_section, keys_of

    name = name.replace("-", "_")
    if "." in name or name in Recipe.model_fields:
        return name
    sections = (key for key in Recipe.model_fields if is_section(annotation(key)))
    return next((f"{key}.{name}" for key in sections if name in keys_of(annotation(key))), "")
