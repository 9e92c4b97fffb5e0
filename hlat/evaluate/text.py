"""Text to tokens and back, as the evaluation harness asks for it.

An imported model gets what `AutoTokenizer` gives: special tokens in a text are recognised, BOS is added if
the tokenizer's files say so, and an empty context is BOS (or EOS, where there is none). So does one that was
trained on from there, or exported: equal weights get equal figures. A model that HLAT trained from a seed has
only ever seen documents that follow an EOS: nothing is added, and an empty context is EOS; unless its
documents began with BOS. It knows special tokens if it was trained on examples whose templates have them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hlat.data.convention import Convention, difference
from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.checkpoint.provenance import Provenance
    from hlat.checkpoint.weights import WeightSource
    from hlat.data.tokenizer import Tokenizer

_STOP_MARGIN = 2  # tokens beyond a stop string's bytes: it may begin and end within one


class TextCodec:
    """See the module.

    Args:
        tokenizer: of the model.
        folder: the tokenizer's files, where special tokens in a text are recognised.
        stop_ids: ids that end a text.
        convention: how the weights know texts; default: that of the tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        folder: Any = None,
        stop_ids: Collection[int] = (),
        convention: Convention | None = None,
    ) -> None:
        if tokenizer.eos_id is None and not stop_ids:
            raise UserError(
                "the tokenizer has no end-of-text token",
                where=str(tokenizer.spec),
                fix='set "eos_token" in the tokenizer_config.json it came with, and convert it again',
            )
        self.tokenizer, self.imported = tokenizer, folder is not None
        self.eos_id = tokenizer.eos_id if tokenizer.eos_id is not None else min(stop_ids)
        self.stop_ids = frozenset(stop_ids) | {self.eos_id}
        known = convention or tokenizer.convention
        self._bos = known.bos
        self.prefix_id = self.eos_id if known.empty is None else known.empty
        self._with_special = _imported_encoder(folder) if self.imported else None
        self._whole = tokenizer.encode_special if known.template else tokenizer.encode_batch
        self._encode = lru_cache(maxsize=8192)(self._encode_once)
        self._prefix_text = self._spelling(self.prefix_id) if self.imported else ""
        self.eos_text = self._spelling(self.eos_id)

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Ids of a text.

        Args:
            special: whether BOS may be added; None = unless the text begins with it already.
        """
        if special is None:
            special = not (self._prefix_text and text.startswith(self._prefix_text))
        return list(self._encode(text, special))

    def _encode_once(self, text: str, special: bool) -> tuple[int, ...]:
        ids: list[int] = self._with_special(text, special) if self._with_special else self._whole([text])[0]
        if not special or self._bos is None or ids[:1] == [self._bos]:
            return tuple(ids)
        return (self._bos, *ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; ids beyond the tokenizer's (a padded embedding has some) give nothing."""
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])

    def stopped(self, ids: Sequence[int], texts: Sequence[str]) -> bool:
        """Whether the text of `ids` holds a stop string near its end."""
        if not texts:
            return False
        most = max(len(text.encode()) for text in texts) + _STOP_MARGIN
        tail = self.decode(ids[-most:])
        return any(text in tail for text in texts)

    def _spelling(self, index: int) -> str:
        """A token as it is written, special or not."""
        return self.tokenizer.pieces().get(index, "") if self.tokenizer.files() else ""


def _imported_encoder(folder: Any) -> Any:
    """`encode(text, special)` as `AutoTokenizer` does it."""
    from hlat.checkpoint.hf_tokenizer import PromptEncoder

    return PromptEncoder(folder).encode


def codec_for(
    source: WeightSource,
    vocab: int,
    tokenizer: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> TextCodec:
    """The codec of a checkpoint.

    Args:
        source: the checkpoint.
        vocab: rows of the model's embedding.
        tokenizer: another tokenizer's path than the one that came with the checkpoint.
        warn: gets a line when its ids mean something else than those the weights learned.

    Raises UserError: there is none, or its ids do not fit the model.
    """
    from hlat.checkpoint.hf_generation import generation_stops
    from hlat.checkpoint.provenance import provenance_of
    from hlat.checkpoint.weights import source_tokenizer
    from hlat.data.tokenizer import load_tokenizer

    own = source_tokenizer(source)
    loaded = load_tokenizer(tokenizer) if tokenizer else own
    if loaded is None:
        fix = "name one: --tokenizer PATH"
        raise UserError("the checkpoint has no tokenizer", where=str(source.path), fix=fix)
    if loaded.vocab_size > vocab:
        raise UserError(
            f"the tokenizer has {loaded.vocab_size} ids, the model's embedding {vocab} rows",
            where=tokenizer or str(source.path),
            fix="give the tokenizer the model was trained with: --tokenizer PATH",
        )
    known = provenance_of(source).convention
    if own is not None and loaded is not own and (what := difference(loaded, own)):
        line = f"--tokenizer {tokenizer} is not the tokenizer of these weights ({what})"
        warn(f"{line}: leave it out to use theirs")
        known = _convention_of(loaded, tokenizer) if known.special else Convention()
    elif own is None and known.special:
        known = _convention_of(loaded, tokenizer)
    folder = (tokenizer or source.tokenizer) if known.special else None
    return TextCodec(loaded, folder, generation_stops(source.meta), known)


def codec_of_run(tokenizer: Tokenizer, record: Provenance) -> TextCodec:
    """The codec of weights that are being trained, with the record that they would be saved with."""
    from hlat.checkpoint.hf_generation import generation_stops

    files = tokenizer.files()
    folder = files[0].parent if record.convention.special and files else None
    stops = generation_stops({"huggingface": dict(record.files)})
    return TextCodec(tokenizer, folder, stops, record.convention)


def _convention_of(tokenizer: Tokenizer, folder: Any) -> Convention:
    """What `AutoTokenizer` does with a tokenizer that an imported model did not come with."""
    from hlat.checkpoint.hf_tokenizer import PromptEncoder

    added = PromptEncoder(folder).added if folder is not None and tokenizer.files() else None
    return Convention(added, tokenizer.bos_id if added is None else added, special=bool(tokenizer.files()))
