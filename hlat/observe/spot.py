"""Notices of EC2 that a spot instance will be taken back, read from the instance's metadata service.

Two minutes before the end there is an interruption notice; a rebalance recommendation may come earlier, or
never lead to anything. The service is asked in version 2 (IMDSv2): a session token first.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from hlat.errors import UserError
from hlat.observe.stopping import REBALANCE, SPOT

BASE = "http://169.254.169.254"
ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # the SDKs' own variables
DISABLED = "AWS_EC2_METADATA_DISABLED"
INTERVAL = 5.0  # seconds between questions, as AWS recommends
_TOKEN_SECONDS = 21_600
_ANSWER_SECONDS = 2.0
_NOTICES = {
    SPOT: "/latest/meta-data/spot/instance-action",
    REBALANCE: "/latest/meta-data/events/recommendations/rebalance",
}
_VENDOR = Path("/sys/devices/virtual/dmi/id/sys_vendor")


def base_url(environ: Mapping[str, str], wanted: bool | str, vendor: Path = _VENDOR) -> str | None:
    """Where to ask; None where it is not to be asked.

    Args:
        environ: environment variables.
        wanted: `run.spot_notice`; auto: on EC2, or where a variable names the service.

    Raises UserError for a variable that is not a URL.
    """
    if wanted is False or environ.get(DISABLED, "").lower() == "true":
        return None
    base = environ.get(ENDPOINT, "").rstrip("/")
    if base and not base.startswith(("http://", "https://")):
        raise UserError(f"{base!r} is not a URL", where=ENDPOINT, fix=f"write {BASE}, or unset it")
    if base or wanted is True:
        return base or BASE
    try:
        return BASE if vendor.read_text(encoding="utf-8", errors="replace").strip() == "Amazon EC2" else None
    except OSError:
        return None


class SpotWatch:
    """Asks in a thread of its own, so that nothing ever waits for the service, and tells of each notice once.

    Args:
        base: URL of the service.
        notify: called from the thread with REBALANCE or SPOT.
        always: ask on an instance that is not a spot instance too.
        interval: seconds between questions.
    """

    def __init__(
        self,
        base: str,
        notify: Callable[[int], None],
        *,
        always: bool = False,
        interval: float = INTERVAL,
    ) -> None:
        self.base, self.notify, self.always, self.interval = base, notify, always, interval
        self._token = ""
        self._stop = threading.Event()
        # No proxy: the service answers on the instance alone.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(self) -> None:
        """Begin to ask."""
        threading.Thread(target=self._run, name="spot-notice", daemon=True).start()

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()

    def _run(self) -> None:
        told: set[int] = set()
        asks = self.always
        while SPOT not in told:
            try:
                if not asks:
                    if self._get("/latest/meta-data/instance-life-cycle") not in ("spot", None):
                        return
                    asks = True
                for cause, path in _NOTICES.items():
                    if cause not in told and self._get(path) is not None:
                        told.add(cause)
                        self.notify(cause)
            except (OSError, HTTPException, ValueError):  # busy, restarting, or not there: ask again
                self._token = ""
            if self._stop.wait(self.interval):
                return

    def _get(self, path: str) -> str | None:
        """What the service has under a path; None for nothing. Raises OSError."""
        if not self._token:
            self._token = self._ask(
                "PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds", str(_TOKEN_SECONDS)
            )
        try:
            return self._ask("GET", path, "X-aws-ec2-metadata-token", self._token)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise  # 401: the token has expired, the next one is asked for

    def _ask(self, method: str, path: str, header: str, value: str) -> str:
        request = urllib.request.Request(self.base + path, method=method, headers={header: value})
        with self._opener.open(request, timeout=_ANSWER_SECONDS) as answer:
            text: str = answer.read(4096).decode("utf-8", "replace")
            return text.strip()


@contextmanager
def watching(wanted: bool | str, notify: Callable[[int], None]) -> Iterator[None]:
    """Watch for notices inside, where `base_url` finds a service to ask."""
    base = base_url(os.environ, wanted)
    watch = SpotWatch(base, notify, always=wanted is True, interval=INTERVAL) if base else None
    if watch is not None:
        watch.start()
    try:
        yield
    finally:
        if watch is not None:
            watch.stop()
