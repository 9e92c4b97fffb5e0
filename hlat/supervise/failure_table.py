"""The failure table: what the ranks' logs, the kernel and exit statuses say about why a run ended.

One row a signal. The first row that matches decides, so their order is the precedence:

0. another process has taken the run over: it must not be disturbed, whatever else happened here;
1. hardware, as the kernel or the runtime names it: whatever else broke followed from it;
2. statuses HLAT chose itself (recipe, guard, store), and mistakes that only look like a wrong recipe;
3. storage;
4. an exception that no row explains: a defect;
5. a node whose installation is not complete, then errors of the software below HLAT;
6. a rank that HLAT names as gone or late, or that the supervisor ended for hanging;
7. a rank that was killed or crashed;
8. echoes: what the others say when their peer has gone.

Sources: [nrt] AWS Neuron, nrt_status.h and "Neuron Runtime troubleshooting"; [npd] AWS's Neuron
node-problem-detector rules; [xid] NVIDIA, "Analyzing Xid Errors with the Xid Catalog"; [cuda] NVIDIA, CUDA
Runtime API, cudaError; [nccl] NVIDIA, NCCL API, ncclResult_t; [torch] PyTorch, ProcessGroupNCCL; [linux] the
kernel's own messages; [hlat] docs/failures.md.
"""

from __future__ import annotations

from hlat.errors import FolderLost
from hlat.supervise.failure_rows import (
    DEVICE_ECHOES,
    DEVICE_HARDWARE,
    DEVICE_SOFTWARE,
    XID_BENIGN,
    Row,
    nrt,
    xid,
)

HOST_HARDWARE = (
    Row(
        "host-memory",
        "node",
        "exclude",
        "kernel",
        "an uncorrected error of the host's memory",
        "[linux]",
        (r"EDAC \w+: \d+ UE\b", r"Uncorrected hardware memory error"),
    ),
    Row(
        "host-disk",
        "node",
        "exclude",
        "kernel",
        "a local disk fails or was mounted read-only after an error",
        "[linux]",
        (
            r"Remounting filesystem read-only",
            r"(?:critical (?:medium|target) error|I/O error), dev (?!sr|fd|loop)\w+",
            r"Buffer I/O error on dev(?:ice)? (?!sr|fd|loop)\w+",
            r"nvme\w*: controller is down; will reset",
        ),
    ),
    Row(
        "replica-differs",
        "node",
        "stop",
        "text",
        "a replica holds other weights: a silent error of that node; checkpoints since may hold it too, so a "
        "person chooses the one to continue from",
        "[hlat]",
        (r"after step \d+ [^\n]*\b(?:holds? other weights than|hold different weights)\b",),
    ),
)

CHOSEN = (
    Row(
        "late-start",
        "peer",
        "restart",
        "text",
        "a rank did not come to the rendezvous in time, or a port or the run folder was not free yet: "
        "status 2, but not the recipe's fault",
        "[hlat]",
        (
            r"hlat: error: [^\n]*(?:did not come in time|no answer for \d+ s|was not ready within"
            r"|ended before all \d+ processes had come|cannot listen: "
            r"|trains in this folder since)",
        ),
    ),
    Row(
        "recipe",
        "recipe",
        "stop",
        "status",
        "a wrong recipe, data or run folder; the same start would end the same way",
        "[hlat]",
        codes=(2,),
    ),
    Row(
        "guard",
        "anomaly",
        "stop",
        "status",
        "the guard gave up: the loss is sick, not the machine",
        "[hlat]",
        codes=(3,),
    ),
    Row(
        "nrt-numerical",
        "anomaly",
        "stop",
        "text",
        "NRT 1003: a graph produced NaN",
        "[nrt]",
        (
            *nrt(1003, "NRT_EXEC_COMPLETED_WITH_NUM_ERR(?:OR)?"),
            r"INFER_ERROR_SUBTYPE_NUMERICAL",
        ),
    ),
    Row(
        "store",
        "store",
        "restart",
        "status",
        "the last state could not be saved: disk or object store failing",
        "[hlat]",
        codes=(74,),
    ),
)

STORAGE = (
    Row(
        "store-denied",
        "store",
        "stop",
        "text",
        "the object store refuses: wrong or missing credentials, no such bucket",
        "[hlat]",
        (
            r"\b(?:AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|NoSuchBucket)\b",
            r"Unable to locate credentials|NoCredentialsError",
        ),
    ),
    Row(
        "disk-full",
        "store",
        "restart",
        "text",
        "no space left; retention, another job or a person may make room before the next attempt",
        "[linux]",
        (r"No space left on device", r"Disk quota exceeded"),
    ),
    Row(
        "disk-read-only",
        "node",
        "exclude",
        "text",
        "a file system became read-only: the kernel does that after an error of the disk",
        "[linux]",
        (r"Read-only file system",),
    ),
    Row(
        "storage",
        "store",
        "restart",
        "text",
        "a disk, shared file system or object store fails; a broken local disk is in the kernel's lines",
        "[linux]",
        (
            r"\[Errno 5\]|Input/output error",
            r"Stale file handle|Transport endpoint is not connected|\[Errno 112\]",
            r"EndpointConnectionError|Could not connect to the endpoint URL|Connect timeout on endpoint URL",
            r"Read timeout on endpoint URL|\b(?:SlowDown|ServiceUnavailable|ExpiredToken|RequestTimeout)\b",
        ),
    ),
)

