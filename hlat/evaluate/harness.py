"""HLAT as a model of the LM Evaluation Harness (`lm_eval`, extra `eval`).

The harness knows tasks, prompts and metrics; here is what it asks of a model. Texts are encoded as its own
`hf` model encodes them (`hlat.evaluate.text`), contexts that are too long lose tokens on the left, and both
models give the same numbers for the same weights.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from hlat.checkpoint.hf_generation import left_out, left_out_line
from hlat.data.joint import after
from hlat.data.quoted import Quoted
from hlat.errors import UserError, missing_extra
from hlat.evaluate.batches import Request, cut_left
from hlat.evaluate.offline import shares_asked
from hlat.evaluate.options import NEW_TOKENS, read_generation

if TYPE_CHECKING:
    from hlat.evaluate.chat import ChatTemplates
    from hlat.evaluate.team import Score, Team

BATCH_SIZE = 16
NOTES = {
    "truncated": "requests longer than the model's context lost tokens on the left",
    "dropped_tokens": "tokens were dropped by that",
    "windowed": "texts longer than the model's context were cut into windows, each token predicted once",
    "shortened": "tasks wanted more new tokens than fit; half of the context was generated at most",
    "without_system": "prompts are without their system message, which the chat template refuses",
}
_opened: list[HarnessModel] = []  # by the harness's own command


def require_harness(purpose: str = "evaluation") -> None:
    """Raise UserError, with the line that installs it, where the harness is missing."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise missing_extra("lm-eval", "eval", purpose) from error


