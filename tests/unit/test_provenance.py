"""What weights began from goes along `init.from`, checkpoints and exports, and is used and said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from hlat.checkpoint.hf import from_hf, to_hf
from hlat.checkpoint.hf_generation import generation_defaults, generation_stops
from hlat.checkpoint.hf_tokenizer import PromptEncoder
from hlat.checkpoint.provenance import CONFIG, META, Provenance, offline_share, provenance_of, recorded
from hlat.checkpoint.weights import open_weights, source_tokenizer
from hlat.cli import main
from hlat.commands.recipe_file import load
from hlat.data import open_data
from hlat.data.build import build, build_key
from hlat.data.convention import Convention, difference, extends
from hlat.data.holdout import HoldoutStream
from hlat.data.packed import TokenFolder
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError
from hlat.evaluate import running
from hlat.evaluate.text import codec_for
from hlat.train.initial import starting_tokenizer

BASE = """
run: {name: base, steps: 1, dir: base}
model: {layers: 1, hidden: 16, heads: 2, ffn: 32, vocab: 320, max_seq_len: 32}
data:
  sources: [{path: text}]
  tokenizer: train:bpe-300
  seq_len: 32
  micro_batch: 4
  global_batch: 4
  holdout: 0.1
optim: {lr: 0}
schedule: {name: constant}
precision: {compute: fp32}
compile: false
"""
PAIRS = """
run: {name: tuned, steps: 4, dir: tuned, stop_at_step: 2}
init: {from: hf}
data:
  examples: {path: pairs.jsonl, prompt: "{prompt}", completion: "{completion}"}
  seq_len: 32
  micro_batch: 4
  global_batch: 4
  holdout: 0.2
