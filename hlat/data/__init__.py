"""Text in, batches out.

`open_data(recipe)` is what training calls; it is resolved on first use, so that the tokenizing worker
processes, which import this package, do not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hlat.data.batch import Batch as Batch
    from hlat.data.loader import Data as Data
    from hlat.data.loader import open_data as open_data

__all__ = ["Batch", "Data", "open_data"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hlat.data' has no attribute {name!r}")
    import importlib

    return getattr(
        importlib.import_module("hlat.data.batch" if name == "Batch" else "hlat.data.loader"), name
    )
