"""A folder in a store of S3, Google or Azure (extras s3, gcs, azure), or on a disk.

What is uploaded is compared with what the store then holds. Credentials are the store's own affair (for s3
AWS's usual chain: environment, profile, role of the instance); none is ever in a URL here, nor in a message.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from hlat.errors import UserError, missing_extra
from hlat.storage.transfer import side_by_side
from hlat.storage.urls import FORMS, KINDS, azure_place, check_url, scheme_of, without_login

PART = 64 << 20  # bytes of a part of a large upload, and of one read
MOST_PARTS = 10_000  # S3's limit; a larger file gets larger parts
_PAGE = 1000  # objects that one request of S3 deletes
_DEFECTS = (TypeError, AttributeError, NameError, AssertionError)
_S3_TIMES = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}
_AZURE_TIMES = {"connection_timeout": 10, "read_timeout": 60}
# Answers that no waiting changes. botocore's codes, and the exceptions that s3fs makes of them.
_LASTING = re.compile(
    r"NoSuchBucket|InvalidBucketName|AccessDenied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch"
    r"|credentials|bucket does not exist|Access Denied"
    r"|File name too long|KeyTooLong"
    r"|ContainerNotFound|AuthenticationFailed|Authorization(?:Failure|PermissionMismatch)"  # Azure
    r"|Anonymous caller|does not have storage\.|invalid_grant|Invalid bucket name",  # Google
    re.IGNORECASE,
)
# The same of a folder on a disk.
_LASTING_NUMBERS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,  # a root that cannot be made
    errno.ENOTDIR,
    errno.EEXIST,  # a file where the folder is to be
    errno.EISDIR,
    errno.EINVAL,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


class StoreError(Exception):
    """A store did not do what it was asked to. The text is a line.

    Args:
        text: what happened.
        kind: failures of one kind are told once.
        lasting: waiting does not help: no such bucket, no permission.
    """

    def __init__(self, text: str, kind: str = "", lasting: bool = False) -> None:
        super().__init__(text)
        self.kind, self.lasting = kind or text, lasting


class Remote:
    """A folder in a store. Paths are relative to it, with `/`. Safe to use from several threads.

    Raises UserError for a URL that is none, an unknown kind of store, or a package that is missing.
    """

    def __init__(self, url: str, where: str = "") -> None:
        if problem := check_url(url):
            raise UserError(f"'{without_login(url)}': {problem}", where=where, fix=FORMS)
        self.url = url.rstrip("/")
        self._fs, root = _open(self.url, where)
        self.root = root.rstrip("/")
        self._is_s3 = scheme_of(self.url) == "s3"

    def at(self, path: str) -> str:
        """The store's own name of a path in this folder."""
        return f"{self.root}/{path}" if path else self.root

    def files(self, folder: str = "") -> dict[str, int]:
        """Name, relative to this `Remote`, and bytes of every file under a folder. Raises StoreError."""
        start, inside = len(self.root) + 1, f"{self.at(folder)}/"
        return {
            name[start:]: int(item["size"])
            for name, item in self._find(folder).items()
            if item["type"] == "file" and name.startswith(inside)
        }

    def read(self, path: str) -> bytes:
        """A small file. Raises FileNotFoundError, StoreError."""
        with _told(f"reading {self.url}/{path}", absent=True):
            return bytes(self._fs.cat_file(self.at(path)))

    def write(self, path: str, data: bytes) -> None:
        """Write a small file; complete, or as it was, on stores that say so (S3). Raises StoreError."""
        with _told(f"writing {self.url}/{path}"):
            self._fs.pipe_file(self.at(path), data)
            if bytes(self._fs.cat_file(self.at(path))) != data:
                raise StoreError(f"{self.url}/{path} holds other bytes than were written", "content")

    def upload(self, file: Path, path: str) -> int:
        """Upload a file and compare what the store then holds (see `same`). Returns its bytes.

        Raises StoreError; OSError when the local file cannot be read.
        """
        size = file.stat().st_size
        part = max(PART, -(-size // MOST_PARTS))
        options = {"chunksize": part} if self._is_s3 else {}
        with _told(f"writing {self.url}/{path}"):
            self._fs.put_file(str(file), self.at(path), **options)
        if not self.same(file, path):
            raise StoreError(f"{self.url}/{path} holds other bytes than were written", "content")
        return size

    def same(self, file: Path, path: str) -> bool:
        """Whether the store holds the bytes of a local file: by the checksum that S3 names, else by reading
        them back. Raises FileNotFoundError, StoreError; OSError when the local file cannot be read.
        """
        size = file.stat().st_size
        with _told(f"reading {self.url}/{path}", absent=True):
            info = self._fs.info(self.at(path))
        if int(info["size"]) != size:
            return False
        tag = str(info.get("ETag", "")).strip('"')
        if tag and tag == _s3_tag(file, size, max(PART, -(-size // MOST_PARTS))):
            return True
        return self._digest(path, size) == _file_digest(file)

    def download(self, path: str, file: Path) -> None:
        """Write a file of the store to the disk and flush it. Raises FileNotFoundError, StoreError, and
        OSError when the disk does not take it.
        """
        with _told(f"reading {self.url}/{path}", absent=True):
            size = int(self._fs.info(self.at(path))["size"])
        with file.open("xb") as out:
            for block in self._blocks(path, size):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())

    def remove(self, path: str) -> None:
        """Delete a file, if there is one. Raises StoreError."""
        self._delete_file(path)

    def delete(self, folder: str, first: str, last: str = "") -> None:
        """Delete a folder, its file `first` before the others and `last` after them. Raises StoreError.

        Each file by its exact name: fsspec's `rm` reads `[`, `]`, `*` and `?` as a pattern, and would delete
        what other runs have in the store.
        """
        self._delete_file(f"{folder}/{first}")
        files = [path for path in self.files(folder) if path != f"{folder}/{last}"]
        if self._is_s3:  # it has no folders
            for start in range(0, len(files), _PAGE):
                self._delete_page(folder, files[start : start + _PAGE])
        else:
            side_by_side(self._delete_file, files)
        if last:
            self._delete_file(f"{folder}/{last}")
        if not self._is_s3:
            found = self._find(folder, withdirs=True)
            for name in sorted((n for n, item in found.items() if item["type"] != "file"), reverse=True):
                self._delete_empty(name)

    def abort_uploads(self, folders: Collection[str] | None = None) -> int:
        """Drop the parts of uploads to these folders (None: to all) that a killed process left unfinished; S3
        keeps (and bills) them unseen. Returns how many uploads. Raises StoreError.
        """
        if not self._is_s3 or not (folders is None or folders):
            return 0
        bucket, _, prefix = self.root.partition("/")
        with _told(f"listing unfinished uploads of {self.url}"):
            ask = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
            uploads: list[dict[str, Any]] = []
            while True:  # S3 names 1,000 at a time
                answer = self._fs.call_s3("list_multipart_uploads", **ask)
                uploads += answer.get("Uploads", [])
                if not answer.get("IsTruncated"):
                    break
                ask |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
            begin = len(f"{prefix}/") if prefix else 0
            if folders is not None:
                uploads = [one for one in uploads if one["Key"][begin:].partition("/")[0] in folders]
            for upload in uploads:
                which = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                self._fs.call_s3("abort_multipart_upload", **which)
            return len(uploads)

    def probe(self) -> None:
        """Write, read and delete a small file. Raises UserError when the store will never allow that,
        StoreError when it does not now.
        """
        name = f".probe-{os.getpid()}-{time.time_ns()}"
        try:
            self.write(name, b"hlat")
            self._delete_file(name)
        except StoreError as error:
            if error.lasting:
                fix = "correct the URL, the credentials in the environment, or their permissions"
                raise UserError(str(error), where="checkpoint.remote", fix=fix) from error
            raise

    def _find(self, folder: str, withdirs: bool = False) -> dict[str, dict[str, Any]]:
        """What fsspec knows of everything under a folder, by the store's own names."""
        with _told(f"listing {self.url}"):
            try:
                return dict(self._fs.find(self.at(folder), detail=True, withdirs=withdirs))
            except FileNotFoundError:
                return {}

    def _delete_file(self, path: str) -> None:
        with _told(f"deleting {self.url}/{path}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self.at(path))

    def _delete_page(self, folder: str, paths: Sequence[str]) -> None:
        """Up to 1,000 objects of S3 in one request."""
        bucket = self.root.partition("/")[0]
        keys = [{"Key": self.at(path).removeprefix(f"{bucket}/")} for path in paths]
        with _told(f"deleting {self.url}/{folder}"):
            wanted = {"Objects": keys, "Quiet": True}
            failed = self._fs.call_s3("delete_objects", Bucket=bucket, Delete=wanted).get("Errors", [])
            if failed:
                text = f"{failed[0].get('Code')} {failed[0].get('Message', '')}".strip()
                raise StoreError(
                    f"deleting {self.url}/{folder}: {len(failed)} of {len(keys)} objects: {text}",
                    str(failed[0].get("Code")),
                    bool(_LASTING.search(text)),
                )

    def _delete_empty(self, name: str) -> None:
        try:
            self._fs.rmdir(name)
        except _DEFECTS:
            raise
        except Exception:  # not empty, or a store without folders: what is left holds nothing
            return

    def _blocks(self, path: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, PART):
            with _told(f"reading {self.url}/{path}", absent=True):
                block = bytes(self._fs.cat_file(self.at(path), start=start, end=min(start + PART, size)))
            yield block

    def _digest(self, path: str, size: int) -> str:
        digest = hashlib.sha256()
        for block in self._blocks(path, size):
            digest.update(block)
        return digest.hexdigest()


def _open(url: str, where: str) -> tuple[Any, str]:
    scheme = scheme_of(url)
    kind = KINDS[scheme]
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        options |= {"skip_instance_cache": True, "config_kwargs": _S3_TIMES}
    if scheme == "file":
        options |= {"auto_mkdir": True}
    try:
        if kind.package == "adlfs":
            return _open_azure(url, where, options)
        import fsspec

        file_system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise missing_extra(
            kind.package or "fsspec", kind.extra or "s3", f"{where or url}: {scheme}://"
        ) from error
    except ValueError as error:
        raise UserError(f"'{url}': {error}", where=where, fix=f"write {kind.form}") from error
    return file_system, str(root)


def _open_azure(url: str, where: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The account and container of the URL, whatever account the environment has credentials of."""
    import adlfs

    account, root = azure_place(url)
    made = adlfs.AzureBlobFileSystem(
        account_name=account, skip_instance_cache=True, **_AZURE_TIMES, **options
    )
    if (other := made.service_client.account_name) not in (None, account):
        what = f"the environment has credentials of account {other}, not of {account}"
        raise UserError(what, where=where or url, fix="set AZURE_STORAGE_CONNECTION_STRING to those of it")
    return made, root


@contextlib.contextmanager
def _told(doing: str, absent: bool = False) -> Iterator[None]:
    """Turn whatever a store's library raises into a StoreError; with `absent` a missing file stays one."""
    try:
        yield
    except (StoreError, *_DEFECTS):
        raise
    except FileNotFoundError as error:
        if absent and not _LASTING.search(str(error)):
            raise
        raise _store_error(doing, error) from error
    except Exception as error:
        raise _store_error(doing, error) from error


def _store_error(doing: str, error: Exception) -> StoreError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    local = isinstance(error, OSError) and error.errno in _LASTING_NUMBERS
    lasting = isinstance(error, PermissionError) or local
    lasting = lasting or bool(_LASTING.search(f"{type(error).__name__} {error}"))
    return StoreError(f"{doing}: {lines[0][:200]}", type(error).__name__, lasting)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _s3_tag(file: Path, size: int, part: int) -> str:
    """S3's ETag of a file uploaded in parts of so many bytes: the MD5 of its content, or of its parts' MD5s.
    (With some encryptions the tag is something else.)
    """
    with file.open("rb") as stream:
        if size < 2 * part:  # s3fs sends it in one piece
            return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        digests = []
        while block := stream.read(part):
            digests.append(hashlib.md5(block, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
