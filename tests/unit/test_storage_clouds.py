"""Stores of Google and Azure: the same as S3 and a disk, against servers of their kind on loopback.

Google's is the package gcp-storage-emulator. Azure's is `azurite-blob` of npm's package azurite, if it is on
PATH (`npm install -g azurite`).
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hlat.checkpoint.folder import step_folder
from hlat.checkpoint.mirror import Mirror
from hlat.checkpoint.store import CheckpointStore
from hlat.errors import UserError
from hlat.storage.remote import Remote
from tests.unit import test_train_command as small

place, train, rows = small.place, small.train, small.rows  # `place` is a fixture
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def google() -> Iterator[dict[str, str]]:
    """The environment for a server with the bucket `bucket`."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    made = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    made.start()
    yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
    made.stop()


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for a server with the container `bucket` of the account `devstoreaccount1`."""
    blob = pytest.importorskip("azure.storage.blob")
    pytest.importorskip("adlfs")
    if (program := shutil.which("azurite-blob")) is None:
        pytest.skip("no azurite-blob on PATH: npm install -g azurite")
    port, folder = free_port(), tmp_path_factory.mktemp("azurite")
    command = [
        program,
        "--blobPort",
        str(port),
        "--location",
        str(folder),
        "--skipApiVersionCheck",
        "--silent",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    account = "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1"
    text = f"{account};AccountKey={KEY};BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.1)
        with blob.BlobServiceClient.from_connection_string(text) as client:
            client.create_container("bucket")
        yield {"AZURE_STORAGE_CONNECTION_STRING": text}
    finally:
        process.kill()
        process.wait()


SLOW = pytest.mark.slow  # the server of Azure takes seconds to start


@pytest.fixture(params=["gs", pytest.param("abfs", marks=SLOW), pytest.param("abfss", marks=SLOW)])
def base(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of an empty folder in a store."""
    for name, value in request.getfixturevalue("google" if request.param == "gs" else "azure").items():
        monkeypatch.setenv(name, value)
    if request.param == "gs":
        return f"gs://bucket/{tmp_path.name}"
    account = {"abfs": "devstoreaccount1", "abfss": "devstoreaccount1.dfs.core.windows.net"}[request.param]
    return f"{request.param}://bucket@{account}/{tmp_path.name}"


def test_what_is_written_is_read_listed_and_deleted(base: str, tmp_path: Path) -> None:
    remote = Remote(f"{base}/run")
    remote.probe()
    assert remote.files() == {}
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 5000)
    remote.upload(file, "step-1/data")
    remote.write("step-1/first", b"x")
    remote.write("step-1/[a]*?.json".replace("?", ""), b"yy")
    remote.write("step-11/other", b"zzz")
    Remote(f"{base}/run2").write("near", b"n")
    assert remote.files() == {
        "step-1/data": 1280000,
        "step-1/first": 1,
        "step-1/[a]*.json": 2,
        "step-11/other": 3,
    }
    assert remote.same(file, "step-1/data") and remote.read("step-1/first") == b"x"
    remote.download("step-1/data", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    remote.write("step-1/data", file.read_bytes()[:-1] + b"!")
    assert not remote.same(file, "step-1/data"), "as long, and other bytes"
    with pytest.raises(FileNotFoundError):
        remote.read("step-1/none")
    remote.delete("step-1", "first", "data")
    assert remote.files() == {"step-11/other": 3} and Remote(f"{base}/run2").files() == {"near": 1}


def test_a_copy_comes_back_as_it_was(base: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    mirror = Mirror(Remote(f"{base}/run"), store.root, keep=1)
    for step in (1, 2):
        store.save(step, {"a": torch.full((50,), float(step))}, {}, step, wait=True)
        mirror.upload(step_folder(store.root, step))
        mirror.tidy()
    other = Mirror(Remote(f"{base}/run"), tmp_path / "other" / "checkpoints", keep=1)
    (copy,) = other.copies()
    assert other.fetch(copy).name == "step-00000002" and other.look().unfinished == []


def test_a_bucket_that_is_not_there_is_refused_at_once(base: str) -> None:
    with pytest.raises(UserError, match="writing"):
        Remote(base.replace("bucket", "nosuchbucket", 1)).probe()


@pytest.mark.slow
def test_credentials_of_another_account_are_refused(
    azure: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in azure.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="credentials of account devstoreaccount1, not of other"):
        Remote("abfs://bucket@other/x")


@pytest.mark.slow
def test_a_run_is_continued_on_an_empty_disk(base: str, place: Path) -> None:
    remote = f"checkpoint.remote={base}"
    assert train(remote, "run.stop_at_step=4") == 0
    shutil.rmtree("runs")
    assert train(remote) == 0
    assert [row["step"] for row in rows("runs/small")] == [1, 2, 3, 4, 5, 6]
    secret = KEY.encode()
    assert not any(secret in file.read_bytes() for file in Path("runs").rglob("*") if file.is_file())
    assert json.loads(Path("runs/small/environment.json").read_text())["starts"]
