"""What is asked of git: right answers, and nothing run that a repository, folder or variable names."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hlat.host.git import head
from hlat.host.programs import find_program
from hlat.observe import environment


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def settled(file: Path) -> None:
    """Let a file be older than the index: git looks again at one that is not."""
    old = time.time() - 100
    os.utime(file, (old, old))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With two commits, and a folder in it."""
    folder = tmp_path / "repository"
    (folder / "inner").mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    for number in (1, 2):
        (folder / "a").write_text(f"{number}\n")
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", "x")
    return folder


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[str]:
    """A command that leaves a mark; it must never be run."""
    script, mark = tmp_path / "evil.sh", tmp_path / "PWNED"
    script.write_text(f"#!/bin/sh\necho run >> {mark}\ncat\n")
    script.chmod(0o755)
    yield str(script)
    assert not mark.exists(), "a command of the repository was run"


CONFIGURED = (
    "filter.evil.clean",
    "filter.evil.smudge",
    "filter.evil.process",
    "core.fsmonitor",
    "core.sshCommand",
    "core.pager",
    "core.editor",
    "core.askPass",
    "core.gitProxy",
    "core.alternateRefsCommand",
    "pager.status",
    "diff.external",
    "diff.evil.textconv",
    "diff.evil.command",
    "merge.evil.driver",
    "gpg.program",
    "credential.helper",
    "uploadpack.packObjectsHook",
    "remote.origin.uploadpack",
    "remote.origin.vcs",
    "submodule.sub.update",
)


def arm(folder: Path, trap: str) -> None:
    """Name the command wherever a repository can name one."""
    for key in CONFIGURED:
        git(folder, "config", key, trap)
    for key in ("status", "rev-parse", "ls-files", "config", "check-attr"):
        git(folder, "config", f"alias.{key}", f"!{trap}")
    git(folder, "config", "filter.evil.required", "true")
    git(folder, "config", "status.submoduleSummary", "true")
    (folder / ".gitattributes").write_text("* filter=evil diff=evil merge=evil\n")
    hooks = folder / "hooks"
    hooks.mkdir()
    for name in ("post-index-change", "fsmonitor-watchman", "reference-transaction", "post-checkout"):
        (hooks / name).write_text(f"#!/bin/sh\n{trap}\n")
        (hooks / name).chmod(0o755)
    git(folder, "config", "core.hooksPath", str(hooks))


def disarmed(folder: Path) -> str:
    """What git itself says of HEAD, read from the file."""
    return (folder / ".git" / "refs" / "heads" / "main").read_text().strip()


@pytest.mark.parametrize("where", ["tree", "inner", "racy"])
def test_nothing_that_a_repository_configures_is_run(repository: Path, trap: str, where: str) -> None:
    arm(repository, trap)
    (repository / "a").write_text("other\n")
    if where != "racy":  # git compares the content of a file that is as new as the index
        settled(repository / "a")
    found = head(repository / "inner" if where == "inner" else repository)
    assert found == (disarmed(repository), None), "whether a filtered file differs only its filter can say"
    if where == "tree":
        subprocess.run(["git", "status"], cwd=repository, capture_output=True, check=False)
        (repository.parent / "PWNED").unlink()  # git itself does run it


def test_nothing_that_a_submodule_configures_is_run(repository: Path, tmp_path: Path, trap: str) -> None:
    git(tmp_path, "clone", "-q", "repository", "other")
    git(repository, "submodule", "add", "-q", str(tmp_path / "other"), "sub")
    git(repository, "commit", "-q", "-m", "sub")
    commit = git(repository, "rev-parse", "HEAD")
    arm(repository / "sub", trap)
    (repository / "sub" / "a").write_text("other\n")
    assert head(repository) == (commit, False), "what lies in a submodule is not looked at"
    of_sub = head(repository / "sub")
    assert of_sub is not None and of_sub[0] == git(repository, "rev-parse", "HEAD:sub")


