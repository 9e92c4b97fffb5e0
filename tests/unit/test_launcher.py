"""Which rank of which job a process is, by what srun, mpirun and mpiexec set; addresses, ports, refusals."""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlat import cli
from hlat.backend.cluster import join
from hlat.backend.launcher import count_tasks, launcher_variables, refuse_tasks, take_place
from hlat.backend.slurm import FIRST_PORT, PORTS, hosts, node_variables, step_port
from hlat.commands import supervise
from hlat.errors import UserError

# What srun sets for the sixth of eight tasks on four nodes.
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "trn-[007-009,20]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURMD_NODENAME": "trn-009",
}
PLACE = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "trn-007",
    "MASTER_PORT": str(FIRST_PORT + 2 * (77 * 97 % PORTS)),
}


def without(names: str, environ: dict[str, str] = STEP) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names.split()}


def test_a_task_of_a_step_is_a_rank() -> None:
    assert launcher_variables(STEP) == PLACE
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert launcher_variables(STEP | chosen) == PLACE | chosen
    taken = dict(STEP)
    take_place(taken)
    assert taken == STEP | PLACE and launcher_variables(taken) == {}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        STEP | {"WORLD_SIZE": "4"},  # torchrun as the task of a step
        STEP | {"WORLD_SIZE": "1"},  # as the user wants it
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        # A batch script, and the shell of salloc.
        {
            "SLURM_JOB_ID": "3",
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NNODES": "2",
        },
        {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"PMI_RANK": "0"},
    ],
)
def test_one_process(environ: dict[str, str]) -> None:
    assert launcher_variables(environ) == {}


def test_a_step_on_one_node_is_not_open_to_others() -> None:
    found = launcher_variables(STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "trn-007"})
    assert found["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without("SLURM_PROCID"), "SLURM_PROCID: SLURM does not say which"),
        (without("SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST: SLURM does not say"),
        (STEP | {"SLURM_DISTRIBUTION": "arbitrary"}, "set MASTER_ADDR to the node of the first task"),
    ],
)
def test_steps_that_do_not_say_where_to_meet(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launcher_variables(environ)
    if "SLURM_PROCID" in environ:
        assert launcher_variables(environ | {"MASTER_ADDR": "a"})["MASTER_ADDR"] == "a"


def test_the_first_task_of_a_heterogeneous_job() -> None:
    """The list of its nodes is by name, and SLURM_NODEID in the order of components (SLURM 22.05)."""
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_ID_HET_GROUP_0": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "node2",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "node1",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_TASKS_PER_NODE": "2,1",
    }
    first = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURMD_NODENAME": "node2"}
    last = {"SLURM_PROCID": "2", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURMD_NODENAME": "node1"}
    found = [launcher_variables(step | task) for task in (first, last)]
    assert [place["MASTER_ADDR"] for place in found] == ["node2", "node2"]
    assert [place["LOCAL_WORLD_SIZE"] for place in found] == ["1", "2"]
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]
    second = step | last | {"SLURM_STEP_NODELIST": "node[1,3]", "SLURM_JOB_NODELIST_HET_GROUP_1": "node[3,1]"}
    assert launcher_variables(second)["MASTER_ADDR"] == "node3", "a step of the second component alone"


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
        ("c[1-2]n[03],x", ["c1n03", "c2n03", "x"]),
        ("gpu[9-11],one", ["gpu9", "gpu10", "gpu11", "one"]),
        ("a[098-101]-ib.x", ["a098-ib.x", "a099-ib.x", "a100-ib.x", "a101-ib.x"]),
        ("", []),
        ("odd[x]", ["oddx"]),
    ],
)
def test_compressed_lists_of_nodes(nodes: str, names: list[str]) -> None:
    assert hosts(nodes) == names


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 4))
def test_a_list_is_what_was_compressed(numbers: list[int], width: int) -> None:
    items = [f"{number:0{width}}-{number + number % 4:0{width}}" for number in numbers]
    names = [f"n{n:0{width}}" for number in numbers for n in range(number, number + number % 4 + 1)]
    assert hosts(f"n[{','.join(items)}],last") == [*names, "last"]


@pytest.mark.parametrize(
    ("counts", "node", "here"),
    [("4(x2),3", 1, "4"), ("4(x2),3", 2, "3"), ("4(x2),3", 3, None), ("8", 0, "8"), ("?", 0, None)],
)
def test_tasks_of_a_node(counts: str, node: int, here: str | None) -> None:
    step = STEP | {
        "SLURM_STEP_TASKS_PER_NODE": counts,
        "SLURM_NODEID": str(node),
        "SLURMD_NODENAME": "elsewhere",
    }
    assert launcher_variables(step).get("LOCAL_WORLD_SIZE") == here
    names = ["trn-007", "trn-008", "trn-009", "trn-20"]
    assert launcher_variables(step | {"SLURMD_NODENAME": names[node]}).get("LOCAL_WORLD_SIZE") == here


