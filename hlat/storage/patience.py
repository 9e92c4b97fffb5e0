"""Asking a store again while it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from hlat.errors import StorageFailed, UserError
from hlat.storage.remote import StoreError

Value = TypeVar("Value")


def patiently(
    work: Callable[[], Value],
    seconds: float,
    where: str,
    failure: Callable[[str], StorageFailed],
    *,
    pauses: tuple[float, float],
    warn: Callable[[str], None] = lambda line: None,
) -> Value:
    """What `work` returns, tried again while the store fails, for so many seconds.

    Args:
        work: raises StoreError when the store fails.
        seconds: how long.
        where: the recipe's key, for messages.
        failure: makes the error of a store that did not answer in that time.
        pauses: seconds between attempts: the first, doubled each time, and the longest.
        warn: told of the first failure.

    Raises what `failure` makes, and UserError when waiting would not help.
    """
    end, (pause, longest), told = time.monotonic() + seconds, pauses, False
    while True:
        try:
            return work()
        except StoreError as error:
            if error.lasting:
                fix = "correct the URL, the credentials in the environment, or their permissions"
                raise UserError(str(error), where=where, fix=fix) from error
            if time.monotonic() + pause > end:
                raise failure(f"the store did not answer for {seconds:.0f} s: {error}") from error
            if not told:
                warn(f"{where}: {error}; trying again for {seconds:.0f} s")
                told = True
        time.sleep(pause)
        pause = min(2 * pause, longest)
