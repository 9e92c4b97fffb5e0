"""Write a checkpoint from a stream of tensors: memory holds one file or one tensor, never a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hlat.checkpoint import folder as folders
from hlat.checkpoint.codec import write_tensors
from hlat.checkpoint.layout import Chunk, Entry, data_file, make_index
from hlat.checkpoint.reader import Checkpoint
from hlat.errors import UserError

PART_BYTES = 512 << 20  # about as much is held in memory before it is written to a file


def write_weights(
    path: Path | str,
    tensors: Iterable[tuple[str, Tensor]],
    meta: dict[str, Any],
    tokenizer: Path | Sequence[Path] | None = None,
) -> Checkpoint:
    """Write a checkpoint from a stream of tensors, such as converted weights.

    Args:
        path: folder to create; it appears when it is complete.
        tensors: (global name, tensor on any device), each name once; consumed one by one.
        meta: as in `CheckpointStore.save`; its `step` and `tokens`, if any, become the checkpoint's.
        tokenizer: its files, or a folder of them.

    Raises:
        UserError: `path` exists and is not empty, or cannot be written.
        ValueError: a name comes twice.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError("exists already", where=str(path), fix="choose a new folder or remove this one")
    partial = None
    try:
        partial = folders.begin(path)
        index = make_index(partial, _write_parts(partial, tensors))
        step, tokens = meta.get("step", 0), meta.get("tokens", 0)
        files = folders.tokenizer_files(tokenizer)
        text = folders.meta_text(meta, step, tokens, files)
        marker = {"step": step, "tokens": tokens, "sequence": 1, "permanent": True}
        folders.seal_folder(partial, sorted(index.headers), index.to_json(), text, files, marker)
        folders.commit(partial, path)
    except OSError as error:
        reason, remedy = folders.explain(error, path.parent, None)
        raise UserError(f"cannot be written ({reason})", where=str(path), fix=remedy) from error
    finally:
        if partial is not None:
            folders.abandon(partial)
    return Checkpoint(path)


def _write_parts(partial: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Entry]:
    written: dict[str, Entry] = {}
    waiting: dict[str, Tensor] = {}
    files = size = 0

    def flush() -> None:
        nonlocal files, size
        part = sorted(
            waiting.items(), key=lambda item: -item[1].element_size()
        )  # wide first: all are aligned
        for (name, tensor), record in zip(part, write_tensors(partial / data_file(files), part), strict=True):
            shape = tuple(tensor.shape)
            written[name] = Entry(tensor.dtype, shape, (Chunk((0,) * len(shape), shape, record),))
        files, size = files + 1, 0
        waiting.clear()

    for name, tensor in tensors:
        if name in written or name in waiting:
            raise ValueError(f"tensor '{name}' comes twice")
        waiting[name] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= PART_BYTES:
            flush()
    if waiting:
        flush()
    return written
