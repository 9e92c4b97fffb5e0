"""Chat templates as the evaluation harness uses them: questions and examples as messages of one text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hlat.data.chat_layout import Unclear
from hlat.data.chat_renderer import Refused, Renderer
from hlat.data.chat_template import TemplateFiles
from hlat.errors import UserError

_END = "<<hlat: the message goes on here>>"


class ChatTemplates(TemplateFiles):
    """The templates of a tokenizer's files, applied to messages."""

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of messages (`role`, `content`), ending where the model's answer begins; without
        add_generation_prompt the last message is the beginning of that answer, and nothing follows it.

        Raises UserError for a template that is no valid one or refuses the messages.
        """
        chat = [dict(message) for message in messages]
        if not add_generation_prompt and chat:
            chat[-1]["content"] = f"{chat[-1]['content']}{_END} "
        try:
            text = _renderer(self, self.name).render(chat, add_generation_prompt)
        except (Refused, Unclear) as error:
            what = f"the chat template cannot be applied ({error})"
            fix = "repair it, or evaluate without it"
            raise UserError(what, where=str(self.folder), fix=fix) from error
        if add_generation_prompt:
            return text
        if _END not in text:
            raise UserError("the chat template does not show the last message", where=str(self.folder))
        before, _, after = text.rpartition(_END)
        return before if after.startswith(" ") else before.rstrip()  # this one trims its messages


@lru_cache(maxsize=4)
def _renderer(templates: ChatTemplates, name: str) -> Renderer:
    return templates.renderer()
