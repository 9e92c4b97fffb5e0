"""One rank of an evaluation: tasks of a folder on a model, cut in several ways, results into a folder.

    RANK=0 WORLD_SIZE=2 … python eval_ranks.py JOBS.json

A job is {"out", "target", "tasks", "include", "tp", "pp", "batch_size", "limit"}; the first rank writes the
harness's results to `out`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hlat.evaluate.job import Evaluation, gathered
from hlat.evaluate.results import write_json
from hlat.evaluate.running import Selection
from hlat.evaluate.target import open_target


def main(jobs: Path) -> None:
    """Work through the jobs in one group of ranks."""
    with gathered() as cluster:
        for job in json.loads(jobs.read_text()):
            evaluation = Evaluation(cluster, tp=job["tp"], pp=job["pp"], dtype=torch.float32)
            selection = Selection(
                tuple(job["tasks"]),
                include=job["include"],
                batch_size=job["batch_size"],
                limit=job.get("limit"),
            )
            results = evaluation.run(open_target(job["target"]), selection)
            if results is not None:
                write_json(results, job["out"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
