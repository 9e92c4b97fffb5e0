"""Node checks before a start: every one in both directions on a faked machine, and within their time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hlat.checkpoint.retention import most_at_once
from hlat.checkpoint.store import CheckpointStore
from hlat.cli import main
from hlat.commands.doctor_cluster import table
from hlat.doctor import gpus, holders, space
from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine, Output, Package
from hlat.errors import UserError
from hlat.recipe import Recipe, load
from hlat.supervise import cluster_check
from hlat.supervise.cluster_check import Node, Result
from hlat.supervise.node import is_bad, node_findings
from hlat.train import same

XID = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus."


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load("tiny", [f"run.dir={tmp_path}/run"])


@pytest.fixture
def trn(tmp_path: Path) -> Recipe:
    return load("hlat-7b", [f"run.dir={tmp_path}/run"])


def silent(since: float) -> str:
    return ""


def ask(recipe: Recipe, machine: Any, **more: Any) -> dict[str, Finding]:
    found = node_findings(recipe, machine=machine, **{"kernel": silent, **more})
    return {finding.check: finding for finding in found}


def wrong(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.status for name, finding in found.items() if finding.status != "ok"}


def test_a_healthy_node(trn: Recipe, fake_node: Any) -> None:
    found = ask(trn, fake_node, nodes=16, ranks=32)
    assert wrong(found) == {} and not is_bad(found.values())
    asked = {"devices.neuron", "devices.memory", "devices.holders", "system.driver", "network.efa", "clock"}
    assert asked | {"disk.checkpoints", "kernel", "package.torch-neuronx"} <= set(found)
    assert not {"network.port", "compiler", "devices.neuron-ls"} & set(found)


def test_a_plain_host(recipe: Recipe, fake_host: Any) -> None:
    assert wrong(ask(recipe, fake_host)) == {}


def counter(machine: Any, name: str) -> None:
    machine.write(f"/sys/devices/virtual/neuron_device/neuron3/stats/hardware/{name}", "2\n")


def hold(machine: Any) -> None:
    machine.write("/proc/4711/comm", "python\n")
    folder = machine.root / "proc/4711/fd"
    folder.mkdir()
    for number in range(2):
        (folder / str(number)).symlink_to(f"/dev/neuron{number}")
    (folder / "9").symlink_to("/dev/null")


@pytest.mark.parametrize(
    ("spoil", "check", "status", "bad"),
    [
        (lambda m: (m.root / "dev/neuron7").unlink(), "devices.neuron", "fail", True),
        (lambda m: counter(m, "sram_ecc_uncorrected"), "devices.memory", "fail", True),
        (lambda m: counter(m, "mem_ecc_repairable_uncorrected"), "devices.memory", "fail", True),
        (hold, "devices.holders", "fail", False),
        (lambda m: (m.root / "sys/module/neuron/version").unlink(), "system.driver", "fail", True),
        (lambda m: m.write("/sys/module/neuron/version", "2.1.0\n"), "system.driver", "warn", False),
        (
            lambda m: (m.root / "sys/class/infiniband/rdmap3s27/device/vendor").unlink(),
            "network.efa",
            "fail",
            True,
        ),
        (lambda m: m.commands.pop("fi_info"), "network.libfabric", "fail", True),
        (lambda m: setattr(m, "clock", float("inf")), "clock", "warn", False),
        (lambda m: setattr(m, "free_bytes", 10**9), "disk.checkpoints", "fail", False),
        (lambda m: setattr(m, "free_bytes", 150 * 10**9), "disk.checkpoints", "warn", False),
        (lambda m: setattr(m, "readable", False), "disk.run", "fail", False),
        (lambda m: m.limits.update(MEMLOCK=(65536.0, 65536.0)), "limits.memlock", "fail", False),
        (lambda m: setattr(m, "python", (3, 8, 1)), "python", "fail", False),
        (
            lambda m: m.packages.update({"torch-neuronx": Package("1.0")}),
            "package.torch-neuronx",
            "fail",
            False,
        ),
    ],
)
def test_each_fault_of_a_node(
    spoil: Callable[[Any], None], check: str, status: str, bad: bool, trn: Recipe, fake_node: Any
) -> None:
    spoil(fake_node)
    found = ask(trn, fake_node, nodes=16)
    assert found[check].status == status, found[check]
    assert bool(is_bad(found.values())) is bad


def test_own_processes_may_hold_devices(fake_node: Any) -> None:
    hold(fake_node)
    assert "4711 (python): 2" in holders.check(fake_node).fact
    assert holders.check(fake_node, own={4711}).status == "ok"


def test_the_kernels_log(recipe: Recipe, fake_host: Any) -> None:
    def kernel(*lines: tuple[float, str]) -> Callable[[float], str]:
        return lambda since: "\n".join(line for at, line in lines if at >= since)

    now = time.time()
    recent = ask(recipe, fake_host, kernel=kernel((now - 60, XID)))["kernel"]
    assert recent.status == "fail" and "in the last hour: xid-hardware" in recent.fact
    assert ask(recipe, fake_host, kernel=kernel((now - 8000, XID)))["kernel"].status == "warn"
    contained = "NVRM: Xid (PCI:0000:01:00): 94, pid=7194, Contained: CE User Channel (0x9). RST: No"
    assert ask(recipe, fake_host, kernel=kernel((now - 60, contained)))["kernel"].status == "warn"
    assert ask(recipe, fake_host, kernel=kernel((now, "usb 1-1: new device")))["kernel"].status == "ok"


def nvidia(machine: Any, **tables: str) -> Any:
    machine.commands = {
        "query-gpu=name": Output(0, tables.get("gpu", "NVIDIA H200, 570.1\nNVIDIA H200, 570.1\n")),
        "query-gpu=index": Output(0, tables.get("ecc", "0, 0\n1, 0\n")),
        "query-remapped-rows": Output(0, tables.get("rows", "00000000:3B:00.0, No, No\n")),
        "query-compute-apps": Output(0, tables.get("apps", "")),
        **machine.commands,
    }
    return machine


@pytest.mark.parametrize(
    ("tables", "check", "status", "words"),
    [
        ({"ecc": "0, 0\n1, 3\n"}, "devices.memory", "fail", "uncorrected memory errors: GPU 1: 3"),
        ({"ecc": "0, [N/A]\n"}, "devices.memory", "ok", "not counted"),
        ({"rows": "00000000:3B:00.0, No, Yes\n"}, "devices.rows", "fail", "failed: 00000000:3B:00.0"),
        ({"rows": "00000000:3B:00.0, Yes, No\n"}, "devices.rows", "warn", "waits to be remapped"),
        ({"apps": "4711, /usr/bin/python, 70000\n"}, "devices.users", "warn", "4711 (/usr/bin/python)"),
        ({"gpu": "NVIDIA H200, 570.1\n"}, "devices", "fail", "1 GPU: NVIDIA H200, 570.1, but 2 ranks"),
    ],
)
def test_each_fault_of_a_gpu(
    tables: dict[str, str], check: str, status: str, words: str, fake_host: Any
) -> None:
    assert {f.check: f.status for f in gpus.check(nvidia(fake_host), 2)} == {
        "devices": "ok",
        "devices.memory": "ok",
    }
    fake_host.commands.clear()
    found = {finding.check: finding for finding in gpus.check(nvidia(fake_host, **tables), 2)}
    assert found[check].status == status and words in found[check].fact
    fake_host.environ = {"CUDA_VISIBLE_DEVICES": ""}
    assert [f.status for f in gpus.check(fake_host, 8)][0] == "ok"  # a run on the CPU


def test_a_lost_gpu(fake_host: Any) -> None:
    text = "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost. Reboot the system"
    fake_host.commands["nvidia-smi"] = Output(15, "", text)
    assert [finding.status for finding in gpus.check(fake_host)] == ["fail"]


def test_room_for_checkpoints(recipe: Recipe, fake_host: Any, tmp_path: Path) -> None:
    one = space.checkpoint_bytes(recipe)
    assert one == 12 * recipe.model.parameter_count()  # fp32 masters and two moments
    fake_host.free_bytes = (recipe.checkpoint.keep + 1) * one
    assert space.check(fake_host, recipe).status == "ok"
    fake_host.free_bytes -= 1
    assert space.check(fake_host, recipe).status == "warn"
    fake_host.free_bytes = one - 1
    assert space.check(fake_host, recipe).status == "fail"
    folder = tmp_path / "run/checkpoints/step-00000010"
    folder.mkdir(parents=True)
    (folder / "data-00000.safetensors").write_bytes(b"x" * 1000)
    assert space.check(fake_host, recipe).status == "ok"  # the size of a real one counts
    fake_host.free_bytes = recipe.checkpoint.keep * 1000 - 1  # one of keep + 1 is there
    assert space.check(fake_host, recipe).status == "warn"


def test_the_sizes_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/operations/storage.md").read_text(encoding="utf-8")
    sizes = [
        space.checkpoint_bytes(load("hlat-7b", overrides)) / 1e9
        for overrides in ([], ["precision={compute: bf16, master: fp32, states: fp32}"])
    ]
    for size, each in zip(sizes, ("6 bytes", "12 bytes a parameter"), strict=True):
        assert f"{size:.0f} GB" in page and each in page


@pytest.mark.parametrize("remote", [None, "file:///copies"])
def test_permanent_checkpoints_take_none_of_the_room(
    recipe: Recipe, fake_host: Any, tmp_path: Path, remote: str | None
) -> None:
    section = recipe.checkpoint.model_copy(update={"remote": remote, "keep": 2})
    recipe = recipe.model_copy(update={"checkpoint": section})
    root = Path(recipe.run.dir) / "checkpoints"
    for step in (1, 2, 3):
        CheckpointStore(root, keep=2, permanent_every_tokens=1).save(step, {}, {}, tokens=step)
    one = space._size(root / "step-00000003")
    fake_host.free_bytes = most_at_once(2, remote is not None) * one
    assert space.check(fake_host, recipe).status == "ok"
    fake_host.free_bytes -= 1
    assert space.check(fake_host, recipe).status == "warn"


def test_another_stores_room_is_not_asked(fake_host: Any) -> None:
    fake_host.free_bytes = 0
    recipe = load("tiny")
    assert space.check(fake_host, recipe).status == "fail"
    far = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": "s3://bucket/run"})})
    assert space.check(fake_host, far).status == "ok"
    assert ask(far, fake_host)["disk.checkpoints"].fact == "checkpoints go to s3://bucket/run"


def test_this_machine_in_five_seconds(recipe: Recipe) -> None:
    started = time.monotonic()
    found = node_findings(recipe)
    assert time.monotonic() - started < 5
    assert {"devices", "clock", "disk.checkpoints", "kernel"} <= {finding.check for finding in found}


def test_commands_that_hang_cost_no_more(
    trn: Recipe, fake_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("fi_info", "nvidia-smi", "neuron-ls", "dpkg-query", "rpm", "g++"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexec sleep 30\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    machine = Machine(fake_node.root)
    started = time.monotonic()
    found = ask(trn, machine, nodes=16)
    assert time.monotonic() - started < 6
    assert found["network.libfabric"].status == "fail"


def told(**facts: Any) -> dict[str, Any]:
    usual = {
        "code": "a" * 64,
        "hlat": "1",
        "torch": "2",
        "python": "3.11",
        "neuron": "nothing",
        "recipe": "r",
    }
    return {"facts": {**usual, "values": None, **facts}}


def test_who_differs_from_the_majority() -> None:
    nodes = [Node(f"node-{number}", [number], []) for number in range(4)]
    said = [told(), told(neuron="neuronx-cc 2"), told(code="b" * 64), told()]
    cluster_check._compare(nodes, said)
    found = {node.host: [finding.check for finding in node.findings] for node in nodes}
    assert found == {"node-0": [], "node-1": ["software.neuron"], "node-2": ["software.code"], "node-3": []}
    assert "neuronx-cc 2 instead of nothing on node-0 and most others" in nodes[1].findings[0].fact
    two = nodes[:2]
    two[1].findings.clear()
    cluster_check._compare(two, said[:2])
    assert [len(node.findings) for node in two] == [0, 1]  # without a majority the first one is right


def figures(product: float = 1.0, reduce: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"product": product, "reduce": reduce, "right": True, "error": "", **more}


def test_judging_measurements() -> None:
    def judge(*measured: dict[str, Any]) -> Result:
        nodes = [Node("node-a", [0, 1], []), Node("node-b", [2, 3], [])]
        result = Result(nodes, 4, "gloo", floor=50e6)
        cluster_check._judge(result, measured, 1.5)
        return result

    good = judge(*[figures()] * 4)
    assert good.healthy and good.bandwidth == pytest.approx(1.5 * (8 << 20) / 0.1) and not good.broken
    slow = judge(figures(), figures(), figures(), figures(1.6))
    assert [node.host for node in slow.nodes if node.bad] == ["node-b"]
    assert (
        "rank 3: 1,600.0 ms for a matrix product, the median is 1,000.0 ms" in slow.nodes[1].findings[0].fact
    )
    narrow = judge(*[figures(reduce=0.1 + 0.5 * (rank == 2)) for rank in range(4)])
    assert not narrow.healthy and not any(node.bad for node in narrow.nodes)
    assert "21 MB/s, at least 50 are wanted" in narrow.findings[0].fact
    false = judge(figures(), figures(right=False), figures(), figures())
    assert "node-a: rank 1: a wrong sum" in false.findings[0].fact
    lost = judge(figures(), figures(), figures(silent=30.0), figures(error="RuntimeError: Connection closed"))
    assert lost.broken and [node.host for node in lost.nodes if node.bad] == ["node-b"]
    lines = "\n".join(table(lost, ["node-b"], "bad.txt"))
    assert (
        "1 of 2 nodes is not fit: node-b; written to bad.txt" in lines and "0-1" in lines and "2-3" in lines
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster"], "--cluster needs a recipe"),
        (["--cluster", "tiny", "--slow", "1"], "--slow: 1 is too small"),
        (["--cluster", "tiny", "--min-bandwidth", "-1"], "--min-bandwidth: -1 is out of range"),
        (["--cluster", "tiny", "--fix-plan"], "--fix-plan: is about one machine"),
        (["tiny", "--bad-nodes", "x"], "--bad-nodes: goes with --cluster alone"),
        (["tiny", "--slow", "2"], "--slow: goes with --cluster alone"),
    ],
)
def test_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_one_process_is_a_cluster_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["doctor", "--cluster", "tiny", f"run.dir={tmp_path}", f"--bad-nodes={tmp_path}/deep/bad.txt"]
    assert main(arguments) == 0
    assert "every node is fit" in capsys.readouterr().out and (tmp_path / "deep/bad.txt").read_text() == ""
    arguments[-1] = "--bad-nodes=/proc/none/bad.txt"
    assert main(arguments) == 2
    assert "/proc/none/bad.txt: cannot be written" in capsys.readouterr().err


def test_software_of_neuron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same, "versions", lambda: {"torch": "2.9", "neuronx-cc": "2.24.1", "nki": "0.3"})
    (tmp_path / "sys/module/neuron").mkdir(parents=True)
    assert same.neuron_software(tmp_path) == "neuronx-cc 2.24.1, nki 0.3"
    (tmp_path / "sys/module/neuron/version").write_text("2.26.10.0\n")
    assert same.neuron_software(tmp_path) == "neuronx-cc 2.24.1, nki 0.3, driver 2.26.10.0"
    monkeypatch.setattr(same, "versions", dict)
    assert same.neuron_software(tmp_path / "none") == "nothing"
    names = ["rank 0 (a)", "rank 1 (b)"]
    with pytest.raises(UserError, match=r"rank 1 \(b\): has of Neuron driver 2, but rank 0 nothing"):
        same.refuse_differences([{"neuron": "nothing"}, {"neuron": "driver 2"}], names)
