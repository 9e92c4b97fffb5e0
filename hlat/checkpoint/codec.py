"""The bytes of a checkpoint: safetensors files as streams, JSON with a checksum, RNG states as text.

The safetensors format is an 8-byte little-endian header length, a JSON header and the raw tensors one after
the other (https://huggingface.co/docs/safetensors). The library of that name writes a file from a complete
dictionary held in memory; here the tensors are written one by one and hashed on the way, so saving needs no
copy of the file. The result opens with `safetensors.safe_open` like any other.

Checksums are SHA-256: 1.8 GB/s on a core with SHA instructions (crc32: 6 GB/s), a tenth of a second for 165
MB in the background, and good enough to name a tensor by its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from hlat.host import json_text

sha256 = hashlib.sha256
BLOCK = (
    8 << 20
)  # bytes hashed, written or read at once: large enough for the disk, small enough for the CPU cache

DTYPE_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CODE_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class ChunkRecord:
    """Where one rectangle of a tensor lies: `file` name, `start` in bytes, and the `sha256` of its bytes."""

    file: str
    start: int
    sha256: str


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; writing to them changes the tensor."""
    # A single element counts as contiguous whatever its stride, which `view` would not accept.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensors(path: Path, entries: Sequence[tuple[str, Tensor]]) -> list[ChunkRecord]:
    """Write named tensors (any device) as one safetensors file and flush it to the disk.

    Tensors are moved to the CPU one at a time, in the order given; the largest element sizes should come
    first, so that every tensor starts at a multiple of its element size.

    Returns:
        One record per entry, in the same order.

    Raises:
        OSError: the disk is full or not writable (the file is left as far as it got).
        TypeError: a dtype that safetensors does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in entries:
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"tensor '{name}' has dtype {tensor.dtype}, which safetensors cannot hold")
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    records = []
    with path.open("xb") as file:
        file.write(head)
        position = len(head)
        for _, tensor in entries:
            digest = _write_hashed(file, raw_bytes(tensor.detach().cpu().contiguous()))
            records.append(ChunkRecord(path.name, position, digest))
            position += tensor.numel() * tensor.element_size()
        flush_to_disk(file)
    return records


def _write_hashed(file: IO[bytes], data: memoryview) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        digest.update(block)
        file.write(block)
    return digest.hexdigest()


def read_header(file: IO[bytes]) -> bytes:
    """The length prefix and header of an open safetensors file, or what a cut file has of them."""
    prefix = file.read(8)
    if len(prefix) < 8:
        return prefix
    length = struct.unpack("<Q", prefix)[0]
    return prefix + file.read(min(length, 1 << 30))


def read_into(file: IO[bytes], start: int, target: memoryview, digest: hashlib._Hash | None = None) -> bool:
    """Fill `target` with the bytes from `start` on, feeding `digest`; False if the file ends too early."""
    file.seek(start)
    for at in range(0, len(target), BLOCK):
        block = target[at : at + BLOCK]
        if file.readinto(block) != len(block):  # type: ignore[attr-defined]
            return False
        if digest is not None:
            digest.update(block)
    return True


def hash_range(file: IO[bytes], start: int, length: int) -> str:
    """SHA-256 of `length` bytes from `start` on, read block by block (fewer at the end of the file)."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(BLOCK, max(length, 1))))
    file.seek(start)
    while length > 0:
        count = file.readinto(buffer[: min(len(buffer), length)])  # type: ignore[attr-defined]
        if not count:
            break
        digest.update(buffer[:count])
        length -= count
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a whole file. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hash_range(file, 0, path.stat().st_size)


def hash_header(path: Path) -> str:
    """SHA-256 of the header of a safetensors file with its length prefix. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.sha256(read_header(file)).hexdigest()


def flush_to_disk(file: IO[bytes]) -> None:
    """Push a file's bytes through the operating system's cache to the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write and flush a small file; returns its `bytes` and `sha256` for the marker. Raises OSError."""
    with path.open("xb") as file:
        file.write(data)
        flush_to_disk(file)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def seal(body: dict[str, Any]) -> bytes:
    """JSON text of `body` with a checksum of itself under the key `checksum`."""
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "checksum": checksum}, indent=1).encode() + b"\n"


def unseal(text: bytes) -> dict[str, Any]:
    """The dictionary of `seal`. Raises ValueError if the text was changed or is not such a file."""
    body = json_text.loads(text)
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    checksum = body.pop("checksum", None)
    if checksum != hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest():
        raise ValueError("its checksum does not match its content")
    return body


def rng_to_json() -> dict[str, Any]:
    """States of torch's default generators as hex text: `cpu`, and a list `cuda` where that is in use."""
    states: dict[str, Any] = {"cpu": _hex(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = [_hex(state) for state in torch.cuda.get_rng_state_all()]
    return states


def rng_from_json(states: dict[str, Any]) -> None:
    """Set the generators from `rng_to_json`.

    CUDA states are left aside where there is no such device: other hardware draws other numbers anyway.
    """
    torch.set_rng_state(_unhex(states["cpu"]))
    if torch.cuda.is_available():
        for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_unhex(state), device)


def _hex(state: Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
