"""Sharing a Neuron compile cache through a store. Every node compiles into, and reads from, its own disk:
file locks do not hold on network file systems, and two jobs that write one cache damage it.

```
/var/tmp/neuron-compile-cache/neuronxcc-2.20.9961.0+0acef03a/MODULE_56f0d314fda2b6e1e336+617f6939/
    model.neff, model.done, model.hlo_module.pb, compile_flags.json
s3://bucket/compile-cache/neuronxcc-…/MODULE_…/    the same, and hlat-module.json, uploaded last
s3://bucket/compile-cache/sets/<key>.json          which modules a recipe needs
```
A module's name holds the hash of its graph and of the compiler's flags, the folder above it the compiler's
version: what has a name never changes, so pushing twice, or from two nodes, cannot harm. Only whole modules
travel: a failed compilation leaves a folder without `model.neff`, one under way has no `model.done`.
A process that compiles holds a file lock (`hlat.storage.module_lock`) in the module's folder: nothing there
is touched meanwhile, and whoever replaces files there holds it, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hlat.errors import UserError
from hlat.host import json_text
from hlat.storage.module_lock import SUFFIX, holding, locked
from hlat.storage.remote import Remote
from hlat.storage.transfer import side_by_side

MARKER, SETS = "hlat-module.json", "sets"
_COMPILER = re.compile(r"neuronxcc-[\w.+-]+")
_MODULE = re.compile(r"MODULE_[\w+-]+")
_FILE = re.compile(r"[\w][\w.+-]*")
_LOCK, _DONE = ".hlat-cache.lock", "model.done"
_COMPILING = "left {name} as it is: it is being compiled here"


@dataclass(frozen=True)
class Module:
    """A compiled graph: `neuronxcc-…/MODULE_…`, and each file's bytes and sha256."""

    name: str
    files: dict[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True)
class Difference:
    """How a local cache differs from a set of modules in the store."""

    missing: list[str]
    other: list[str]
    """Names whose bytes differ."""
    extra: list[str]
    """Compiled here by the same compiler, but not in the set."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.other or self.extra)


def local_modules(cache: Path, compiler: str = "") -> dict[str, Path]:
    """Name -> folder of every whole module in a local cache, of one compiler version or of all."""
    found = {}
    for done in cache.glob("neuronxcc-*/MODULE_*/model.done"):
        folder = done.parent
        if compiler in ("", folder.parent.name) and _whole(folder) and not locked(folder):
            found[f"{folder.parent.name}/{folder.name}"] = folder
    return dict(sorted(found.items()))


def _whole(folder: Path) -> bool:
    """Whether a compilation has come to its end here."""
    neff = folder / "model.neff"
    with contextlib.suppress(OSError):
        return (folder / _DONE).is_file() and neff.stat().st_size > 0
    return False


def _content(folder: Path) -> list[Path]:
    """The files of a module; a lock is not one of them."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix != SUFFIX)


def left_out(cache: Path, compiler: str = "") -> list[str]:
    """Names of the modules that are not whole: failed, or being compiled."""
    whole = local_modules(cache)
    names = {
        f"{path.parent.name}/{path.name}" for path in cache.glob("neuronxcc-*/MODULE_*") if path.is_dir()
    }
    return sorted(name for name in names - whole.keys() if compiler in ("", name.partition("/")[0]))


def stored_modules(remote: Remote, compiler: str = "") -> list[str]:
    """Names of the whole modules in the store. Raises StoreError."""
    names = (
        path.removesuffix(f"/{MARKER}") for path in remote.files(compiler) if path.endswith(f"/{MARKER}")
    )
    return sorted(name for name in names if _known(name))


def push(
    remote: Remote, cache: Path, compiler: str = "", key: str = "", say: Callable[[str], None] = print
) -> tuple[int, int]:
    """Upload the whole modules that the store lacks.

    Args:
        remote, cache: to and from where.
        compiler: `neuronxcc-…`: only those of this version; "" for all.
        key: of a recipe (see `graph_key`): note that these modules are what it needs.
        say: told what is left out.

    Returns modules and bytes uploaded. Raises StoreError.
    """
    present = set(stored_modules(remote, compiler))
    modules = local_modules(cache, compiler)
    for name in left_out(cache, compiler):
        say(f"left out {name}: failed, or being compiled")
    sent = [_push_module(remote, name, folder) for name, folder in modules.items() if name not in present]
    if key:
        remote.write(_set_path(key), json.dumps({"modules": list(modules)}, indent=1).encode() + b"\n")
    return len(sent), sum(module.bytes for module in sent)


