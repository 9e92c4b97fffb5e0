"""What is fuzzed: for each reader good files, how they are damaged, and what reading them right gives.

A target makes its good files once, draws damage to them as a folder's content, and reads such a folder as the
product does. `read` raises UserError for what it refuses, AssertionError for a wrong answer; anything else that
it raises is a fault of the reader.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from mutations import INTERESTING, ODD, Files, changed_bytes, changed_folder, changed_value, pick

from hlat.errors import UserError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXTS = [
    "def read_json(path):\n    return json.load(open(path))\n",
    "  two spaces, Ünïcode 名前, \N{GRINNING FACE}\n\n",
    "</s><|endoftext|><s>",
    "",
    "\n",
    "a" * 300,
]


def content_of(folder: Path) -> Files:
    """A folder's files as bytes, by their names in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Target:
    """One reader."""

    def draw(self, draw: Callable[..., Any]) -> Files:
        """Damaged files."""
        raise NotImplementedError

    def read(self, folder: Path) -> None:
        """Read the folder. Raises UserError, or AssertionError for a wrong answer."""
        raise NotImplementedError

    @staticmethod
    def scratch() -> Path:
        """A folder for good files."""
        return Path(tempfile.mkdtemp(prefix="hlat-fuzz-seed-"))


class RecipeTarget(Target):
    """A recipe and overrides. What loads, loads again from its resolved form to the same."""

    KEYS = (
        "optim.lr", "model.hidden", "model.layers", "data.seq_len", "run.steps", "run.name", "data.holdout",
        "parallel.tp", "checkpoint.every", "eval", "data.sources", "guard", "optim", "x", "model.preset",
        "base", "precision.compute", "log.every", "parallel.timeout", "checkpoint.remote", "data.tokenizer",
    )  # fmt: skip

    def __init__(self) -> None:
        from hlat.recipe import load
        from hlat.recipe_io import shipped_recipes

        self.seeds = [load(file).to_dict() for file in shipped_recipes().values()]
        self.texts = [file.read_bytes() for file in shipped_recipes().values()]

    def draw(self, draw: Callable[..., Any]) -> Files:
        from hlat.recipe_yaml import dump_yaml

        if draw(st.booleans()):
            value = pick(draw, self.seeds)
            for _ in range(draw(st.integers(1, 3))):
                value = changed_value(draw, value)
            try:
                content = dump_yaml(value).encode("utf-8", "surrogatepass")
            except RecursionError:
                content = b"[" * 2000
        else:
            content = pick(draw, self.texts)
            for _ in range(draw(st.integers(1, 3))):
                content = changed_bytes(draw, content)
        overrides = []
        for _ in range(draw(st.integers(0, 2))):
            value = draw(st.sampled_from(ODD))
            text = value if isinstance(value, str) else json.dumps(value)
            overrides.append(f"{draw(st.sampled_from(self.KEYS))}={text}")
        return {"recipe.yaml": content, "overrides.json": json.dumps(overrides).encode()}

    def read(self, folder: Path) -> None:
        from hlat.commands.recipes import summary
        from hlat.recipe import load
        from hlat.recipe_yaml import dump_yaml

        overrides = json.loads((folder / "overrides.json").read_bytes())
        recipe = load(folder / "recipe.yaml", overrides)
        assert all(isinstance(line, str) for line in summary(recipe))
        assert 0 < recipe.model.parameter_count() < 2**63 and recipe.tokens_per_step > 0
        again = folder / "resolved.yaml"
        again.write_text(dump_yaml(recipe.to_dict()), encoding="utf-8")
        assert load(again).to_dict() == recipe.to_dict(), "a resolved recipe gives another recipe"


