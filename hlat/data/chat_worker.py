"""The process that runs chat templates: a stranger's program can neither hang a run nor fill its memory.

`python -m hlat.data.chat_worker`: JSON lines on stdin and stdout. The first line is the job: `template`,
`tokens` (texts of the special tokens by name), `control` (all of them), `frozen` (whether the present is a
fixed day), `seconds` and `memory` (bytes) that one conversation may take. Each further one is a conversation:
`messages`, `tools`, and `prompt`: whether an answer is to begin, for its text alone; without that key it is
laid out (`hlat.data.chat_layout`).
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

from hlat.data.chat_layout import GENERATED, Layout, Unclear
from hlat.data.chat_sandbox import sandbox
from hlat.errors import UserError

FROZEN = datetime(2024, 7, 26)
LONGEST = 1 << 26  # characters of one conversation


def _frozen() -> datetime:
    return FROZEN


class Conversations:
    """A template, ready for conversations. Raises what Jinja raises for one that is no valid template."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        text, now = job["template"], _frozen if job["frozen"] else datetime.now
        environment = sandbox(now, GENERATED)
        tree = environment.parse(text)
        self._marked, self._plain = environment.from_string(text), sandbox(now).from_string(text)
        self._tokens, self._control = job["tokens"], job["control"]
        self._tagged = any(
            getattr(call.call.node, "name", "") == "_show" for call in tree.find_all(_call_blocks())
        )

    def answer(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """What is written for one conversation: its text, or `unclear`, or an `error` of the template."""
        try:
            if "prompt" in item:
                found = {"text": self._render(self._plain, item["tools"])(item["messages"], item["prompt"])}
            else:
                layout = Layout(lambda *_: "", self._tagged, self._control)
                render = self._render(self._marked, layout.hide(item["tools"]))
                found = asdict(Layout(render, self._tagged, self._control)(item["messages"]))
        except Unclear as error:
            return {"unclear": str(error)}
        except (Exception, RecursionError) as error:  # whatever a stranger's program throws
            return {"error": _reason(error)}
        if len(found["text"]) > LONGEST:
            return {"error": f"it makes a text of {len(found['text']):,} characters"}
        return found

    def _render(self, template: Any, tools: Any) -> Callable[[Any, bool], str]:
        def render(messages: Any, prompt: bool) -> str:
            return str(
                template.render(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=prompt,
                    **self._tokens,
                )
            )

        return render


def _call_blocks() -> Any:
    from jinja2 import nodes

    return nodes.CallBlock


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error).strip() else type(error).__name__


def main() -> None:
    """See the module."""
    for line in sys.stdin:
        job = json.loads(line)
        break
    else:
        return
    with suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = job["memory"] if most == resource.RLIM_INFINITY else min(job["memory"], most)
        resource.setrlimit(resource.RLIMIT_AS, (wanted, most))
    signal.setitimer(signal.ITIMER_PROF, job["seconds"])
    try:
        conversations = Conversations(job)
    except UserError as error:
        _write({"error": error.what, "fix": error.fix})
        return
    except (Exception, RecursionError) as error:  # no valid template
        _write({"error": _reason(error)})
        return
    _write({})
    for line in sys.stdin:
        item = json.loads(line)
        # Of computing, so that a busy machine is no reason; the signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])
        answer = conversations.answer(item)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answer)


def _write(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run that asks will end it
    main()
