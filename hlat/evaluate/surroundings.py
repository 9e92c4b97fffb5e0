"""What the evaluation harness writes down of its surroundings, without the programs it would ask.

It starts git, which runs what a repository's configuration names and says on the console that there is none,
and pip as a module of the working directory, which may hold one of that name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from hlat.observe.environment import git_state, versions


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """Inside, the harness's results have HLAT's facts about versions and the repository, under the harness's
    names.
    """
    from lm_eval import evaluator

    former = evaluator.get_git_commit_hash, evaluator.add_env_info
    evaluator.get_git_commit_hash = lambda: _commit(Path.cwd())
    evaluator.add_env_info = _add_facts
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = former


def _add_facts(results: dict[str, Any]) -> None:
    known = versions()
    results["pretty_env_info"] = "\n".join(f"{name}: {version}" for name, version in known.items())
    results["transformers_version"] = known.get("transformers", "N/A")
    results["lm_eval_version"] = metadata.version("lm_eval")
    results["upper_git_hash"] = _commit(Path.cwd().parent)


def _commit(folder: Path) -> str | None:
    return (git_state(folder) or {}).get("commit")
