"""Readers of weights: our checkpoints, folders of Hugging Face, GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from mutations import INTERESTING, ODD, Files, changed_bytes, changed_folder, pick
from target import TEXTS, Target, content_of

from hlat.errors import UserError


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
        refusals = [r for path in (folder, folder / "step-00000020") for r in self.refusals(path)]
        if refusals:
            raise refusals[-1]

    def refusals(self, path: Path) -> list[UserError]:
        """What is refused of a checkpoint or a folder of them; what is read is right."""
        from hlat.checkpoint.store import open_checkpoint

        said: list[str] = []
        try:
            checkpoint = open_checkpoint(path, said.append)
        except UserError as error:
            return [error]
        assert checkpoint.step == 20 or (checkpoint.step == 10 and said), "an older one in silence"
        saved = self.tensors(checkpoint.step)
        assert checkpoint.names() == sorted(saved) and checkpoint.meta["note"] == "x"
        refused = []
        for name, tensor in saved.items():
            try:
                read = checkpoint.read(name)
            except UserError as error:
                refused.append(error)
                continue
            assert read.dtype == tensor.dtype and torch.equal(read, tensor), f"{name} is another tensor"
        return refused


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
        from hlat.checkpoint.hf_generation import generation_defaults, generation_stops
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
                if isinstance(fields[key], list) and fields[key] and draw(st.booleans()):
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
