"""`hlat convert from-nxd` on files as the ranks of a job write them: every value in its place."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hlat.checkpoint.reader import open_checkpoint
from hlat.cli import main
from hlat.model.config import ModelConfig
from hlat.model.init import parameter_shapes

MODEL = ModelConfig(layers=1, hidden=16, heads=2, kv_heads=2, ffn=24, vocab=260, max_seq_len=16)
DP, TP = 2, 2


def pieces(weights: dict[str, Tensor], tp: int) -> list[tuple[str, Tensor, dict]]:
    """What one of the ranks that share each layer holds: half of the rows of matrices, and where it lies. Of
    vectors, which all of them hold, the first one's count."""
    found, at = [], 0
    for name, whole in weights.items():
        rows = whole.shape[0] // TP if whole.dim() == 2 else whole.shape[0]
        offset = [tp * rows, 0] if whole.dim() == 2 else [0]
        part = whole[offset[0] : offset[0] + rows]
        spec = {"primary": whole.dim() == 2 or tp == 0, "at": at, "offset": offset}
        spec |= {"size": list(part.shape), "shape": list(whole.shape)}
        found.append((name, part, spec))
        at += part.numel()
    return found


def write_nxd(path: Path, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    """A complete checkpoint of DP x TP ranks; of each bucket a replica holds a share, cut where it may be."""
    (path / "optim").mkdir(parents=True)
    for dp, tp in product(range(DP), range(TP)):
        parts = pieces(weights, tp)
        flat = torch.cat([part.reshape(-1) for _, part, _ in parts])
        state = torch.cat([part.reshape(-1) for _, part, _ in pieces(moments, tp)])
        cut = flat.numel() // 3
        first, last = (0, cut) if dp == 0 else (cut, flat.numel())
        bucket = {
            "master": flat[first:last].clone(),
            "state": {"exp_avg": state[first:last].clone(), "step": torch.tensor(5.0)},
            "first": first,
            "specs": {name: spec for name, _, spec in parts},
        }
        content = {"buckets": {"0": bucket}, "frozen": {}, "owners": {}, "updates": torch.tensor(5)}
        torch.save(content, path / f"optim/dp_rank_{dp:02d}_tp_rank_{tp:02d}_pp_rank_00.pt")
    meta = {"step": 5, "tokens": 80, "model": MODEL.model_dump(), "recipe": {"data": {"tokenizer": "bytes"}}}
    torch.save({"meta": json.dumps(meta), "tokenizer": {}}, path / "user_content.pt")
    (path / "done").touch()


def test_every_value_is_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also after the way on to Hugging Face's files."""
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(MODEL)
    weights, moments = (
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)
    )
    write_nxd(tmp_path / "nxd/step-000000005", weights, moments)
    assert main(["convert", "from-nxd", str(tmp_path / "nxd"), str(tmp_path / "run")]) == 0
    found = open_checkpoint(tmp_path / "run/checkpoints/step-00000005")
    assert (found.step, found.tokens) == (5, 80)
    for name in shapes:
        assert torch.equal(found.read(f"model/{name}"), weights[name]), name
        assert torch.equal(found.read(f"optim/exp_avg/{name}"), moments[name]), name
    assert found.read("optim/step").item() == found.read("run/updates").item() == 5
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", "keep"]) == 0
    exported = load_file(tmp_path / "hf/model.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], weights["embed.weight"])
    # Without one rank's file it is one line, and nothing is written.
    next((tmp_path / "nxd").glob("*/optim/dp_rank_01_tp_rank_01*")).unlink()
    capsys.readouterr()
    assert main(["convert", "from-nxd", str(tmp_path / "nxd"), str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "are missing; copy the files of all ranks" in said
    assert not (tmp_path / "other").exists()
