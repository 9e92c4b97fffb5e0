"""One rank of an evaluation: tasks of a folder on a model, cut in several ways, results into a folder.

    RANK=0 WORLD_SIZE=2 … python eval_ranks.py JOBS.json

A job is {"out", "target", "tasks", "include", "tp", "pp", "batch_size", "sequence", "dtype"}; the first rank
writes the harness's results to `out`. With `sequence` the model is one as a run with sequence parallelism has
it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hlat.backend.native import NativeBackend
from hlat.evaluate.job import Evaluation, gathered, run_with
from hlat.evaluate.results import write_json
from hlat.evaluate.running import Selection, load_tasks, run_tasks
from hlat.evaluate.target import choose_layout, load_team, open_target
from hlat.evaluate.team import Team


def sequence_team(job: dict) -> Team:
    """This rank's part of a model whose stream is split along the sequence."""
    target = open_target(job["target"])
    layout = replace(choose_layout(target.source, job["tp"], job["tp"], 1), sequence=True)
    backend = NativeBackend(
        layout, device=torch.device("cpu"), kv_heads=target.source.meta["model"]["kv_heads"]
    )
    return load_team(target, backend, getattr(torch, job["dtype"]))


def main(jobs: Path) -> None:
    """Work through the jobs in one group of ranks."""
    with gathered() as cluster:
        for job in json.loads(jobs.read_text()):
            evaluation = Evaluation(cluster, tp=job["tp"], pp=job["pp"], dtype=getattr(torch, job["dtype"]))
            selection = Selection(
                tuple(job["tasks"]),
                include=job["include"],
                batch_size=job["batch_size"],
            )
            if job.get("sequence"):
                team = sequence_team(job)
                results = run_with(
                    team, lambda team=team, chosen=selection: run_tasks(team, load_tasks(chosen))
                )
            else:
                results = evaluation.run(open_target(job["target"]), selection)
            if results is not None:
                write_json(results, job["out"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
