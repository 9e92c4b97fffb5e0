"""A tiny all-reduce: two processes over gloo, and on a Neuron machine two over its cores."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hlat.backend.neuron.machine import neuron_devices
from hlat.doctor import Case
from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine, Output
from hlat.host import python

_GLOO_SECONDS, _NEURON_SECONDS = 90, 900  # a first graph may compile for minutes


def check(machine: Machine, case: Case) -> Iterator[Finding]:
    """Both reductions, each where its packages are there."""
    yield _gloo(machine)
    if not case.neuron:
        return
    name, torch_neuronx = "allreduce.neuron", machine.package("torch-neuronx")
    if not neuron_devices(machine.root) or torch_neuronx is None or torch_neuronx.empty:
        yield Finding(
            name, "warn", "not run: it needs devices and torch-neuronx", advice="repair those first"
        )
    elif case.platform != "trn1":
        yield Finding(name, "warn", f"not run: there is no such check for {case.platform} yet")
    else:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        words = [*torchrun, *python.torchrun_module(["hlat.backend.nxd.probe"])]
        done = _python(machine, words, _NEURON_SECONDS)
        yield _judge(name, "two Neuron cores", done)


def _gloo(machine: Machine) -> Finding:
    if machine.package("torch") is None:
        return Finding("allreduce.gloo", "warn", "not run: it needs torch", advice="repair that first")
    with tempfile.TemporaryDirectory() as folder:
        done = _python(machine, ["hlat.doctor.probe", str(Path(folder) / "store")], _GLOO_SECONDS)
    return _judge("allreduce.gloo", "two processes over gloo", done)


def _python(machine: Machine, module: list[str], timeout: float) -> Output | None:
    """Run a module with this Python, in which this very hlat is found."""
    environ = {**python.environment(machine.environ), "OMP_NUM_THREADS": "1"}
    return machine.run(python.module(*module), timeout, environ)


def _judge(check: str, what: str, done: Output | None) -> Finding:
    if done is None:
        return Finding(check, "fail", "this Python cannot be started again")
    if done.code is None:
        advice = "a firewall or a wrong interface on loopback (GLOO_SOCKET_IFNAME=lo) is the usual cause"
        return Finding(check, "fail", f"{what}: {done.err}", advice=advice)
    result = _result(done.out)
    if done.code == 0 and result.get("right"):
        return Finding(check, "ok", f"all-reduce of {what}: right, {1e3 * result['seconds']:.1f} ms")
    lines = [line for line in (done.err or done.out).splitlines() if line.strip()]
    fact = (
        "gives a wrong sum"
        if "right" in result
        else f"fails: {lines[-1].strip()[:160] if lines else 'no output'}"
    )
    return Finding(check, "fail", f"all-reduce of {what} {fact}")


def _result(text: str) -> dict:
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "right" in found:
            return found
    return {}