def pull(
    remote: Remote, cache: Path, names: Iterable[str], say: Callable[[str], None] = print
) -> tuple[int, int]:
    """Download modules that are not whole here; one process of a machine at a time does it. What is being
    compiled here is left alone, and `say` is told.

    Returns modules and bytes downloaded. Raises StoreError, OSError, UserError for a damaged one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    got = []
    with _alone(cache):
        for name in names:
            if _whole(cache / name):
                continue
            if locked(cache / name):
                say(_COMPILING.format(name=name))
            else:
                module = _pull_module(remote, name, cache, say)
                got += [module] if module is not None else []
    return len(got), sum(module.bytes for module in got)


def compare(remote: Remote, cache: Path, names: Iterable[str], compiler: str = "") -> Difference:
    """How the local cache differs from these modules of the store, byte by byte. Nodes that differ stop with
    mismatching collectives, or hang. Raises StoreError.
    """
    names = list(names)
    here = local_modules(cache, compiler)
    missing = [name for name in names if name not in here]
    other = []
    for name in names:
        if name in here and (module := _stored(remote, name)) is not None:
            local = {file.name: _fact(file) for file in _content(here[name]) if file.name in module.files}
            if local != module.files:
                other.append(name)
    return Difference(missing, other, sorted(here.keys() - set(names)))


def wanted(remote: Remote, compiler: str = "", key: str = "") -> tuple[list[str], bool]:
    """The modules a recipe needs, and whether the store knows; otherwise all of the compiler's version.
    Raises StoreError.
    """
    if key:
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            names = json_text.loads(remote.read(_set_path(key)))["modules"]
            return sorted(name for name in names if _known(name)), True
    return stored_modules(remote, compiler), False


def graph_key(facts: dict[str, object]) -> str:
    """A name for what decides a run's graphs: compiler version, flags, recipe, number of processes."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _push_module(remote: Remote, name: str, folder: Path) -> Module:
    files = {file.name: _fact(file) for file in _content(folder)}
    side_by_side(lambda file: remote.upload(folder / file, f"{name}/{file}"), list(files))
    module = Module(name, files)
    content = {file: {"bytes": size, "sha256": digest} for file, (size, digest) in files.items()}
    remote.write(f"{name}/{MARKER}", json.dumps({"files": content}, indent=1).encode() + b"\n")
    return module


def _pull_module(remote: Remote, name: str, cache: Path, say: Callable[[str], None]) -> Module | None:
    """Fetch a module beside its place and put it there; None where it is, or was, compiled meanwhile."""
    module = _stored(remote, name)
    if module is None:
        raise UserError(f"there is no whole {name}", where=remote.url, fix="push it again")
    final = cache / name
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        side_by_side(lambda file: remote.download(f"{name}/{file}", partial / file), list(module.files))
        for file, fact in module.files.items():
            if _fact(partial / file) != fact:
                where = f"{remote.url}/{name}/{file}"
                raise UserError(
                    "does not match its sha256", where=where, fix="delete the module, push it again"
                )
        if not _put(partial, final):
            if not _whole(final):
                say(_COMPILING.format(name=name))
            return None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return module


def _put(partial: Path, final: Path) -> bool:
    """Move a fetched module to its place. Returns False where a compilation is under way, or has come to its
    end meanwhile. What a dead one left there gives way; the folder and its lock stay what they are, since
    another process may wait for that lock.
    """
    try:
        os.rename(partial, final)
        return True
    except OSError as error:
        linked = error.errno == errno.ENOTDIR and final.is_dir()  # kept elsewhere, and filled there
        if not linked and error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    with holding(final) as held:
        if not held or _whole(final):
            return False
        new = {file.name for file in _content(partial)}
        (final / _DONE).unlink(missing_ok=True)
        for file in _content(final):
            if file.name not in new:
                file.unlink()
        for name in sorted(new, key=lambda name: name == _DONE):  # it says that all others are there
            os.replace(partial / name, final / name)
    return True


def _stored(remote: Remote, name: str) -> Module | None:
    try:
        files = json_text.loads(remote.read(f"{name}/{MARKER}"))["files"]
        found = {str(file): (int(fact["bytes"]), str(fact["sha256"])) for file, fact in files.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Module(name, found) if _known(name) and all(map(_FILE.fullmatch, found)) else None


def _fact(file: Path) -> tuple[int, str]:
    with file.open("rb") as stream:
        return file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def _known(name: str) -> bool:
    """Whether a name is that of a module: what comes from a store becomes a path."""
    compiler, _, module = name.partition("/")
    return bool(_COMPILER.fullmatch(compiler) and _MODULE.fullmatch(module))


def _set_path(key: str) -> str:
    return f"{SETS}/{key}.json"


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    with open(cache / _LOCK, "w", encoding="utf-8") as handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