def test_ports_of_steps_at_the_same_time() -> None:
    """Steps of one job by --overlap, of jobs that share a node, and of a requeued job; each has two ports."""
    ports = {
        step_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restart)})
        for job, step, restart in itertools.product(range(5000, 5004), range(8), range(3))
    }
    assert len(ports) == 4 * 8 * 3 and all(port % 2 == 0 and 30000 <= port < 32767 for port in ports)
    assert step_port({"SLURM_JOB_ID": "9", "SLURM_STEPID": "2"}) == step_port(
        {"SLURM_JOB_ID": "10", "SLURM_JOB_ID_HET_GROUP_0": "9", "SLURM_STEP_ID": "2"}
    )


OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
PMI = {"PMI_SIZE": "4", "PMI_RANK": "1"}


def test_open_mpi_on_one_node_is_one_run() -> None:
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    assert launcher_variables(OMPI) == place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ports = [
        launcher_variables(OMPI | {"PMIX_NAMESPACE": f"prterun-node-{number}@1"})["MASTER_PORT"]
        for number in (100, 100, 101)
    ]
    assert ports[0] == ports[1] != ports[2] and 30000 <= int(ports[0]) < 32767
    # mpirun in a SLURM job starts its helpers with srun: the step's tasks are theirs.
    helper = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert launcher_variables(helper | OMPI)["RANK"] == "3"


def test_mpi_on_several_nodes_needs_an_address() -> None:
    spread = OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    for environ, text in ((spread, "mpirun -x MASTER_ADDR"), (PMI, "mpiexec -genv MASTER_ADDR")):
        with pytest.raises(UserError, match=f"cannot tell where rank 0 is.*{text}") as caught:
            launcher_variables(environ)
        assert caught.value.exit_code == 2
        assert launcher_variables(environ | {"MASTER_ADDR": "n1"})["WORLD_SIZE"] == "4"
    hydra = PMI | {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "5000"}
    found = launcher_variables(hydra)
    assert found == {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_PORT": "5000",
    }


def test_pmi_of_srun_is_the_step() -> None:
    assert launcher_variables(STEP | {"PMI_SIZE": "8", "PMI_RANK": "5"}) == PLACE
    with pytest.raises(UserError, match="mpiexec"):  # hydra, started by srun once a node
        launcher_variables(STEP | {"PMI_SIZE": "16", "PMI_RANK": "5"})


def test_a_task_that_stands_for_its_node() -> None:
    one = STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}
    meeting = {name: PLACE[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    assert node_variables(one) == {"NODES": "4", "NODE_RANK": "2", **meeting}
    assert node_variables(one | {"NODES": "2"}) == node_variables(one | {"WORLD_SIZE": "1"}) == {}
    assert node_variables({}) == node_variables(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    with pytest.raises(UserError, match=r"8 tasks on 4; start it with srun --ntasks-per-node=1"):
        node_variables(STEP)


def test_a_supervisor_takes_its_node_from_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one = STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    for name in ("WORLD_SIZE", "NODES", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    alone = {"nnodes": 1, "node_rank": 0, "master_addr": None, "master_port": None}

    def place(**given: object) -> argparse.Namespace:
        args = argparse.Namespace(**alone | given)
        supervise._take_node(args)
        return args

    port = int(PLACE["MASTER_PORT"])
    assert vars(place()) == {"nnodes": 4, "node_rank": 2, "master_addr": "trn-007", "master_port": port}
    assert place(master_port=7).master_port == 7
    given = {"nnodes": 2, "node_rank": 1, "master_addr": "a"}  # as `hlat launch slurm` gives it
    assert vars(place(**given)) == alone | given
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert vars(place()) == alone


@pytest.mark.parametrize(
    ("environ", "tasks"),
    [(STEP, 8), (OMPI, 4), (PMI, 4), ({"WORLD_SIZE": "2"}, 2), (STEP | {"WORLD_SIZE": "1"}, 1), ({}, 1)],
)
def test_what_one_process_does(environ: dict[str, str], tasks: int) -> None:
    assert count_tasks(environ) == tasks
    if tasks == 1:
        refuse_tasks("generate", environ)
        return
    with pytest.raises(UserError, match=rf"hlat generate: one process does this, and {tasks} were started"):
        refuse_tasks("generate", environ)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "runs/x", "--prompt", "a"],
        ["convert", "to-hf", "runs/x", "out"],
        ["sweep", "tiny", "optim.lr=[1e-3]"],
        ["launch", "slurm", "tiny", "--nodes", "1", "--nproc-per-node", "1"],
        ["supervise", "tiny"],
    ],
)
def test_every_task_of_a_step_is_refused_alike(words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert "srun --ntasks" in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())


def test_joining_as_tasks_of_a_step(tmp_path: Path) -> None:
    """Two processes with the variables of a step on one node, and no others, are one job of two ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    step = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))},
        **STEP,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "MASTER_PORT": port,
    }
    program = "from hlat.backend.cluster import join; c = join(60.0); c.leave(60.0); print(c.rank, c.world)"
    second = subprocess.Popen(
        [sys.executable, "-c", program],
        env=step | {"SLURM_PROCID": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    first = join(60.0, step | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert (first.rank, first.world, first.local_world) == (0, 2, 2)
    first.leave(60.0)
    assert second.communicate(timeout=60)[0] == "1 2\n"
