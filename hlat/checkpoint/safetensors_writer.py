"""Writes a safetensors file whose tensors are made one at a time.

The library's own `save_file` wants all tensors of a file in memory. The format lets them be streamed: a
header with the byte range of every tensor, then the bytes (https://huggingface.co/docs/safetensors,
"Format").
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hlat.checkpoint.codec import DTYPE_CODES, flush_to_disk, raw_bytes


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
) -> None:
    """Writes the tensors of `shapes` to `path`, in that order; memory is that of one tensor and of what it
    is converted to.

    Args:
        shapes, dtypes: of every tensor, by name. Order wider dtypes first if they are mixed, or some tensors
            lie unaligned.
        read: returns one tensor; it is converted to its dtype of `dtypes`.

    Raises ValueError when `read` returns another shape than announced, OSError when the disk is full.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": DTYPE_CODES[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = read(name)
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
            file.write(raw_bytes(tensor.to(device="cpu", dtype=dtypes[name]).contiguous()))
            del tensor  # before the next one is read
        flush_to_disk(file)