class HarnessModel:
    """The methods the harness calls. Only the first rank of a team has one.

    Args:
        pretrained: run, step folder or Hugging Face folder; or a team that is there already.
        batch_size: rows of a forward pass at most.
        dtype: fp64, fp32, bf16 or fp16.
        tokenizer: another tokenizer than the checkpoint's.
        device: cpu, cuda, …

        collect: note the questions whose answers are not finite in `broken`; otherwise they raise
            Diverged: the harness would take the first choice for the best one and give a figure.

    Attributes:
        notes: how often something was cut to fit the model; the keys are those of NOTES.
        broken: task -> numbers of its questions of which an answer is not finite.
        context_ended: task -> how many generations the end of the context ended.
        ignored: settings of the model's generation_config.json that ask for what is not done here.
        unsure: task -> share of the standard library's documents that it asks about, where it is not known
            whether the model was trained on them.
    """

    def __init__(
        self,
        pretrained: str | Team,
        batch_size: int | str | None = None,
        dtype: str = "fp32",
        tokenizer: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        collect: bool = False,
    ) -> None:
        super().__init__()
        self.team = _open_team(pretrained, dtype, tokenizer, device)
        self.batch_size = min(_batch_size(batch_size), max_batch_size or 1 << 30)
        self.codec, self.max_length = self.team.codec, self.team.live.config.max_seq_len
        self.notes: Counter[str] = Counter()
        self.broken: dict[str, set[int]] = defaultdict(set)
        self.context_ended: Counter[str] = Counter()
        self.ignored: list[str] = []
        self.unsure: dict[str, float] = {}
        self._collect = collect
        self._encode_chat: Callable[[str], list[int]] | None = None
        if isinstance(pretrained, str):
            _opened.append(self)

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return self.codec.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self.codec.prefix_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task does not say."""
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        chat = self.team.chat
        return str(self.codec.tokenizer.identity) + (chat.digest if chat is not None else "")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with BOS where the `hf` model has it."""
        if self._encode_chat is not None:
            return self._encode_chat(string)
        return self.codec.encode(string, add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what continues it, as the harness has them (white space at the end of a
        context belongs to the continuation) where the context keeps its ids in the whole. Elsewhere the
        harness would score another text than the continuation; here it has the ids that it has in training
        (`hlat.data.joint`).
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, head = self.tok_encode(context + continuation), self.tok_encode(context)
        if whole[: len(head)] == head:
            return head, whole[len(head) :]

        def encode(text: Quoted) -> list[int]:
            return self.tok_encode(text.text, False)

        return head, after(encode, self.codec.decode, head, whole, Quoted(continuation))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Use the model's chat template, or the one of a name; returns it. Raises UserError where there is
        none.
        """
        if chat_template is False or chat_template is None:
            return None
        return self._chat().choose(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as the text that the model's chat template makes of them; without the system message
        where it refuses that one, as the `hf` model does. Raises UserError where there is none.
        """
        chat = self._chat()
        try:
            return chat.render(chat_history, add_generation_prompt)
        except UserError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            text = chat.render(rest, add_generation_prompt)
        self.notes.update(without_system=1)
        return text

    def _chat(self) -> ChatTemplates:
        """The templates; from here on texts may hold special tokens."""
        chat = self.team.chat
        if chat is None:
            raise UserError(
                "the model's tokenizer has no chat template",
                fix="leave out the option, or give one that has: --tokenizer PATH",
            )
        fast = (chat.folder / "tokenizer.json").is_file()
        if fast and not self.codec.imported and self._encode_chat is None:
            from hlat.checkpoint.hf_tokenizer import PromptEncoder

            encoder = PromptEncoder(chat.folder)
            self._encode_chat = lambda text: encoder.encode(text, special=False)
        return chat

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Score]:
        """Scores of (context, continuation), both texts."""
        self._check_documents(requests)
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        self._check(requests, [math.isfinite(nats) for nats, _ in scores])
        return scores

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Score]:
        """Scores of (texts, context ids, continuation ids)."""
        return self.team.score([self._fit(context, rest) for _, context, rest in requests], self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of whole texts, in windows where they are longer than the model's context:
        each token is predicted once, from as many as fit before it.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        self._check_documents(requests)
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            if len(tokens) > self.max_length:
                self.notes.update(windowed=1)
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, rest = make_disjoint_window(pair)
                windows.append(Request(tuple(context), tuple(rest)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self.team.score(windows, self.batch_size), strict=True):
            totals[owner] += nats
        self._check(requests, list(map(math.isfinite, totals)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue each context up to the first stop string."""
        import torch

        from hlat.evaluate.team import BROKEN, LIMIT

        self._check_documents(requests)
        texts, sound = [""] * len(requests), [True] * len(requests)
        seed = int(torch.randint(1 << 31, ()))  # follows the seed that the harness sets
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        for key, members in groups.items():
            wanted = read_generation(json.loads(key), self.max_length, self.team.generation)
            if wanted.shortened:
                self.notes.update(shortened=1)
            drawn = wanted.options.get("temperature", 0) > 0
            self.ignored = sorted({*self.ignored, *left_out(self.team.generation, drawn)})
            room = self.max_length - wanted.options["max_new_tokens"]
            prompts = [self._shorten(self.tok_encode(requests[n].args[0]), room) for n in members]
            options = {**wanted.options, "stop_texts": wanted.stops, "seed": seed}
            made = self.team.generate(prompts, self.batch_size, options)
            for number, ids in zip(members, made, strict=True):
                texts[number] = _before(self.codec.decode(ids), wanted.stops)
                sound[number] = ids.end != BROKEN
                if wanted.shortened and ids.end == LIMIT:
                    self.context_ended[requests[number].task_name] += 1
        self._check(requests, sound)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the results' `config`."""
        config = self.team.live.config
        facts = {"model_dtype": str(self.team.live.dtype), "model_config": config.model_dump(mode="json")}
        return {**facts, "notes": self.said()}

    def said(self) -> dict[str, Any]:
        """What was cut, left out or ended, as `note_lines` takes it: `notes`, `broken`, `context_ended`, and
        `ignored` and `unsure` where there is any.
        """
        broken = {task: len(questions) for task, questions in self.broken.items()}
        said = {"notes": dict(self.notes), "broken": broken, "context_ended": dict(self.context_ended)}
        rare = {"ignored": self.ignored, "unsure": self.unsure}
        return said | {key: value for key, value in rare.items() if value}

    def _check_documents(self, requests: Sequence[Any]) -> None:
        """Note questions from documents that the model may have been trained on. Raises UserError where it
        was.
        """
        known = self.team.held_out
        for task, share in shares_asked(requests).items():
            if known is None:
                self.unsure[task] = share
            elif share > known:
                told = f"the model held out {known:g} of Python's standard library"
                fix = f"give the tasks the metadata holdout {known:g}" if known else "leave the task out"
                raise UserError(f"{told}, and task '{task}' asks about {share:g} of it", fix=fix)

    def _check(self, requests: Sequence[Any], sound: Sequence[bool]) -> None:
        """Note the requests whose answers are not finite, or raise Diverged."""
        broken = [request for request, fine in zip(requests, sound, strict=True) if not fine]
        if broken and not self._collect:
            from hlat.evaluate.generate import diverged

            raise diverged(f"the model's logits are not finite for {len(broken)} of {len(requests)} requests")
        for request in broken:
            self.broken[request.task_name].add(request.doc_id)

    def _fit(self, context: Sequence[int], rest: Sequence[int]) -> Request:
        request, dropped = cut_left(Request(tuple(context), tuple(rest)), self.max_length)
        if dropped:
            self.notes.update(truncated=1, dropped_tokens=dropped)
        return request

    def _shorten(self, prompt: list[int], room: int) -> list[int]:
        if len(prompt) > room:
            self.notes.update(truncated=1, dropped_tokens=len(prompt) - room)
        return prompt[-room:] or [self.prefix_token_id]


def note_lines(said: Mapping[str, Any]) -> list[str]:
    """What `HarnessModel.said` returns, one line each."""
    lines = [f"{said['notes'][key]} {text}" for key, text in NOTES.items() if said["notes"].get(key)]
    lines += [
        f"{task}: {count} generations ended at the end of the model's context, not where the task stops them"
        for task, count in said.get("context_ended", {}).items()
    ]
    if said.get("ignored"):
        lines.append(left_out_line(said["ignored"]))
    if unsure := said.get("unsure"):
        lines.append(
            f"it is not known which documents the model was trained on: {', '.join(unsure)} ask about "
            f"{max(unsure.values()):g} of Python's standard library, which may be among them"
        )
    lines += [
        f"{task}: no figure: the model's logits are not finite for {count} question{'s' * (count > 1)}"
        for task, count in said.get("broken", {}).items()
    ]
    return lines


def _open_team(pretrained: str | Team, dtype: str, tokenizer: str | None, device: str | None) -> Team:
    if not isinstance(pretrained, str):
        return pretrained
    import torch

    from hlat.backend.launcher import count_tasks
    from hlat.backend.native import NativeBackend
    from hlat.evaluate.target import load_team, open_target, parse_device, parse_dtype

    if count_tasks() > 1:
        fix = "use one process, or: torchrun … -m hlat eval"
        raise UserError("the harness's own command runs this model in one process", fix=fix)
    if (device or "").startswith("cuda") and not torch.cuda.is_available():
        device = None  # the harness's command asks for cuda:0 unless told otherwise
    backend = NativeBackend(device=parse_device(device))
    return load_team(open_target(pretrained), backend, parse_dtype(dtype), tokenizer)


def _batch_size(value: int | str | None) -> int:
    """A number of rows. `auto`, the harness's wish to search for one, is the default."""
    text = str(value or BATCH_SIZE)
    if text.startswith("auto"):
        return BATCH_SIZE
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{value!r} is not a number of rows", where="--batch-size", fix="write 1 or more")
    return int(text)


def _before(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


@cache
def lm_class() -> Any:
    """The class `HlatLM`, known to the harness as the model `hlat`. Raises UserError without the extra.

    The harness's own models stay known: it registers them on the first look into an empty registry, so they
    have to be there before `hlat` is.
    """
    require_harness()
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    made = type("HlatLM", (HarnessModel, TemplateLM), {"__doc__": HarnessModel.__doc__})
    return register_model("hlat")(made)


def main() -> None:
    """The harness's own command, with the model `hlat`: the harness has no other way for a package to add
    one. Wrong input is one line and exit code 2, as in `hlat`; what was cut is said after the results.
    """
    try:
        lm_class()
        from lm_eval.__main__ import cli_evaluate

        from hlat.evaluate.surroundings import own_environment

        with own_environment():
            cli_evaluate()
    except UserError as error:
        from hlat.observe.redact import redact
        from hlat.observe.terminal import one_line

        print(f"hlat-lm-eval: error: {one_line(redact(error.line()))}", file=sys.stderr)
        sys.exit(error.exit_code)
    for model in _opened:
        for line in note_lines(model.said()):
            print(f"note: {line}", file=sys.stderr)
    _opened.clear()


if __name__ == "__main__":
    main()
