"""A folder in Hugging Face's layout as a source of weights: what `from_pretrained` gives.

Its files may disagree about the output head, and then the tensors decide, as in `transformers`: a head that
differs from the embedding is a head of its own whatever `tie_word_embeddings` says, and with that flag either
of the two stands for both. What `transformers` would make up at random is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlat.checkpoint.codec import CODE_DTYPES
from hlat.checkpoint.hf_config import DTYPES, config_from_hf, hf_name
from hlat.checkpoint.hf_schema import GenerationFields, checked, read_json
from hlat.checkpoint.hf_tensors import find_tensors, open_safetensors
from hlat.checkpoint.provenance import CONFIG, META
from hlat.checkpoint.weights import PREFIX
from hlat.errors import UserError
from hlat.model.config import ModelConfig
from hlat.model.init import parameter_shapes
from hlat.storage.digests import file_digests
from hlat.storage.fingerprint import digest_of

GENERATION = "generation_config.json"
GENERATION_TEXT = "generation_text"
"""What a checkpoint's record of Hugging Face's files calls the text of that file."""
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")
_HEAD, _EMBED, _BASE = "lm_head.weight", "model.embed_tokens.weight", "model."
_QUANTISED = ("F8", "F6_", "F4", "I", "U")  # what safetensors calls them
_ROWS = 4096  # of two matrices compared at a time


class HFFolder:
    """A folder with config.json and safetensors files, as a WeightSource. Its tensors have HLAT's names.

    Attributes:
        notes: lines about files that disagree in a way that `transformers` settles.

    Raises UserError for another architecture, missing or quantised weights, a shard that the folder lacks, or
    files that contradict each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        raw = read_json(self.path / "config.json")
        config = config_from_hf(raw, where=str(self.path / "config.json"))
        kept: dict[str, Any] = {"config": {key: raw[key] for key in _KEPT if key in raw}}
        if (self.path / GENERATION).is_file():
            kept["generation_config"] = read_json(self.path / GENERATION)
            checked(GenerationFields, kept["generation_config"], str(self.path / GENERATION))
            kept[GENERATION_TEXT] = (self.path / GENERATION).read_bytes().decode()
        has_tokenizer = any((self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        self.tokenizer: Path | None = self.path if has_tokenizer else None
        self.notes: list[str] = []
        self._tensors = find_tensors(self.path, raw.get("transformers_weights"))
        self._open: dict[str, Any] = {}
        self._stored = self._by_name(config)
        config = self._settle_head(config)
        self._hf_names = {PREFIX + name: hf_name(name) for name in parameter_shapes(config)}
        self._check_absent()
        self._unknown = [
            n
            for n in self._stored
            if n not in self._hf_names.values() and not n.endswith("rotary_emb.inv_freq")
        ]
        for name in self._hf_names:
            if self._hf_names[name] in self._stored:
                self.dtype(name)
        self.meta: dict[str, Any] = {"model": config.model_dump(), "step": 0, "huggingface": kept}
        if CONFIG in raw:
            self.meta[META] = raw[CONFIG]

    def _by_name(self, config: ModelConfig) -> dict[str, str]:
        """Name in LlamaForCausalLM -> name in the files. A model saved without its head (LlamaModel) has
        names without `model.`."""
        expected = {*map(hf_name, parameter_shapes(config)), _HEAD}
        stored: dict[str, str] = {}
        for name in self._tensors.files:
            other = _BASE + name if _BASE + name in expected else name.removeprefix(_BASE)
            full = other if name not in expected and other in expected else name
            if full in stored:
                what = f"there are both {stored[full]} and {name}"
                raise UserError(what, where=str(self.path), fix="save the model again with save_pretrained")
            stored[full] = name
        return stored

    def _settle_head(self, config: ModelConfig) -> ModelConfig:
        head, embed, where = _HEAD in self._stored, _EMBED in self._stored, str(self.path)
        if not config.tie_embeddings:
            if embed and not head and _HEAD not in self._tensors.absent:
                raise UserError(
                    f"tie_word_embeddings is false, and {_HEAD} is missing",
                    where=where,
                    fix='write "tie_word_embeddings": true if the embedding is the output head too',
                )
            return config
        if head and embed and not self._same(_HEAD, _EMBED):
            note = f"tie_word_embeddings is true, and {_HEAD} is another matrix than the embedding"
            self.notes.append(f"{where}: {note}: both are used, as transformers does")
            return config.model_copy(update={"tie_embeddings": False})
        if head:
            stored = self._stored.pop(_HEAD)
            self._stored.setdefault(_EMBED, stored)
        return config

    def _same(self, one: str, other: str) -> bool:
        names = [self._stored[one], self._stored[other]]
        files = [open_safetensors(self.path / self._tensors.files[name]) for name in names]
        a, b = (file.get_slice(name) for file, name in zip(files, names, strict=True))
        if a.get_shape() != b.get_shape() or len(a.get_shape()) != 2:
            return False
        rows = a.get_shape()[0]
        return all(
            torch.equal(a[start : start + _ROWS].double(), b[start : start + _ROWS].double())
            for start in range(0, rows, _ROWS)
        )

    def _check_absent(self) -> None:
        """Raise UserError where the index names a tensor of the model that its file does not hold."""
        for name in self._hf_names.values():
            if name not in self._stored and name in self._tensors.absent:
                what = f"{self._tensors.source} says that {name} is in {self._tensors.absent[name]}"
                raise UserError(
                    f"{what}, and it is not: they are of two different saves",
                    where=str(self.path),
                    fix="copy the whole folder again",
                )

    def _place(self, name: str) -> tuple[Any, str]:
        """(open file, name in it) of a tensor with HLAT's name."""
        stored = self._stored[self._hf_names[name]]
        file = self._tensors.files[stored]
        if file not in self._open:
            # One at a time: a mapped file counts as memory while it is open.
            self._open = {file: open_safetensors(self.path / file)}
        return self._open[file], stored

    def _slice(self, name: str) -> Any:
        file, stored = self._place(name)
        return file.get_slice(stored)

    def names(self) -> list[str]:
        """Logical names of the tensors in the folder; of an unknown one, `model/` and its name there."""
        present = [name for name, other in self._hf_names.items() if other in self._stored]
        return present + [f"{PREFIX}{name}" for name in self._unknown]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header of its file."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """bf16, fp16 or fp32, as it is stored. Raises UserError for any other, quantised ones too."""
        kind = self._slice(name).get_dtype()
        dtype: torch.dtype | None = CODE_DTYPES.get(kind)
        if dtype not in DTYPES.values():
            quantised = "the weights are quantised: " if kind.startswith(_QUANTISED) else ""
            what = f"{quantised}{self._hf_names[name]} is stored as {kind}"
            raise UserError(what, where=str(self.path), fix="save it as bfloat16, float16 or float32")
        return dtype  # type: ignore[return-value]

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, in its stored dtype. Raises UserError as `dtype` does."""
        self.dtype(name)
        file, stored = self._place(name)
        tensor: Tensor = file.get_tensor(stored)
        return tensor

    def content(self) -> str:
        """Digest (hex) of the files that hold weights, and of which holds which. Raises UserError."""
        used = {
            name: self._tensors.files[self._stored[name]]
            for name in self._hf_names.values()
            if name in self._stored
        }
        names = sorted(set(used.values()))
        digests = dict(zip(names, file_digests(self.path / name for name in names), strict=True))
        return digest_of({name: digests[file] for name, file in used.items()})
