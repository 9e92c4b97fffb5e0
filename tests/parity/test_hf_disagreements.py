"""Hugging Face folders whose files disagree: what `from_pretrained` loads, or one line."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hlat.checkpoint.hf import HFFolder, from_hf, to_hf
from hlat.checkpoint.store import open_checkpoint
from hlat.checkpoint.weights import load_model, open_weights
from hlat.errors import UserError

transformers = pytest.importorskip("transformers")

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
INDEX = "model.safetensors.index.json"


def tensors(seed: int, tied: bool = False) -> dict[str, torch.Tensor]:
    """All of a tiny Llama's, by name."""
    torch.manual_seed(seed)
    made = transformers.LlamaForCausalLM(config())
    found = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    if tied:
        del found[HEAD]
    return found


def config(**changes) -> "transformers.LlamaConfig":
    return transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.3,
        **changes,
    )


A, B = tensors(1), tensors(2)


def folder(path: Path, tied: bool = False) -> Path:
    path.mkdir()
    raw = {**config().to_dict(), "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    (path / "config.json").write_text(json.dumps(raw))
    return path


def edit(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shards(path: Path, weights: dict[str, torch.Tensor], count: int = 3) -> dict[str, str]:
    """Writes an index and its files; returns the index's map."""
    places = {}
    for number in range(count):
        part = dict(itertools.islice(weights.items(), number, None, count))
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(part, path / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    write_index(path, places)
    return places


def write_index(path: Path, places: object) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def single(path: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def theirs(path: Path) -> dict[str, torch.Tensor] | None:
    """What transformers loads, by name, a tied head among it; None where it fails or makes something up."""
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, dtype=torch.float32
        )
    except Exception:
        return None
    return None if report["missing_keys"] else dict(model.state_dict())


def ours(path: Path) -> dict[str, torch.Tensor] | UserError:
    from hlat.checkpoint.hf_config import hf_name

    try:
        model = load_model(open_weights(path))
    except UserError as error:
        assert "\n" not in error.line() and len(error.line()) < 600
        return error
    found = {hf_name(name): value for name, value in model.named_parameters()}
    return {HEAD: found[EMBED], **found}


def agree(path: Path) -> bool:
    """Whether both load, and then the same; one line of ours is allowed, other weights never."""
    mine, other = ours(path), theirs(path)
    if isinstance(mine, UserError):
        return False
    assert other is not None, "loaded what transformers does not"
    for name, value in other.items():
        assert torch.equal(mine[name], value.float()), name
    return True


def test_a_left_over_index_does_not_count(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf")
    shards(path, A)
    single(path, B)  # saved again, and the shards are still there
    assert agree(path) and torch.equal(HFFolder(path).read("model/embed.weight"), B[EMBED])
    for shard in path.glob("model-*"):
        shard.unlink()
    assert agree(path)
    (path / INDEX).write_text("{")  # nobody reads it
    assert agree(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="JSON"):
        HFFolder(path)


def test_every_reader_takes_the_single_file(tmp_path: Path) -> None:
    """Import, export and `init.from` go through the one reader."""
    from hlat.train.initial import open_source

    path = folder(tmp_path / "hf")
    shards(path, A)
    single(path, B)
    from_hf(path, tmp_path / "ours")
    to_hf(path, tmp_path / "back", dtype="keep")
    found = [
        open_checkpoint(tmp_path / "ours").read("model/embed.weight"),
        load_file(tmp_path / "back/model.safetensors")[EMBED],
        open_source(str(path))[0].read("model/embed.weight"),
    ]
    assert all(torch.equal(tensor, B[EMBED]) for tensor in found)


def test_left_over_shards_of_another_save(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf")
    shards(path, A, 2)
    shards(path, B, 3)
    assert agree(path) and torch.equal(HFFolder(path).read("model/norm.weight"), B[NORM])


def test_an_index_and_its_shards_of_two_saves(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf")
    places = shards(path, B)
    with safe_open(path / places[NORM], "pt") as file:
        rest = {name: A[name] for name in file.keys() if name != NORM}  # noqa: SIM118
    save_file(rest, path / places[NORM])
    with pytest.raises(UserError, match=r"norm\.weight is in model-0000\d.*it is not"):
        HFFolder(path)
    # In two files: transformers takes the last one, and the index must not say otherwise.
    other = next(name for name in sorted(set(places.values())) if name != places[NORM])
    save_file({**load_file(path / places[NORM]), NORM: B[NORM]}, path / places[NORM])
    save_file({**load_file(path / other), NORM: A[NORM]}, path / other)
    for place, fine in ((max(other, places[NORM]), True), (min(other, places[NORM]), False)):
        write_index(path, {**places, NORM: place})
        assert agree(path) == fine


def test_an_index_that_names_too_much_or_too_little(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf")
    places = shards(path, B)
    write_index(path, {**places, "model.layers.0.self_attn.rotary_emb.inv_freq": places[NORM]})
    assert agree(path)
    write_index(path, {name: file for name, file in places.items() if name != NORM})
    assert agree(path)  # it lies in a file that the index names
    write_index(path, {**places, NORM: places[EMBED]})
    assert agree(path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["none", "same", "other", "alone", "shape"])
def test_tie_flag_and_head(tmp_path: Path, tied: bool, head: str) -> None:
    path = folder(tmp_path / "hf", tied)
    changed = {
        "none": {HEAD: None},
        "same": {HEAD: A[EMBED].clone()},
        "other": {},
        "alone": {EMBED: None},
        "shape": {HEAD: torch.zeros(14, 8)},
    }
    weights = {**A, **changed[head]}
    single(path, {name: value for name, value in weights.items() if value is not None})
    assert agree(path) == ((head in ("same", "other")) or (tied and head in ("none", "alone")))
    if tied and head == "other":
        source = HFFolder(path)
        assert not source.meta["model"]["tie_embeddings"] and "another matrix" in source.notes[0]
        assert from_hf(path, tmp_path / "ours")[0] == source.notes[0]
        to_hf(tmp_path / "ours", tmp_path / "back", dtype="keep")
        assert agree(tmp_path / "back")
        assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [False, True])
def test_names_of_a_model_without_its_head(tmp_path: Path, tied: bool) -> None:
    path = folder(tmp_path / "hf", tied)
    single(path, {name.removeprefix("model."): value for name, value in A.items() if name != HEAD})
    edit(path, architectures=["LlamaModel"])
    assert agree(path) == tied
    single(path, {name.removeprefix("model."): value for name, value in A.items()})
    assert agree(path)
    single(path, {**A, "norm.weight": B[NORM]})
    with pytest.raises(UserError, match="both"):
        HFFolder(path)


def test_adapters_variants_and_pickles(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf")
    save_file(A, path / "model.fp16.safetensors")
    with pytest.raises(UserError, match=r"variant: model\.fp16"):
        HFFolder(path)
    torch.save(A, path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only \.bin"):
        HFFolder(path)
    single(path, B)
    assert agree(path)
    (path / "adapter_config.json").write_text("{}")
    (path / "config.json").unlink()
    for read in (open_weights, lambda p: from_hf(p, tmp_path / "ours")):
        with pytest.raises(UserError, match="adapter"):
            read(path)


@pytest.mark.parametrize("named", ["other.safetensors", "other.safetensors.index.json"])
def test_a_file_that_the_configuration_names(tmp_path: Path, named: str) -> None:
    path = folder(tmp_path / "hf")
    single(path, A)
    if named.endswith(".json"):
        shards(path, B)
        (path / INDEX).rename(path / named)
    else:
        save_file(B, path / named, {"format": "pt"})
    edit(path, transformers_weights=named)
    assert agree(path) and torch.equal(HFFolder(path).read("model/norm.weight"), B[NORM])


NAMES = [
    "../x.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "",
    ".",
    "..",
    "x.bin",
    "\0",
    "y" * 300,
    "a\\b",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_nothing_outside_of_the_folder_is_read(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "hf")
    save_file(A, tmp_path / "x.safetensors")
    (path / "a").mkdir()
    save_file(A, path / "a/b.safetensors")
    write_index(path, dict.fromkeys(A, name))
    edit(path, transformers_weights=None)
    with pytest.raises(UserError):
        HFFolder(path)
    single(path, A)
    edit(path, transformers_weights=name)
    with pytest.raises(UserError):
        HFFolder(path)


def test_a_cache_of_links_is_read(tmp_path: Path) -> None:
    """The hub's cache holds links to files that lie elsewhere."""
    path = folder(tmp_path / "hf")
    shards(path, A)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(path.iterdir())):
        shutil.move(file, tmp_path / f"blobs/{number}")
        os.symlink(f"../blobs/{number}", file)
    assert agree(path)


@pytest.mark.parametrize(
    "places", [None, 3, "x", [], {}, {EMBED: 3}, {EMBED: None}, {EMBED: ["a"]}, {EMBED: {"a": "b"}}]
)
def test_an_index_of_wrong_types(tmp_path: Path, places: object) -> None:
    path = folder(tmp_path / "hf")
    write_index(path, places)
    with pytest.raises(UserError, match="weight_map"):
        HFFolder(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "single": lambda path: single(path, B),
    "single, tied": lambda path: single(path, tensors(2, tied=True)),
    "single without norm": lambda path: single(path, {n: t for n, t in B.items() if n != NORM}),
    "single in bf16": lambda path: single(path, {n: t.bfloat16() for n, t in B.items()}),
    "single in part in bf16": lambda path: single(path, {**B, NORM: B[NORM].bfloat16()}),
    "three shards": lambda path: shards(path, A) and None,  # type: ignore[func-returns-value]
    "two shards": lambda path: shards(path, B, 2) and None,  # type: ignore[func-returns-value]
    "no index": lambda path: (path / INDEX).unlink(missing_ok=True),
    "no single": lambda path: (path / "model.safetensors").unlink(missing_ok=True),
    "no second shard": lambda path: [f.unlink() for f in path.glob("model-00002-*")] and None,  # type: ignore[func-returns-value]
    "first shard for second": lambda path: (
        [shutil.copy(f, path / f.name.replace("00001-", "00002-")) for f in path.glob("model-00001-*")]
        and None
    ),  # type: ignore[func-returns-value]
    "tie": lambda path: edit(path, tie_word_embeddings=True),
    "untie": lambda path: edit(path, tie_word_embeddings=False),
    "base": lambda path: edit(path, architectures=["LlamaModel"]),
    "pickle": lambda path: torch.save(A, path / "pytorch_model.bin"),
    "an empty file": lambda path: (path / "model.safetensors").write_bytes(b"") and None,  # type: ignore[func-returns-value]
}


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=5))
def test_any_order_of_changes(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    path = folder(tmp_path_factory.mktemp("any") / "hf")
    for step in steps:
        CHANGES[step](path)
    agree(path)
