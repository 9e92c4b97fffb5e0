"""Every environment variable and compiler flag HLAT sets on Trainium, in one table.

A row says what is set, when, to what, why, who says so, and from which to which release of the Neuron SDK
it means anything. What HLAT leaves alone on purpose stands below it, with the reason. docs/trainium.md
shows both (python docs/neuron_reference.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

CACHE = "/var/tmp/neuron-compile-cache"
TP_ON_TRN1 = (1, 2, 4, 8, 32)
MANY_NODES = 32

_ENVVARS = "AWS, PyTorch Neuron environment variables"
_NRT = "AWS, Neuron runtime configuration"
_CC = "AWS, neuronx-cc command line"
_NXD = "NxD, example pretraining scripts"
_HLAT = "awslabs/HLAT, training scripts"
_NXDT = "AWS, NxD Training"
_EFA = "AWS, multi-node setup and runtime troubleshooting"


@dataclass(frozen=True)
class Facts:
    """What of a recipe and a cluster decides values.

    flash: attention runs in NxD's flash kernel. stochastic: fp32 results are rounded to bf16 stochastically.
    wait: the longest time, in seconds, that ranks wait for each other. cores: NeuronCores used on a node.
    """

    tp: int
    pp: int
    zero1: bool
    flash: bool
    stochastic: bool
    seed: int
    wait: int
    nodes: int
    cores: int


@dataclass(frozen=True)
class Row:
    """One variable or flag. `value` gives None where it is not set; `shown` and `when` are for people.

    since, until: the first SDK release it is for and the first it is no longer for; empty: no bound.
    """

    name: str
    value: Callable[[Facts], str | None]
    shown: str
    when: str
    why: str
    source: str
    kind: Literal["variable", "flag"] = "variable"
    platforms: tuple[str, ...] = ("trn1",)
    since: str = ""
    until: str = ""

    def covers(self, sdk: str) -> bool:
        """Whether this row is for a release of the SDK, written as 2.28.1."""
        number = _release(sdk)
        return (not self.since or number >= _release(self.since)) and (
            not self.until or number < _release(self.until)
        )

    @property
    def releases(self) -> str:
        """The releases in words: 'all', 'from 2.27', 'before 2.31'."""
        since = [f"from {self.since}"] if self.since else []
        until = [f"before {self.until}"] if self.until else []
        return " ".join([*since, *until]) or "all"


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _always(value: str) -> Callable[[Facts], str | None]:
    return lambda facts: value


def _if(condition: Callable[[Facts], bool], value: str) -> Callable[[Facts], str | None]:
    return lambda facts: value if condition(facts) else None


FLAGS = (
    Row(
        "--model-type",
        _always("transformer"),
        "transformer",
        "always",
        "optimisations for transformer blocks",
        f"{_CC}; {_NXD}; {_HLAT}",
        kind="flag",
    ),
    Row(
        "--distribution-strategy",
        _if(lambda facts: not facts.flash, "llm-training"),
        "llm-training",
        "without flash attention",
        "how the published HLAT runs were compiled; AWS asks not to combine it with the flash kernel",
        f"{_HLAT}; {_NXDT}",
        kind="flag",
    ),
    Row(
        "--auto-cast",
        _always("none"),
        "none",
        "always",
        "the recipe's `precision` decides every dtype; until 2.26 the compiler cast fp32 products by default",
        _CC,
        kind="flag",
    ),
    Row(
        "--retry_failed_compilation",
        _always(""),
        "(no value)",
        "always",
        "failures are cached too: a graph that failed once, for want of host memory, would fail for ever",
        f"AWS, Neuron caching; {_NXD}",
        kind="flag",
    ),
)

VARIABLES = (
    Row(
        "NEURON_COMPILE_CACHE_URL",
        _always(CACHE),
        CACHE,
        "always",
        "the node's own disk: file locks do not hold on NFS, EFS and FSx. The default, stated so that it "
        "can be checked and copied; `--cache_dir` in NEURON_CC_FLAGS wins over it",
        f"AWS, Neuron caching and training troubleshooting; {_HLAT}",
    ),
    Row(
        "NEURON_FUSE_SOFTMAX",
        _always("1"),
        "1",
        "always",
        "the compiler's own lowering of softmax",
        f"{_ENVVARS}; {_NXD}; {_HLAT}",
    ),
    Row(
        "NEURON_RT_STOCHASTIC_ROUNDING_EN",
        lambda facts: "1" if facts.stochastic else "0",
        "1 or 0",
        "1 when precision.rounding is stochastic",
        "rounding of fp32 results to bf16 in hardware; off with fp32 masters, where it would only add noise",
        f"{_ENVVARS}; {_NXDT}; {_HLAT}",
    ),
    Row(
        "NEURON_RT_STOCHASTIC_ROUNDING_SEED",
        lambda facts: str(facts.seed % 2**31) if facts.stochastic else None,
        "run.seed",
        "precision.rounding is stochastic",
        "the same random bits in every start",
        _ENVVARS,
    ),
    Row(
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS",
        lambda facts: "7" if facts.pp > 1 else "3",
        "3; 7 with a pipeline",
        "always",
        "graphs queued ahead of the device, about 12 % of a step; more may run out of device memory. "
        "Release 2.31 removed it",
        f"{_NRT}; {_NXD}; {_HLAT}",
        until="2.31",
    ),
    Row(
        "NEURON_RT_EXEC_TIMEOUT",
        lambda facts: str(facts.wait),
        "the larger of parallel.timeout and first_timeout",
        "always",
        "seconds after which a graph counts as hung; a rank that compiled first waits inside one for the "
        "others (HLAT's runs: 4000)",
        f"{_NRT}; {_HLAT}",
    ),
    Row(
        "NEURON_RT_NUM_CORES",
        lambda facts: str(facts.cores),
        "cores used on a node: 32",
        "always",
        "one process a core; set together with the next three",
        _NXD,
    ),
    *(
        Row(name, lambda facts: str(facts.cores), "as above", "always", "the same, for torch_xla", _NXD)
        for name in ("NUM_NEURONCORES", "TPU_NUM_DEVICES", "TPU_CHIPS_PER_HOST_BOUNDS")
    ),
    Row(
        "XLA_DISABLE_FUNCTIONALIZATION",
        _if(lambda facts: facts.zero1, "0"),
        "0",
        "with parallel.zero1",
        "functionalisation on: Llama 70B with ZeRO-1 converged better so; off is the default for speed",
        f"{_ENVVARS}; {_NXD}",
    ),
    *(
        Row(
            name,
            _if(lambda facts: facts.nodes >= MANY_NODES, value),
            value,
            f"from {MANY_NODES} nodes",
            "process groups without a TCP store of their own: thousands of ranks exhaust file descriptors. "
            "The number of nodes is HLAT's choice",
            f"{_ENVVARS}; {_HLAT}",
        )
        for name, value in (("XLA_USE_DUMMY_STORE", "1"), ("TORCH_DIST_INIT_BARRIER", "0"))
    ),
    Row(
        "MALLOC_ARENA_MAX",
        lambda facts: "128" if facts.pp > 1 else "64",
        "64; 128 with a pipeline",
        "always",
        "fewer heaps in glibc: 32 processes a node with hundreds of threads exhaust the host's memory",
        f"{_NXD}; {_HLAT}",
    ),
    Row(
        "FI_PROVIDER",
        _if(lambda facts: facts.nodes > 1, "efa"),
        "efa",
        "on several nodes",
        "collectives between nodes go over EFA, not TCP",
        f"{_EFA}; {_NXD}; {_HLAT}",
        platforms=("trn1", "trn2"),
    ),
    Row(
        "FI_EFA_USE_DEVICE_RDMA",
        _if(lambda facts: facts.nodes > 1, "1"),
        "1",
        "on several nodes",
        "the network card reads device memory itself",
        f"{_EFA}; {_NXD}; {_HLAT}",
        platforms=("trn1", "trn2"),
    ),
    Row(
        "FI_EFA_FORK_SAFE",
        _if(lambda facts: facts.nodes > 1, "1"),
        "1",
        "on several nodes",
        "needed with kernels before 5.15 (Amazon Linux 2), where nodes cannot communicate without it; "
        "harmless elsewhere",
        f"{_EFA}; {_HLAT}",
        platforms=("trn1", "trn2"),
    ),
)
TABLE = (*FLAGS, *VARIABLES)

# (names, why HLAT leaves them alone)
LEFT_ALONE: tuple[tuple[str, str], ...] = (
    (
        "XLA_USE_BF16, XLA_DOWNCAST_BF16",
        "deprecated; they turn fp32 norms, losses and masters into bf16. Refused, whatever their value: NxD "
        "reads even a 0. Dtypes are in the recipe",
    ),
    ("NEURON_RT_VISIBLE_CORES, NEURON_RT_ROOT_COMM_ID", "torch-neuronx sets them under torchrun"),
    ("NEURON_EXPERIMENTAL_COMPRESS_RG", "experimental; some releases of NxD end in an error with it"),
    (
        "NEURON_NUM_RECENT_MODELS_TO_KEEP",
        "4 frees device memory when many graphs are loaded, and costs reloads; set it if graphs do not fit",
    ),
    (
        "ALLREDUCE_GRADIENTS_BUCKET_SIZE_MB, BUCKET_CAP_MB",
        "gradients do not travel through the code that reads them; NxD's own buckets have the published size",
    ),
    ("TF_NUM_INTEROP_THREADS, XLA_THREAD_POOL_SIZE", "of the runtime before PJRT"),
    ("NEURON_TRANSFER_WITH_STATIC_RING_OPS", "empty, the value recommended, is the default since 2.21"),
    ("CCOM_SOCKET_IFNAME", "name the interface (eth0) if the bootstrap of collectives picks a wrong one"),
    ("NEURON_CUSTOM_SILU", "may help SwiGLU models; not measured"),
    ("--enable-saturate-infinity", "hides overflows, which the guard must see"),
    ("--optlevel, -O1", "2 is the default; 1 compiles faster and runs slower, for debugging"),
    ("--target, --lnc", "the compiler takes them from the machine"),
    ("--enable-mixed-precision-accumulation", "on by default since 2.27"),
)
