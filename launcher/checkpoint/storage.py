"""Where checkpoints lie: a folder (local disk, NFS) or a URL (s3://, gs://), behind the same few verbs.

A file appears whole or not at all: locally it is written beside its place, synced and renamed; an object
store shows an object once its upload is complete. `watch` is called with a word before and after each
operation that a kill could fall between; the kill tests end the process in it, others count bytes with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from launcher.errors import CheckpointError

Watch = Callable[[str], None]
UNFINISHED = ".unfinished"
"""Ends the name of a local file that is still being written."""


class Storage(Protocol):
    """Files by name below one place; a name may have slashes."""

    url: str

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Replace a file by these bytes: durable and whole when it returns."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A file's bytes, or a range of them. Raises FileNotFoundError; a range past the end comes back short."""

    def read_into(self, name: str, start: int, buffers: Sequence[memoryview]) -> int:
        """Fill buffers, one after the other, with the bytes from `start` on; returns how many there were. Raises FileNotFoundError."""

    def list(self, folder: str = "") -> dict[str, int]:
        """Names and sizes of all files below a folder; empty where there is no such folder."""

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all in it; one that is not there is no error."""


def open_storage(url: str, watch: Watch | None = None) -> Storage:
    """The storage of a path or URL. Raises CheckpointError for a scheme that nothing here reads, or a URL without a bucket."""
    watch = watch or _ignore
    if "://" not in url:
        return LocalStorage(Path(url), watch)
    if url.startswith("file://"):
        return LocalStorage(Path(url.removeprefix("file://")), watch)
    return RemoteStorage(url, watch)


def join_url(url: str, *names: str) -> str:
    """The URL or path of something below another; the query of a URL stays at its end."""
    place, mark, query = url.partition("?")
    return "/".join([place.rstrip("/"), *names]) + mark + query


def _ignore(word: str) -> None:
    return None


class LocalStorage:
    """A folder that this machine sees."""

    def __init__(self, root: Path, watch: Watch) -> None:
        self.url, self._root, self._watch = str(root), root, watch

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        path = self._root / name
        with self._watched(f"mkdir {name}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + UNFINISHED)
        with self._watched(f"open {name}"):
            file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            try:
                for part in parts:
                    with self._watched(f"write {name}"):
                        _write_all(file, part)
                with self._watched(f"fsync {name}"):
                    os.fsync(file)
            finally:
                os.close(file)
            with self._watched(f"rename {name}"):
                os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)  # a full disk gets its space back
            raise
        with self._watched(f"fsync folder of {name}"):
            _sync_folder(path.parent)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with (self._root / name).open("rb") as file:
            file.seek(start)
            data = file.read(length if length is not None else -1)
        self._watch(f"read {len(data)} {name}")
        return data

    def read_into(self, name: str, start: int, buffers: Sequence[memoryview]) -> int:
        with (self._root / name).open("rb") as file:
            count = _read_all(file.fileno(), start, buffers)
        self._watch(f"read {count} {name}")
        return count

    def list(self, folder: str = "") -> dict[str, int]:
        found = {}
        for place, _, names in os.walk(self._root / folder):  # which passes over folders that are gone: another process may be pruning
            for name in names:
                path = Path(place, name)
                with contextlib.suppress(FileNotFoundError):
                    if not name.endswith(UNFINISHED):
                        found[str(path.relative_to(self._root))] = path.stat().st_size
        return dict(sorted(found.items()))

    def delete(self, name: str) -> None:
        path = self._root / name
        with self._watched(f"delete {name}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _watched(self, word: str) -> Iterator[None]:
        self._watch(f"before {word}")
        yield
        self._watch(f"after {word}")


def _write_all(file: int, part: bytes | memoryview) -> None:
    rest = memoryview(part)
    while rest:
        rest = rest[os.write(file, rest) :]


def _read_all(file: int, start: int, buffers: Sequence[memoryview]) -> int:
    rest, done = list(buffers), 0
    while rest and (count := os.preadv(file, rest, start + done)):
        done += count
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][count:]
    return done


def _sync_folder(folder: Path) -> None:
    """Makes a rename in a folder survive a power cut, where the file system lets folders be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


