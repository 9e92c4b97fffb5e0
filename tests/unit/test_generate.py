"""Sampling, stopping and streaming of generated text, and scores of held-out text."""

import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hlat.checkpoint.store import write_weights
from hlat.commands import convert as convert_command
from hlat.commands import generate as generate_command
from hlat.data.batch import Batch
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError
from hlat.evaluate.generate import Diverged, generate, stream_text
from hlat.evaluate.perplexity import Score, bits_per_byte
from hlat.evaluate.sampling import Sampling, draw
from hlat.model.config import ModelConfig
from hlat.model.decoder import Decoder
from hlat.model.init import init_tensor, parameter_shapes

CONFIG = ModelConfig(layers=2, hidden=16, heads=2, ffn=24, vocab=257, max_seq_len=48, init_std=0.3)


@pytest.fixture(scope="module")
def model() -> Decoder:
    made = Decoder(CONFIG)
    made.init_weights(3)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A weights-only checkpoint of a model of bytes."""
    tensors = ((f"model/{n}", init_tensor(CONFIG, n, s, 3)) for n, s in parameter_shapes(CONFIG).items())
    meta = {"model": CONFIG.model_dump(), "recipe": {"data": {"tokenizer": "bytes"}}}
    write_weights(tmp_path / "run", tensors, meta)
    return tmp_path / "run"


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    generate_command.configure(parser)
    return generate_command.main(parser.parse_args([str(a) for a in arguments]))


def without_cache(model: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_has_diverged_writes_nothing(temperature: float, value: float) -> None:
    made = Decoder(CONFIG)
    made.init_weights(3)
    with torch.no_grad():
        next(made.parameters()).fill_(value)
    with pytest.raises(Diverged, match="the model's logits are not finite"):
        next(generate(made, [5], temperature=temperature))


def test_greedy_is_the_argmax_of_full_forwards(model: Decoder) -> None:
    prompt = [5, 9, 200, 31]
    made = list(generate(model, prompt, max_new_tokens=20))
    assert made == without_cache(model, prompt, 20)
    assert len(set(made)) > 3  # not a model that repeats one token, which would hide a wrong cache


def test_it_ends_at_stop_at_the_count_and_at_the_models_length(model: Decoder) -> None:
    prompt = [5, 9, 200, 31]
    free = list(generate(model, prompt, max_new_tokens=20))
    stop = free[6]
    assert list(generate(model, prompt, max_new_tokens=20, stop={stop})) == free[: free.index(stop)]
    assert list(generate(model, prompt, max_new_tokens=0)) == []
    assert len(list(generate(model, prompt, max_new_tokens=1000))) == CONFIG.max_seq_len - 4
    assert list(generate(model, [1] * CONFIG.max_seq_len, max_new_tokens=5)) == []


def test_bad_prompts(model: Decoder) -> None:
    with pytest.raises(UserError, match="no tokens"):
        next(generate(model, []))
    with pytest.raises(UserError, match="49 tokens, the model takes 48"):
        next(generate(model, [1] * 49))


def test_sampling_follows_the_seed(model: Decoder) -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(model, [5, 9], max_new_tokens=20, temperature=1.0, seed=seed))

    assert draw(1) == draw(1) != draw(2)


def frequencies(**options) -> torch.Tensor:
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**{"temperature": 1.0, **options}, generator=generator)
    drawn = draw(logits.expand(2000, 4), sampling)
    return torch.bincount(drawn, minlength=4) / 2000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.1, 0.3, 0.1]),
        ({"temperature": 0.5}, [25 / 36, 1 / 36, 9 / 36, 1 / 36]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [5 / 8, 0, 3 / 8, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 99}, [0.5, 0.1, 0.3, 0.1]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [5 / 8, 0, 3 / 8, 0]),
        ({"top_p": 1.0}, [0.5, 0.1, 0.3, 0.1]),
        ({"min_p": 0.59}, [5 / 8, 0, 3 / 8, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"typical_p": 0.01}, [0, 0, 1, 0]),  # -log 0.3 is nearest to the entropy, 1.17
        ({"typical_p": 0.5}, [5 / 8, 0, 3 / 8, 0]),
        ({"temperature": 1e-40}, [1, 0, 0, 0]),
        ({"temperature": 1e-300, "top_p": 0.9, "top_k": 3}, [1, 0, 0, 0]),
        ({"temperature": 1e300}, [0.25] * 4),
        ({"temperature": 1e-40, "typical_p": 0.5, "min_p": 0.1}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # 0.5 of the 0.8 that top_k leaves is 0.625
    ],
)
def test_sampling_frequencies(options: dict, expected: list[float]) -> None:
    assert (frequencies(**options) - torch.tensor(expected)).abs().max() < 0.04


def test_streamed_text_is_whole_characters() -> None:
    tokenizer = load_tokenizer("bytes")
    prompt, text = list(b"say: "), "héllo 🙂 ok"
    pieces = list(stream_text(tokenizer, prompt, iter(text.encode())))
    assert "".join(pieces) == text and "🙂" in pieces and not any("\ufffd" in piece for piece in pieces)
    padded = stream_text(tokenizer, prompt, iter([65, 300, 66]))  # 300 is beyond the tokenizer's vocabulary
    assert "".join(padded) == "AB"
    cut = list(stream_text(tokenizer, prompt, iter("🙂".encode()[:2])))
    assert "".join(cut) == "\ufffd"  # what is left at the end is shown as broken


def test_command_prints_prompt_and_continuation(
    run: Path, capsys: pytest.CaptureFixture, model: Decoder
) -> None:
    assert command(run, "--prompt", "abc", "--greedy", "--max-new-tokens", 12) == 0
    made = bytes(i for i in without_cache(model, list(b"abc"), 12) if i < 256).decode("utf-8", "replace")
    assert capsys.readouterr().out == f"abc{made}\n"


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-k", "-1"], "--top-k"),
        (["--temperature", "inf"], "--temperature"),
        (["--top-p", "1.5"], "--top-p"),
        (["--max-new-tokens", "-3"], "--max-new-tokens"),
        (["--temperature", "nan"], "--temperature"),
        (["--seed", str(10**20)], "--seed"),
    ],
)
def test_command_refuses_options(run: Path, options: list[str], place: str) -> None:
    with pytest.raises(UserError) as caught:
        command(run, "--prompt", "a", *options)
    assert caught.value.where == place


def test_command_says_that_the_context_is_full(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(run, "--prompt", "a" * 40, "--greedy", "--max-new-tokens", 8) == 0
    assert capsys.readouterr().err == ""
    assert command(run, "--prompt", "a" * 40, "--greedy", "--max-new-tokens", 9) == 0
    note = "hlat: note: the model's context of 48 tokens is full: 8 of 9 tokens were made\n"
    assert capsys.readouterr().err == note


def test_ids_beyond_the_tokenizers_are_never_made(model: Decoder) -> None:
    free = list(generate(model, [5, 9], max_new_tokens=30))
    known = sorted(free)[len(free) // 2]  # half of them are from here on
    made = list(generate(model, [5, 9], max_new_tokens=30, known=known))
    drawn = list(generate(model, [5, 9], max_new_tokens=30, known=known, temperature=5.0))
    assert len(made) == len(drawn) == 30 and max(made + drawn) < known <= max(free)


def test_command_refuses_before_it_prints(run: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="49 tokens, the model takes 48"):
        command(run, "--prompt", "a" * 49)
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
            command(run, "--prompt", "a", "--device", device)
    assert capsys.readouterr().out == ""


def test_command_refuses_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        command(tmp_path / "nothing", "--prompt", "a")
    tensors = ((f"model/{n}", init_tensor(CONFIG, n, s, 3)) for n, s in parameter_shapes(CONFIG).items())
    write_weights(tmp_path / "mute", tensors, {"model": CONFIG.model_dump()})
    with pytest.raises(UserError, match="no tokenizer"):
        command(tmp_path / "mute", "--prompt", "a")
    other = {**CONFIG.model_dump(), "layers": 3}
    tensors = ((f"model/{n}", init_tensor(CONFIG, n, s, 3)) for n, s in parameter_shapes(CONFIG).items())
    write_weights(tmp_path / "wrong", tensors, {"model": other, "recipe": {"data": {"tokenizer": "bytes"}}})
    with pytest.raises(UserError, match="9 tensors are missing"):
        command(tmp_path / "wrong", "--prompt", "a")


def test_converted_there_and_back_it_says_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parser = argparse.ArgumentParser()
    convert_command.configure(parser)
    steps = (
        ["to-hf", run, tmp_path / "hf", "--dtype", "fp32"],
        ["from-hf", tmp_path / "hf", tmp_path / "back"],
    )
    for step in steps:
        assert convert_command.main(parser.parse_args([str(a) for a in step])) == 0
    captured = capsys.readouterr()
    assert captured.out.count("wrote") == 2 and not captured.err
    said = []
    for folder in (run, tmp_path / "hf", tmp_path / "back"):
        command(
            folder,
            "--prompt",
            "héllo",
            "--max-new-tokens",
            20,
            "--temperature",
            0.9,
            "--top-p",
            0.9,
            "--seed",
            4,
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] and len(said[0]) > 10


def test_score(model: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(3):
        ids = torch.randint(0, 257, (2, 17), generator=generator)
        targets = ids[:, 1:].clone()
        targets[0, :5] = -100
        batches.append(Batch(ids[:, :-1].clone(), targets))
    score = bits_per_byte(model, iter(batches), text_bytes=500)
    nats = sum(
        F.cross_entropy(model(b.ids).flatten(0, 1), b.targets.flatten(), reduction="sum").item()
        for b in batches
    )
    assert score.tokens == 3 * (32 - 5) == sum(int(b.targets_count()) for b in batches)
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert score.loss == pytest.approx(nats / score.tokens, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 500, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(score.loss))


def test_score_of_nothing(model: Decoder) -> None:
    empty = bits_per_byte(model, [], 0)
    assert (
        (empty.nats, empty.tokens) == (0.0, 0) and math.isnan(empty.loss) and math.isnan(empty.bits_per_byte)
    )
    assert Score(math.log(2) * 8, 1, 1).bits_per_byte == pytest.approx(8)
