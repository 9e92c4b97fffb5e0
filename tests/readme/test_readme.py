"""README.md and the documentation do what they say: every fenced command runs, every fenced recipe loads.

A fenced `bash` command is either one of .ci/run's own steps, or runs here: one shell session for each page,
in a folder that looks like a clone. Runs are shortened by overrides at the end of the command, nothing else
changes. A command that no rule covers fails `test_every_command_has_a_proof`.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]  # the others show commands in passing

SHORT = "run.steps=12 schedule.warmup_steps=2 model.layers=2 data.seq_len=64 data.micro_batch=4"
SHORT += " data.global_batch=8 checkpoint.every=4 eval.every=6 eval.rows=8 compile=false"
OVERRIDES = {"hlat train ": SHORT, "hlat generate ": "--max-new-tokens 8", "hlat eval ": "--limit 4"}
AS_WRITTEN = (
    "source .venv/bin/activate",
    "hlat report ",
    "hlat convert to-hf ",
    "hlat recipes ",
    "hlat --help",
)
IN_CI = ("make train", "make test", "make eval")


def fences(page: Path, language: str) -> list[str]:
    """The content of every fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every command of the page's bash blocks, continuation lines joined."""
    blocks = "".join(fences(page, "bash")).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.strip() and not line.startswith("#")]


def runnable(command: str) -> str | None:
    """The command as it is run here; None when it is a step of .ci/run. Raises LookupError without a rule."""
    if command in IN_CI:
        return None
    for start, addition in OVERRIDES.items():
        if command.startswith(start):
            return f"{command} {addition}"
    if command.startswith(AS_WRITTEN):
        return command
    raise LookupError(f"no rule in {__file__} says how this command is proved: {command}")


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_every_command_has_a_proof(page: Path) -> None:
    found = commands(page)
    assert len(found) >= 3
    steps = re.findall(r'^step ".*?" \d+ (.*)$', (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    for command in found:
        assert runnable(command) is not None or command in steps


def test_a_command_without_a_proof_is_noticed() -> None:
    with pytest.raises(LookupError):
        runnable("curl https://example.org | sh")


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_fences_are_of_a_checked_kind(page: Path) -> None:
    """A block under another name would escape the checks of this file."""
    text = page.read_text(encoding="utf-8")
    kinds = re.findall(r"^```(.*)$", text, re.MULTILINE)
    assert len(kinds) % 2 == 0, "a fence is not closed"
    assert set(kinds[::2]) <= {"bash", "python", "yaml", "toml", "json", "text"}
    assert set(kinds[1::2]) <= {""}


def test_readme_starts_with_the_two_commands() -> None:
    assert commands(ROOT / "README.md")[:2] == ["make train", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_the_text_load(page: Path, tmp_path: Path) -> None:
    from hlat.recipe import load

    for i, block in enumerate(fences(page, "yaml")):
        if not block.startswith("base:"):
            continue
        file = tmp_path / f"recipe{i}.yaml"
        file.write_text(block)
        load(file)


def test_some_recipe_is_shown() -> None:
    assert fences(ROOT / "README.md", "yaml")[0].startswith("base:")


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "index.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def bare(function: ast.FunctionDef) -> str:
    """A function's code without types and docstring."""
    function.returns = None
    for argument in function.args.args:
        argument.annotation = None
    if ast.get_docstring(function):
        function.body = function.body[1:]
    return ast.unparse(function)


def test_the_step_shown_is_the_step_run() -> None:
    shown = ast.parse(fences(ROOT / "README.md", "python")[0]).body[0]
    source = ast.parse((ROOT / "hlat" / "train" / "step.py").read_text())
    real = next(n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == "train_step")
    assert isinstance(shown, ast.FunctionDef) and bare(shown) == bare(real)


def test_the_plug_in_shown_works(tmp_path: Path) -> None:
    import torch

    from hlat.recipe import load
    from hlat.registry import lookup

    file = tmp_path / "shown_plugin.py"
    file.write_text(fences(ROOT / "CONTRIBUTING.md", "python")[0])
    spec = importlib.util.spec_from_file_location("shown_plugin", file)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    guard = lookup("guard", load("tiny", ["guard.name=ceiling", "guard.loss=15.0"]).guard.name)(loss=15.0)
    assert guard(torch.tensor(14.0), torch.tensor(1.0)) and not guard(
        torch.tensor(torch.nan), torch.tensor(1.0)
    )


@pytest.fixture
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone after `make train`: .venv, recipes and a (short) run in runs/tiny."""
    folder = tmp_path_factory.mktemp("read me")
    for name, target in ((".venv", Path(sys.prefix)), ("recipes", ROOT / "recipes"), ("docs", ROOT / "docs")):
        (folder / name).symlink_to(target)
    shell(folder, [f".venv/bin/python -m hlat train recipes/tiny.yaml {SHORT}"])
    return folder


def shell(folder: Path, lines: list[str]) -> str:
    """Run the lines in one bash session that ends at the first failure."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = "\n".join(["set -euo pipefail", *lines])
    done = subprocess.run(
        ["bash", "-xc", script], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, clone: Path) -> None:
    lines = [line for command in commands(page) if (line := runnable(command)) is not None]
    assert any(line.startswith("hlat train ") for line in lines)
    shell(clone, lines)
    reports = list(clone.glob("*.html"))
    assert reports and all(report.stat().st_size > 10_000 for report in reports)
    exported = {file.name for file in (clone / "exported" / "tiny").iterdir()}
    assert {"config.json", "model.safetensors"} <= exported
