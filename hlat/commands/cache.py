"""`hlat cache`: share the Neuron compile cache of a node through a store."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hlat.errors import StorageFailed, UserError
from hlat.paths import existing_folder, folder_to_write

if TYPE_CHECKING:
    from hlat.recipe import Recipe
    from hlat.storage.remote import Remote

Value = TypeVar("Value")
# What of a recipe may change without a new graph. Rates and the like enter a graph as tensors; they count all
# the same, since a set that is not found costs a listing and no compilation.
_NO_GRAPH = ("run", "checkpoint", "log", "init", "compile_cache")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("push", "upload the compiled graphs that the store lacks; one node does it, after compiling"),
        ("pull", "download those a recipe needs, or all of the installed compiler's version; on every node"),
        ("verify", "compare this node's graphs with the store's; exit code 1 when they differ"),
        ("list", "compilers and graphs in the store"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument("url", metavar="URL", help="s3://bucket/folder, or gs://, abfs:// or file://")
        if name != "list":
            action.add_argument("recipe", nargs="?", help="a recipe file or name: only its graphs")
            action.add_argument(
                "overrides", nargs="*", default=[], metavar="key=value", help="changes, as for hlat train"
            )
            action.add_argument(
                "--cache", type=folder_to_write, metavar="DIR", help="default: where Neuron keeps it"
            )
        action.add_argument(
            "--compiler", default="", metavar="V", help="default: the neuronx-cc installed here"
        )


def main(args: argparse.Namespace) -> int:
    """Run one action. Raises UserError, StorageFailed."""
    from hlat.storage.remote import Remote

    remote = Remote(args.url, "hlat cache")
    actions = {"push": _push, "pull": _pull, "verify": _verify, "list": _list}
    return told(lambda: actions[args.action](args, remote))


def told(work: Callable[[], Value]) -> Value:
    """What `work` returns. A store that fails is a UserError, or StorageFailed where waiting may help."""
    from hlat.storage.remote import StoreError

    try:
        return work()
    except StoreError as error:
        if error.lasting:
            fix = "correct the URL, the credentials in the environment, or their permissions"
            raise UserError(str(error), where="hlat cache", fix=fix) from error
        raise StorageFailed(str(error), where="hlat cache", fix="try again") from error
    except OSError as error:
        where = str(error.filename or "hlat cache")
        raise UserError(
            error.strerror or str(error), where=where, fix="make room, or name --cache"
        ) from error


def compiler_version(given: str = "") -> str:
    """`neuronxcc-<version>`, the folder of a compiler in a cache; "" where none is installed or named."""
    if not given:
        try:
            given = metadata.version("neuronx-cc")
        except metadata.PackageNotFoundError:
            return ""
    return given if given.startswith("neuronxcc-") else f"neuronxcc-{given}"


def local_cache(given: Path | None = None) -> Path:
    """The cache on this node. Raises UserError where NEURON_COMPILE_CACHE_URL is a store itself."""
    from hlat.backend.neuron.profile import compile_cache

    if given is not None:
        return given
    place = compile_cache(os.environ)
    if "://" in place:
        fix = "unset it: the node's own disk is safer, and hlat cache brings the graphs there"
        raise UserError(f"the compile cache is {place}", where="NEURON_COMPILE_CACHE_URL", fix=fix)
    return Path(place)


def recipe_key(recipe: Recipe, compiler: str) -> str:
    """The key of a recipe's set of graphs; see `hlat.storage.compile_cache.graph_key`."""
    from hlat.backend.neuron.profile import CC_FLAGS, cluster
    from hlat.storage.compile_cache import graph_key

    values = recipe.to_dict()
    nodes, cores = cluster(os.environ)
    nodes, cores = (
        int(os.environ.get(name) or value) for name, value in (("NODES", nodes), ("CORES", cores))
    )
    shape = {name: value for name, value in values["data"].items() if name not in ("sources", "tokenizer")}
    facts: dict[str, Any] = {name: value for name, value in values.items() if name not in _NO_GRAPH}
    facts |= {"data": shape, "compiler": compiler, "flags": os.environ.get(CC_FLAGS, "")}
    return graph_key(facts | {"nodes": nodes, "cores": cores})


