"""Whatever the bytes of a file are: documents, counted drops, or one line that names the file."""

import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hlat.data import json_values
from hlat.data import sources as sources_module
from hlat.data.readers import read_pieces
from hlat.data.records import Records
from hlat.data.sources import resolve_source, units
from hlat.errors import UserError

RECORDS = [{"text": f"record {n} ü", "meta": {"b": [n, None, 1.5]}} for n in range(4)]
LINES = "\n".join(map(json.dumps, RECORDS)).encode()
ARRAY = json.dumps(RECORDS, indent=1, ensure_ascii=False).encode()
SEEDS = [
    ("x.jsonl", LINES),
    ("x.json", LINES),
    ("x.json", ARRAY),
    ("x.json", json.dumps(RECORDS[0], indent=1).encode()),
    ("x.txt", ARRAY),
    ("x.jsonl.gz", gzip.compress(LINES) * 2),
    ("x.json.xz", lzma.compress(ARRAY)),
    ("x.json.bz2", bz2.compress(ARRAY)),
]
WORDS = [
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b'"',
    b"\\",
    rb"\ud800",
    b"NaN",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
]
WORDS += [
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\x1f\x8b",
    b"(\xb5/\xfd",
    b"PAR1",
    b"ARROW1\0\0",
    b"\xe2\x82",
]
EDITS = st.lists(
    st.tuples(st.integers(0, 2**20), st.integers(0, 12), st.sampled_from(WORDS) | st.binary(max_size=3)),
    max_size=4,
)


def edited(content, edits):
    for at, gone, put in edits:
        at %= len(content) + 1
        content = content[:at] + put + content[at + gone :]
    return content


@given(
    st.sampled_from(SEEDS), EDITS, st.sampled_from([1, 5, 2**20]), st.sampled_from(["text", "meta.b", "x"])
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_counted_or_refused(tmp_path, seed, edits, step, field):
    name, content = seed
    content = edited(content, edits)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "UNIT_BYTES_MIN", max(step, 50))
        patch.setattr(json_values, "_CHUNK", step)
        try:
            source = resolve_source(path=path, text_field=field)
            found = [d for unit in units(source) for d in read_pieces(source.files, unit, field)]
            assert all((document.text is None) == bool(document.reason) for document in found)
            assert all(document.text.encode() for document in found if document.text is not None)
            records = list(Records(str(path), None, "data.examples").read()) if name != "x.txt" else []
            assert all((record.values is None) == bool(record.reason) for record in records)
        except UserError as error:
            assert "\n" not in error.line() and (not content or name in error.line())
