"""Checkpoints of NxD runs, in HLAT's format and in NxD's own files."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.nxd

BF16, ROWS = "precision.compute=bf16", "data.micro_batch=4"
LAYOUTS = {
    "tp2-sequence": ["parallel.tp=2", "parallel.sequence=true"],
    "dp2-zero1-bf16": ["parallel.dp=2", "parallel.zero1=true", BF16, ROWS],
    "dp2-bf16": ["parallel.dp=2", BF16, ROWS],
    "pp2-tied": ["parallel.pp=2", "model.tie_embeddings=true", ROWS],
}
IDS = [("cpu-mode", name) for name in LAYOUTS] + [
    ("xla-mode", name) for name in ("tp2-sequence", "dp2-zero1-bf16")
]


def cases(mode: str) -> list[dict[str, object]]:
    own = [name for m, name in IDS if m == mode]
    return [
        {"name": f"{job}-{name}", "job": job, "overrides": LAYOUTS[name]}
        for name in own
        for job in ("resume", "nxd_files")
    ]


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
    assert result.pop("step") == 2
    assert result == {"losses": True, "tensors": True, "converted": True, "names": True}
