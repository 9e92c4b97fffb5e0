"""The rows of the failure table about accelerators: Neuron's runtime, NVIDIA's driver, CUDA and NCCL.

Sources are named in `hlat.supervise.failure_table`, where the rows get their order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# done, hang: not from the table; the supervisor sees these itself.
Kind = Literal[
    "recipe", "anomaly", "software", "node", "peer", "store", "preempted", "lost", "unknown", "done", "hang"
]
Action = Literal["stop", "restart", "exclude"]
Where = Literal["kernel", "text", "both", "status", "flag"]


@dataclass(frozen=True)
class Row:
    """One signal.

    name: of the rule. patterns: regular expressions, searched line by line, in any case; what stands between
    two parts is `[^\\n]*`, outside of all groups (`hlat.supervise.patterns`). where: the kernel's
    lines, the ranks' text, both; "status": `codes` are exit statuses of a rank; "flag": what the supervisor
    saw. meaning: what it is and why this action. source: see the module text.
    """

    name: str
    kind: Kind
    action: Action
    where: Where
    meaning: str
    source: str
    patterns: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()


def nrt(code: int, *names: str) -> tuple[str, ...]:
    """A Neuron runtime status in the forms it is logged: its name, status=5, err: 5."""
    status = rf"\bnrt[\w:]*?\W[^\n]*\bstatus\s{{0,9}}[=:]?\s{{0,9}}{code}\b"
    named = (rf"\b{name}\b" for name in names)
    return status, rf"completed with err(?:or)?:?\s{{0,9}}{code}\b", *named


def xid(codes: Iterable[int], rest: str = "") -> str:
    """A line of the NVIDIA driver: NVRM: Xid (PCI:0000:3b:00): 79, ..."""
    return rf"NVRM: Xid \([^)]{{0,80}}\):? (?:{'|'.join(map(str, codes))})\b{rest}"


# What the catalogue answers with RESET_GPU, RESTART_BM or a workflow of tests: no training on it before.
XID_HARDWARE = (46, 48, 62, 64, 74, 79, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158)
# RESTART_APP: the GPU stays usable.
XID_APPLICATION = (8, 11, 13, 25, 31, 32, 60, 69, 80)
# IGNORE, or what a process that ends leaves behind (43, 45): never the cause.
XID_BENIGN = (14, 37, 38, 43, 44, 45, 63, 66, 67, 92, 93)
_TIMEOUT = r"(?:execution|inference) timeout \({} ms\)[^\n]*waiting for execution completion"

DEVICE_HARDWARE = (
    Row(
        "neuron-hardware",
        "node",
        "exclude",
        "both",
        "the Neuron driver reports a hardware error; AWS asks for the instance to be replaced",
        "[nrt] [npd]",
        (r"NEURON_HW_ERR=\w+",),
    ),
    Row(
        "xid-hardware",
        "node",
        "exclude",
        "both",
        "an Xid that needs a GPU reset, a reboot or tests: ECC, NVLink, GPU off the bus, GSP, PMU",
        "[xid]",
        (
            xid(XID_HARDWARE),
            xid(range(144, 151), r"[^\n]*\bFatal\b"),
            xid((154,), r"[^\n]*recovery action changed from [^\n]* to 0x\w+ \((?!None\))"),
            r"NVRM:[^\n]*fallen off the bus",
        ),
    ),
    Row(
        "nrt-sram",
        "node",
        "exclude",
        "text",
        "NRT 1004, 1202: an uncorrectable error in on-chip memory; replace the instance",
        "[nrt]",
        (
            *nrt(1202, "NRT_EXEC_HW_ERR_NC_UE"),
            *nrt(1004, "NRT_EXEC_COMPLETED_WITH_ERR(?:OR)?"),
            r"\buncorrectable memory error (?:is detected )?on Neuron device",
            r"Uncorrectable memory error is detected",
        ),
    ),
    Row(
        "nrt-hbm-repairable",
        "node",
        "exclude",
        "text",
        "NRT 1205: an HBM error that reloading the driver or a reboot repairs; not before that",
        "[nrt]",
        (
            *nrt(1205, "NRT_EXEC_HW_ERR_REPAIRABLE_HBM_UE"),
            r"Uncorrectable HBM memory error[^\n]*(?:reload the neuron driver|reboot)",
        ),
    ),
    Row(
        "nrt-hbm",
        "node",
        "exclude",
        "text",
        "NRT 1201: an HBM error that cannot be repaired; replace the instance",
        "[nrt]",
        (*nrt(1201, "NRT_EXEC_HW_ERR_HBM_UE"), r"Uncorrectable HBM memory error is detected"),
    ),
    Row(
        "nrt-dma",
        "node",
        "exclude",
        "text",
        "NRT 1203: a DMA engine aborted; replace the instance",
        "[nrt]",
        (*nrt(1203, "NRT_EXEC_HW_ERR_DMA_ABORT"), r"DMA [TR]X engine \d+ is in an abort state"),
    ),
    Row(
        "nrt-compute-hang",
        "node",
        "exclude",
        "text",
        "a graph did not end within 30 s or more (NEURON_RT_EXEC_TIMEOUT); AWS: replace the instance",
        "[nrt]",
        (_TIMEOUT.format(r"(?:[3-9]\d{4}|\d{6,})"),),
    ),
    Row(
        "nrt-hardware",
        "node",
        "restart",
        "text",
        "NRT 6, 101: a hardware error or an execution unit that cannot go on; a start resets the cores, "
        "a second time on the same node is its fault",
        "[nrt]",
        (*nrt(6, "NRT_HW_ERROR"), *nrt(101, "NRT_EXEC_UNIT_UNRECOVERABLE")),
    ),
    Row(
        "cuda-hardware",
        "node",
        "exclude",
        "text",
        "CUDA reports an uncorrectable memory or NVLink error, or finds no usable GPU",
        "[cuda]",
        (
            r"uncorrectable ECC error encountered",
            r"uncorrectable NVLink error detected",
            r"CUDA_ERROR_(?:ECC|NVLINK)_UNCORRECTABLE",
            r"no CUDA-capable device is detected",
            r"system not yet initialized",
            r"GPU is lost|NVML_ERROR_GPU_IS_LOST",
        ),
    ),
    Row(
        "xid-contained",
        "node",
        "restart",
        "both",
        "Xid 94: an ECC error contained to this process; the GPU stays usable, a second time is its fault",
        "[xid]",
        (xid((94,)),),
    ),
)

DEVICE_SOFTWARE = (
    Row(
        "neuron-setup",
        "node",
        "exclude",
        "text",
        "driver, collectives or EFA are missing on this node: repair its image",
        "[nrt]",
        (
            r"Unable to run multi-instance workload\.\s+Ofi plugin",
            r"OFI plugin initNet\(\) failed",
            r"Error opening libnccom\.so",
            r"Unable to determine Neuron Driver version",
            r"This runtime requires Neuron Driver version",
            r"No usable listening interface found",
            r"setting FI_EFA_FORK_SAFE=1",
        ),
    ),
    Row(
        "nrt-busy",
        "software",
        "restart",
        "text",
        "NRT 9, 1005: another process holds the cores; not hardware, a left-over process ends",
        "[nrt]",
        (
            *nrt(9, "NRT_LOAD_NOT_ENOUGH_NC"),
            *nrt(1005, "NRT_EXEC_NC_BUSY"),
            r"NeuronCore\(s\) not available",
            r"CUDA-capable device\(s\) is/are busy or unavailable",
        ),
    ),
    Row(
        "nrt-memory",
        "software",
        "stop",
        "both",
        "NRT 4, 11: device or host memory does not suffice for this recipe",
        "[nrt]",
        (
            *nrt(4, "NRT_RESOURCE"),
            *nrt(11, "NRT_FAIL_HOST_MEM_ALLOC"),
            r"neuron:mc_alloc: device mempool [^\n]* needed \d+ available",
        ),
    ),
    Row(
        "nrt-software",
        "software",
        "stop",
        "text",
        "NRT 2, 10, 1002, 1006: a graph or its input is wrong; the same start would end the same way",
        "[nrt]",
        (
            *nrt(2, "NRT_INVALID"),
            *nrt(10, "NRT_UNSUPPORTED_NEFF_VERSION"),
            *nrt(1002, "NRT_EXEC_BAD_INPUT"),
            *nrt(1006, "NRT_(?:EXEC_)?OOB"),
            r"NEFF version mismatch",
            r"failed to run scatter/gather[^\n]*out-of-bound",
        ),
    ),
    Row(
        "nrt-notifications",
        "software",
        "stop",
        "text",
        "NRT 1204: the queue of notifications overflowed; set NEURON_RT_ENABLE_DGE_NOTIFICATIONS=0",
        "[nrt]",
        (*nrt(1204, "NRT_EXEC_SW_NQ_OVERFLOW"),),
    ),
    Row(
        "nrt-short-timeout",
        "software",
        "stop",
        "text",
        "a graph did not end within NEURON_RT_EXEC_TIMEOUT, which is set below 30 s: raise it",
        "[nrt]",
        (_TIMEOUT.format(r"\d{1,5}"),),
    ),
    Row(
        "cuda-memory",
        "software",
        "stop",
        "text",
        "the GPU's memory does not suffice for this recipe",
        "[cuda]",
        (r"CUDA out of memory", r"CUDA error: out of memory", r"CUDA_ERROR_OUT_OF_MEMORY"),
    ),
    Row(
        "cuda-assert",
        "software",
        "stop",
        "text",
        "a check in a kernel failed, usually an index out of range",
        "[cuda]",
        (r"device-side assert triggered",),
    ),
    Row(
        "cuda-access",
        "software",
        "restart",
        "both",
        "a kernel touched memory it has not or raised an exception (Xid 13, 31); the catalogue: restart the "
        "application",
        "[xid] [cuda]",
        (
            r"CUDA error: an illegal (?:memory access|instruction) was encountered",
            r"CUDA error: (?:unspecified launch failure|misaligned address)",
            xid(XID_APPLICATION),
        ),
    ),
    Row(
        "nccl-usage",
        "software",
        "stop",
        "text",
        "NCCL was called wrongly",
        "[nccl]",
        (r"ncclInvalid(?:Usage|Argument)",),
    ),
)

DEVICE_ECHOES = (
    Row(
        "nrt-collectives",
        "peer",
        "restart",
        "text",
        "NRT 5, 1200: collectives wait for a worker; the cause is on another node",
        "[nrt]",
        (
            *nrt(1200, "NRT_EXEC_HW_ERR_COLLECTIVES"),
            r"missing collectives status",
            *nrt(5, "NRT_TIMEOUT"),
        ),
    ),
    Row(
        "nrt-network",
        "peer",
        "restart",
        "text",
        "NRT 1206: a peer closed its connection, or EFA failed",
        "[nrt]",
        (*nrt(1206, "NRT_NETWORK_PROXY_FAILURE"), r"RX, connection closed by remote peer"),
    ),
    Row(
        "nccl-timeout",
        "peer",
        "restart",
        "text",
        "a collective did not end in time on a rank that waited",
        "[torch]",
        (r"Watchdog caught collective operation timeout",),
    ),
    Row(
        "nccl",
        "peer",
        "restart",
        "text",
        "NCCL lost a peer, its network or its device",
        "[nccl] [torch]",
        (
            r"ncclRemoteError|remote process exited or there was a network error",
            r"ncclSystemError|unhandled system error",
            r"ncclUnhandledCudaError|unhandled cuda error|ncclInternalError",
            r"NET/\w+ ?: Got completion from peer",
        ),
    ),
)
