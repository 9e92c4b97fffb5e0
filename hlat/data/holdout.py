"""Held-out batches, and the bytes of text their targets stand for.

The stream is EOS, then the held-out documents, each followed by its EOS; rows of S targets cut it without
overlap. So every token of a document is a target exactly once, the first one included: it is predicted from
the EOS before it. Documents come in the order of their content hash, which is as good as random, so that a
few batches sample all sources. What follows the last row asked for is not part of
the measurement, and a document cut there counts with the bytes of its tokens that were targets.

Bits per byte = (sum of -log2 p over the targets) / `text_bytes`. The EOS targets cost bits and stand for no
bytes. With the document mask the first token of a document is no target (there is nothing to predict it
from); its bytes are then taken out of the count too. Where documents begin with BOS that is their first
token: it is never a target and stands for no bytes, with or without the mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

import numpy as np

from hlat.data.batch import IGNORE, Batch, make_batch
from hlat.data.packed import TokenFolder
from hlat.data.tokenizer import Tokenizer


class HoldoutStream:
    """The held-out documents of all sources.

    Args:
        folders: the tokenized folders in recipe order.
        seq_len: targets per row.
        bos_id: what documents begin with; None: nothing.
    """

    def __init__(
        self,
        folders: Sequence[TokenFolder],
        tokenizer: Tokenizer,
        seq_len: int,
        document_mask: bool,
        bos_id: int | None = None,
    ) -> None:
        assert tokenizer.eos_id is not None
        self._tokenizer, self._seq_len, self._mask, self._eos = (
            tokenizer,
            seq_len,
            document_mask,
            tokenizer.eos_id,
        )
        self._bos = bos_id
        self._first_is_given = document_mask or bos_id is not None
        self._shards = [shard for folder in folders for shard in folder.shards["holdout"]]
        self._measure = lru_cache(maxsize=8)(self._measure_targets)

    @cached_property
    def _table(self) -> np.ndarray:
        """(documents, 4) int64: shard, first token, end, bytes of text; in the order of evaluation."""
        parts, marks = [np.zeros((0, 4), dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
        for number, shard in enumerate(self._shards):
            ends = shard.table[:, 0].astype(np.int64)
            starts = np.append(0, ends[:-1])
            parts.append(
                np.stack(
                    [np.full_like(ends, number), starts, ends, shard.table[:, 1].astype(np.int64)], axis=1
                )
            )
            marks.append(np.asarray(shard.table[:, 2]))
        return np.concatenate(parts)[np.argsort(np.concatenate(marks), kind="stable")]

    @property
    def documents(self) -> int:
        """Number of held-out documents."""
        return len(self._table)

    @cached_property
    def targets(self) -> int:
        """Tokens of the whole stream that can be targets (without a document mask)."""
        return int((self._table[:, 2] - self._table[:, 1]).sum())

    def content(self) -> str:
        """Hash (hex sha256) of which documents are held out, by their text: the same for every tokenizer."""
        marks = [np.asarray(shard.table[:, 2]) for shard in self._shards]
        return hashlib.sha256(np.sort(np.concatenate(marks)).tobytes() if marks else b"").hexdigest()

    def batches(self, batch_size: int, rows: int | None = None) -> Iterator[Batch]:
        """The first `rows` rows (all for None) in batches of `batch_size`.

        The last one is filled with EOS that are no targets.
        """
        remaining = self._limit(rows)
        stream = self._tokens()
        buffer = np.array([self._eos], dtype=np.int64)
        per_batch = batch_size * self._seq_len
        for _ in range(-(-remaining // per_batch)):
            parts = [buffer]
            have = len(buffer)
            while have < per_batch + 1 and (document := next(stream, None)) is not None:
                parts.append(document)
                have += len(document)
            filled = np.concatenate(parts)
            chunk, buffer = filled[: per_batch + 1], filled[per_batch:]
            padded = np.full(per_batch + 1, self._eos, dtype=np.int64)
            padded[: len(chunk)] = chunk
            index = np.arange(batch_size)[:, None] * self._seq_len + np.arange(self._seq_len + 1)
            batch = make_batch(padded[index], self._eos, self._mask, self._bos)
            batch.targets.view(-1)[max(0, min(remaining, per_batch)) :] = IGNORE
            remaining -= per_batch
            yield batch

    def text_bytes(self, rows: int | None = None) -> int:
        """Bytes of text whose tokens are the targets of these rows.

        Exact for byte-level tokenizers. For others exact but for what normalisation does to the one cut
        document and, with the document mask, to first tokens.
        """
        return self._measure(self._limit(rows))[0]

    def targets_in(self, rows: int | None = None) -> int:
        """Number of targets in these rows."""
        return self._measure(self._limit(rows))[1]

    def text(self, rows: int | None = None) -> bytes:
        """The text that `text_bytes` counts, decoded from the tokens.

        What to give gzip for a comparable figure.
        """
        limit = self._limit(rows)
        return b"".join(self._tokenizer.decode_bytes(part) for part in self._scored(limit))

    def _limit(self, rows: int | None) -> int:
        return self.targets if rows is None else min(self.targets, rows * self._seq_len)

    def _tokens(self) -> Iterator[np.ndarray]:
        for shard, start, end, _ in self._table:
            yield self._shards[shard].ids(int(start), int(end))

    def _scored(self, limit: int) -> Iterator[np.ndarray]:
        """Of each document the tokens that are targets and stand for text, in the first `limit` places."""
        for tokens in self._tokens():
            if limit <= 0:
                return
            yield tokens[: min(limit, len(tokens) - 1)][1 if self._first_is_given else 0 :]
            limit -= len(tokens)

    def _measure_targets(self, limit: int) -> tuple[int, int]:
        """(bytes, targets) of the first `limit` places of the stream."""
        total, first_tokens, left = 0, 0, limit
        for (_, start, end, size), tokens in zip(self._table, self._tokens(), strict=True):
            if left <= 0:
                break
            body = tokens[: min(left, int(end - start) - 1)]
            whole = left >= int(end - start) - 1
            own = body if self._bos is None else body[1:]
            total += int(size) if whole else self._tokenizer.count_bytes(own)
            if self._first_is_given:
                first_tokens += 1
                total -= 0 if self._bos is not None else self._tokenizer.count_bytes(body[:1])
            left -= int(end - start)
        return total, limit - first_tokens
