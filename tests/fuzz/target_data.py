"""Readers of data: tokenized folders, tokenizers, files of text and records."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mutations import Files, changed_bytes, changed_folder, pick
from target import TEXTS, Target, content_of

from hlat.errors import UserError


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
    from hlat.data.verify import as_json, verify

    bad = verify(folder)
    json.dumps(as_json(bad))
    if bad:
        raise UserError(f"{bad[0].file}: {bad[0].reason}")


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

        from hlat.data.chat import BUILTIN
        from hlat.data.chat_renderer import Renderer

        self.renderer = Renderer(BUILTIN["plain"], {"eos_token": "</s>"}, ["</s>"], frozen=True)
        records = [{"text": text, "id": n, "nested": {"a": [n]}} for n, text in enumerate(TEXTS)]
        lines = "\n".join(json.dumps(record) for record in records).encode()
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        chats = json.dumps({"messages": [{"role": "system", "content": "z"}, *turns], "tools": [{}]}).encode()
        table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
        parquet, arrow = io.BytesIO(), io.BytesIO()
        pyarrow.parquet.write_table(table, parquet, compression="none")
        with pyarrow.ipc.new_stream(arrow, table.schema) as writer:
            writer.write_table(table)
        whole = json.dumps(records).encode()
        self.files: Files = {
            "a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines), "c.parquet": parquet.getvalue(),
            "d.arrow": arrow.getvalue(), "e.txt": "".join(TEXTS).encode(), "f.json": whole, "g.json": lines,
            "h.json.gz": gzip.compress(whole), "i.jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
            "j.jsonl.xz": lzma.compress(lines), "k.jsonl": chats,
        }  # fmt: skip

    def draw(self, draw: Callable[..., Any]) -> Files:
        name = draw(st.sampled_from(sorted(self.files)))
        content = self.files[name]
        assert content is not None
        if name.endswith(".gz") and draw(st.booleans()):
            return {name: gzip.compress(changed_bytes(draw, gzip.decompress(content)))}
        return changed_folder(draw, {name: content})

    def read(self, folder: Path) -> None:
        from hlat.data.messages import Conversations, are_messages
        from hlat.data.readers import read_pieces
        from hlat.data.records import Records
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
        records = list(Records(str(folder), None, "data.examples").read())
        for record in records:
            assert record.name and (record.values is None) == bool(record.reason)
        if any(record.values is not None and are_messages(record.values) for record in records):
            dropped: Counter[str] = Counter()
            chats = Conversations(self.renderer, ["</s>"])
            examples = chats.read(records, str(folder), "data.examples", dropped)
            assert len(examples) + sum(dropped.values()) == len(records), "a record is gone in silence"
