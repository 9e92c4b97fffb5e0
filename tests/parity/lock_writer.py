"""A run without a model: python lock_writer.py FOLDER STEPS. It holds the folder, writes rows, saves its step
every ten steps as a checkpoint would be saved, and continues from the newest. Torch is not needed for that.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hlat.errors import UserError
from hlat.observe.jsonl import replace_file
from hlat.observe.runfolder import RunFolder
from hlat.observe.sinks import JsonlSink


def main(path: Path, last: int) -> int:
    with RunFolder(path).start("", "", description={}, say=print) as folder:
        saved = folder.checkpoints / "saved"
        step = int(saved.read_text()) if saved.exists() else 0
        rows = JsonlSink(folder.path, step, folder.claim)
        while step < last:
            step += 1
            time.sleep(0.01)
            rows.row({"kind": "train", "step": step})
            rows.flush()
            if step % 10 == 0:
                assert rows.sync() is None
                folder.claim.confirm()
                replace_file(saved, f"{step}".encode())
        rows.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
    except UserError as error:
        print(f"hlat: error: {error.line()}")
        sys.exit(error.exit_code)
