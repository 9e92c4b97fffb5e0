"""Conversations as finetuning examples: records with `messages`, of which the answers are learned."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hlat.data.chat_layout import ANSWERS, Laid, Unclear
from hlat.data.chat_renderer import Refused, Renderer
from hlat.data.example_text import Example
from hlat.data.packed import document_hash
from hlat.data.quoted import Quoted
from hlat.data.template import field_text
from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.data.records import Record

FIELD = "messages"
KNOWN = ("system", "developer", "user", *ANSWERS, "tool", "function", "ipython")
"""Roles that are known. Another one may not be part of a special token, which a template may make of it."""
_OTHERS = "conversations"  # of `from` and `value`


class Conversations:
    """Reads conversations.

    Args:
        renderer: of the chat template.
        control: texts of the special tokens.
        group_field: see `read_examples`.
    """

    def __init__(self, renderer: Renderer, control: Iterable[str], group_field: str | None = None) -> None:
        self._renderer, self._control, self._group = renderer, "\0".join(control), group_field

    def read(
        self, records: Iterable[Record], source: str, where: str, dropped: Counter[str]
    ) -> list[Example]:
        """The examples in records; what cannot be used is counted by reason.

        Raises UserError when there is none, or the chat template is no valid one or takes too long.
        """
        examples: list[Example] = []
        reasons: Counter[str] = Counter()
        first: Mapping[str, Any] | None = None
        for record in records:
            if record.values is None:
                reasons[record.reason] += 1
                continue
            first = record.values if first is None else first
            try:
                examples.append(replace(self._example(record.values), place=record.place))
            except Unclear as error:
                reasons[str(error)] += 1
            except Refused as error:
                reasons[f"the chat template refuses it ({error})"] += 1
        dropped.update(reasons)
        if not examples:
            raise _nothing(source, first, reasons, where)
        return examples

    def _example(self, values: Mapping[str, Any]) -> Example:
        """Raises Unclear and Refused for a record that cannot be used."""
        messages = self._messages(values)
        tools = values.get("tools")
        laid = self._renderer.lay_out(messages, tools if isinstance(tools, list) and tools else None)
        group = field_text(values, self._group) if self._group else None
        if self._group and group is None:
            raise Unclear(f"no text or number under '{self._group}'")
        asked = next(n for n, message in enumerate(messages) if message["role"] in ANSWERS)
        try:
            laid.text.encode("utf-8")
            mark = document_hash(json.dumps(messages[:asked], sort_keys=True).encode("utf-8"))
            own = mark if group is None else document_hash(group.encode("utf-8"))
        except UnicodeEncodeError:
            raise Unclear("not Unicode text (lone surrogate)") from None
        return _as_example(laid, mark, own)

    def _messages(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        messages = values.get(FIELD)
        if not isinstance(messages, list) or not messages:
            raise Unclear(f"no list of messages under '{FIELD}'")
        found = [self._message(message) for message in messages]
        answers = [message for message in found if message["role"] in ANSWERS]
        if not answers:
            raise Unclear("no assistant turn")
        if not all(message.get("content") or message.get("tool_calls") for message in answers):
            raise Unclear("empty answer")
        return found

    def _message(self, message: Any) -> dict[str, Any]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unclear("a message is no object with a role and content")
        role, content = message["role"], message.get("content")
        if role not in KNOWN and (not re.fullmatch(r"[\w-]+", role) or role in self._control):
            raise Unclear(f"unknown role {role[:40]!r}")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise Unclear("the content of a message is not text")
        return {key: value for key, value in message.items() if value is not None} | {
            "content": content or ""
        }


def are_messages(values: Mapping[str, Any]) -> bool:
    """Whether a record looks like a conversation."""
    return isinstance(values.get(FIELD), list) or _of_others(values)


def _of_others(values: Mapping[str, Any]) -> bool:
    """Whether a record is a conversation as other tools write it."""
    for name in (FIELD, _OTHERS):
        turns = values.get(name)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, dict) and {"from", "value"} <= first.keys():
            return True
    return isinstance(values.get(_OTHERS), list)


def _as_example(laid: Laid, mark: int, group: int) -> Example:
    quotes = [(a, b) for a, b in laid.quotes if a < b]
    text = Quoted.joined(_parts(laid.text, quotes))
    begin, end = laid.spans[0][0], laid.spans[-1][1]
    spans = tuple((a - begin, b - begin) for a, b in laid.spans)
    return Example(text.part(0, begin), text.part(begin, end), -1, mark, group, spans)


def _parts(text: str, quotes: Iterable[tuple[int, int]]) -> Iterable[Quoted]:
    done = 0
    for first, end in quotes:
        yield Quoted(text[done:first])
        yield Quoted.of(text[first:end])
        done = end
    yield Quoted(text[done:])


def _nothing(source: str, first: Mapping[str, Any] | None, reasons: Counter[str], where: str) -> UserError:
    if first is not None and _of_others(first):
        what = f"the records of '{source}' are conversations of 'from' and 'value', which are not read"
        fix = f"write {FIELD}: [{{role: user, content: …}}, {{role: assistant, content: …}}]"
        return UserError(what, where=where, fix=fix)
    said = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
    what = f"no conversation in '{source}' can be used" + (f" ({said})" if said else "")
    return UserError(what, where=where, fix=f"write {FIELD}: a list of objects with role and content")