class CheckpointTarget(Target):
    """Two checkpoints of a run: what is read is bitwise what was saved at the step that is given."""

    def __init__(self) -> None:
        from hlat.checkpoint.store import CheckpointStore

        folder = self.scratch()
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
        store = CheckpointStore(folder / "checkpoints", keep=3)
        for step in (10, 20):
            meta = {"note": "x"}
            store.save(step, self.tensors(step), meta, tokens=step, tokenizer=folder / "tokenizer.json")
        self.files = content_of(folder / "checkpoints")

    @staticmethod
    def tensors(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {
            "model/a": torch.randn(50, 7, generator=generator),
            "model/b": torch.randn(3, generator=generator).bfloat16(),
            "optim/b": torch.arange(40) + step,
            "step": torch.tensor(step),
        }

    def draw(self, draw: Callable[..., Any]) -> Files:
        newest = [name for name in self.files if "20/" in name]
        names = (
            newest if draw(st.integers(0, 4)) else None
        )  # mostly, so that the older one is there to fall back on
        return changed_folder(draw, self.files, names)

    def read(self, folder: Path) -> None:
        from hlat.checkpoint.store import open_checkpoint

        for path in (folder, folder / "step-00000020"):
            said: list[str] = []
            try:
                checkpoint = open_checkpoint(path, said.append)
            except UserError:
                continue
            assert checkpoint.step in (10, 20) and (checkpoint.step == 20 or said), "an older one in silence"
            saved = self.tensors(checkpoint.step)
            assert checkpoint.names() == sorted(saved) and checkpoint.meta["note"] == "x"
            for name, tensor in saved.items():
                try:
                    read = checkpoint.read(name)
                except UserError:
                    continue
                assert read.dtype == tensor.dtype and torch.equal(read, tensor), f"{name} is another tensor"


class HuggingFaceTarget(Target):
    """A folder as transformers saves it: logits are those of `from_pretrained`, where both read it."""

    def __init__(self) -> None:
        import transformers

        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        transformers.logging.disable_progress_bar()
        self.transformers = transformers
        self.seeds: list[Files] = []
        for tied in (False, True):
            torch.manual_seed(0)
            config = transformers.LlamaConfig(
                vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
                tie_word_embeddings=tied, initializer_range=0.2, eos_token_id=2, bos_token_id=1,
            )  # fmt: skip
            model = transformers.LlamaForCausalLM(config)
            whole, parts = self.scratch(), self.scratch()
            model.save_pretrained(whole)
            model.save_pretrained(parts, max_shard_size="8KB")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            older = self.scratch()
            model.save_pretrained(older, max_shard_size="8KB")
            self.seeds += [content_of(whole), content_of(parts), {**content_of(older), **content_of(whole)}]

    def draw(self, draw: Callable[..., Any]) -> Files:
        files = pick(draw, self.seeds)
        return changed_folder(draw, files, draw(st.sampled_from([None, ["config.json"], ["config.json"]])))

    def read(self, folder: Path) -> None:
        from hlat.checkpoint.hf_tokenizer import generation_defaults, generation_stops
        from hlat.checkpoint.weights import load_model, open_weights

        source = open_weights(folder)
        model = load_model(source)
        assert all(isinstance(stop, int) for stop in generation_stops(source.meta))
        assert isinstance(generation_defaults(source.meta), dict)
        config = model.config
        ids = torch.arange(min(8, config.max_seq_len))[None] % config.vocab
        with torch.no_grad():
            ours = model(ids)
            try:
                theirs = self.transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
                )
                logits = theirs(ids).logits
            except Exception:
                return  # it refuses more than we do
        if logits.isfinite().all():
            wrong = (ours - logits).abs().max()
            assert wrong <= 1e-3 * max(1.0, float(logits.abs().max())), f"logits are {float(wrong):g} off"