@pytest.mark.parametrize("key", ["include.path", "includeIf.gitdir:/**.path"])
def test_nothing_that_an_included_file_configures_is_run(repository: Path, trap: str, key: str) -> None:
    (repository / "more").write_text(f'[core]\n\tfsmonitor = {trap}\n[filter "evil"]\n\tclean = {trap}\n')
    git(repository, "config", key, str(repository / "more"))
    (repository / ".gitattributes").write_text("* filter=evil\n")
    (repository / "a").write_text("other\n")
    assert head(repository) == (disarmed(repository), None)


def test_nothing_is_fetched(repository: Path, tmp_path: Path, trap: str) -> None:
    """A partial clone lacks objects; git would start what its configuration names to fetch them."""
    git(repository, "config", "uploadpack.allowFilter", "true")
    git(tmp_path, "clone", "-q", "--no-checkout", "--filter=tree:0", f"file://{repository}", "partial")
    partial = tmp_path / "partial"
    git(partial, "config", "remote.origin.uploadpack", trap)
    git(partial, "config", "core.sshCommand", trap)
    assert head(partial) == (git(repository, "rev-parse", "HEAD"), None)


@pytest.mark.parametrize("name", ["GIT_DIR", "GIT_EXTERNAL_DIFF", "GIT_CONFIG_PARAMETERS", "GIT_SSH_COMMAND"])
def test_the_environment_changes_nothing(
    repository: Path, trap: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"GIT_DIR": "/nowhere", "GIT_CONFIG_PARAMETERS": f"'core.fsmonitor={trap}'"}
    monkeypatch.setenv(name, values.get(name, trap))
    assert head(repository) == (disarmed(repository), False)


