"""Rules about the source itself: which part may import which, what is imported lazily, what is never used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "hlat").rglob("*.py"))

# From the ground up. A part imports itself and parts of lower rows, never others of its row or a higher one.
# Plug-ins are found by the registry: `train` does not import `method`. Imports under TYPE_CHECKING are free.
LAYERS = (
    ("errors", "host", "process"),
    ("paths",),
    ("registry", "section", "storage"),
    ("mesh",),
    ("model", "data", "observe", "backend"),
    ("recipe", "optim", "objective"),
    ("parallel",),
    ("reduce", "checkpoint"),
    ("evaluate",),
    ("train", "method", "doctor"),
    ("supervise",),
    ("launch",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

LAZY = {
    "transformers",
    "datasets",
    "pyarrow",
    "matplotlib",
    "gguf",
    "tensorboard",
    "sentencepiece",
    "lm_eval",
    "fsspec",
    "s3fs",
    "gcsfs",
    "adlfs",
    "botocore",
    "boto3",
}
LAZY |= {"accelerate", "torch.utils.tensorboard", "torch._inductor"}
NEURON_PART = "hlat.backend.nxd."  # the one place, as docs/design.md says
NEURON = {"torch_xla", "torch_neuronx", "neuronx_distributed", "neuronxcc", "libneuronxla", "nki"}
RUNS_TEXT = {"os.system", "os.popen", "eval", "exec", "yaml.unsafe_load"}
RUNS_TEXT |= {"subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"}
SHELLS = ("['bash', '-c'", "['sh', '-c'", "['/bin/bash', '-c'", "['/bin/sh', '-c'")
STARTS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
NEVER = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def part_of(module: str) -> str:
    """'hlat.recipe_io' -> 'recipe', 'hlat.model.decoder' -> 'model', 'hlat' -> ''."""
    names = module.split(".")
    return names[1].split("_")[0] if len(names) > 1 and not names[1].startswith("__") else ".".join(names[1:])


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(module, inside a function?, line) of every import that runs; those under TYPE_CHECKING do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((a.value, lazy, node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []), lazy)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, inside)


def is_under(module: str, packages: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def import_problems(module: str, tree: ast.AST) -> Iterator[str]:
    own = part_of(module)
    for name, lazy, line in imports(tree):
        where = f"{module}:{line}: {name}"
        if name.split(".")[0] == "hlat":
            other = part_of(name)
            if other in LEVEL and other != own and LEVEL[other] >= LEVEL.get(own, 0):
                yield f"{where}: '{own}' may not import '{other}'"
        if is_under(name, LAZY) and not lazy:
            yield f"{where}: belongs inside a function"
        if is_under(name, NEURON) and not (module.startswith(NEURON_PART) and lazy):
            yield f"{where}: only in hlat/backend/nxd, inside a function"
        if is_under(name, NEVER):
            yield f"{where}: runs code from files"


def call_problems(module: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
        where = f"{module}:{node.lineno}: {name}"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"{where} without weights_only=True"
        if name in ("yaml.load", "yaml.load_all") and "Safe" not in ast.unparse(node):
            yield f"{where} without a safe loader"
        if name in RUNS_TEXT or given.get("shell", "False") != "False":
            yield f"{where}: runs text as code"
        elif name in STARTS and node.args and is_text(node.args[0]):
            yield f"{where}: a command is a list of words"
        elif name in STARTS and node.args and ast.unparse(node.args[0]).startswith(SHELLS):
            yield f"{where}: runs text as code"
        if given.get("trust_remote_code", "False") != "False":
            yield f"{where} with trust_remote_code"
        if "encoding" not in given and is_of_text(node, name, given):
            yield f"{where} without an encoding: the locale's may be any"


def is_of_text(node: ast.Call, name: str, given: dict[str, str]) -> bool:
    """Whether a call reads or writes text."""
    last = name.rpartition(".")[2]
    if name in STARTS:
        return "text" in given or "universal_newlines" in given
    if last in ("read_text", "write_text"):
        return name.rpartition(".")[0] not in ("", "found")  # `found`: a distribution's metadata
    if last != "open" or name in ("os.open", "gzip.open", "self._opener.open"):
        return False
    place = 1 if name == "open" else 0
    mode = ast.unparse(node.args[place]) if len(node.args) > place else given.get("mode", "'r'")
    return "b" not in mode


def is_text(node: ast.AST) -> bool:
    """Whether an expression is a text to the eye: written out, formatted or joined."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.BinOp):
        return is_text(node.left) or is_text(node.right)
    joined = isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".join", ".format"))
    return isinstance(node, ast.JoinedStr) or joined


def problems(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    found = [
        *import_problems(module, tree),
        *call_problems(module, tree),
    ]
    return sorted(found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_source_rules(file: Path) -> None:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert part_of(module) in {"", *LEVEL}, "a new part of hlat/: give it a place in LAYERS"
    assert problems(module, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "part"),
    [
        ("hlat.model.decoder", "from hlat.train.run import Run", "may not import 'train'"),
        ("hlat.data.loader", "def f():\n    import hlat.recipe", "may not import 'recipe'"),
        ("hlat.model.decoder", "from hlat import data", "may not import 'data'"),
        ("hlat.data.readers", "import pyarrow.parquet", "inside a function"),
        ("hlat.observe.sinks", "from torch.utils.tensorboard import SummaryWriter", "inside a function"),
        ("hlat.train.loop", "def f():\n    import torch_xla", "only in hlat/backend/nxd"),
        ("hlat.backend.neuron.probe", "def f():\n    import torch_xla.core", "only in hlat/backend/nxd"),
        ("hlat.train.loop", "import_module('torch_xla.core')", "only in hlat/backend/nxd"),
        ("hlat.checkpoint.store", "def f():\n    from pickle import load", "runs code"),
        ("hlat.checkpoint.store", "import torch\ntorch.load('x')", "weights_only"),
        ("hlat.checkpoint.store", "import yaml\nyaml.load(text, Loader=yaml.Loader)", "safe loader"),
        ("hlat.train.loop", "import subprocess\nsubprocess.run('ls', shell=True)", "runs text as code"),
        ("hlat.train.loop", "import subprocess\nsubprocess.run(f'ls {x}', check=True)", "list of words"),
        ("hlat.train.loop", "import subprocess\nsubprocess.run('ls ' + x, check=True)", "list of words"),
        ("hlat.train.loop", "import subprocess\nsubprocess.Popen(['bash', '-c', x])", "runs text as code"),
        ("hlat.train.loop", "import subprocess\nsubprocess.run(x, shell=y)", "runs text as code"),
        ("hlat.checkpoint.hf", "load(x, trust_remote_code=True)", "trust_remote_code"),
    ],
)
def test_rules_can_fail(module: str, source: str, part: str) -> None:
    found = problems(module, source)
    assert len(found) == 1 and part in found[0]


@pytest.mark.parametrize(
    "source",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hlat.train.run import Run",
        "def f():\n    import pyarrow",
        "import torch\ntorch.load('x', weights_only=True)",
        "from hlat.errors import UserError",
        "from hlat import __version__",
    ],
)
def test_rules_can_pass(source: str) -> None:
    assert problems("hlat.data.readers", source) == []


@pytest.mark.parametrize(
    "statement", ["import hlat.recipe", "from hlat.cli import main; main(['recipes', 'list'])"]
)
def test_torch_is_not_imported(statement: str) -> None:
    probe = f"{statement}\nimport sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
