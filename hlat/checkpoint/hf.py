"""Hugging Face folders of the Llama architecture: read as a source of weights, imported, exported.

Everything goes tensor by tensor, so memory does not grow with the model. An export that fails leaves nothing
behind.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlat.checkpoint.hf_config import DTYPES, config_to_hf, hf_name
from hlat.checkpoint.hf_folder import GENERATION, GENERATION_TEXT, HFFolder
from hlat.checkpoint.hf_schema import write_json
from hlat.checkpoint.hf_tensors import INDEX, SINGLE, refuse_adapter
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
from hlat.model.fit import check_fits
from hlat.model.init import parameter_shapes

_NO_TOKENIZER = "no tokenizer"
_CLASSIFIER = "classifier.weight"


def import_weights(source: WeightSource, out: str | Path, dtype: str = "keep") -> list[str]:
    """Writes any source's weights, tensor by tensor, as a weights-only checkpoint at `out`.

    Returns warnings for the user.

    Args:
        dtype: bf16, fp16, fp32, or keep (as stored, so that the way back is bit-identical).
    """
    from hlat.checkpoint.store import write_weights

    config = model_config(source)
    target = None if dtype == "keep" else DTYPES[dtype]
    largest = max(math.prod(shape) for shape in parameter_shapes(config).values())
    check_fits(largest * 4, torch.device("cpu"), "the numbers of its largest tensor", str(source.path))

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
    refuse_adapter(Path(folder))
    if not (Path(folder) / "config.json").is_file():
        raise UserError("no config.json", where=str(folder), fix="give a folder in Hugging Face's layout")
    source = HFFolder(folder)
    return source.notes + import_weights(source, out, dtype)


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
        _write_generation(kept, partial / GENERATION)
    if warnings == [_NO_TOKENIZER]:
        warnings = [f"{source.path} has no tokenizer, so {out} has none either"]
    warnings += _oversized(source, dtypes, shard_size)
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


def _write_generation(kept: dict[str, Any], path: Path) -> None:
    """Writes generation_config.json, unchanged where training on has not given it other settings."""
    value, text = kept.get("generation_config"), kept.get(GENERATION_TEXT)
    with suppress(ValueError, RecursionError):  # of a record that was changed by hand
        if isinstance(text, str) and json.dumps(json.loads(text)) == json.dumps(value):
            path.write_bytes(text.encode())
            return
    if value:
        write_json(path, value)


def _oversized(source: WeightSource, dtypes: dict[str, torch.dtype], shard_size: int) -> list[str]:
    """A line about tensors that are larger than a file was to be."""
    sizes = {name: math.prod(source.shape(name)) * dtype.itemsize for name, dtype in dtypes.items()}
    names = [name for name in dtypes if sizes[name] > shard_size]
    if not names:
        return []
    largest = max(names, key=lambda name: sizes[name])
    what = "1 tensor exceeds" if len(names) == 1 else f"{len(names)} tensors exceed"
    first = f"{hf_name(largest.removeprefix(PREFIX))} has {sizes[largest]:,} bytes"
    return [f"{what} --shard-size, {shard_size:,} bytes, in a file to itself: {first}"]


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
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
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
        write_json(folder / INDEX, index)


def parse_size(text: str) -> int:
    """ "5GB", "500 MB", "1048576" -> bytes (decimal units, as Hugging Face counts). Raises UserError
    otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(B?)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError(f"'{text}' is not a size", where="--shard-size", fix="write e.g. 5GB or 500MB")
    return size
