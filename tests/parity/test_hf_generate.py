"""Greedy text equals that of transformers' generate."""

import argparse
from pathlib import Path

import pytest
import torch

from hlat.checkpoint.hf import HFFolder
from hlat.checkpoint.weights import load_model
from hlat.commands import generate as command
from hlat.evaluate.generate import generate

transformers = pytest.importorskip("transformers")


def hf_model(path: Path, kv_heads: int, vocab: int = 97):
    torch.manual_seed(kv_heads)
    made = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=3,
    )
    model = transformers.LlamaForCausalLM(made).eval()
    model.save_pretrained(path)
    return model


def theirs(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 3}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy(tmp_path: Path, kv_heads: int) -> None:
    reference = hf_model(tmp_path, kv_heads)
    ours = load_model(HFFolder(tmp_path))
    for start in range(4):
        prompt = [start + 5, 17, 60 + start]
        expected = theirs(reference, prompt, 40)
        made = list(generate(ours, prompt, max_new_tokens=40, stop={3}))
        assert made == (expected[:-1] if expected[-1] == 3 else expected)
        assert len(set(expected)) > 3


def test_command_on_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    reference = hf_model(tmp_path, 2, vocab=260)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "<pad>": 1, "<unk>": 2, "</s>": 3, **{c: i + 4 for i, c in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens(["<s>", "<pad>", "<unk>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("Hello").input_ids
    assert prompt[0] == 0
    parser = argparse.ArgumentParser()
    command.configure(parser)
    arguments = [str(tmp_path), "--prompt", "Hello", "--greedy", "--max-new-tokens", "30"]
    assert command.main(parser.parse_args(arguments)) == 0
    expected = tokenizer.decode(theirs(reference, prompt, 30), skip_special_tokens=True)
    assert capsys.readouterr().out == f"Hello{expected}\n"
