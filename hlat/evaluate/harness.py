"""HLAT as a model of the LM Evaluation Harness (`lm_eval`, extra `eval`).

The harness knows tasks, prompts and metrics; here is what it asks of a model. Texts are encoded as its own
`hf` model encodes them (`hlat.evaluate.text`), contexts that are too long lose tokens on the left, and both
models give the same numbers for the same weights.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError, missing_extra
from hlat.evaluate.batches import Request, cut_left

if TYPE_CHECKING:
    from hlat.evaluate.team import Score, Team

DEFAULT_NEW_TOKENS = 256
BATCH_SIZE = 16
_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_KEYS = ("temperature", "top_k", "top_p")


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

    Attributes:
        notes: how often something was cut to fit the model: `truncated` requests, `dropped_tokens` of them,
            `shortened` generations.
    """

    def __init__(
        self,
        pretrained: str | Team,
        batch_size: int | str | None = None,
        dtype: str = "fp32",
        tokenizer: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.team = _open_team(pretrained, dtype, tokenizer, device)
        self.batch_size = min(_batch_size(batch_size), max_batch_size or 1 << 30)
        self.codec, self.max_length = self.team.codec, self.team.live.config.max_seq_len
        self.notes: Counter[str] = Counter()

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
        return DEFAULT_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return str(self.codec.tokenizer.identity)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with BOS where the `hf` model has it."""
        return self.codec.encode(string, add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Score]:
        """Scores of (context, continuation), both texts."""
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        return scores

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Score]:
        """Scores of (texts, context ids, continuation ids)."""
        return self.team.score([self._fit(context, rest) for _, context, rest in requests], self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of whole texts, in windows where they are longer than the model's context:
        each token is predicted once, from as many as fit before it.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, rest = make_disjoint_window(pair)
                windows.append(Request(tuple(context), tuple(rest)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self.team.score(windows, self.batch_size), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue each context up to the first stop string."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        for key, members in groups.items():
            stops, options = self._generation(json.loads(key))
            room = self.max_length - options["max_new_tokens"]
            prompts = [self._shorten(self.tok_encode(requests[n].args[0]), room) for n in members]
            made = self.team.generate(prompts, self.batch_size, {**options, "stop_texts": stops})
            for number, ids in zip(members, made, strict=True):
                texts[number] = _before(self.codec.decode(ids), stops)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the results' `config`."""
        config = self.team.live.config
        return {"model_dtype": str(self.team.live.dtype), "model_config": config.model_dump(mode="json")}

    def _fit(self, context: Sequence[int], rest: Sequence[int]) -> Request:
        request, dropped = cut_left(Request(tuple(context), tuple(rest)), self.max_length)
        if dropped:
            self.notes.update(truncated=1, dropped_tokens=dropped)
        return request

    def _shorten(self, prompt: list[int], room: int) -> list[int]:
        if len(prompt) > room:
            self.notes.update(truncated=1, dropped_tokens=len(prompt) - room)
        return prompt[-room:] or [self.prefix_token_id]

    def _generation(self, given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Stop strings, and the options of `Team.generate`, from a task's generation arguments."""
        until = given.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        lengths = [given.pop(key) for key in _LENGTH_KEYS if key in given]
        count = int(lengths[0]) if lengths else DEFAULT_NEW_TOKENS
        if count >= self.max_length:  # half of the model's context stays for the prompt
            self.notes.update(shortened=1)
            count = self.max_length // 2
        draws = bool(given.pop("do_sample", False))
        sampling = {key: given.pop(key) for key in _SAMPLING_KEYS if key in given}
        if given:
            what = f"generation option {next(iter(given))!r} is not supported"
            known = ", ".join(("until", "do_sample", *_LENGTH_KEYS, *_SAMPLING_KEYS))
            raise UserError(what, where="generation_kwargs of a task", fix=f"there are: {known}")
        options: dict[str, Any] = {"max_new_tokens": count}
        if draws and sampling.get("temperature", 1.0) > 0:
            options |= {"temperature": 1.0, **{k: v for k, v in sampling.items() if v is not None}}
        return [text for text in stops if text], options


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
    """The class `HlatLM`, known to the harness as the model `hlat`. Raises UserError without the extra."""
    require_harness()
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    made = type("HlatLM", (HarnessModel, TemplateLM), {"__doc__": HarnessModel.__doc__})
    return register_model("hlat")(made)


def main() -> None:
    """The harness's own command, with the model `hlat`: the harness has no other way for a package to add
    one.
    """
    lm_class()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
