"""One way to read weights, whatever holds them: a run, a step folder, a Hugging Face folder or a GGUF
file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hlat.errors import UserError
from hlat.model.config import ModelConfig
from hlat.model.decoder import Decoder
from hlat.model.fit import check_fits
from hlat.model.init import parameter_shapes
from hlat.paths import expand, kind_of

if TYPE_CHECKING:
    from hlat.checkpoint.peers import Peers
    from hlat.data.tokenizer import Tokenizer

PREFIX = "model/"
"""Before every parameter name in a checkpoint; `optim/…` is the optimizer's."""


class WeightSource(Protocol):
    """Tensors by logical name ("model/embed.weight"), read one at a time.

    path: what was opened.
    meta: at least "model" (fields of ModelConfig); "huggingface" holds what only Hugging Face's files know,
    and is there
        exactly if the weights came from outside (see `hlat.checkpoint.hf`).
    """

    path: Path
    meta: dict[str, Any]

    @property
    def tokenizer(self) -> Path | None:
        """Folder with the tokenizer's files, or None."""
        ...

    def names(self) -> list[str]:
        """Logical names of all tensors, "model/" in front."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, read from its file's header."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives. Raises UserError for weights that are not bf16, fp16 or fp32."""
        ...

    def read(self, name: str) -> Tensor:
        """A whole tensor on the CPU. Raises UserError for a file that is damaged or cannot be read."""
        ...

    def content(self) -> str:
        """Digest (hex) of the weights themselves, wherever they lie. Raises UserError."""
        ...


def open_weights(
    path: str | Path,
    warn: Callable[[str], None] | None = None,
    compare: bool = True,
    peers: Peers | None = None,
) -> WeightSource:
    """Opens a run folder (its newest complete checkpoint whose weights are undamaged), a step folder, or a
    folder in Hugging Face's layout.

    Args:
        path: the folder.
        warn: gets a line about each newer checkpoint that cannot be used, and about files that disagree; the
            log by default.
        compare: read the weights of a run now, to compare them with their checksums; otherwise, and of a
            step folder, a damaged tensor shows when it is read. Optimizer state is not read.
        peers: the processes that call this together and share that reading.

    Raises UserError for a path that is none of these.
    """
    path = expand(path)
    kind = kind_of(path)
    if kind == "file" and path.suffix == ".gguf":
        raise UserError(
            "is a GGUF file", where=str(path), fix=f"import it first: hlat convert from-gguf {path} OUT"
        )
    if kind != "folder":
        raise UserError(
            "no such checkpoint" if kind == "missing" else f"is a {kind}, not a checkpoint",
            where=str(path),
            fix="give a run folder, a step folder or a Hugging Face folder",
        )
    if (path / "config.json").is_file():
        from hlat.checkpoint.hf_folder import HFFolder

        folder = HFFolder(path)
        for note in folder.notes:
            (warn or logging.getLogger(__name__).warning)(note)
        return folder
    if path.is_dir():
        from hlat.checkpoint.hf_tensors import refuse_adapter

        refuse_adapter(path)
    from hlat.checkpoint.store import open_checkpoint

    return open_checkpoint(path, warn, PREFIX if compare else None, peers)


def source_name(source: WeightSource) -> str:
    """How weights are called: by their folder, or by their run and step."""
    if "huggingface" in source.meta:
        return source.path.name
    parent = source.path.resolve().parent
    run = parent.parent.name if parent.name == "checkpoints" else parent.name
    return f"{run} {source.path.name}"


def model_config(source: WeightSource) -> ModelConfig:
    """The configuration of a source's model; raises UserError when its tensors are not exactly that
    model's."""
    config = _recorded_config(source)
    expected = parameter_shapes(config)
    found = {name.removeprefix(PREFIX) for name in source.names() if name.startswith(PREFIX)}
    if missing := sorted(expected.keys() - found):
        raise UserError(f"{len(missing)} tensors are missing, first {missing[0]}", where=str(source.path))
    if extra := sorted(found - expected.keys()):
        raise UserError(
            f"{len(extra)} tensors do not belong to the model, first {extra[0]}", where=str(source.path)
        )
    for name, shape in expected.items():
        if tuple(source.shape(PREFIX + name)) != shape:
            what = f"{name} has shape {tuple(source.shape(PREFIX + name))}, the configuration says {shape}"
            raise UserError(what, where=str(source.path))
    return config


def _recorded_config(source: WeightSource) -> ModelConfig:
    try:
        return ModelConfig(**source.meta["model"])
    except (KeyError, TypeError, ValueError) as error:  # pydantic's error is a ValueError
        reason = " ".join(str(error).split())[:200]
        what = f"the record of its model cannot be used ({reason})"
        raise UserError(what, where=str(source.path), fix="copy or convert these weights again") from None


def source_tokenizer(source: WeightSource) -> Tokenizer | None:
    """The tokenizer that came with the weights, or None."""
    from hlat.data.tokenizer import load_tokenizer

    if source.tokenizer is not None:
        return load_tokenizer(source.tokenizer)
    # The tokenizer of bytes has no files, and it alone.
    spec, record = (
        source.meta.get("recipe", {}).get("data", {}).get("tokenizer"),
        source.meta.get("provenance"),
    )
    plain = load_tokenizer("bytes")
    known = isinstance(record, dict) and record.get("tokenizer") == plain.identity
    return plain if known or spec in ("bytes", "init") else None


@torch.no_grad()
def load_model(
    source: WeightSource, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """A model with these weights, filled tensor by tensor: peak memory is the model and one tensor.

    Args:
        dtype: of the model's weights, which is also what it computes in.
        device: where the weights go.

    Raises UserError for a model that the memory cannot hold.
    """
    config = model_config(source)
    size = config.parameter_count() * dtype.itemsize + config.position_bytes()
    check_fits(size, torch.device(device), f"{config.parameter_count():,} parameters", str(source.path))
    with torch.device("meta"):
        model = Decoder(config)
    model.to(dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.copy_(source.read(PREFIX + name))
    return model.eval()
