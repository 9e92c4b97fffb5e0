"""Commands in the documentation: verbs, options, defaults and recipe values are those of the parsers."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hlat.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from command_parsers import parsers, whole_parser
from docs_pages import PAGES, ROOT, Table, codes, fences, name, tables

# Options of other programs: srun and sbatch, torchrun, lm_eval, neuronx-cc, ruff, aws, any with a secret.
FOREIGN = {
    *("--exclusive", "--mem", "--requeue", "--signal", "--batch", "--wait", "--kill-on-bad-exit", "--ntasks"),
    *("--dependency", "--het-group", "--overlap", "--distribution", "--ntasks-per-node"),
    *("--no-python", "--signals-to-handle"),
    *("--metadata", "--include_path", "--model_args", "--gen_kwargs", "--apply_chat_template"),
    *("--fewshot_as_multiturn", "--system_instruction"),
    *("--retry_failed_compilation", "--auto-cast", "--check", "--recursive", "--api-key"),
}
PLACEHOLDERS = {"N": "2", '"$SLURM_NNODES"': "2", "…": "", "ALGO": "adamw"}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """The whole parser, which takes every path: whether a file is there is not the question here."""
    whole = whole_parser()
    for inner in parsers(whole):
        for action in inner._actions:
            if action.type not in (None, int, float):
                action.type = None
    return whole


def shown_commands(page: Path) -> list[str]:
    """Whole command lines of the fenced blocks, as one writes them in a shell."""
    found = []
    for block in fences(page, "", "bash", "text", "console"):
        joined = re.sub(r" *\\\n *", " ", block)
        joined = re.sub(r"'[^'\n]*\n[^']*'", lambda quoted: quoted[0].replace("\n", " "), joined)
        for line in joined.splitlines():
            printed = re.match(r"hlat [\w -]+: ", line)  # what a command prints begins with its name
            begins = re.match(r"(?:\$ )?(?:hlat|(?:torchrun|srun|python)\b.* hlat) [a-z-]", line)
            if begins and not printed and "|" not in line:
                found.append(line.removeprefix("$ "))
    return found


def words_of(line: str) -> list[str]:
    """What stands behind `hlat`, placeholders filled in; empty where `hlat` is no word of the line."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
    words = [word for word in words if word not in ("", "$SMALL", "help")]
    words = words[words.index("hlat") + 1 :] if "hlat" in words and words[0] != "hlat-lm-eval" else []
    end = next((i for i, word in enumerate(words) if word in (">", "&&")), len(words))
    return [word.replace("$SLURM_NNODES", "2") for word in words[:end]]


