"""Checks of NVIDIA GPUs: driver, uncorrected memory errors, remapped rows, who uses them."""

from __future__ import annotations

from collections.abc import Iterator

from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine

_RESET = (
    "reset the GPU (nvidia-smi --gpu-reset) or reboot, and test again; replace the machine when it comes back"
)


def check(machine: Machine, ranks: int = 0) -> Iterator[Finding]:
    """GPUs and their health; one line where there are none.

    ranks: processes that shall have one each.
    """
    done = machine.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if done is None:
        yield Finding("devices", "ok", f"no GPU and no Neuron device; {machine.cpus} CPU cores")
        return
    if done.code != 0:
        text = " ".join((done.err or done.out).split())[:120]
        lost = "fail" if "lost" in text or "fallen off" in text else "warn"
        yield Finding("devices", lost, f"nvidia-smi fails: {text}", advice="repair the NVIDIA driver")  # type: ignore[arg-type]
        return
    names = [line.strip() for line in done.out.splitlines() if line.strip()]
    if not names:
        yield Finding("devices", "ok", "no GPU")
        return
    fact = f"{len(names)} GPU: {names[0]}"
    if ranks > len(names) and machine.environ.get("CUDA_VISIBLE_DEVICES") != "":
        advice = "start as many ranks as GPUs; if one is missing, reboot or replace the machine"
        yield Finding("devices", "fail", f"{fact}, but {ranks} ranks", advice=advice)
    else:
        yield Finding("devices", "ok", fact)
    yield _memory(machine)
    yield from _rows(machine)
    yield from _users(machine)


def _query(machine: Machine, kind: str, fields: str) -> list[list[str]]:
    """Rows of one of nvidia-smi's tables."""
    done = machine.run(["nvidia-smi", f"--query-{kind}={fields}", "--format=csv,noheader,nounits"])
    lines = done.out.splitlines() if done is not None and done.code == 0 else []
    return [[field.strip() for field in line.split(",")] for line in lines if line.strip()]


def _memory(machine: Machine) -> Finding:
    """Uncorrected ECC errors since the driver was loaded."""
    name = "devices.memory"
    found = [row for row in _query(machine, "gpu", "index,ecc.errors.uncorrected.volatile.total") if row[1:]]
    counted = [(index, int(errors)) for index, errors, *_ in found if errors.isdigit()]
    bad = [f"GPU {index}: {errors}" for index, errors in counted if errors]
    if bad:
        return Finding(name, "fail", f"uncorrected memory errors: {', '.join(bad[:4])}", advice=_RESET)
    return Finding(name, "ok", "no uncorrected memory error" if counted else "memory errors are not counted")


def _rows(machine: Machine) -> Iterator[Finding]:
    """Rows of memory that were, or could not be, replaced; nothing where the GPU does not do that."""
    rows = _query(machine, "remapped-rows", "gpu_bus_id,remapped_rows.pending,remapped_rows.failure")
    states = [row for row in rows if len(row) == 3 and row[2].lower() in ("yes", "no", "0", "1")]
    failed = [bus for bus, _, failure in states if failure.lower() in ("yes", "1")]
    pending = [bus for bus, waits, _ in states if waits.lower() in ("yes", "1")]
    if failed:
        advice = "replace the GPU"
        yield Finding("devices.rows", "fail", f"remapping a row failed: {', '.join(failed)}", advice=advice)
    elif pending:
        advice = "reset the GPU at the next occasion"
        yield Finding(
            "devices.rows", "warn", f"a row waits to be remapped: {', '.join(pending)}", advice=advice
        )


def _users(machine: Machine) -> Iterator[Finding]:
    """Processes that compute on a GPU now."""
    rows = _query(machine, "compute-apps", "pid,process_name,used_memory")
    users = [f"{row[0]} ({row[1]})" for row in rows if len(row) > 1 and row[0].isdigit()]
    if users:
        advice = "end them if they are left over from a run"
        yield Finding("devices.users", "warn", f"processes use GPUs: {', '.join(users[:8])}", advice=advice)