def test_settings_of_the_user_run_nothing(
    repository: Path, tmp_path: Path, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitconfig").write_text(f"[core]\n\tfsmonitor = {trap}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert head(repository) == (disarmed(repository), False)


@pytest.mark.parametrize("path", [".:{path}", ":{path}", "bin:{path}"])
def test_a_program_of_the_working_directory_is_not_taken(
    repository: Path, trap: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (repository, repository / "bin"):
        folder.mkdir(exist_ok=True)
        (folder / "git").write_text(f"#!/bin/sh\n{trap}\n")
        (folder / "git").chmod(0o755)
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PATH", path.format(path=os.environ["PATH"]))
    assert head(repository) == (disarmed(repository), False)
    assert os.path.isabs(find_program("git") or "")
    monkeypatch.setenv("PATH", ".")
    assert find_program("git") is None and head(repository) is None


def test_what_a_run_notes_of_its_surroundings_runs_nothing(
    repository: Path, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm(repository, trap)
    (repository / "a").write_text("other\n")
    monkeypatch.chdir(repository)
    assert environment.describe()["git"] == {"commit": disarmed(repository), "dirty": None}


# -- right answers


def test_the_ways_a_branch_may_be_kept(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "pack-refs", "--all")
    assert head(repository) == (commit, False)
    git(repository, "checkout", "-q", "--detach", "HEAD~1")
    assert head(repository) == (git(repository, "rev-parse", "HEAD"), False)
    git(repository, "worktree", "add", "-q", str(tmp_path / "second"), "main")
    assert head(tmp_path / "second") == (commit, False)
    (tmp_path / "second" / "a").write_text("other\n")
    assert head(tmp_path / "second") == (commit, True)
    assert head(repository) == (git(repository, "rev-parse", "HEAD"), False)
    git(tmp_path, "clone", "-q", "--shared", "repository", "shared")
    assert head(tmp_path / "shared") == (git(repository, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize("options", [["--object-format=sha256"], ["--ref-format=reftable"]])
def test_other_formats(tmp_path: Path, options: list[str]) -> None:
    try:
        git(tmp_path, "init", "-q", *options)
    except subprocess.CalledProcessError:
        pytest.skip(f"this git does not know {options[0]}")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "x")
    assert head(tmp_path) == (git(tmp_path, "rev-parse", "HEAD"), False)


def test_what_differs(repository: Path) -> None:
    commit = disarmed(repository)
    (repository / "untracked").write_text("x")
    assert head(repository) == (commit, False)
    os.utime(repository / "a", (5, 5))
    assert head(repository) == (commit, False), "touched, and the same"
    git(repository, "update-index", "--split-index")
    assert head(repository) == (commit, False)
    (repository / "a").chmod(0o755)
    assert head(repository) == (commit, True)
    git(repository, "config", "core.fileMode", "false")
    assert head(repository) == (commit, False), "the file system knows no modes"
    (repository / "a").unlink()
    assert head(repository) == (commit, True)
    git(repository, "checkout", "-q", "a")
    git(repository, "rm", "-q", "--cached", "a")
    assert head(repository) == (commit, True), "staged"


def test_filters_that_changed_nothing_are_clean(repository: Path) -> None:
    """Files of a filter that are as git left them: nobody needs to ask the filter."""
    (repository / ".gitattributes").write_text("a filter=upper\n")
    git(repository, "config", "filter.upper.clean", "tr a-z A-Z")
    (repository / "a").write_text("letters\n")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "x")
    for file in ("a", ".gitattributes"):
        settled(repository / file)
    git(repository, "update-index", "--refresh")
    assert head(repository) == (disarmed(repository), False)
    settled(repository / "a")
    (repository / "inner" / "b").write_text("1")
    git(repository, "add", "inner/b")
    assert head(repository) == (disarmed(repository), True), "another file is sure to differ"


@pytest.mark.parametrize(
    "damage", ["no commit", "empty HEAD", "pipe HEAD", "pipe config", "no objects", "gitdir nowhere", "index"]
)
def test_what_is_no_repository_is_none(repository: Path, damage: str) -> None:
    inside, commit = repository / ".git", disarmed(repository)
    if damage == "no commit":
        git(repository, "checkout", "-q", "--orphan", "new")
    elif damage == "index":
        (inside / "index").write_bytes(b"garbage")
        assert head(repository) == (commit, None)
        return
    elif damage == "no objects":
        (inside / "objects").rename(inside / "gone")
    elif damage == "gitdir nowhere":
        inside.rename(repository.parent / "moved")
        inside.write_text("gitdir: /nowhere\n")
    else:
        file = inside / damage.split()[1]
        file.unlink()
        os.mkfifo(file) if damage.startswith("pipe") else file.write_text("")
    assert head(repository) is None


def test_a_folder_without_a_repository(tmp_path: Path) -> None:
    assert head(tmp_path) is None and head(tmp_path / "missing") is None
    assert environment.git_state(tmp_path) is None


@pytest.mark.slow
def test_no_command_says_anything_of_git_outside_a_repository(
    load_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """git says that there is none: no command starts it, and none has a library start it."""
    from hlat.cli import main

    load_module(Path(__file__).with_name("test_train_command.py")).make_place(tmp_path, monkeypatch)
    tasks = load_module(Path(__file__).with_name("test_eval_command.py"))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/git"
    program.write_text(
        "#!/bin/sh\necho \"$@\" >> called-git\necho 'fatal: not a git repository' >&2\nexit 128\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    tasks.write_task(tmp_path / "tasks", tasks.QUESTIONS)
    asked = ["--tasks", "mine", "--include-path", "tasks"]
    commands = [
        ["recipes", "check", "small.yaml"],
        ["data", "tokenize", "text", "--tokenizer", "bytes", "--out", "tokens"],
        ["train", "small.yaml", "run.steps=2"],
        ["report", "runs/small"],
        ["generate", "runs/small", "--prompt", "alpha", "--max-new-tokens", "1"],
        ["convert", "to-hf", "runs/small", "hf"],
        ["eval", "hf", *asked],
        ["compare", "runs/small", "hf", *asked],
        ["doctor"],
    ]
    for command in commands:
        code = main(command)
        assert code == 0 or command == ["doctor"], (command, capfd.readouterr().err)
    assert "git repository" not in capfd.readouterr().err
    assert not Path("called-git").exists()
