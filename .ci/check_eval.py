"""Check what `make eval` left in the run folder: the model of `make train` does better than chance on at
least two kinds of questions, by more than three standard errors.

python .ci/check_eval.py runs/tiny/offline.json
"""

import json
import sys
from pathlib import Path

LEAST_TASKS, LEAST_ERRORS = 2, 3.0
CHOICES = ("acc", "acc_mutual_info")  # figures of questions with a level of chance between 0 and 1


def above_chance(results: dict) -> dict[str, str]:
    """The tasks that are, and by how much."""
    found = {}
    for task, levels in results["hlat"]["chance"].items():
        for metric, level in levels.items():
            value = results["results"][task].get(f"{metric},none")
            error = results["results"][task].get(f"{metric}_stderr,none")
            if metric not in CHOICES or not isinstance(value, float) or not isinstance(error, float):
                continue
            if error > 0 and (value - level) / error > LEAST_ERRORS:
                found[task] = f"{metric} {value:.3f} ± {error:.3f}, chance {level:.2f}"
    return found


if __name__ == "__main__":
    better = above_chance(json.loads(Path(sys.argv[1]).read_text()))
    print("\n".join(f"{task}: {text}" for task, text in better.items()))
    sys.exit(0 if len(better) >= LEAST_TASKS else f"above chance on {len(better)} tasks, not {LEAST_TASKS}")
