"""Hugging Face folders of the Llama architecture: read as a source of weights, imported, exported.

Everything goes tensor by tensor, so memory does not grow with the model. An export that fails leaves nothing
behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlat.checkpoint.codec import CODE_DTYPES
from hlat.checkpoint.hf_config import DTYPES, config_from_hf, config_to_hf, hf_name, read_json, write_json
from hlat.checkpoint.hf_tokenizer import copy_tokenizer, export_tokenizer, special_ids, tokenizer_texts
from hlat.checkpoint.output import new_folder
from hlat.checkpoint.provenance import CONFIG, META, Provenance, provenance_of
from hlat.checkpoint.safetensors_writer import write_safetensors
from hlat.checkpoint.weights import (
    PREFIX,
    WeightSource,
    model_config,
    open_weights,
    source_name,
    source_tokenizer,
)
from hlat.errors import UserError
from hlat.model.init import parameter_shapes
from hlat.storage.digests import file_digests
from hlat.storage.fingerprint import digest_of

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")
_GENERATION = "generation_config.json"
_NO_TOKENIZER = "no tokenizer"
_CLASSIFIER = "classifier.weight"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class HFFolder:
    """A folder with config.json and safetensors files, as a WeightSource. Its tensors have HLAT's names.

    Raises UserError for another architecture, missing weights, or a shard that the folder lacks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        raw = read_json(self.path / "config.json")
        config = config_from_hf(raw, where=str(self.path / "config.json"))
        kept: dict[str, Any] = {"config": {key: raw[key] for key in _KEPT if key in raw}}
        if (self.path / _GENERATION).is_file():
            kept["generation_config"] = read_json(self.path / _GENERATION)
        self.meta: dict[str, Any] = {"model": config.model_dump(), "step": 0, "huggingface": kept}
        if CONFIG in raw:
            self.meta[META] = raw[CONFIG]
        has_tokenizer = any((self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        self.tokenizer: Path | None = self.path if has_tokenizer else None
        self._hf_names = {PREFIX + name: hf_name(name) for name in parameter_shapes(config)}
        self._files = self._weight_map()
        self._open: dict[str, Any] = {}
        # A tied model may carry its head once more, and old exports the rotary frequencies.
        ignored = {"lm_head.weight"} if config.tie_embeddings else set()
        self._unknown = [
            n
            for n in self._files
            if n not in {*self._hf_names.values(), *ignored} and not n.endswith("rotary_emb.inv_freq")
        ]

    def _weight_map(self) -> dict[str, str]:
        if (self.path / _INDEX).is_file():
            files: dict[str, str] = read_json(self.path / _INDEX).get("weight_map", {})
            for file in sorted(set(files.values())):
                if Path(file).name != file or not (self.path / file).is_file():
                    raise UserError(
                        f"{file} is missing", where=str(self.path), fix="copy the whole folder again"
                    )
            return files
        if not (self.path / _SINGLE).is_file():
            what = "no safetensors weights" + (" (only .bin files)" if list(self.path.glob("*.bin")) else "")
            raise UserError(
                what,
                where=str(self.path),
                fix="save the model with save_pretrained, which writes model.safetensors",
            )
        with self._safe_open(_SINGLE) as file:
            return dict.fromkeys(file.keys(), _SINGLE)

    def _safe_open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"not a readable safetensors file ({error})", where=str(self.path / file)
            ) from None

    def _file(self, name: str) -> Any:
        file = self._files[self._hf_names[name]]
        if file not in self._open:
            # One at a time: a mapped file counts as memory while it is open.
            self._open = {file: self._safe_open(file)}
        return self._open[file]

    def names(self) -> list[str]:
        present = [name for name, other in self._hf_names.items() if other in self._files]
        return present + [f"{PREFIX}{name}" for name in self._unknown]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(self._hf_names[name]).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        kind = self._file(name).get_slice(self._hf_names[name]).get_dtype()
        dtype: torch.dtype | None = CODE_DTYPES.get(kind)
        if dtype not in DTYPES.values():
            what = f"{self._hf_names[name]} is stored as {kind}"
            raise UserError(what, where=str(self.path), fix="save it as bfloat16, float16 or float32")
        return dtype  # type: ignore[return-value]

    def read(self, name: str) -> Tensor:
        return self._file(name).get_tensor(self._hf_names[name])

    def content(self) -> str:
        used = {name: self._files[name] for name in self._hf_names.values() if name in self._files}
        names = sorted(set(used.values()))
        digests = dict(zip(names, file_digests(self.path / name for name in names), strict=True))
        return digest_of({name: digests[file] for name, file in used.items()})


def import_weights(source: WeightSource, out: str | Path, dtype: str = "keep") -> list[str]:
    """Writes any source's weights, tensor by tensor, as a weights-only checkpoint at `out`.

    Returns warnings for the user.

    Args:
        dtype: bf16, fp16, fp32, or keep (as stored, so that the way back is bit-identical).
    """
    from hlat.checkpoint.store import write_weights

    config = model_config(source)
    target = None if dtype == "keep" else DTYPES[dtype]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in parameter_shapes(config):
            tensor = source.read(PREFIX + name)
            yield PREFIX + name, tensor.to(target or tensor.dtype)

    meta = {"model": config.model_dump(), "step": 0, "huggingface": source.meta.get("huggingface", {})}
    if META in source.meta:
        meta[META] = source.meta[META]
    write_weights(out, tensors(), meta, tokenizer_texts(source.tokenizer))
    return [] if source.tokenizer else [f"{source.path} has no tokenizer, so {out} has none either"]


def from_hf(folder: str | Path, out: str | Path, dtype: str = "keep") -> list[str]:
    """Imports a Hugging Face folder as a weights-only checkpoint; `import_weights` says the rest."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError("no config.json", where=str(folder), fix="give a folder in Hugging Face's layout")
    return import_weights(HFFolder(folder), out, dtype)


def to_hf(
    source: WeightSource | str | Path, out: str | Path, dtype: str = "bf16", shard_size: int = 5 * 10**9
) -> list[str]:
    """Exports a run (its newest complete checkpoint) or a step folder to Hugging Face's layout.

    Returns warnings for the user.

    Args:
        dtype: bf16, fp16, fp32, or keep (the checkpoint's own, fp32 for a training run's masters).
        shard_size: most bytes of tensors in one file; a larger tensor gets a file to itself.
    """
    if isinstance(source, (str, Path)):
        source = open_weights(source)
    config = model_config(source)
    names = [PREFIX + name for name in parameter_shapes(config) if name != _CLASSIFIER]
    dtypes = {name: source.dtype(name) if dtype == "keep" else DTYPES[dtype] for name in names}
    if dtype == "keep":
        # Wide tensors first keeps every tensor aligned; the sort is stable.
        names.sort(key=lambda name: -dtypes[name].itemsize)
    warnings: list[str] = []
    with new_folder(Path(out)) as partial:
        _write_shards(source, names, dtypes, shard_size, partial)
        record = provenance_of(source)
        kept, warnings = _export_texts(source, record, partial, config.max_seq_len)
        extra = dict(kept["config"])
        if "huggingface" not in source.meta:
            record = replace(record, ancestors=(*record.ancestors, source_name(source)))
        if record.ancestors or record.held_out:  # else there is nothing that Hugging Face's files do not say
            extra[CONFIG] = {**record.to_json(), "files": {}}
        write_json(partial / "config.json", config_to_hf(config, dtypes[names[0]], extra))
        if kept.get("generation_config"):
            write_json(partial / _GENERATION, kept["generation_config"])
    if warnings == [_NO_TOKENIZER]:
        warnings = [f"{source.path} has no tokenizer, so {out} has none either"]
    if config.classes:
        warnings.append(f"the linear classifier has no place in LlamaForCausalLM and is not in {out}")
    return warnings


def _export_texts(
    source: WeightSource, record: Provenance, folder: Path, max_seq_len: int
) -> tuple[dict[str, Any], list[str]]:
    """Writes the tokenizer's files. Returns what config.json and generation_config.json get; warnings."""
    if record.convention.special:  # came from Hugging Face and goes back as it came
        if source.tokenizer is not None:
            copy_tokenizer(source.tokenizer, folder)
        warnings = [] if source.tokenizer is not None else [_NO_TOKENIZER]
        return {"config": {}, **record.files}, warnings
    tokenizer = source_tokenizer(source)
    if tokenizer is None:
        return {"config": {}}, [_NO_TOKENIZER]
    ids = special_ids(tokenizer)
    warnings = export_tokenizer(tokenizer, folder, max_seq_len, record.convention.bos)
    return {
        "config": ids,
        "generation_config": {**ids, **record.files.get("generation_config", {})},
    }, warnings


def _write_shards(
    source: WeightSource, names: list[str], dtypes: dict[str, torch.dtype], shard_size: int, folder: Path
) -> None:
    """model.safetensors, or several numbered files and their index."""
    groups: list[list[str]] = [[]]
    room = shard_size
    size = {name: math.prod(source.shape(name)) * dtypes[name].itemsize for name in names}
    for name in names:
        if groups[-1] and size[name] > room:
            groups.append([])
            room = shard_size
        groups[-1].append(name)
        room -= size[name]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = _SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        by_hf_name = {hf_name(name.removeprefix(PREFIX)): name for name in group}
        write_safetensors(
            folder / file,
            {other: source.shape(name) for other, name in by_hf_name.items()},
            {other: dtypes[name] for other, name in by_hf_name.items()},
            lambda other, names=by_hf_name: source.read(names[other]),  # type: ignore[misc]
        )
        weight_map |= dict.fromkeys(by_hf_name, file)
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(size.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(folder / _INDEX, index)


def parse_size(text: str) -> int:
    """ "5GB", "500 MB", "1048576" -> bytes (decimal units, as Hugging Face counts). Raises UserError
    otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(B?)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError(f"'{text}' is not a size", where="--shard-size", fix="write e.g. 5GB or 500MB")
    return size