class GGUFTarget(Target):
    """A GGUF file: metadata of every type and value, and damaged bytes."""

    def __init__(self) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        alphabet = [*sorted(ByteLevel.alphabet()), "ab", "th"]
        self.fields: dict[str, Any] = {
            "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 32,
            "llama.embedding_length": 16, "llama.feed_forward_length": 24, "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": 4, "llama.vocab_size": 258,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": alphabet,
            "tokenizer.ggml.token_type": [1] * 258, "tokenizer.ggml.merges": ["a b", "t h"],
            "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.chat_template": "{{ x }}",
        }  # fmt: skip
        shapes = {
            "token_embd": (258, 16), "output": (258, 16), "output_norm": (16,), "blk.0.attn_norm": (16,),
            "blk.0.ffn_norm": (16,), "blk.0.attn_q": (16, 16), "blk.0.attn_k": (8, 16),
            "blk.0.attn_v": (8, 16),
            "blk.0.attn_output": (16, 16), "blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16),
            "blk.0.ffn_down": (16, 24),
        }  # fmt: skip
        generator = np.random.default_rng(0)
        self.tensors = {
            f"{name}.weight": generator.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        self.good = self.written(self.fields)

    def written(self, fields: dict[str, Any]) -> bytes:
        """The file with this metadata. Raises what the gguf package does for values it cannot write."""
        import gguf

        path = self.scratch() / "m.gguf"
        writer = gguf.GGUFWriter(path, str(fields.get("general.architecture", "llama")))
        for key, value in fields.items():
            if key == "general.architecture":
                continue
            kind = gguf.GGUFValueType.get_type(value)
            if kind == gguf.GGUFValueType.INT32:
                kind = gguf.GGUFValueType.UINT32 if value >= 0 else gguf.GGUFValueType.INT64
                kind = gguf.GGUFValueType.UINT64 if value >= 2**32 else kind
            writer.add_key_value(key, value, kind)
        for name, data in self.tensors.items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = path.read_bytes()
        path.unlink()
        path.parent.rmdir()
        return content

    def draw(self, draw: Callable[..., Any]) -> Files:
        content = self.good
        if draw(st.booleans()):
            fields = dict(self.fields)
            for _ in range(draw(st.integers(1, 2))):
                key = draw(st.sampled_from(sorted(fields)))
                if isinstance(fields[key], list) and draw(st.booleans()):
                    items = list(fields[key])
                    items[draw(st.integers(0, len(items) - 1))] = draw(
                        st.sampled_from(["", "ab", -1, 2, 9, "x y z"])
                    )
                    fields[key] = items
                elif draw(st.integers(0, 5)):
                    fields[key] = draw(
                        st.sampled_from([v for v in ODD if not isinstance(v, dict) and v is not None])
                    )
                else:
                    del fields[key]
            try:
                content = self.written(fields)
            except Exception:
                content = self.good[: draw(st.integers(0, len(self.good)))]
        else:
            head = len(self.good) - sum(data.nbytes for data in self.tensors.values())
            for _ in range(draw(st.integers(1, 2))):
                place = draw(st.integers(0, head))
                number = draw(st.sampled_from(INTERESTING)) % 2**32
                content = content[:place] + number.to_bytes(4, "little") + content[place + 4 :]
            if draw(st.booleans()):
                content = changed_bytes(draw, content)
        return {"m.gguf": content}

    def read(self, folder: Path) -> None:
        from hlat.checkpoint.gguf import from_gguf
        from hlat.checkpoint.store import open_checkpoint
        from hlat.checkpoint.weights import load_model, source_tokenizer

        warnings = from_gguf(folder / "m.gguf", folder / "ours")
        assert all(isinstance(line, str) for line in warnings)
        checkpoint = open_checkpoint(folder / "ours")
        model = load_model(checkpoint)
        with torch.no_grad():
            model(torch.zeros(1, min(4, model.config.max_seq_len), dtype=torch.long))
        tokenizer = source_tokenizer(checkpoint)
        if tokenizer is not None:
            for text in TEXTS:
                tokenizer.decode(tokenizer.encode(text))


class TokenFolderTarget(Target):
    """A folder of `hlat data tokenize`: what passes the full check gives the rows of the good one."""

    RECIPE = """
run: {name: fuzz, steps: 4, seed: 1}
model: {layers: 1, hidden: 16, heads: 2, ffn: 32, vocab: 300, max_seq_len: 32}
data:
  {sources: [{path: FOLDER}], tokenizer: FOLDER, seq_len: 32, micro_batch: 2, global_batch: 2, holdout: 0.3}
"""

    def __init__(self) -> None:
        from hlat.cli import main

        self.seeds: list[Files] = []
        self.rows: list[list[list[int]]] = []
        for spec in ("bytes", "train:bpe-280"):
            folder = self.scratch()
            lines = [json.dumps({"text": f"{text} number {n}"}) for n, text in enumerate(TEXTS * 8)]
            (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
            cache = os.environ.get("HLAT_CACHE")
            os.environ["HLAT_CACHE"] = str(folder / "cache")
            out = ["--out", str(folder / "tokens"), "--holdout", "0.3", "--workers", "1"]
            with open(os.devnull, "w", encoding="utf-8") as quiet:
                from contextlib import redirect_stderr, redirect_stdout

                with redirect_stdout(quiet), redirect_stderr(quiet):
                    assert not main(
                        ["data", "tokenize", str(folder / "texts.jsonl"), "--tokenizer", spec, *out]
                    )
            if cache is None:
                del os.environ["HLAT_CACHE"]
            else:
                os.environ["HLAT_CACHE"] = cache
            self.seeds.append(content_of(folder / "tokens"))
            self.rows.append(self.rows_of(folder / "tokens"))

    def rows_of(self, folder: Path) -> list[list[int]]:
        """Ids of the rows that a run reads."""
        from hlat.data import open_data
        from hlat.recipe import load

        recipe = self.scratch() / "recipe.yaml"
        recipe.write_text(self.RECIPE.replace("FOLDER", json.dumps(str(folder))), encoding="utf-8")
        try:
            data = open_data(load(recipe))
        finally:
            recipe.unlink()
            recipe.parent.rmdir()
        batches = [batch for step in range(4) for batch in data.batches(step, 2, 1)]
        batches += list(data.holdout_batches(2))
        data.report_lines()
        rows = [row.tolist() for batch in batches for row in batch.ids]
        assert all(0 <= i < data.vocab_size for row in rows for i in row), "ids outside of the vocabulary"
        return rows

    def draw(self, draw: Callable[..., Any]) -> Files:
        files = pick(draw, self.seeds)
        names = draw(st.sampled_from([None, ["manifest.json"], ["manifest.json"]]))
        return changed_folder(draw, files, names)

    def read(self, folder: Path) -> None:
        rows = self.rows_of(folder)
        verify_tokens(folder)  # raises where the content is not that of the manifest
        assert rows in self.rows, "other rows, and the full check says nothing"


def verify_tokens(folder: Path) -> None:
    """The full check. Raises UserError for a damaged folder."""
    from hlat.data.packed import SPLITS, TokenFolder

    tokens = TokenFolder(folder)
    for split in SPLITS:
        for shard in tokens.shards[split]:
            shard.verify()


class TokenizerTarget(Target):
    """Tokenizers of every make: ids are those of the library that made them, and bytes come back."""

    def __init__(self) -> None:
        import sentencepiece
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

        texts = [text for text in TEXTS if text] * 20
        special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
        self.seeds: list[Files] = []
        for kind in ("bytes", "metaspace", "prepend"):
            tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None if kind == "bytes" else "<unk>"))
            if kind == "bytes":
                tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
                tokenizer.decoder = decoders.ByteLevel()
            elif kind == "metaspace":
                tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
                tokenizer.decoder = decoders.Metaspace()
            else:
                tokenizer.normalizer = normalizers.Sequence(
                    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
                )
            trainer = trainers.BpeTrainer(
                vocab_size=320,
                special_tokens=special,
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [],
            )
            tokenizer.train_from_iterator(texts, trainer)
            config = {
                "eos_token": "</s>",
                "bos_token": {"content": "<s>", "lstrip": False},
                "chat_template": "x",
            }
            others = {"special_tokens_map.json": {"eos_token": "</s>"}, "added_tokens.json": {"<x>": 321}}
            files: Files = {"tokenizer.json": tokenizer.to_str().encode()}
            files |= {"tokenizer_config.json": json.dumps(config).encode(), "chat_template.jinja": b"{{ x }}"}
            files |= {name: json.dumps(value).encode() for name, value in others.items()}
            self.seeds.append(files)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=320, model_type="bpe",
            byte_fallback=True, minloglevel=2,
        )  # fmt: skip
        config = {
            "eos_token": "</s>",
            "bos_token": "<s>",
            "added_tokens_decoder": {"320": {"content": "<x>"}},
        }
        self.seeds.append(
            {"tokenizer.model": model.getvalue(), "tokenizer_config.json": json.dumps(config).encode()}
        )

    def draw(self, draw: Callable[..., Any]) -> Files:
        return changed_folder(draw, pick(draw, self.seeds))

    def read(self, folder: Path) -> None:
        from hlat.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(folder)
        assert len(tokenizer.identity) == 64 and all(path.exists() for path in tokenizer.kept_files())
        assert len(tokenizer.pieces()) <= tokenizer.vocab_size
        for mark in (tokenizer.eos_id, tokenizer.bos_id):
            assert mark is None or 0 <= mark < tokenizer.vocab_size
        batch = tokenizer.encode_arrays(TEXTS)
        for text, ids in zip(TEXTS, batch, strict=True):
            assert ids.dtype == np.int64 and ids.tolist() == tokenizer.encode(text)
            assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
            assert tokenizer.eos_id not in ids, "text has become an end of document"
            assert isinstance(tokenizer.decode(ids), str)
            assert tokenizer.count_bytes(ids) == len(tokenizer.decode_bytes(ids))


