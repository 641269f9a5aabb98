"""This machine as a cloud: buckets are directories, and the event agent watches them itself."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from bucketward.errors import ConfigError, Denied, Error, NotFound, Unavailable, Unsupported
from bucketward.model import BucketInfo, QuarantineSpec

PERMISSIONS: Mapping[str, str] = {
    "read": "list the directory and read the files to be scanned",
    "write": "quarantine and delete files",
    "xattr": "tag files with their verdict (the file system must keep user.* attributes)",
}

_XATTR = "user.bucketward.probe"


def open_local(url: str, buckets: Iterable[str] = ()) -> LocalCloud:
    """Open ``local:///absolute/data/directory``; `buckets` as in `LocalCloud`."""
    parts = urlsplit(url)
    if parts.scheme != "local" or parts.netloc or not parts.path.startswith("/") or parts.query:
        raise ConfigError("the local cloud is named local:///its/data/directory", backend="local")
    return LocalCloud(os.fsdecode(unquote_to_bytes(parts.path)), buckets)


class LocalCloud:
    """Directories of this machine, each named as the file store does: ``file:///absolute/path``.

    It knows the `buckets` it was given and those enrolled since; it looks for no others.  `enrol`
    answers ``watch``: there is nobody to announce a new file, so an agent has to watch for it.
    Quarantine directories are made in `data_dir`, and nobody but us can look into them.
    """

    account = "local"
    region = "local"

    def __init__(self, data_dir: str | Path, buckets: Iterable[str] = ()) -> None:
        self._data = Path(data_dir).absolute()
        self._given = tuple(dict.fromkeys(_identity(_path(bucket)) for bucket in buckets))
        self._enrolled: dict[str, None] = {}
        self._lock = threading.Lock()

    def ping(self) -> None:
        with _translating(str(self._data)):
            if not stat.S_ISDIR(self._data.stat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        if not os.access(self._data, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            raise Denied(
                f"{self._data} cannot be written to; give it to the user that Bucketward runs as",
                backend="local",
                reason="write",
            )

    def close(self) -> None:
        pass

    def buckets(self) -> Sequence[str]:
        with self._lock:
            known = dict.fromkeys((*self._given, *self._enrolled))
        return [bucket for bucket in known if _path(bucket).is_dir()]

    def describe(self, bucket: str) -> BucketInfo:
        """Return what there is: whom the world outside this machine lets in, we cannot tell."""
        mode = self._look(bucket).st_mode
        return BucketInfo(
            _identity(_path(bucket)),
            account=self.account,
            region=self.region,
            has_versions=False,
            is_public=None if mode & stat.S_IRWXO else False,
            requester_pays=False,
        )

    def enrol(self, bucket: str, queue: str) -> str:  # noqa: ARG002 - the watcher knows its queue
        self._look(bucket)
        with self._lock:
            self._enrolled[_identity(_path(bucket))] = None
        return "watch"

    def withdraw(self, bucket: str) -> None:
        with self._lock:
            self._enrolled.pop(_identity(_path(bucket)), None)

    def make_quarantine(self, spec: QuarantineSpec) -> str:
        """Make the directory with mode 0700; one that is a bucket already is somebody else's.

        `Unsupported` for `expire_days` and `kms_key`: a directory does neither.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", spec.name):
            raise Unsupported(
                f"{spec.name[:64]!a} cannot be a quarantine's name; use letters, digits, . _ -",
                backend="local",
            )
        if spec.region not in ("", self.region):
            raise Unsupported(f"there is no region {spec.region} here", backend="local")
        if spec.expire_days or spec.kms_key:
            raise Unsupported(
                "a directory neither expires nor encrypts its files; leave expire_days 0 and "
                "kms_key empty",
                backend="local",
            )
        path = self._data / spec.name
        bucket = _identity(path)
        with self._lock:
            is_bucket = bucket in self._given or bucket in self._enrolled
        if is_bucket:
            raise Denied(f"{bucket} is a bucket of its own; choose another name", backend="local")
        with _translating(str(path)):
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            try:
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except NotADirectoryError as error:
                raise Denied(
                    f"{path} is a link or a file; move it away, or choose another name",
                    backend="local",
                ) from error
            try:
                if os.fstat(handle).st_uid != os.geteuid():
                    raise PermissionError(errno.EPERM, "another user's")
                os.fchmod(handle, 0o700)
            finally:
                os.close(handle)
        return bucket

    def bucket_policy(self, bucket: str) -> str:
        self._look(bucket)
        return ""

    def replace_bucket_policy(
        self,
        bucket: str,
        document: str,  # noqa: ARG002 - there is nothing to do with it
        expected: str,  # noqa: ARG002
    ) -> None:
        self._look(bucket)
        raise Unsupported(f"{bucket} is a directory and has no policy", backend="local")

    def missing_permissions(self, bucket: str) -> Mapping[str, str]:
        """Try them on a file without a name, which no watcher ever sees."""
        self._look(bucket)
        path = _path(bucket)
        missing = []
        if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
            missing.append("read")
        try:
            handle = os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            # Some file systems have no nameless files (EOPNOTSUPP, or EISDIR from old kernels).
            is_unknown = error.errno in (errno.EOPNOTSUPP, errno.EISDIR)
            if not (is_unknown and os.access(path, os.W_OK | os.X_OK, effective_ids=True)):
                missing.append("write")
            elif not _keeps_attributes(path):
                missing.append("xattr")
        else:
            try:
                os.setxattr(handle, _XATTR, b"1")
            except OSError:
                missing.append("xattr")
            finally:
                os.close(handle)
        return {name: PERMISSIONS[name] for name in missing}

    def regions(self) -> Sequence[str]:
        return (self.region,)

    @staticmethod
    def _look(bucket: str) -> os.stat_result:
        with _translating(bucket):
            found = _path(bucket).stat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotFound(f"{bucket} is not a directory", backend="local")
        return found


def _path(bucket: str) -> Path:
    scheme, _, rest = bucket.partition("://")
    path = unquote_to_bytes(rest)
    if scheme != "file" or not path.startswith(b"/") or b"\0" in path:
        raise NotFound(f"{bucket[:80]!a} is not file:// and an absolute path", backend="local")
    return Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100 - resolve() would follow links


def _identity(path: Path) -> str:
    """Return the URL of a directory, as the file store writes it: only the needful is encoded."""
    text = os.fsencode(path).decode("utf-8", "surrogateescape")
    return "file://" + re.sub(
        "[%?#\x00-\x1f\x7f\udc80-\udcff]",
        lambda found: f"%{found[0].encode('utf-8', 'surrogateescape')[0]:02X}",
        text,
    )


def _keeps_attributes(path: Path) -> bool:
    try:
        os.getxattr(path, _XATTR)
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


@contextmanager
def _translating(what: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no directory {what}", backend="local") from error
    except PermissionError as error:
        raise Denied(
            f"{what} belongs to another user, or may not be entered; give it to the user that "
            "Bucketward runs as",
            backend="local",
            reason="write",
        ) from error
    except OSError as error:
        raise _other(what, error) from error


def _other(what: str, error: OSError) -> Error:
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS):
        return Denied(f"{what}: {error.strerror}", backend="local", reason="write")
    return Unavailable(f"{what}: {error.strerror}", backend="local")
