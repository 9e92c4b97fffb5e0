"""Runs torchrun for one attempt and writes down how each rank ended.

    python -m hlat.supervise.agent RESULT [torchrun's arguments]

torchrun's own exit status only says that some rank failed. RESULT gets {"codes": {rank: status}}, a negative
status for a signal, as `subprocess` has it; with "refused", the error line, where no rank could be started.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from hlat.errors import UserError
from hlat.observe.heartbeat import die_with_parent
from hlat.supervise.scratch import write_result


def main() -> int:
    """0 when every rank ended with 0, 128 + the signal that ended it, else 1."""
    die_with_parent(signal.SIGTERM)  # torchrun ends its workers on SIGTERM
    result, arguments = Path(sys.argv[1]), sys.argv[2:]
    logging.disable(logging.ERROR)  # torchrun's own account of a failure; the supervisor gives one
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.run import config_from_args, elastic_launch, parse_args

    from hlat.supervise import rendezvous

    rendezvous_handler_registry.register(rendezvous.NAME, rendezvous.create)
    config, command, command_args = config_from_args(parse_args(arguments))
    config.rdzv_backend = rendezvous.NAME
    codes: dict[int, int] = {}
    refused = ""
    try:
        elastic_launch(config=config, entrypoint=command)(*command_args)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:  # its supervisor ends it, or is gone: torchrun has ended the ranks
        return 128 + int(error.sigval)
    except UserError as error:
        refused = f"hlat: error: {error}"
        print(refused, file=sys.stderr, flush=True)
    write_result(result, {"codes": codes, "refused": refused})
    return 1 if codes or refused else 0


if __name__ == "__main__":
    sys.exit(main())
