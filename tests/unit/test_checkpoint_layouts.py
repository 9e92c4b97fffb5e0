"""Save in one layout, load in another, bitwise: one process, DTensors on two, pieces of flat buckets on two.

This file is also the program that the two ranks run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hlat.checkpoint import folder, layout
from hlat.checkpoint.piece import piece
from hlat.checkpoint.store import CheckpointStore, open_checkpoint
from hlat.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHAPES = {
    "model/wide": (7, 6),
    "model/tall": (5, 3),
    "model/norm": (9,),
    "model/tiny": (1, 4),
    "optim/cube": (3, 2, 5),
}
WORLD = 2


def logical(seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}
    return tensors | {
        "optim/half": torch.randn(6, 4, generator=made).bfloat16(),
        "optim/step": torch.tensor(seed),
    }


def sharded(tensors: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Every second tensor cut along dimension 0 (7 rows, 9 elements, 1 row), others along 1 or whole."""
    result = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        placement = (
            Replicate() if tensor.dim() < 1 else Shard(0 if number % 2 == 0 or tensor.dim() < 2 else 1)
        )
        result[name] = distribute_tensor(tensor, mesh, [placement])
    return result


MATRICES = ("model/wide", "model/tall", "model/tiny", "optim/half")


def pieces(tensors: dict[str, Tensor], rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's pieces of the matrices, and their memory. Cuts fall inside rows; one is rank 1's alone."""
    views: dict[str, Tensor] = {}
    flats: dict[str, Tensor] = {}
    for name in MATRICES:
        total = tensors[name].numel()
        cuts = [0, total // world + 1 if name != "model/tiny" else 0, total]
        first, last = cuts[rank], cuts[rank + 1]
        if first < last:
            flats[name] = tensors[name].reshape(-1)[first:last].clone()
            whole = tuple(tensors[name].shape)
            views[name] = piece(flats[name], whole, (0, 0), whole, first, last)
    return views, flats


def rank_main(rank: int, work: Path) -> None:
    """Everything the two ranks do; an assertion here fails the test."""
    dist.init_process_group("gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=WORLD)
    mesh = DeviceMesh("cpu", range(WORLD))
    heard: list[str] = []
    store = CheckpointStore(work / "many", keep=9, async_=True, warn=heard.append)

    shards = sharded(logical(1), mesh)
    store.save(1, shards, {"by": "dtensor"}, tokens=1)
    for tensor in shards.values():
        tensor.to_local().fill_(9)  # training goes on
    views, flats = pieces(logical(2), rank, WORLD)
    store.save(2, views, {"by": "pieces"}, tokens=2)
    for flat in flats.values():
        flat.fill_(9)
    store.wait()
    assert store.steps() == [1, 2]

    one = CheckpointStore(work / "one", keep=9).newest()  # saved by a single process
    assert one is not None and one.step == 5
    targets = sharded(logical(7), mesh)
    one.load_into(targets)
    assert all(torch.equal(targets[name].full_tensor(), tensor) for name, tensor in logical(5).items())  # type: ignore

    for checked in (False, True):  # reading only the rows needed, and whole chunks with their checksums
        views, flats = pieces(logical(7), rank, WORLD)
        wanted = pieces(logical(5), rank, WORLD)[1]
        one.verified = None if checked else ""
        one.load_into(views, partial=True)
        assert all(torch.equal(flats[name], flat) for name, flat in wanted.items())

    found = store.newest()  # pieces into DTensors
    assert found is not None and found.step == 2
    targets = {name: t for name, t in sharded(logical(7), mesh).items() if name in MATRICES}
    found.load_into(targets)
    assert all(torch.equal(targets[name].full_tensor(), logical(2)[name]) for name in MATRICES)  # type: ignore

    refused(found, rank, mesh)
    damaged(work, store, rank, mesh, heard)
    full_disk(store, rank, mesh)
    dist.destroy_process_group()


def refused(found, rank: int, mesh: DeviceMesh) -> None:
    """A mistake on one rank is the same error on both, before anybody reads."""
    wrong = {name: t for name, t in sharded(logical(7), mesh).items() if name in MATRICES}
    if rank == 1:
        wrong["model/other"] = torch.zeros(2)
    with pytest.raises(UserError, match="no tensor 'model/other'"):
        found.load_into(wrong)
    views, _ = pieces(logical(7), rank, WORLD)
    views.pop("model/tall")
    with pytest.raises(UserError, match="1 tensors that the run has no place for: model/tall"):
        found.load_into(views)


def damaged(work: Path, store: CheckpointStore, rank: int, mesh: DeviceMesh, heard: list[str]) -> None:
    """Both ranks agree to skip a damaged checkpoint, whoever of them finds the damage; rank 0 reports it."""
    store.save(3, sharded(logical(3), mesh), {}, tokens=3, wait=True)
    if rank == 0:
        file = folder.step_folder(work / "many", 3) / "data-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    dist.barrier()
    newest = store.newest()
    assert newest is not None and newest.step == 2
    assert [("data-00001" in line, "using step 2" in line) for line in heard] == (
        [(True, True)] if rank == 0 else []
    )


def full_disk(store: CheckpointStore, rank: int, mesh: DeviceMesh) -> None:
    """One rank cannot write: both hear of it at the next call, and nothing of it stays."""
    usage = layout.shutil.disk_usage
    if rank == 1:
        layout.shutil.disk_usage = lambda path: usage(path)._replace(free=0)
    store.save(4, sharded(logical(4), mesh), {}, tokens=4)
    with pytest.raises(UserError, match="step 4 was not saved .the disk is full"):
        store.save(5, sharded(logical(4), mesh), {}, tokens=5)
    layout.shutil.disk_usage = usage
    dist.barrier()
    assert not [name for name in os.listdir(store.root) if name.startswith(".")]
    store.save(4, sharded(logical(4), mesh), {}, tokens=4, wait=True)
    assert store.steps() == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a single process saved step 5 (`one`), and two ranks then did `rank_main`."""
    work = tmp_path_factory.mktemp("layouts")
    store = CheckpointStore(work / "one", keep=9)
    store.save(5, logical(5), {}, tokens=5)
    command = [sys.executable, __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(work)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(WORLD)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n\n".join(errors)
    return work


@pytest.mark.parametrize(
    ("step", "names"), [(1, sorted(logical())), (2, sorted(MATRICES)), (4, sorted(logical()))]
)
def test_two_ranks_save_one_loads(work: Path, step: int, names: list[str]) -> None:
    found = open_checkpoint(folder.step_folder(work / "many", step))
    assert found.names() == names and len(list(found.path.glob("data-*"))) == WORLD
    targets = {name: torch.zeros_like(logical()[name]) for name in names}
    found.load_into(targets)
    for name in names:
        assert torch.equal(targets[name], logical(step)[name]) and torch.equal(
            found.read(name), logical(step)[name]
        )
    found.verify()


def test_the_ranks_share_the_writing(work: Path) -> None:
    sizes = [file.stat().st_size for file in folder.step_folder(work / "many", 1).glob("data-*")]
    assert max(sizes) < 1.5 * min(sizes)


def test_a_lost_part_is_never_saved_as_whole(tmp_path: Path) -> None:
    views, _ = pieces(logical(1), 0, WORLD)  # the other rank's pieces are missing
    with pytest.raises(ValueError, match="only a part of tensor 'model/"):
        CheckpointStore(tmp_path, keep=1).save(1, views, {}, tokens=0)
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
