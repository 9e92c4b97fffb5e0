"""The command line of HLAT, with the stand-ins put in as soon as torch.distributed is initialised."""

from __future__ import annotations

import sys
from typing import Any

import nxd_host
import torch.distributed as dist

from hlat.backend.nxd.start import cpu_mode
from hlat.cli import main

_init = dist.init_process_group


def init_process_group(*args: Any, **kwargs: Any) -> None:
    _init(*args, **kwargs)
    (nxd_host.cpu_mode if cpu_mode() else nxd_host.xla_bridge)()


dist.init_process_group = init_process_group

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
