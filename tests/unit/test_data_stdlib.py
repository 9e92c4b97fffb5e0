"""The two sets of examples made from the standard library."""

from __future__ import annotations

from collections import Counter

from hlat.data.stdlib import PACKAGES, documented_functions, labelled_functions


def test_packages_are_balanced_and_do_not_say_their_name() -> None:
    records = list(labelled_functions())
    counts = Counter(record["label"] for record in records)
    assert set(counts) == set(PACKAGES)
    assert len(set(counts.values())) == 1
    assert counts["xml"] >= 100
    leaks = [r for r in records for name in PACKAGES if name in r["text"].lower()]
    assert leaks == []
    assert len({record["text"] for record in records}) == len(records)
    assert all(record["file"].startswith(f"{record['label']}/") for record in records)
    assert records == list(labelled_functions())


def test_docstrings_are_sentences_beside_signatures() -> None:
    records = list(documented_functions())
    assert len(records) > 2000
    for record in records:
        assert record["signature"].startswith(("def ", "async def "))
        assert "\n" not in record["summary"]
        assert record["summary"][-1] in ".!?"
