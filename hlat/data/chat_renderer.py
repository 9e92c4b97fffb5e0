"""A chat template in a process of its own (`hlat.data.chat_worker`), with limits."""

from __future__ import annotations

import json
import signal
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hlat.data.chat_layout import Laid, Unclear
from hlat.errors import UserError
from hlat.host.python import environment, module

SECONDS = 10.0
"""Of computing that one conversation may take."""
MEMORY = 2 << 30
"""Bytes of address space of the process."""


class Refused(Exception):
    """What a template says against a conversation."""


class Renderer:
    """Renders conversations. The process begins with the first of them and ends with this object.

    Args:
        template: its text. tokens: texts of special tokens, by name (`bos_token`, …).
        control: texts of all special tokens.
        where: where the template is from, for errors.
        frozen: let `strftime_now` say the same day always, for rows that do not depend on it.
    """

    def __init__(
        self,
        template: str,
        tokens: Mapping[str, str],
        control: Sequence[str] = (),
        where: str = "",
        frozen: bool = False,
    ) -> None:
        self._job: dict[str, Any] = {"template": template, "tokens": dict(tokens), "control": list(control)}
        self._job |= {"frozen": frozen, "seconds": SECONDS, "memory": MEMORY}
        self._where = where
        self._process: subprocess.Popen[str] | None = None

    def lay_out(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Laid:
        """The text of a conversation, what is learned of it and what is quoted in it.

        Raises Unclear where that cannot be told, Refused where the template throws, UserError where it takes
        more time or memory than it may, or is no valid template.
        """
        found = self._ask({"messages": list(messages), "tools": tools})
        pairs = ([(int(a), int(b)) for a, b in found[key]] for key in ("quotes", "spans"))
        return Laid(found["text"], *pairs)

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool, tools: Any = None) -> str:
        """The text of messages; with `prompt` up to where an answer begins. Raises as `lay_out`."""
        return str(self._ask({"messages": list(messages), "tools": tools, "prompt": prompt})["text"])

    def _ask(self, item: Mapping[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        answer = self._exchange(self._process, item)
        if "unclear" in answer:
            raise Unclear(answer["unclear"])
        if "error" in answer:
            raise Refused(answer["error"])
        return answer

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            module("hlat.data.chat_worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment(),
        )
        weakref.finalize(self, _end, process)
        answer = self._exchange(process, self._job)
        if "error" in answer:
            what = f"the chat template cannot be applied ({answer['error']})"
            raise UserError(what, where=self._where, fix=answer.get("fix") or "repair it")
        return process

    def _exchange(self, process: subprocess.Popen[str], item: Mapping[str, Any]) -> dict[str, Any]:
        assert process.stdin and process.stdout
        line = ""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(item) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if line.endswith("\n"):
            return dict(json.loads(line))
        status, self._process = process.wait(), None
        slow = status == -signal.SIGPROF
        what = f"takes more than {SECONDS:g} s of computing for one conversation" if slow else f"({status})"
        what = what if slow else f"has ended the process that runs it {what}"
        raise UserError(f"the chat template {what}", where=self._where, fix="repair it")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    process.wait()
