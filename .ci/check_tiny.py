"""Check what `make train` left in its run folder: held-out bits per byte fell and ended below the limit.

python .ci/check_tiny.py runs/tiny
"""

import json
import sys
from pathlib import Path

LIMIT_BITS_PER_BYTE = 2.0
LEAST_STEPS = 300


def problems(run: Path) -> list[str]:
    """What is wrong with the tiny run, one line each; empty when all is well."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    bits = [row["bits_per_byte"] for row in rows if row["kind"] == "eval"]
    found = []
    if [row["step"] for row in train] != list(range(1, len(train) + 1)) or len(train) < LEAST_STEPS:
        found.append(f"one row for every step 1..{LEAST_STEPS} or more expected, got {len(train)}")
    if len(bits) < 3 or sorted(bits, reverse=True) != bits:
        found.append(f"held-out bits per byte shall be measured at least three times and fall: {bits}")
    if not bits or not bits[-1] < LIMIT_BITS_PER_BYTE:
        found.append(f"final held-out bits per byte shall be below {LIMIT_BITS_PER_BYTE}: {bits[-1:]}")
    if not found:
        print(f"{len(train)} steps, held-out bits per byte {' -> '.join(f'{b:.3f}' for b in bits)}")
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    sys.exit("\n".join(wrong) if wrong else 0)