def _key(args: argparse.Namespace) -> str:
    if args.recipe is None:
        return ""
    from hlat.commands.recipe_file import load

    return recipe_key(load(args.recipe, args.overrides), compiler_version(args.compiler))


def _push(args: argparse.Namespace, remote: Remote) -> int:
    from hlat.storage.compile_cache import push

    cache = local_cache(args.cache and existing_folder(args.cache, "--cache"))
    count, size = push(remote, cache, compiler_version(args.compiler), _key(args))
    print(f"pushed {count} graphs, {size / 1e6:.1f} MB, from {cache} to {remote.url}")
    return 0


def _pull(args: argparse.Namespace, remote: Remote) -> int:
    cache = local_cache(args.cache)
    count, size = pull_for(remote, cache, compiler_version(args.compiler), _key(args), print)
    print(f"pulled {count} graphs, {size / 1e6:.1f} MB, from {remote.url} to {cache}")
    return 0


def pull_for(
    remote: Remote, cache: Path, compiler: str, key: str, say: Callable[[str], None]
) -> tuple[int, int]:
    """Download the graphs of a recipe, or all of the compiler's where the store does not know the recipe."""
    from hlat.storage.compile_cache import pull, wanted

    names, known = wanted(remote, compiler, key)
    if key and not known:
        say(f"{remote.url} does not know this recipe: taking all {len(names)} graphs of this compiler")
    return pull(remote, cache, names, say)


def share(recipe: Recipe, push: bool) -> None:
    """`compile_cache` of a recipe: fetch its graphs before they are needed, or push what was compiled. A
    store that fails costs a line and compilations, not the run.
    """
    from hlat.storage import compile_cache as shared
    from hlat.storage.remote import Remote

    assert recipe.compile_cache is not None
    compiler, cache = compiler_version(), local_cache()
    try:
        remote, key = Remote(recipe.compile_cache, "compile_cache"), recipe_key(recipe, compiler)
        if push:
            count, size = told(lambda: shared.push(remote, cache, compiler, key, _say))
        else:
            count, size = told(lambda: pull_for(remote, cache, compiler, key, _say))
        if count:
            _say(f"{'pushed' if push else 'pulled'} {count} graphs, {size / 1e6:.1f} MB; store {remote.url}")
    except StorageFailed as error:
        _say(f"warning: {error.line()}")


def _say(line: str) -> None:
    print(f"hlat: compile cache: {line}", file=sys.stderr)


def _verify(args: argparse.Namespace, remote: Remote) -> int:
    from hlat.storage.compile_cache import compare, wanted

    cache = local_cache(args.cache)  # a node that has none yet lacks all graphs
    compiler, key = compiler_version(args.compiler), _key(args)
    names, known = wanted(remote, compiler, key)
    found = compare(remote, cache, names, compiler)
    for what, listed in (("missing here", found.missing), ("other bytes", found.other)):
        for name in listed:
            print(f"{what}: {name}")
    if known:
        found = type(found)(found.missing, found.other, [])  # graphs of other recipes do no harm
    for name in found.extra:
        print(f"only here: {name}")
    if not names:
        raise UserError("there are no graphs of this compiler", where=remote.url, fix="push them first")
    print(f"{cache}: {'differs from' if found else 'has all'} {len(names)} graphs of {remote.url}")
    return 1 if found else 0


def _list(args: argparse.Namespace, remote: Remote) -> int:
    from hlat.storage.compile_cache import SETS, stored_modules

    by_compiler: dict[str, int] = {}
    chosen = compiler_version(args.compiler) if args.compiler else ""
    for name in stored_modules(remote, chosen):
        compiler = name.partition("/")[0]
        by_compiler[compiler] = by_compiler.get(compiler, 0) + 1
    files = remote.files()
    for compiler, count in by_compiler.items():
        size = sum(item for path, item in files.items() if path.startswith(f"{compiler}/"))
        print(f"{compiler}  {count} graphs, {size / 1e6:.1f} MB")
    print(f"{len([path for path in files if path.startswith(f'{SETS}/')])} recipes are known")
    return 0
