"""Which tensors a Hugging Face folder holds, and in which of its files: those that `from_pretrained` loads.

`transformers` takes model.safetensors where it is there, and only then an index beside it. Of an index it
takes the names of the files alone: every tensor in them counts, wherever the index says that it lies, and of
two of one name that of the last file. Where such an index and its files tell different stories, and not only
in a way that changes nothing, that is an error here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hlat.checkpoint.hf_schema import IndexFields, checked, read_json, shown
from hlat.errors import UserError

INDEX, SINGLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_config.json"
_SUFFIX, _AGAIN = ".safetensors", "copy the whole folder again, or save the model again with save_pretrained"


@dataclass
class Tensors:
    """files: tensor -> name of its file. absent: tensors that an index names and no file holds -> the file it
    names. source: the file that says which files count.
    """

    folder: Path
    source: str
    files: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def find_tensors(folder: Path, named: str | None = None) -> Tensors:
    """The tensors of a folder.

    Args:
        named: the file that config.json names as `transformers_weights`; None: it names none.

    Raises UserError: no weights, an adapter's, a file that is missing, damaged or not in the folder, an index
    that its files contradict.
    """
    refuse_adapter(folder)
    if named is not None:
        _check_name(folder, "config.json: transformers_weights", named, (_SUFFIX, _SUFFIX + ".index.json"))
        source = named
    else:
        source = next((name for name in (SINGLE, INDEX) if (folder / name).is_file()), "")
    if not source:
        raise _no_weights(folder)
    if source.endswith(_SUFFIX):
        with open_safetensors(folder / source) as file:
            return Tensors(folder, source, dict.fromkeys(file.keys(), source))
    return _of_index(folder, source)


def _of_index(folder: Path, source: str) -> Tensors:
    where = str(folder / source)
    index = checked(IndexFields, read_json(folder / source), where).weight_map
    if not index:
        raise UserError("weight_map names no tensor", where=where, fix=_AGAIN)
    found = Tensors(folder, source)
    for name in sorted(set(index.values())):
        _check_name(folder, f"{source}: weight_map", name, (_SUFFIX,))
        with open_safetensors(folder / name) as file:
            for tensor in file.keys():  # noqa: SIM118 (a file of safetensors is no dictionary)
                if tensor in found.files and index.get(tensor) != name:
                    what = f"{tensor} is in {found.files[tensor]} and in {name}: one of them is left over"
                    raise UserError(what, where=where, fix=_AGAIN)
                found.files[tensor] = name
    found.absent = {tensor: name for tensor, name in index.items() if tensor not in found.files}
    return found


def _check_name(folder: Path, where: str, name: str, suffixes: tuple[str, ...]) -> None:
    """Raise UserError unless a name is that of a safetensors file right in the folder."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        what = f"{shown(name)} is not the name of a file in the folder"
        raise UserError(what, where=f"{folder}: {where}", fix="nothing outside of the folder is read")
    if not name.endswith(suffixes):
        what = f"{shown(name)} is no safetensors file"
        raise UserError(what, where=f"{folder}: {where}", fix="save the model again with save_pretrained")
    try:
        there = (folder / name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        shorter = name if len(name) <= 80 else f"{name[:80]}…"
        raise UserError(f"{shorter} is missing", where=str(folder), fix="copy the whole folder again")


def refuse_adapter(folder: Path) -> None:
    """Raise UserError for a folder of PEFT's: it holds changes to a model that lies elsewhere."""
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{ADAPTER} is there: the folder is an adapter (PEFT), not a whole model",
            where=str(folder),
            fix="merge it first: PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(…)",
        )


def _no_weights(folder: Path) -> UserError:
    what = "no safetensors weights"
    others = sorted(path.name for path in folder.glob("model.*.safetensors*") if path.name != INDEX)
    if list(folder.glob("*.bin")):
        what += " (only .bin files)"
    elif others:
        what += f" (only a variant: {others[0]})"
    fix = "save the model with save_pretrained, which writes model.safetensors"
    return UserError(what, where=str(folder), fix=fix)


def open_safetensors(path: Path) -> Any:
    """An open safetensors file, a context manager. Raises UserError for what is none."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"not a readable safetensors file ({error})", where=str(path)) from None
