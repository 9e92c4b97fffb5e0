"""The local tasks: only what is held out, the same every time, and answers that are right."""

from __future__ import annotations

import pytest

from hlat.data.packed import document_hash, holdout_threshold
from hlat.errors import UserError
from hlat.evaluate import offline
from hlat.evaluate.reference import PUBLISHED

pytest.importorskip("datasets")


def test_documents_are_the_held_out_ones_and_nested() -> None:
    small, large = offline.held_out_documents(0.02), offline.held_out_documents(0.05)
    assert all(document_hash(text.encode()) == mark < holdout_threshold(0.02) for mark, text in small)
    assert small == large[: len(small)] and len(large) > len(small) > 0
    with pytest.raises(UserError, match="no document"):
        offline.held_out_documents(1e-9)


def test_a_run_trained_on_the_library_has_not_seen_them() -> None:
    from hlat.data.readers import read_pieces
    from hlat.data.sources import resolve_source, units

    source = resolve_source(dataset="python-stdlib")
    texts = [d.text for unit in units(source) for d in read_pieces(source.files, unit, "text") if d.text]
    trained = {t for t in texts if document_hash(t.encode()) >= holdout_threshold(0.05)}
    asked = [text for _, text in offline.held_out_documents(0.05)]
    assert not trained & set(asked) and set(asked) <= set(texts)


def test_cloze() -> None:
    rows = list(offline.cloze(0.05)["test"])
    documents = [text for _, text in offline.held_out_documents(0.05)]
    assert len(rows) > 100
    places = [row["answer"] for row in rows]
    assert all(0.15 < places.count(k) / len(rows) < 0.35 for k in range(4))
    for row in rows[::10]:
        assert len(set(row["choices"])) == 4 and len(row["context"]) <= offline.WINDOW
        right = row["context"] + row["choices"][row["answer"]]
        assert any(right in text for text in documents)


def test_functions_and_docstrings() -> None:
    rows, turned = list(offline.docstring(0.05)["test"]), list(offline.function(0.05)["test"])
    assert len(rows) == len(turned) > 100
    for row, other in zip(rows, turned, strict=True):
        assert row["choices"][row["answer"]] == other["docstring"]
        assert other["choices"][other["answer"]] == row["context"]
        assert len(set(row["choices"])) == len(set(other["choices"])) == 4


@pytest.mark.parametrize("make", [offline.code_bits, offline.docstring_bits, offline.comment_bits])
def test_texts(make) -> None:
    texts = [row["text"] for row in make(0.05)["test"]]
    assert len(texts) == len(set(texts)) > 50
    assert all(80 <= len(text) <= offline.LONGEST_TEXT for text in texts)
    offline.held_out_documents.cache_clear()
    assert texts == [row["text"] for row in make(0.05)["test"]]


def test_every_task_of_the_paper_exists() -> None:
    """The data sets lie on a hub; that the harness knows the names is what can be checked here."""
    tasks = pytest.importorskip("lm_eval.tasks")
    from hlat.evaluate.running import TASKS, Selection, _check_safety, _members

    manager = tasks.TaskManager(include_path=[str(TASKS)])
    members = manager.task_index["hlat-paper"].cfg["task"]
    names = {str(m.get("group") or m["task"]) for m in members}
    for member in members:
        names |= set(member["task"]) if isinstance(member.get("task"), list) else set()
    assert {name for name in names if name not in manager.task_index} == {
        "hlat-commonsense",
        "hlat-world-knowledge",
    }
    with pytest.raises(UserError, match="task 'humaneval' runs code"):
        _check_safety(manager, Selection(("hlat-paper",)))
    _check_safety(manager, Selection(("hlat-paper",), allow_code=True))
    _check_safety(manager, Selection(("hlat-offline", "mmlu")))
    assert {"piqa", "mmlu_anatomy", "nq_open"} <= {name for name, _ in _members(manager, ["hlat-paper"])}
    shots = {m.get("group") or m["task"]: m.get("num_fewshot") for m in members}
    assert shots["mmlu"] == 5 and shots["gsm8k"] == 8 and shots["hlat-commonsense"] == 0


def test_published_values() -> None:
    assert any((p.task, p.model, p.value) == ("mmlu", "HLAT-7B", 41.318) for p in PUBLISHED)
    assert all(0 < p.value < 100 and p.source for p in PUBLISHED)


def test_a_task_that_trusts_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    import datasets

    from hlat.evaluate.running import Selection, _check_safety

    entry = types.SimpleNamespace(
        cfg={"dataset_kwargs": {"trust_remote_code": True}}, yaml_path="x", tags=set()
    )
    manager = types.SimpleNamespace(task_index={"old": entry})
    _check_safety(manager, Selection(("old",)))
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(UserError, match="run code from the hub"):
        _check_safety(manager, Selection(("old",)))


def test_random_states_are_put_back() -> None:
    import random

    import numpy as np
    import torch

    from hlat.evaluate.running import same_random_state

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with same_random_state():
        assert draw() == expected
        torch.manual_seed(5)
    assert draw() == expected
