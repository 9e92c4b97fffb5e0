"""What weights began from and know, beside their numbers: a record that goes where they go.

A run writes it into the `meta.json` of its checkpoints (`provenance`), an export into `config.json` (`hlat`,
which `transformers` keeps when it saves the model again). What Hugging Face's own files say of BOS counts
more than the record: they may have been changed since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.checkpoint.hf_tokenizer import PromptEncoder, tokenizer_texts
from hlat.data.convention import Convention
from hlat.data.sources import STDLIB
from hlat.errors import UserError
from hlat.host import json_text

if TYPE_CHECKING:
    from hlat.checkpoint.weights import WeightSource

META, CONFIG = "provenance", "hlat"
DOCUMENTS, EXAMPLES = "documents", "examples"
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Provenance:
    """The record.

    Attributes:
        convention: how texts were put before the weights.
        tokenizer: identity of their tokenizer (hex sha256); empty: not known.
        held_out: kind of data -> the smallest share of it that this run or one it goes back to held out.
            Kinds: `documents`; `python-stdlib`, where its documents were among them; `examples`, and
            `examples by FIELD` where a field decides.
        chat_template: hex sha256 of its text; empty: none.
        dtype: format of the weights the run began from; empty: it began from a seed.
        ancestors: the runs it goes back to, the first one first, each "name step N".
        files: parts of Hugging Face's config.json and generation_config.json, where the first weights came
            from there.
    """

    convention: Convention = Convention()
    tokenizer: str = ""
    held_out: Mapping[str, float] = field(default_factory=dict)
    chat_template: str = ""
    dtype: str = ""
    ancestors: tuple[str, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "bos": self.convention.to_json(),
            "tokenizer": self.tokenizer,
            "held_out": dict(self.held_out),
            "chat_template": self.chat_template,
            "dtype": self.dtype,
            "ancestors": list(self.ancestors),
            "files": dict(self.files),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Provenance:
        """The reverse of `to_json`; absent keys have the defaults. Raises ValueError for other values."""
        texts = {key: values.get(key, "") for key in ("tokenizer", "chat_template", "dtype")}
        parts = {key: values.get(key) or {} for key in ("bos", "held_out", "files")}
        ancestors = values.get("ancestors") or []
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"{texts} are not texts")
        if not all(isinstance(part, dict) for part in parts.values()) or not isinstance(ancestors, list):
            raise ValueError("bos, held_out and files are objects, ancestors is a list")
        shares = parts["held_out"].values()
        if not all(isinstance(share, int | float) and 0 <= share < 1 for share in shares):
            raise ValueError(f"held_out is {parts['held_out']}")
        return cls(
            Convention.from_json(parts["bos"]),
            held_out=parts["held_out"],
            files=parts["files"],
            ancestors=tuple(map(str, ancestors)),
            **texts,
        )

    @property
    def offline_share(self) -> float | None:
        """Share of the standard library's documents that no run of the chain was trained on; None: unknown.

        A run on other text counts with what it held out, for that text may hold the same files; one that held
        out nothing says nothing about the library, unless it was trained on it.
        """
        known = [self.held_out[STDLIB]] if STDLIB in self.held_out else []
        return min(known + [share for share in [self.held_out.get(DOCUMENTS, 0.0)] if share], default=None)

    def holding_out(self, shares: Mapping[str, float]) -> Provenance:
        """The record after training on data of which these shares were held out."""
        smallest = {kind: min(share, self.held_out.get(kind, share)) for kind, share in shares.items()}
        return replace(self, held_out={**self.held_out, **smallest})


def recorded(meta: Mapping[str, Any], where: str = "") -> Provenance | None:
    """The record in a checkpoint's meta; None for one that has none. Raises UserError for a damaged one."""
    values = meta.get(META)
    if not isinstance(values, dict):
        return None
    try:
        return Provenance.from_json(values)
    except ValueError as error:
        fix = "remove that entry, or convert the weights again"
        what = f"the record of what the weights began from is damaged ({error})"
        raise UserError(what, where=where, fix=fix) from None


def held_out(source: WeightSource) -> Mapping[str, float]:
    """Shares that the weights and those they go back to held out, by kind; empty where nothing is known."""
    return _record(source).held_out


def offline_share(source: WeightSource) -> float | None:
    """`Provenance.offline_share` of some weights, without opening their tokenizer."""
    return _record(source).offline_share


def provenance_of(source: WeightSource) -> Provenance:
    """What is known of some weights; of those that came from Hugging Face what their files say.

    Raises UserError for a damaged record or tokenizer.
    """
    record = _record(source)
    files = source.meta.get("huggingface")
    if files is None:
        return record
    folder = source.tokenizer
    template = template_digest(tokenizer_texts(folder))
    return replace(
        record,
        convention=Convention(special=True) if folder is None else _convention(folder, record),
        chat_template=template,
        files=files,
    )


def _record(source: WeightSource) -> Provenance:
    found = recorded(source.meta, str(source.path))
    if found is not None:
        return found
    # A run of an earlier version: what its own recipe held out, unless other weights lie behind it.
    recipe = source.meta.get("recipe", {})
    data = recipe.get("data", {})
    share, sources = data.get("holdout"), data.get("sources") or ()
    if share is None or data.get("examples") or (recipe.get("init") or {}).get("from"):
        return Provenance()
    library = any(isinstance(entry, dict) and entry.get("dataset") == STDLIB for entry in sources)
    return Provenance(held_out=dict.fromkeys((DOCUMENTS, STDLIB) if library else (DOCUMENTS,), float(share)))


def _convention(folder: Path, record: Provenance) -> Convention:
    """What a folder's tokenizer does to a text; what an empty one is, is known of weights with a record that
    have the BOS it says."""
    encoder = PromptEncoder(folder)
    bos = encoder.added
    if record.tokenizer and record.convention.bos == bos:
        return replace(record.convention, special=True)
    return Convention(bos, encoder.bos_id if bos is None else bos, special=True)


def template_digest(files: Sequence[Path]) -> str:
    """Hash (hex sha256) of the chat template among a tokenizer's files; empty: there is none."""
    for name in _TEMPLATES:
        for path in files:
            if path.name == name and (text := _template(path)):
                return hashlib.sha256(text.encode()).hexdigest()
    return ""


def _template(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jinja":
        return text
    try:
        value = json_text.loads(text).get("chat_template")
    except (ValueError, AttributeError):
        return ""  # whoever needs the file will say what is wrong with it
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True) if value else ""
