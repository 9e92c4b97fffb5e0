"""What a process asks before it writes in a run folder."""

from __future__ import annotations


class Claim:
    """Nobody's: for folders without a lock, and for ranks other than the first, which write at its word.

    Attributes:
        name: stands in rows, so that it can be seen who wrote them; empty here.
        turn: a number higher than those of all who held the folder before; 0 where it is not known.
    """

    name = ""
    turn = 0

    def confirm(self) -> None:
        """Return if this process still holds the folder. Call it before a save, a deletion, an upload and a
        flush of rows.

        Raises:
            FolderLost: another process has taken it over: nothing may be written any more.
            OSError: it cannot be seen at the moment.
        """

    def check_place(self) -> None:
        """Raise FolderLost where the folder is known to have been moved, deleted or replaced. Call it before
        a save: rows may wait for a folder that comes back, state that is never saved is lost.
        """


UNCLAIMED = Claim()