GCS_PATIENCE_S = 60


class RemoteStorage:
    """A bucket, through pyarrow's file systems. Credentials come from where the provider's own tools read them."""

    def __init__(self, url: str, watch: Watch) -> None:
        from pyarrow import ArrowException
        from pyarrow.fs import FileSystem

        scheme, _, place = url.partition("://")
        if not place.partition("?")[0].partition("/")[0]:
            raise CheckpointError(f"{url} names no bucket", f"write {scheme}://BUCKET/FOLDER")
        try:
            self._fs, self._root = FileSystem.from_uri(_limit_retries(url))
        except (ArrowException, ValueError, OSError) as error:
            raise _make_error(url, error) from None
        self.url, self._watch = url, watch

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        self._watch(f"before open {name}")
        with self._naming(name):
            stream = self._fs.open_output_stream(self._path(name))
            for part in parts:
                self._watch(f"before write {name}")
                stream.write(part)
            self._watch(f"before upload {name}")
            stream.close()
        self._watch(f"after upload {name}")

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with self._naming(name), self._fs.open_input_file(self._path(name)) as file:
            size = file.size()
            data: bytes = file.read_at(max(0, min(length if length is not None else size, size - start)), start)
        self._watch(f"read {len(data)} {name}")
        return data

    def read_into(self, name: str, start: int, buffers: Sequence[memoryview]) -> int:
        data = memoryview(self.read(name, start, sum(map(len, buffers))))
        done = 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def list(self, folder: str = "") -> dict[str, int]:
        from pyarrow.fs import FileSelector, FileType

        with self._naming(folder):
            infos = self._fs.get_file_info(FileSelector(self._path(folder), recursive=True, allow_not_found=True))
        start = len(self._root) + 1
        return {info.path[start:]: info.size for info in infos if info.type == FileType.File}

    def delete(self, name: str) -> None:
        from pyarrow.fs import FileType

        self._watch(f"before delete {name}")
        with self._naming(name), contextlib.suppress(FileNotFoundError):  # a folder in a bucket is only a name, and may be none
            kind = self._fs.get_file_info(self._path(name)).type
            if kind == FileType.Directory:
                self._fs.delete_dir(self._path(name))
            elif kind == FileType.File:
                self._fs.delete_file(self._path(name))
        self._watch(f"after delete {name}")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _make_error(join_url(self.url, name), error) from error


REMEDIES = (
    (("NO_SUCH_BUCKET", "NoSuchBucket"), "make the bucket first, or name one that is there"),
    (("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_SIGNATURE", "MISSING_AUTHENTICATION_TOKEN",
      "EXPIRED_TOKEN", "HTTP status 403", "FORBIDDEN"),
     "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) of someone who may list, read, write and delete there"),
    (("PERMISSION_DENIED", "UNAUTHENTICATED", "credentials"),
     "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login, as someone who may list, read, write and delete there"),
    (("NETWORK_CONNECTION", "curlCode", "CURL error", "Retry policy exhausted", "resolve"),
     "nothing answers there: check the network; a server of your own is named by AWS_ENDPOINT_URL, or ?endpoint_override=HOST:PORT in the URL"),
)  # fmt: skip
"""By what the AWS and Google libraries within pyarrow 26 say."""


def _make_error(url: str, error: Exception) -> CheckpointError:
    """What a bucket's library said, with the URL and what to do."""
    text = str(error)
    remedy = next(
        (remedy for words, remedy in REMEDIES if any(word in text for word in words)),
        "write a path, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER",
    )
    return CheckpointError(f"{url}: {_first_line(error)}", remedy)


def _limit_retries(url: str) -> str:
    """Google's library tries for a quarter of an hour unless told; a person waits at the other end."""
    if not url.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}retry_limit_seconds={GCS_PATIENCE_S}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