class DocumentTarget(Target):
    """Files of text and records: each document is text, or a reason why it is none."""

    def __init__(self) -> None:
        import pyarrow
        import pyarrow.parquet

        records = [{"text": text, "id": n, "nested": {"a": [n]}} for n, text in enumerate(TEXTS)]
        lines = "\n".join(json.dumps(record) for record in records).encode()
        table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
        parquet, arrow = io.BytesIO(), io.BytesIO()
        pyarrow.parquet.write_table(table, parquet, compression="none")
        with pyarrow.ipc.new_stream(arrow, table.schema) as writer:
            writer.write_table(table)
        whole = json.dumps(records).encode()
        self.files: Files = {
            "a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines), "c.parquet": parquet.getvalue(),
            "d.arrow": arrow.getvalue(), "e.txt": "".join(TEXTS).encode(), "f.json": whole, "g.json": lines,
            "h.json.gz": gzip.compress(whole),
        }  # fmt: skip

    def draw(self, draw: Callable[..., Any]) -> Files:
        name = draw(st.sampled_from(sorted(self.files)))
        content = self.files[name]
        assert content is not None
        if name.endswith(".gz") and draw(st.booleans()):
            return {name: gzip.compress(changed_bytes(draw, gzip.decompress(content)))}
        return changed_folder(draw, {name: content})

    def read(self, folder: Path) -> None:
        from hlat.data.readers import read_pieces
        from hlat.data.records import read_records
        from hlat.data.sources import identity, resolve_source, units

        try:
            source = resolve_source(path=folder)
            assert len(identity(source)) == 64
            for unit in units(source):
                for document in read_pieces(source.files, unit, source.text_field):
                    assert document.name and (document.text is None) == bool(document.reason)
                    (document.text or "").encode("utf-8")
        except UserError:
            pass
        for record in read_records(str(folder), None, "data.examples"):
            assert record.name and (record.values is None) == bool(record.reason)


TARGETS: dict[str, type[Target]] = {
    "recipe": RecipeTarget,
    "checkpoint": CheckpointTarget,
    "huggingface": HuggingFaceTarget,
    "gguf": GGUFTarget,
    "tokens": TokenFolderTarget,
    "tokenizer": TokenizerTarget,
    "documents": DocumentTarget,
}
