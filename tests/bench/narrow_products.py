"""16-bit products on CPUs without instructions for them: PyTorch's own beside those made in fp32 and rounded.

    python tests/bench/narrow_products.py [--rounds 7] [--out narrow-products.json]

For each limit of oneDNN's and PyTorch's instructions a process of its own times both, in turns, at the shapes
of recipes/tiny.yaml: a layer with its gradients, core attention with its gradients, and a model's loss with
all gradients (nothing compiled). Printed is the median time of each and the median of the rounds' ratios
(PyTorch's own / by way of fp32; above 1 the way of fp32 is faster). A limit on a CPU that has the
instructions stands for a CPU that lacks them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIMITS = {"AVX2": "avx2", "AVX512_CORE": "avx512"}  # of oneDNN, of PyTorch's own kernels
SEED = 1
ROWS, LENGTH = 8, 256


def parts(dtype_name: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    import torch

    from hlat.model.attention import CoreAttention
    from hlat.model.config import ModelConfig
    from hlat.model.decoder import Decoder
    from hlat.model.products import Linear

    torch.manual_seed(SEED)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype_name]
    config = ModelConfig(preset="tiny")
    layer = Linear(config.hidden, config.ffn).to(dtype)
    x = torch.randn(ROWS, LENGTH, config.hidden).to(dtype).requires_grad_()
    q, k, v = (
        torch.randn(ROWS, LENGTH, heads, config.head_dim).to(dtype).requires_grad_()
        for heads in (config.heads, config.kv_heads, config.kv_heads)
    )
    core, model = CoreAttention("auto"), Decoder(config).to(dtype)
    ids = torch.randint(config.vocab, (ROWS, LENGTH))
    return {
        "layer": lambda: layer(x).sum().backward(),
        "attention": lambda: core(q, k, v).sum().backward(),
        "model": lambda: model(ids).float().logsumexp(-1).sum().backward(),
    }


def measure(dtype_name: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each part, PyTorch's own products and those by way of fp32, one list item a round."""
    from hlat.host import cpu

    ways = {"own": frozenset(), "fp32": frozenset(cpu._INSTRUCTIONS)}
    times: dict[str, dict[str, list[float]]] = {}
    for name, part in parts(dtype_name).items():
        times[name] = {way: [] for way in ways}
        for turn in range(rounds + 1):  # the first warms up
            for way in sorted(ways, reverse=turn % 2 == 0):
                cpu.WIDENED = ways[way]  # type: ignore[misc]
                start = time.perf_counter()
                part()
                if turn:
                    times[name][way].append(time.perf_counter() - start)
    return times


def main() -> None:
    """One process for each limit and dtype, one line for each of its parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.rounds)))
        return
    import torch

    import hlat

    results = []
    for limit, capability in LIMITS.items():
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit, "ATEN_CPU_CAPABILITY": capability}
        for dtype in ("bf16", "fp16"):
            command = [sys.executable, __file__, "--one", dtype, "--rounds", str(args.rounds)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            for part, times in json.loads(done.stdout.splitlines()[-1]).items():
                ratios = [own / wide for own, wide in zip(times["own"], times["fp32"], strict=True)]
                middle = statistics.median(ratios)
                own, wide = (1e3 * statistics.median(times[way]) for way in ("own", "fp32"))
                span = f"{min(ratios):.2f} to {max(ratios):.2f}"
                print(f"{limit:12} {dtype} {part:10} {own:8.1f} ms {wide:8.1f} ms  {middle:.2f} ({span})")
                results.append({"limit": limit, "dtype": dtype, "part": part, "ratio": middle, **times})
    if args.out is not None:
        head = {
            "command": f"python tests/bench/narrow_products.py --rounds {args.rounds} --out {args.out.name}",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {
                "hlat": hlat.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
            "seeds": {"products": SEED},
        }
        args.out.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
