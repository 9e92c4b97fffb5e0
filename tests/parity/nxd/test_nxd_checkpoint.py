"""Checkpoints of NxD runs, in HLAT's format and in NxD's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hlat.checkpoint.hf import to_hf
from hlat.checkpoint.nxd import from_nxd
from hlat.checkpoint.store import open_checkpoint
from hlat.checkpoint.weights import load_model

pytestmark = pytest.mark.nxd

BF16, ROWS = "precision.compute=bf16", "data.micro_batch=4"
LAYOUTS = {
    "tp2-sequence": ["parallel.tp=2", "parallel.sequence=true"],
    "dp2-zero1-bf16": ["parallel.dp=2", "parallel.zero1=true", BF16, ROWS],
    "dp2-bf16": ["parallel.dp=2", BF16, ROWS],
    "pp2-tied": ["parallel.pp=2", "model.tie_embeddings=true", ROWS],
    "dp2-conef": ["parallel.dp=2", ROWS, "reduce={name: conef, start_step: 1}"],
    "dp2-zero1-mada": ["parallel.dp=2", "parallel.zero1=true", ROWS, "optim={name: mada, hyper_start: 1}"],
}
IDS = [("cpu-mode", name) for name in LAYOUTS] + [
    ("xla-mode", name) for name in ("tp2-sequence", "dp2-zero1-bf16", "dp2-conef")
]


ACROSS = {
    "name": "across",
    "job": "across",
    "overrides": LAYOUTS["tp2-sequence"],
    "other": ["parallel.dp=2", ROWS],
}


def cases(mode: str) -> list[dict[str, object]]:
    own = [name for m, name in IDS if m == mode]
    named = [
        {"name": f"{job}-{name}", "job": job, "overrides": LAYOUTS[name]}
        for name in own
        for job in ("resume", "nxd_files")
    ]
    return [*named, ACROSS]


@pytest.mark.parametrize(("mode", "name"), IDS, ids=[f"{m}-{n}" for m, n in IDS])
def test_resume_is_bitwise(mode: str, name: str, nxd_result: Callable) -> None:
    assert nxd_result(mode, 2, cases(mode), f"resume-{name}") == {
        "losses": True,
        "tensors": True,
        "weights": True,
    }


@pytest.mark.parametrize(("mode", "name"), IDS, ids=[f"{m}-{n}" for m, n in IDS])
def test_nxd_files_resume_and_convert(mode: str, name: str, nxd_result: Callable) -> None:
    result = nxd_result(mode, 2, cases(mode), f"nxd_files-{name}")
    assert result["step"] == 2
    assert result["losses"] and result["tensors"] and result["converted"] and result["names"]


@pytest.mark.parametrize("name", ["tp2-sequence", "pp2-tied"], ids=lambda name: f"cpu-mode-{name}")
def test_from_nxd_to_hugging_face(name: str, nxd_result: Callable, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    result = nxd_result("cpu-mode", 2, cases("cpu-mode"), f"nxd_files-{name}")
    from_nxd(result["folder"], tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    ours = load_model(open_checkpoint(tmp_path / "run"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.01
        assert (ours(ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["cpu-mode", "xla-mode"])
def test_native_and_nxd_continue_each_other(mode: str, nxd_result: Callable) -> None:
    found = nxd_result(mode, 2, cases(mode), "across")
    assert found["to_nxd"] < 1e-5 and found["to_native"] < 1e-5
    assert "was saved as dp 1 x pp 1 x tp 2, sequence" in found["refused"]