optim: {lr: 0}
schedule: {name: constant}
checkpoint: {every: 1, keep: 1}
precision: {compute: fp32}
compile: false
"""


def add_bos(folder: Path) -> int:
    """Let a folder's tokenizer put <s> before every text, as Llama's does."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    index = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", index)]
    )
    backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<s>", "chat_template": "T"}))
    return index


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Weights that go from run to run unchanged: `base`, exported to `hf`, which gets a BOS; `tuned` on
    pairs, stopped and resumed; `third` on the first text again, with a larger share held out; `hf3` exported.
    """
    folder = tmp_path_factory.mktemp("chain")
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i}.txt").write_text(f"alpha beta gamma {i} delta eps zeta " * 12)
    rows = [
        {"prompt": f"alpha {i}" * (i > 0) + " word" * (40 * (i == 1)), "completion": " beta"}
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "base.yaml").write_text(BASE)
    (folder / "tuned.yaml").write_text(PAIRS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert main(["train", "base.yaml"]) == 0
        to_hf("base", "hf", dtype="fp32")
        bos = add_bos(Path("hf"))
        draws = Path("hf/generation_config.json")
        draws.write_text(json.dumps({**json.loads(draws.read_text()), "top_k": 7, "top_p": 0.5}))
        assert main(["train", "tuned.yaml"]) == 0
        third = ["run.name=third", "run.dir=third", "run.steps=1", "init.from=tuned", "data.holdout=0.3"]
        assert main(["train", "tuned.yaml", "run.stop_at_step=null"]) == 0  # the first checkpoint is deleted
        assert main(["train", "base.yaml", *third, "data.tokenizer=init"]) == 0
        to_hf("third", "hf3", dtype="fp32")
        yield folder, bos


@pytest.mark.parametrize("name", ["tuned", "third", "hf3"])
@pytest.mark.parametrize("text", ["", "alpha 3", "<s>alpha", " <|endoftext|> beta"])
def test_the_same_weights_see_the_same_ids(chain, name: str, text: str) -> None:
    _, bos = chain
    first, later = open_weights("hf"), open_weights(name)
    assert all(torch.equal(first.read(key), later.read(key)) for key in first.names())
    ours, theirs = codec_for(later, 320), codec_for(first, 320)
    assert ours.encode(text) == theirs.encode(text) and ours.encode(text).count(bos) == 1
    assert ours.encode(text, special=False) == theirs.encode(text, special=False)
    assert (ours.prefix_id, ours.eos_id, ours.stop_ids) == (bos, theirs.eos_id, theirs.stop_ids)


def test_a_model_without_bos_and_its_export_see_none(chain) -> None:
    to_hf("base", "plain", dtype="fp32")
    for name in ("base", "plain"):
        codec = codec_for(open_weights(name), 320)
        assert codec.prefix_id == codec.eos_id and codec.encode("alpha") == codec.tokenizer.encode("alpha")


def test_rows_of_examples_begin_with_bos_and_learn_the_completion_alone(chain) -> None:
    folder, bos = chain
    recipe = load("tuned.yaml", [])
    data = open_data(recipe, tokenizer=starting_tokenizer(recipe, folder / "nothing"))
    plain, cut = data.tokenizer.encode, 0
    batch = data.batch(range(data.train.documents))
    for ids, targets, (prompt, completion) in zip(
        batch.ids.tolist(), batch.targets.tolist(), data.train.texts, strict=True
    ):
        answer = [*plain(completion), data.tokenizer.eos_id]
        whole = [bos, *plain(prompt)]
        if len(whole) + len(answer) > 33:
            cut, whole = cut + 1, [bos, *whole[len(whole) + len(answer) - 32 :]]
        assert ids[: len(whole)] == whole and ids.count(bos) == 1
        assert targets[len(whole) - 1 :][: len(answer)] == answer and sum(t >= 0 for t in targets) == len(
            answer
        )
    assert cut == 1 and any(prompt == "" for prompt, _ in data.train.texts + data.holdout.texts)
    assert bos not in [t for row in batch.targets.tolist() for t in row]


def test_rows_of_documents_begin_with_bos_which_is_no_target(chain) -> None:
    folder, bos = chain
    options = ["init.from=tuned", "data.tokenizer=init", "data.holdout=0.3"]
    recipe = load("base.yaml", options)
    data = open_data(recipe, tokenizer=starting_tokenizer(recipe, folder / "nothing"))
    other = open_data(load("base.yaml", ["data.tokenizer=hf", "data.holdout=0.3"]))
    assert data.bos_id == bos and other.bos_id is None and data.fingerprint != other.fingerprint
    count = data.folders[0].count
    assert count("train") == other.folders[0].count("train") + count("train", "documents")
    batch = data.batches(0, 4, 1)[0]
    after_end = batch.ids[:, :-1] == data.tokenizer.eos_id
    assert after_end.any() and (batch.ids[:, 1:][after_end] == bos).all()
    assert (batch.targets != bos).all() and (batch.targets[:, :-1][after_end] == -100).all()
    assert data.holdout_bytes() == other.holdout_bytes() and data.holdout_text() == other.holdout_text()


def test_the_record_of_a_chain(chain, capsys) -> None:
    folder, bos = chain
    record = provenance_of(open_weights("third"))
    assert record.convention == Convention(bos, bos, special=True)
    assert record.held_out == {"documents": 0.1, "examples": 0.2} and record.offline_share == 0.1
    assert record.ancestors == ("base step-00000001", "tuned step-00000004")
    assert record.dtype == "float32"
    template = provenance_of(open_weights("hf")).chat_template
    assert template and record.chat_template == template
    from_hf("hf3", "imported")
    for name in ("hf3", "imported"):
        source, chain_of_three = open_weights(name), (*record.ancestors, "third step-00000001")
        expected = replace(record, ancestors=chain_of_three, files=source.meta["huggingface"])
        assert provenance_of(source) == expected
        assert offline_share(source) == 0.1
    assert PromptEncoder(Path("hf3")).added == bos and PromptEncoder(Path("hf3")).encode("alpha")[0] == bos
    assert generation_stops(open_weights("third").meta) == generation_stops(open_weights("hf").meta) != set()


def test_the_export_is_read_by_transformers_which_keeps_the_record(chain, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained("hf3")
    config.save_pretrained(tmp_path)
    saved, written = (json.loads((Path(f) / "config.json").read_text()) for f in (tmp_path, "hf3"))
    assert saved[CONFIG] == written[CONFIG] and written[CONFIG]["held_out"]["documents"] == 0.1


@pytest.mark.slow
def test_what_departs_from_the_weights_is_said(chain, capsys) -> None:
    capsys.readouterr()
    options = ["init.from=tuned", "run.steps=1", "model.vocab=320"]
    assert (
        main(["train", "base.yaml", *options, "run.dir=w1", "data.tokenizer=bytes", "data.holdout=0.3"]) == 0
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: data.tokenizer 'bytes' is not the tokenizer of" in out and "data.tokenizer: init" in out
    assert "data.holdout is 0.3, and 0.1 of the documents were held out" in out and "data.holdout=0.1" in out
    assert provenance_of(open_weights("w1")).convention == Convention()
    # The recipe names the tokenizer of the weights once more: there is nothing to say.
    assert main(["train", "base.yaml", "init.from=base", "run.dir=w2", "run.steps=1"]) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.slow
def test_tokens_of_another_tokenizer_and_tokens_without_bos(chain, capsys) -> None:
    tokenize = ["data", "tokenize", "text", "--holdout", "0.1"]
    assert main([*tokenize, "--tokenizer", "bytes", "--out", "t-bytes"]) == 0
    assert main([*tokenize, "--tokenizer", "hf", "--out", "t-plain"]) == 0
    assert main([*tokenize, "--tokenizer", "hf", "--bos", "--out", "t-bos"]) == 0
    capsys.readouterr()
    command = ["train", "base.yaml", "init.from=hf", "run.steps=1", "data.tokenizer=init"]
    assert main([*command, "run.dir=x1", "data.sources=[{path: t-bytes}]"]) == 2
    error = capsys.readouterr().err
    assert "another tokenizer" in error and "--tokenizer" in error and "set data.tokenizer" not in error
    assert main([*command, "run.dir=x2", "data.sources=[{path: t-plain}]"]) == 0
    assert "do not begin with BOS" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "run.dir=x3", "data.sources=[{path: t-bos}]"]) == 0
    assert "BOS" not in capsys.readouterr().out.replace("texts begin with BOS", "")
    both = "data.sources=[{path: t-plain}, {path: t-bos}]"
    assert main([*command, "run.dir=x4", both]) == 2
    assert "data.sources[0].path: t-plain" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_began_with_bos_here(chain) -> None:
    """Documents tokenized with BOS teach a new model BOS, and its export adds it."""
    _, bos = chain
    assert (
        main(["data", "tokenize", "text", "--holdout", "0.1", "--tokenizer", "hf", "--bos", "--out", "own"])
        == 0
    )
    new = ["run.dir=new", "data.sources=[{path: own}]", "data.tokenizer=own"]
    assert main(["train", "base.yaml", *new]) == 0
    to_hf("new", "new-hf", dtype="fp32")
    assert PromptEncoder(Path("new-hf")).added == bos
    ours, theirs = (codec_for(open_weights(name), 320) for name in ("new", "new-hf"))
    assert ours.encode("alpha 3") == theirs.encode("alpha 3") == [bos, *ours.tokenizer.encode("alpha 3")]
    assert ours.prefix_id == theirs.prefix_id == bos


def test_generate_begins_an_empty_prompt_as_the_weights_know_it(chain, monkeypatch) -> None:
    import hlat.evaluate.generate as generation

    _, bos = chain
    seen: list[list[int]] = []
    monkeypatch.setattr(
        generation, "generate", lambda model, prompt, **options: seen.append(prompt) or iter(())
    )
    for name in ("base", "hf", "tuned"):
        assert main(["generate", name, "--prompt", "", "--device", "cpu"]) == 0
    eos = load_tokenizer("hf").eos_id
    assert seen == [[eos], [bos], [bos]]


def test_tasks_inside_a_run_ask_about_what_the_chain_held_out(chain, monkeypatch, capsys) -> None:
    import hlat.train.tasks as tasks

    asked = []

    def load_tasks(selection) -> None:
        asked.append(selection)
        raise UserError("enough")

    class Team(tasks.Team):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            asked.append(self.generation)

    monkeypatch.setattr(tasks, "Team", Team)
    monkeypatch.setattr(tasks, "load_tasks", load_tasks)
    options = ["init.from=third", "run.dir=asking", "eval.tasks=[hlat-offline]", "run.stop_at_step=null"]
    assert main(["train", "tuned.yaml", *options]) == 2
    draws = asked.pop(0)
    assert [selection.holdout for selection in asked] == [0.1]
    # What the model's files say of drawing holds inside a run, for its checkpoints and for its export alike.
    assert {key: draws[key] for key in ("top_k", "top_p")} == {"top_k": 7, "top_p": 0.5}
    for name in ("hf", "tuned", "third", "hf3"):
        assert generation_defaults(open_weights(name).meta) == draws, name
    own = replace(asked[0], tasks=("hlat-offline", "my-task.yaml"), holdout=0.0)
    assert running._metadata(own) == {"holdout": 0.0}  # also beside other tasks, and also nothing at all


def test_a_tokenizer_beside_that_of_the_weights_is_said(chain) -> None:
    lines: list[str] = []
    source = open_weights("tuned")
    assert codec_for(source, 320, "bytes", lines.append).prefix_id == 256
    assert len(lines) == 1 and "is not the tokenizer of these weights" in lines[0]
    codec = codec_for(source, 320, "hf", lines.append)
    assert len(lines) == 1 and codec.encode("alpha") == codec_for(source, 320).encode("alpha")


def test_a_checkpoint_without_a_record_is_what_it_was(chain) -> None:
    source = open_weights("tuned")
    del source.meta[META]
    assert provenance_of(source) == Provenance()  # the weights behind it may know less than its recipe says
    seeded = SimpleNamespace(
        meta={"recipe": {"data": {"holdout": 0.2, "sources": [{"path": "text"}]}}}, path=""
    )
    assert provenance_of(seeded) == Provenance(held_out={"documents": 0.2})  # type: ignore[arg-type]
    seeded.meta["recipe"]["data"] = {"holdout": 0.0, "sources": [{"dataset": "python-stdlib"}]}
    assert offline_share(seeded) == 0.0  # type: ignore[arg-type]
    codec = codec_for(source, 320)
    assert codec.encode("alpha") == codec.tokenizer.encode("alpha") and codec.prefix_id == codec.eos_id


@pytest.mark.parametrize(
    ("held_out", "share"),
    [
        ({}, None),
        ({"examples": 0.2}, None),
        ({"documents": 0.0}, None),
        ({"documents": 0.02, "examples": 0.0}, 0.02),
        ({"documents": 0.0, "python-stdlib": 0.0}, 0.0),
        ({"documents": 0.0, "python-stdlib": 0.05}, 0.05),
        ({"documents": 0.02, "python-stdlib": 0.05}, 0.02),
    ],
)
def test_what_the_offline_tasks_may_ask_about(held_out: dict[str, float], share: float | None) -> None:
    assert Provenance(held_out=held_out).offline_share == share


def test_the_smallest_share_of_a_chain_counts() -> None:
    record = Provenance()
    for shares in ({"documents": 0.3}, {"examples": 0.2}, {"documents": 0.1}, {"documents": 0.4}):
        record = record.holding_out(shares)
    assert record.held_out == {"documents": 0.1, "examples": 0.2}
    assert Provenance.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert recorded({}) is None and recorded({META: "text"}) is None


@pytest.mark.parametrize("damage", [{"held_out": {"documents": 2}}, {"bos": {"bos": "x"}}, {"tokenizer": 1}])
def test_a_damaged_record_is_one_line(damage: dict) -> None:
    with pytest.raises(UserError, match="is damaged"):
        recorded({META: damage}, "here")


def test_tokenizers_are_compared_by_what_ids_mean(chain, tmp_path: Path) -> None:
    plain, own = source_tokenizer(open_weights("base")), load_tokenizer("hf")
    exported = tmp_path / "bytes"
    exported.mkdir()
    from hlat.checkpoint.hf_tokenizer import export_tokenizer

    export_tokenizer(load_tokenizer("bytes"), exported, 32)
    assert load_tokenizer(exported).identity != load_tokenizer("bytes").identity
    assert difference(load_tokenizer(exported), load_tokenizer("bytes")) == ""
    assert (
        plain is not None
        and "ids" in difference(own, plain)
        and extends(own, plain)
        and not extends(plain, own)
    )
    assert "stand for another text" in difference(load_tokenizer("bytes"), plain)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, None])
def test_held_out_bytes_with_bos_are_those_of_the_targets(chain, tmp_path: Path, mask: bool, rows) -> None:
    """Counted token by token, as without BOS: each target's own bytes, EOS none."""
    _, bos = chain
    tokenizer = load_tokenizer("hf")
    source = resolve_source(path="text")
    before = build_key([source], tokenizer, 0.5)
    tokenizer.convention = Convention(bos=bos)
    assert build_key([source], tokenizer, 0.5) != before
    folder = TokenFolder(build([source], tokenizer, tmp_path / "out", holdout=0.5, workers=1).folder)
    stream = HoldoutStream([folder], tokenizer, 16, mask, bos)
    batches = list(stream.batches(3, rows))
    targets = np.concatenate([batch.targets.flatten().numpy() for batch in batches])
    targets = targets[targets != -100]
    assert bos not in targets and stream.targets_in(rows) == len(targets)
    assert stream.text_bytes(rows) == len(tokenizer.decode_bytes(targets)) == len(stream.text(rows))
