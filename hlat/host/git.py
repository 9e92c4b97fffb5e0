"""The commit of a repository, asked of git without anything that the repository configures.

A repository's configuration names programs: filters, monitors of the file system, hooks, helpers that fetch
what is missing. Options that switch them off one by one miss the next one. So git is shown another
repository: an empty one of our own, whose index, references and objects are those of the real one, and whose
configuration is ours alone. Settings of the user and of the system are left out as well.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hlat.host.programs import find_program

_SECONDS = 10.0
_SMALL, _CONFIG = 4096, 1 << 20  # bytes that HEAD and its like may have; the same of a configuration
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHARED = ("refs", "packed-refs", "reftable")
# What changes how files are compared, or how the repository is read, and names no program.
_HARMLESS = {
    "core.filemode": "true|false",
    "core.symlinks": "true|false",
    "core.ignorecase": "true|false",
    "core.trustctime": "true|false",
    "core.checkstat": "default|minimal",
    "core.autocrlf": "true|false|input",
    "core.eol": "lf|crlf|native",
    "extensions.objectformat": "sha1|sha256",
    "extensions.refstorage": "files|reftable",
}


class _Failed(Exception):
    """git has no answer."""


@dataclass(frozen=True)
class _Repository:
    """Where the parts of a repository lie: its work tree; what belongs to that alone (HEAD, the index); what
    all work trees share.
    """

    tree: Path
    own: Path
    common: Path


def head(folder: Path) -> tuple[str, bool | None] | None:
    """The commit that is checked out in the repository around a folder, and whether tracked files differ from
    it; None without a repository, a commit or git.

    Whether files differ is None where it cannot be told without the repository's own programs: files that
    have been touched since the checkout and belong to a filter, an object that is not here. What lies in
    submodules is not looked at, only which commit they are at.
    """
    git, found = find_program("git"), _around(folder)
    if git is None or found is None:
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="hlat-git-") as scratch:
            asked = _Asked(git, found, Path(scratch))
            commit = asked("rev-parse", "--verify", "--quiet", "HEAD").strip()
            if not _COMMIT.fullmatch(commit):
                return None
            try:
                return commit, asked.differs()
            except _Failed:
                return commit, None
    except (_Failed, OSError):
        return None


class _Asked:
    """Answers questions about a repository in place of which git sees one without configuration.

    Args:
        git: the program.
        found: the repository.
        scratch: an empty folder.

    Raises OSError.
    """

    def __init__(self, git: str, found: _Repository, scratch: Path) -> None:
        self._git, self._tree = git, found.tree
        common = scratch / "common"
        own = common if found.own == found.common else scratch / "own"
        for made in {common, own, scratch / "home"}:
            made.mkdir()
        for name in _SHARED:
            _show(found.common / name, common / name)
            if own != common:
                _show(found.own / name, own / name)
        for place, shown in ((found.common, common), (found.own, own)):
            (shown / "HEAD").write_bytes(_read(place / "HEAD", _SMALL))
        if own != common:
            (own / "commondir").write_text(f"{common}\n", encoding="utf-8")
        for part in found.own.glob("sharedindex.*"):
            _show(part, own / part.name)
        (common / "refs").mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        home = str(scratch / "home")
        self._environment = kept | {
            "HOME": home,
            "XDG_CONFIG_HOME": home,
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_ALLOW_PROTOCOL": "none",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_CEILING_DIRECTORIES": str(scratch),
        }
        settings = self._settings(found.common / "config", scratch)
        (common / "config").write_text(settings, encoding="utf-8")
        self._environment |= {
            "GIT_DIR": str(own),
            "GIT_WORK_TREE": str(found.tree),
            "GIT_OBJECT_DIRECTORY": str(found.common / "objects"),
            "GIT_INDEX_FILE": str(found.own / "index"),
        }

    def __call__(self, *words: str, given: str = "", folder: Path | None = None) -> str:
        """What git prints. Raises _Failed."""
        command = [self._git, "--no-pager", *words]
        try:
            done = subprocess.run(
                command,
                cwd=folder or self._tree,
                env=self._environment,
                input=given,
                capture_output=True,
                timeout=_SECONDS,
                check=True,
                encoding="utf-8",
                errors="surrogateescape",
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise _Failed from error
        return done.stdout

    def differs(self) -> bool | None:
        """Whether tracked files are not as committed; see `head`. Raises _Failed."""
        found = self(
            "status", "--porcelain", "-z", "--untracked-files=no", "--ignore-submodules=dirty", "--no-renames"
        )
        changes = [entry for entry in found.split("\0") if entry]
        doubtful = [entry[3:] for entry in changes if entry[:2] == " M"]
        if len(doubtful) < len(changes):
            return True
        return bool(changes) and (True if self._unfiltered(doubtful) else None)

    def _unfiltered(self, files: Sequence[str]) -> bool:
        """Whether one of the files belongs to no filter."""
        given = "".join(f"{file}\0" for file in files)
        answer = self("check-attr", "-z", "--stdin", "filter", given=given).split("\0")
        return any(value in ("unspecified", "unset") for value in answer[2::3])

    def _settings(self, config: Path, scratch: Path) -> str:
        """A configuration of the harmless settings of another. git reads the syntax: a copy, as a file."""
        copy = scratch / "settings"
        copy.write_bytes(_read(config, _CONFIG))
        listed = self("config", "--file", str(copy), "--no-includes", "--null", "--list", folder=scratch)
        values = dict(entry.partition("\n")[::2] for entry in listed.split("\0") if entry)
        sections: dict[str, list[str]] = {"core": ["bare = false"], "extensions": []}
        version = 0
        for key, allowed in _HARMLESS.items():
            value = values.get(key, "").lower()
            if re.fullmatch(allowed, value):
                section, _, name = key.partition(".")
                sections[section].append(f"{name} = {value}")
                version = 1 if section == "extensions" else version
        sections["core"] += [f"repositoryformatversion = {version}", f"hooksPath = {os.devnull}"]
        sections["core"] += ["fsmonitor = false", "untrackedCache = false"]
        lines = [f"[{name}]\n" + "".join(f"\t{line}\n" for line in body) for name, body in sections.items()]
        return "".join(lines)


def _around(folder: Path) -> _Repository | None:
    """The repository in whose work tree a folder lies, as git looks for it: up to the border of the file
    system.
    """
    try:
        device = folder.stat().st_dev
        for tree in (folder.absolute(), *folder.absolute().parents):
            if tree.stat().st_dev != device:
                return None
            if (found := _in_tree(tree)) is not None:
                return found
    except OSError:
        return None
    return None


def _in_tree(tree: Path) -> _Repository | None:
    """The repository of a work tree; None where this is none. Raises OSError."""
    own = tree / ".git"
    if own.is_file():  # of a further work tree, or a submodule
        text = _text(own)
        if not text.startswith("gitdir: "):
            return None
        own = Path(os.path.normpath(tree / text.removeprefix("gitdir: ")))
    if not (own / "HEAD").exists():
        return None
    common = own
    if (own / "commondir").is_file():
        common = Path(os.path.normpath(own / _text(own / "commondir")))
    return _Repository(tree, own, common) if (common / "objects").is_dir() else None


def _show(real: Path, shown: Path) -> None:
    if real.is_dir() or real.is_file():
        shown.symlink_to(real)


def _text(file: Path) -> str:
    return os.fsdecode(_read(file, _SMALL)).strip("\r\n")


def _read(file: Path, most: int) -> bytes:
    """A small regular file; nothing else is waited for or read. Raises OSError."""
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{file} is no file")
        data = stream.read(most + 1)
    if len(data) > most:
        raise OSError(f"{file} is too large")
    return data