HOST_SOFTWARE = (
    Row(
        "host-memory-full",
        "software",
        "restart",
        "both",
        "the host's or container's memory was full: the kernel killed a process, or an allocation failed",
        "[linux]",
        (
            r"Out of memory: Killed process",
            r"Memory cgroup out of memory: Kill",
            r"\boom-kill:constraint=",
            r"\bMemoryError\b|Cannot allocate memory|can't allocate memory",
            r"\[?F137\]?[^\n]*forcibly killed",
        ),
    ),
)

NAMED = (
    Row(
        "gone",
        "peer",
        "restart",
        "text",
        "HLAT names a rank whose process or machine is gone",
        "[hlat]",
        (
            r"\brank \d+ \([^)]{0,200}\) is gone\b",
            r"\bstopped because [^\n]* does not answer",
            r"\bheld the job's store, is gone",
        ),
    ),
    Row(
        "late",
        "peer",
        "restart",
        "text",
        "HLAT names a rank that made no progress",
        "[hlat]",
        (r"\brank \d+ \([^)]{0,200}\) is late\b", r"\ball ranks wait in step \d+"),
    ),
    Row("hang", "peer", "restart", "flag", "a rank came no further within its phase's limit", "[hlat]"),
)

ENDED = (
    Row(
        "crash",
        "software",
        "restart",
        "status",
        "a rank crashed outside Python (SIGSEGV, SIGILL, SIGFPE)",
        "[linux]",
        codes=(-11, -4, -8, 139, 132, 136),
    ),
    Row(
        "bus-error",
        "store",
        "restart",
        "status",
        "SIGBUS: a mapped file was cut or could not be read, or /dev/shm is full",
        "[linux]",
        codes=(-7, 135),
    ),
    Row(
        "killed",
        "peer",
        "restart",
        "status",
        "a rank was ended by SIGKILL: by a person, a launcher or a kernel whose messages may not be read",
        "[linux]",
        codes=(-9, 137),
    ),
)

HOST_ECHOES = (
    Row(
        "connection",
        "peer",
        "restart",
        "text",
        "gloo or the job's store lost a peer",
        "[torch]",
        (
            r"Connection (?:closed|reset) by (?:remote )?peer",
            r"\bBroken pipe\b|Connection refused",
            r"\bgloo\b[^\n]*(?:time|connect|socket|peer)",
            r"Dist(?:Backend|Network|Store)Error",
            r"Timed out waiting \d+\s?ms for (?:recv|send)",
        ),
    ),
    Row(
        "aborted",
        "software",
        "restart",
        "status",
        "a library ended the rank (SIGABRT) and no line says why",
        "[linux]",
        codes=(-6, 134),
    ),
)

LOST = Row(
    "folder-lost",
    "lost",
    "stop",
    "status",
    "another process has taken the run folder over, and trains: this one must not start again",
    "[hlat]",
    codes=(FolderLost.exit_code,),
)
PREEMPTED = Row(
    "signal",
    "preempted",
    "stop",
    "status",
    "ended early by a signal: preemption, walltime or a person; queue it again",
    "[hlat]",
    codes=(143, 138, 130, -15, -10, -2),
)
DEFECT = Row(
    "exception",
    "software",
    "stop",
    "text",
    "an exception that no other row explains; the same start would end the same way",
    "[hlat]",
)
CLEAN = Row(
    "clean",
    "unknown",
    "restart",
    "status",
    "every rank ended with status 0 before the run was done",
    "[hlat]",
    codes=(0,),
)
UNKNOWN = Row(
    "unknown", "unknown", "restart", "flag", "nothing says why; the budget of restarts bounds it", ""
)

BENIGN = (
    (
        r"Timeout waiting for (?:RX|incoming connection) \(waited \d+ sec\) - retrying",
        "a peer compiles; not fatal",
    ),
    (r"Connect to \S+ failed - retrying", "the same"),
    (r"Failed to process command DEREG_MR", "EFA, after a process has ended"),
    (xid(XID_BENIGN), "the catalogue's IGNORE, or what an ended process leaves behind"),
)

TABLE = (
    LOST,
    *DEVICE_HARDWARE,
    *HOST_HARDWARE,
    PREEMPTED,
    *CHOSEN,
    *STORAGE,
    DEFECT,
    *DEVICE_SOFTWARE,
    *HOST_SOFTWARE,
    *NAMED,
    *ENDED,
    *DEVICE_ECHOES,
    *HOST_ECHOES,
    CLEAN,
    UNKNOWN,
)
