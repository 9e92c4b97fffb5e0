"""What a stranger meets first: packaging, the Makefile, continuous integration, generated pages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def load_file(path: Path) -> ModuleType:
    """A Python file outside the package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_package_is_listed() -> None:
    folders = {file.parent for file in (ROOT / "hlat").rglob("*.py")}
    without = sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists())
    assert without == [], "folders with modules but no __init__.py are not installed"
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {
        "hlat_launch",
        "hlat_recipes",
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_extras() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {
        "data",
        "hf",
        "gguf",
        "eval",
        "s3",
        "gcs",
        "azure",
        "track",
        "plots",
        "docs",
        "dev",
    }
    named = {name for group in extras.values() for name in group}
    assert not [name for name in named if "neuron" in name], "PyPI's Neuron packages are placeholders"
    sources = "".join(file.read_text() for file in (ROOT / "hlat").rglob("*.py"))
    used = set(re.findall(r"hlat\[(\w+)\]", sources)) | set(
        re.findall(r'missing_extra\("[\w-]+", "(\w+)"', sources)
    )
    assert used <= set(extras), "a message names an extra that does not exist"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, with the build tool that is installed here."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("wheel") / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("hlat", "launch", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", str(copy.parent), str(copy)], check=True)
    return next(copy.parent.glob("hlat-*.whl"))


def test_wheel_has_the_recipes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = [file.relative_to(ROOT / "recipes").as_posix() for file in (ROOT / "recipes").rglob("*.yaml")]
    assert len(recipes) >= 5
    assert {f"hlat_recipes/{name}" for name in [*recipes, "schema.json", "__init__.py"]} <= names
    templates = {file.name for file in (ROOT / "launch/templates").iterdir() if file.is_file()}
    assert len(templates) >= 8 and {f"hlat_launch/{name}" for name in templates} <= names
    assert "hlat/py.typed" in names
    assert not [
        name for name in names if name.startswith(("tests", "recipes/", "launch/")) or "setup_env" in name
    ]


def test_installed_wheel_works_anywhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    command = "import sys; sys.path.insert(0, sys.argv.pop(1)); from hlat.cli import entry; entry()"
    for words, shown in (
        (["recipes", "show", "hlat-7b"], "6,738,415,616 parameters"),
        (["launch", "slurm", "hlat-7b", "--nodes", "16", "--dry-run"], "#SBATCH --nodes=16"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", command, str(target), *words], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["recipes", "list"]])
def test_module_equals_command(arguments: list[str]) -> None:
    module = subprocess.run(
        [sys.executable, "-m", "hlat", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    entry = [sys.executable, "-c", "from hlat.cli import entry; entry()", *arguments]
    command = subprocess.run(entry, capture_output=True, text=True, cwd=ROOT)
    assert module.returncode == command.returncode == 0
    assert module.stdout == command.stdout


def test_licence_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) >= 200 and PROJECT["project"]["license"] == "Apache-2.0"


def test_version_is_stated_once_each() -> None:
    import hlat

    assert PROJECT["project"]["version"] == hlat.__version__


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_make_without_python_is_one_line() -> None:
    done = make("train", "PYTHON=no-such-python")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and "no-such-python" in lines[0] and "3.11" in lines[0]


def test_make_shows_its_targets() -> None:
    shown = make("help").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert [name for name in phony.group(1).split() if name not in (*shown.split(), "help")] == []


def test_train_and_test_share_the_environment() -> None:
    train, test, full = (make("-n", target).stdout for target in ("train", "test", "test-full"))
    assert "hlat train recipes/tiny.yaml" in train and "--extras" not in train
    for text in (test, full):
        assert "--extras dev,hf,eval,gguf" in text
    assert all(".venv/bin/python -m" in text for text in (train, test, full))
    assert '-m "not slow and not slurm"' in test and "-m slow" in full


def test_continuous_integration_runs_everything() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
    assert "set -euo pipefail" in script
    ran = [line.split(maxsplit=1)[1] for line in re.findall(r'^ *step ".*?" (\d+ .*)$', script, re.MULTILINE)]
    wanted = [
        "make train",
        "make test",
        "make test-slurm",
        "make eval",
        "make lint",
        "make docs",
        "make test-full",
    ]
    assert [command for command in ran if command.startswith("make")] == wanted
    assert any("check_tiny.py" in command for command in ran)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def write_run(folder: Path, steps: int, bits: list[float]) -> Path:
    rows: list[dict] = [{"kind": "train", "step": step} for step in range(1, steps + 1)]
    rows += [{"kind": "eval", "step": i, "bits_per_byte": value} for i, value in enumerate(bits)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("steps", "bits", "wrong"),
    [
        (400, [2.6, 2.1, 1.9], 0),
        (400, [2.6, 2.1, 2.0], 1),
        (400, [1.7, 1.9, 1.8], 1),
        (400, [1.9], 1),
        (299, [2.6, 2.1, 1.9], 1),
        (10, [], 3),
        (400, [2.6, 2.1, float("nan")], 1),
    ],
)
def test_check_of_the_tiny_run(tmp_path: Path, steps: int, bits: list[float], wrong: int) -> None:
    check = load_file(ROOT / ".ci" / "check_tiny.py")
    assert len(check.problems(write_run(tmp_path, steps, bits))) == wrong


@pytest.mark.parametrize(("values", "better"), [((0.5, 0.4), 2), ((0.5, 0.3), 1), ((0.25, 0.1), 0)])
def test_check_of_the_evaluation(values: tuple[float, float], better: int) -> None:
    check = load_file(ROOT / ".ci" / "check_eval.py")
    results = {f"task{i}": {"acc,none": v, "acc_stderr,none": 0.03} for i, v in enumerate(values)}
    results["bits"] = {"bits_per_byte,none": 1.6, "bits_per_byte_stderr,none": "N/A"}
    chance = {**{name: {"acc": 0.25} for name in ("task0", "task1")}, "bits": {"bits_per_byte": 8.0}}
    assert len(check.above_chance({"results": results, "hlat": {"chance": chance}})) == better


def test_recipe_reference_is_current() -> None:
    module = load_file(ROOT / "docs" / "recipe_reference.py")
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert module.page(page) == page, "run: python docs/recipe_reference.py"
    for key in ("run.dir", "optim.groups[].match", "data.sources[].path", "train_only", "checkpoint.async"):
        assert f"| `{key}` |" in page


def test_every_docs_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- .*?: ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)