def chosen(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of the verb and action that words name, and the words behind it. Raises LookupError."""
    verbs = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if verbs is None or not words or not re.fullmatch(r"[a-z-]+", words[0]) or words[0].startswith("-"):
        return parser, words
    if words[0] not in verbs.choices:
        raise LookupError(f"{parser.prog} has no {words[0]!r}")
    return chosen(verbs.choices[words[0]], words[1:])


def wrong_with(parser: argparse.ArgumentParser, words: list[str]) -> str:
    """The verb, option or recipe key among words that does not exist, or an empty text."""
    from hlat.recipe_errors import annotation

    try:
        inner, rest = chosen(parser, words)
    except LookupError as error:
        return str(error)
    for word in rest:
        option = re.match(r"--[a-z][\w-]*", word)
        if option and option[0] not in inner._option_string_actions:
            return f"{inner.prog} has no {option[0]}"
        key = re.match(r"(?!key=)([a-z_]+(?:\.\w+)*)=", word)
        takes_keys = any(action.dest == "overrides" for action in inner._actions)
        if key and takes_keys and annotation(key[1]) is None and not is_option(key[1]):
            return f"recipes have no {key[1]}"
    return ""


def is_option(key: str) -> bool:
    """Whether a dotted key is an option of some plug-in of HLAT."""
    from hlat.registry import KINDS, lookup, names, options_of

    kind, _, option = key.partition(".")
    return kind in KINDS and any(option in options_of(lookup(kind, plugin)) for plugin in names(kind))


def test_commands_in_blocks_are_complete(parser: argparse.ArgumentParser) -> None:
    wrong, seen = [], 0
    for page in PAGES:
        for line in shown_commands(page):
            words = words_of(line)
            if not words or words[-1] in ("--help", "--version"):
                continue
            seen += 1
            problem = wrong_with(parser, words)
            try:
                parser.read(words)  # type: ignore[attr-defined]
            except UserError as error:
                problem = problem or error.line()
            wrong += [f"{name(page)}: {line}: {problem}"] if problem else []
    assert wrong == [] and seen > 60


def test_commands_in_the_text_exist(parser: argparse.ArgumentParser) -> None:
    wrong, seen = [], 0
    for page in PAGES:
        for code in codes(page):
            if re.match(r"(hlat|(torchrun|srun|python) .*hlat) [a-z-]", code):
                seen += 1
                cut = re.sub(r"[\[\]…]|'[^']*$", " ", code)
                problem = wrong_with(parser, words_of(cut))
                wrong += [f"{name(page)}: {code}: {problem}"] if problem else []
    assert wrong == [] and seen > 100


def test_what_is_wrong_with_a_command_is_noticed(parser: argparse.ArgumentParser) -> None:
    assert wrong_with(parser, ["trian", "tiny"]) == "hlat has no 'trian'"
    assert wrong_with(parser, ["data", "tokenise"]) == "hlat data has no 'tokenise'"
    assert wrong_with(parser, ["eval", "--task", "x"]) == "hlat eval has no --task"
    assert wrong_with(parser, ["train", "tiny", "run.step=5"]) == "recipes have no run.step"
    assert wrong_with(parser, ["train", "tiny", "guard.sigma=5", "run.steps=5"]) == ""


def test_options_exist(parser: argparse.ArgumentParser) -> None:
    known = {option for inner in parsers(parser) for option in inner._option_string_actions}
    scripts = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    wrong, used = [], set()
    for page in PAGES:
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", " ".join(codes(page))):
            used.add(option)
            if option not in known | FOREIGN and f'"{option}"' not in scripts:
                wrong.append(f"{name(page)}: {option}")
    assert wrong == [] and sorted(FOREIGN - used) == []


def stated(cell: str) -> str | None:
    """The default that a table states: 'default `bf16`', 'default 16', or a number in brackets."""
    found = re.search(r"\bdefault:? `?(\d[\d.]*|bf16|fp32|default)\b", cell) or re.search(
        r"\((\d[\d.]*)\)", cell
    )
    return found[1].rstrip(".") if found else None


def test_stated_defaults_of_options(parser: argparse.ArgumentParser) -> None:
    wrong, seen = [], 0
    for page in PAGES:
        for table in tables(page):
            for row in table.rows:
                option = re.match(r"`(--[a-z-]+)", row[0])
                value = stated(row[1]) if option and len(row) > 1 else None
                if option is None or value is None:
                    continue
                seen += 1
                found = defaults(parser, table, option[1])
                if value not in found:
                    wrong.append(f"{name(page)}: {option[1]} is {value} there, {found} in the code")
    assert wrong == [] and seen >= 9


def defaults(parser: argparse.ArgumentParser, table: Table, option: str) -> set[str]:
    """The defaults of an option in the command (and its actions) that was shown last before a table, of
    those that have the option.
    """
    shown = re.findall(r"^hlat ([a-z]+(?: (?:to|from)-[a-z]+)?)(?= |$)", table.before, re.MULTILINE)
    for command in reversed(shown):
        progs = [p for p in parsers(parser) if p.prog.startswith(f"hlat {command}")]
        found = [p._option_string_actions[option] for p in progs if option in p._option_string_actions]
        if found:
            return {default_of(action) for action in found}
    return set()


def default_of(action: argparse.Action) -> str:
    """A default: where the parser has none, because it depends on other things, the one its help states."""
    told = re.search(r"default: ([\w.-]+)", action.help or "")
    if action.default is None:
        return told[1] if told else ""
    return f"{action.default:g}" if isinstance(action.default, float) else str(action.default)


def test_stated_defaults_in_the_help(parser: argparse.ArgumentParser) -> None:
    wrong, seen = [], 0
    for inner in parsers(parser):
        for action in inner._actions:
            told = re.search(r"\(?default:? ([\d.]+)\b", action.help or "")
            if told and action.default is not None:
                seen += 1
                if float(told[1].rstrip(".")) != float(action.default):
                    wrong.append(f"{inner.prog} {action.option_strings}: {told[1]}, {action.default}")
    assert wrong == [] and seen >= 5


def make(*arguments: str) -> str:
    """What make would run."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-n", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    ).stdout


def variables_of(page: str) -> set[str]:
    """The variables that a page shows in commands or in code, and those of the Makefile's own head."""
    return set(re.findall(r"\b([A-Z]{4,})=(?=[\w\"/])", (ROOT / page).read_text(encoding="utf-8")))


def test_variables_of_make() -> None:
    """Each variable of README and of the Makefile's help does to each target what is said of it."""
    told = variables_of("Makefile") & {"PYTHON", "TORCH", "WORKERS", "ARGS"}
    assert told == {"PYTHON", "TORCH", "WORKERS", "ARGS"} and variables_of("README.md") <= told
    assert '"python3.12" launch/setup_env.py --torch "2.11.0"' in make(
        "train", "PYTHON=python3.12", "TORCH=2.11.0"
    )
    assert make("train", "ARGS=run.name=short run.steps=50").endswith(
        "hlat train recipes/tiny.yaml run.name=short run.steps=50\n"
    )
    assert " -n 5 " in make("test", "WORKERS=5") and " -n 2 " in make("test")
    for target in ("train", "eval", "test", "test-full", "test-slurm", "chaos"):
        assert "--marker-of-this-test" in make(target, "ARGS=--marker-of-this-test").splitlines()[-1], target
    for target in ("install", "train", "eval", "test", "test-full", "test-slurm", "chaos", "lint", "docs"):
        assert '"python3.12" launch/setup_env.py --torch "2.11.0"' in make(
            target, "PYTHON=python3.12", "TORCH=2.11.0"
        ), target
