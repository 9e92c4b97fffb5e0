"""What `--help` of each command ends with: examples, and the page of the documentation that says more."""

from __future__ import annotations

from typing import NamedTuple


class Help(NamedTuple):
    """`examples` are whole command lines; `page` is a file of the repository."""

    page: str
    examples: tuple[str, ...]


HELP: dict[str, Help] = {
    "hlat": Help(
        "docs/quickstart.md",
        ("hlat train tiny", 'hlat generate runs/tiny --prompt "def read_json(path):"', "hlat help eval"),
    ),
    "hlat train": Help(
        "docs/quickstart.md",
        (
            "hlat train tiny",
            "hlat train recipes/tiny.yaml run.name=wide model.hidden=384 optim.lr=1e-3",
            "torchrun --nproc-per-node 8 -m hlat train 1b parallel.tp=4 parallel.zero1=true",
        ),
    ),
    "hlat supervise": Help(
        "docs/operations.md",
        (
            "hlat supervise 1b --nproc-per-node 8",
            "hlat supervise 1b --nproc-per-node 8 --nnodes 4 --node-rank 0 --master-addr node-1",
        ),
    ),
    "hlat launch": Help(
        "docs/operations/launch.md",
        ("hlat launch slurm hlat-7b --nodes 16 --dry-run", "hlat launch kubernetes hlat-7b --help"),
    ),
    "hlat launch slurm": Help(
        "docs/operations/launch.md",
        (
            "hlat launch slurm hlat-7b --nodes 16 --time 48:00:00",
            "hlat launch slurm hlat-7b --nodes 16 --dry-run",
        ),
    ),
    "hlat launch torchrun": Help(
        "docs/operations/launch.md", ("hlat launch torchrun hlat-7b --nodes 4 --master-addr node-1",)
    ),
    "hlat launch kubernetes": Help(
        "docs/operations/launch.md", ("hlat launch kubernetes hlat-7b --nodes 4 --dry-run",)
    ),
    "hlat recipes": Help("docs/recipes.md", ("hlat recipes list", "hlat recipes diff tiny hlat-7b")),
    "hlat recipes list": Help("docs/recipes.md", ("hlat recipes list",)),
    "hlat recipes show": Help(
        "docs/recipes.md", ("hlat recipes show tiny optim.lr=1e-3", "hlat recipes show runs/tiny")
    ),
    "hlat recipes diff": Help(
        "docs/recipes.md", ("hlat recipes diff tiny hlat-7b", "hlat recipes diff runs/tiny runs/wide")
    ),
    "hlat recipes check": Help(
        "docs/recipes.md", ("hlat recipes check my.yaml", "hlat recipes check my.yaml parallel.tp=8")
    ),
    "hlat recipes schema": Help("docs/recipes.md", ("hlat recipes schema --out schema.json",)),
    "hlat data": Help(
        "docs/data.md",
        (
            "hlat data tokenize corpus/ --tokenizer tokenizer.json --out tokens/",
            "hlat data locate runs/tiny --step 100",
        ),
    ),
    "hlat data train-tokenizer": Help(
        "docs/data.md", ("hlat data train-tokenizer corpus/ --vocab 32000 --out tokenizer/",)
    ),
    "hlat data tokenize": Help(
        "docs/data.md",
        (
            "hlat data tokenize corpus/ --tokenizer tokenizer.json --out tokens/",
            "hlat data tokenize c4.00000.json.gz dclm.jsonl.zst --tokenizer bytes --out tokens/",
        ),
    ),
    "hlat data inspect": Help(
        "docs/data.md", ("hlat data inspect tokens/", "hlat data inspect tokens/ --recipe 1b")
    ),
    "hlat data verify": Help("docs/data.md", ("hlat data verify tokens/", "hlat data verify tokens/ --json")),
    "hlat data locate": Help(
        "docs/data.md",
        (
            "hlat data locate runs/tiny --step 100 --row 3 --text",
            "hlat data locate runs/tiny --step 100 --json",
        ),
    ),
    "hlat generate": Help(
        "docs/convert.md",
        (
            'hlat generate runs/tiny --prompt "def read_json(path):"',
            'hlat generate exported/tiny --prompt "import" --greedy --max-new-tokens 20',
        ),
    ),
    "hlat convert": Help(
        "docs/convert.md",
        (
            "hlat convert to-hf runs/tiny exported/tiny",
            "hlat convert from-hf Llama-2-7b-hf checkpoints/llama-2",
        ),
    ),
    "hlat convert to-hf": Help(
        "docs/convert.md",
        (
            "hlat convert to-hf runs/tiny exported/tiny",
            "hlat convert to-hf runs/tiny/checkpoints/step-00000200 exported/tiny-200 --dtype fp32",
        ),
    ),
    "hlat convert from-hf": Help(
        "docs/convert.md", ("hlat convert from-hf Llama-2-7b-hf checkpoints/llama-2 --dtype bf16",)
    ),
    "hlat convert from-gguf": Help(
        "docs/convert.md", ("hlat convert from-gguf model-q8_0.gguf checkpoints/model",)
    ),
    "hlat convert from-nxd": Help(
        "docs/trainium.md", ("hlat convert from-nxd runs/hlat-7b runs/hlat-7b-converted",)
    ),
    "hlat eval": Help(
        "docs/evaluation.md",
        (
            "hlat eval runs/tiny --tasks hlat-offline",
            "hlat eval exported/tiny --tasks arc_easy hellaswag --num-fewshot 5 --json scores.json",
        ),
    ),
    "hlat compare": Help(
        "docs/evaluation.md", ("hlat compare runs/tiny runs/wide --tasks hlat-offline --html compare.html",)
    ),
    "hlat sweep": Help(
        "docs/methods/mada.md",
        (
            'hlat sweep tiny "optim.lr=[1e-3, 3e-3]" run.steps=200 --seeds 3',
            'hlat sweep tiny "optim.lr=[1e-3, 3e-3]" --list',
        ),
    ),
    "hlat report": Help(
        "docs/run-folder.md", ("hlat report runs/tiny", "hlat report runs/tiny runs/wide --out report.html")
    ),
    "hlat cache": Help("docs/operations/storage.md", ("hlat cache list s3://bucket/graphs",)),
    "hlat cache push": Help("docs/operations/storage.md", ("hlat cache push s3://bucket/graphs",)),
    "hlat cache pull": Help("docs/operations/storage.md", ("hlat cache pull s3://bucket/graphs",)),
    "hlat cache verify": Help("docs/operations/storage.md", ("hlat cache verify s3://bucket/graphs",)),
    "hlat cache list": Help("docs/operations/storage.md", ("hlat cache list s3://bucket/graphs",)),
    "hlat doctor": Help(
        "docs/trainium.md",
        ("hlat doctor", "hlat doctor --fix-plan", "hlat doctor --profile hlat-7b"),
    ),
}


def epilog(command: str) -> str:
    """The end of a command's help; empty for one that is not known.

    Args:
        command: with its verbs, such as "hlat data verify".
    """
    found = HELP.get(command)
    if found is None:
        return ""
    lines = "\n".join(f"  {line}" for line in found.examples)
    return f"\nexamples:\n{lines}\n\nmore: {found.page}\n"
