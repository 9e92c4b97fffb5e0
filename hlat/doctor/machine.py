"""How checks look at a machine: files, commands, packages, limits. Tests put another one in its place."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hlat.host.limits import cores
from hlat.host.programs import find_program

_PLACEHOLDER_BYTES = 4096  # an empty package has one short module
_TIME_ERROR = 5  # sys/timex.h: the clock is not synchronised
_TIMEX_BYTES, _MAXERROR_AT = 512, 24  # more than struct timex needs; offset of its maxerror on 64-bit Linux


@dataclass(frozen=True)
class Output:
    """What a command printed and returned. code None: it did not end in time."""

    code: int | None
    out: str
    err: str = ""


@dataclass(frozen=True)
class Package:
    """An installed Python package. empty: it has no contents, as PyPI's placeholders."""

    version: str
    empty: bool = False


class Machine:
    """This machine. What cannot be found out is None, 0 or an empty text; no method raises."""

    def __init__(self, root: Path = Path("/"), environ: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.environ: Mapping[str, str] = os.environ if environ is None else environ
        self.python = sys.version_info[:3]
        self.patience = float("inf")  # seconds a command gets at most
        self.cpus = cores(root)

    def read(self, path: str) -> str:
        """The text of a file under the root; empty when it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def find(self, folder: str, pattern: str) -> list[Path]:
        """Files below a folder under the root that match a pattern, in order."""
        try:
            return sorted((self.root / folder.lstrip("/")).rglob(pattern))
        except OSError:
            return []

    def run(
        self, command: Sequence[str], timeout: float = 20, environ: Mapping[str, str] | None = None
    ) -> Output | None:
        """Run a command without a shell; None when there is no such command."""
        path = find_program(command[0]) or self._in_neuron_folder(command[0])
        if path is None:
            return None
        try:
            done = subprocess.run(
                [path, *command[1:]],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=min(timeout, self.patience),
                stdin=subprocess.DEVNULL,
                env=None if environ is None else dict(environ),
                encoding="utf-8",
            )
        except subprocess.TimeoutExpired:
            return Output(None, "", f"no answer in {min(timeout, self.patience):g} s")
        except OSError as error:
            return Output(127, "", str(error))
        return Output(done.returncode, done.stdout, done.stderr)

    def _in_neuron_folder(self, name: str) -> str | None:
        for folder in ("opt/aws/neuron/bin", "opt/amazon/efa/bin"):
            file = self.root / folder / name
            if os.access(file, os.X_OK):
                return str(file)
        return None

    def package(self, name: str) -> Package | None:
        """An installed Python package, not imported."""
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return None
        origin = found.read_text("direct_url.json") or "{}"
        with suppress(ValueError):
            if json.loads(origin).get("dir_info", {}).get("editable"):
                return Package(found.version)
        files = [file for file in found.files or [] if ".dist-info" not in str(file.parent)]
        size = sum(file.size or 0 for file in files if file.suffix != ".pyc")
        return Package(found.version, empty=bool(files) and size < _PLACEHOLDER_BYTES)

    def limit(self, name: str) -> tuple[float, float]:
        """(soft, hard) of a resource limit such as 'NOFILE'; unlimited is infinity."""
        endless = resource.RLIM_INFINITY
        values = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        soft, hard = (float("inf") if value == endless else float(value) for value in values)
        return soft, hard

    def free(self, path: Path) -> int | None:
        """Bytes free for this user where `path` is, or would be made."""
        for place in (path, *path.absolute().parents):
            with suppress(OSError):
                return shutil.disk_usage(place).free
        return None

    def size(self, path: Path) -> int | None:
        """Bytes of the file system at `path`; None where there is nothing."""
        try:
            return shutil.disk_usage(path).total
        except OSError:
            return None

    def writable(self, path: Path) -> bool:
        """Whether a folder can be written, or made."""
        existing = next((place for place in (path, *path.absolute().parents) if place.exists()), None)
        return existing is not None and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)

    def file_system(self, path: Path) -> str:
        """The type of the file system `path` is on, as nfs4, lustre, ext4."""
        best, kind = "", ""
        for line in self.read("/proc/mounts").splitlines():
            parts = line.split()
            if len(parts) > 2 and len(parts[1]) >= len(best) and path.absolute().is_relative_to(parts[1]):
                best, kind = parts[1], parts[2]
        return kind

    def port_free(self, port: int) -> bool:
        """Whether a server could listen on this port now."""
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(("", port))
            except OSError:
                return False
        return True

    def clock_error(self) -> float | None:
        """The largest error of the clock in seconds, as the kernel knows it; infinity: not synchronised."""
        if sys.platform != "linux":
            return None
        block = ctypes.create_string_buffer(_TIMEX_BYTES)  # zeros: ask, set nothing
        try:
            state = ctypes.CDLL(None).adjtimex(block)
        except (OSError, AttributeError):
            return None
        if state < 0:
            return None
        if state == _TIME_ERROR:
            return float("inf")
        return int.from_bytes(block.raw[_MAXERROR_AT : _MAXERROR_AT + 8], sys.byteorder) / 1e6

    def host_name(self) -> str:
        """The full name of this host."""
        return socket.getfqdn()
