"""Take everything from a process that an engine does not need; a script, too, that then runs one.

Nothing of Bucketward is imported here: as a script it runs by its path, before any privilege is
dropped, so that it works wherever the package is installed.
"""

import ctypes
import os
import pwd
import resource
import struct
import sys
from pathlib import Path

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_SIGKILL = 9


def unprivileged_user(wanted: str = "") -> tuple[int, int]:
    """Return uid and gid to run engines as: `wanted`, ``clamav`` or ``nobody``; ours if not root.

    `wanted` that does not exist is a `LookupError`.
    """
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    for name in [wanted] if wanted else ["clamav", "nobody"]:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    if wanted:
        raise LookupError(f"there is no user {wanted!r} to run the engine as")
    return 65534, 65534


def confine(uid: int, gid: int, *, oom_score: int, memory: int = 0) -> None:
    """Give up network, user, privileges and core dumps, for good and as far as we are able to.

    What the platform refuses (no network namespace in a container without the capability) is left
    as it is.  `memory` bounds the address space in bytes, 0 for no bound.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _write("/proc/self/oom_score_adj", str(oom_score))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if os.geteuid() == 0:
        libc.unshare(_CLONE_NEWNET)
        if uid != 0:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
    elif libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        libc.capset(struct.pack("II", _CAPABILITY_VERSION_3, 0), bytes(24))
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def die_with(parent: int) -> None:
    """Be killed as soon as the thread that started us ends, even by SIGKILL.

    To be called last: a change of user clears it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, "ascii")
    except OSError:
        return


def main() -> None:
    """Run ``PARENT UID GID COMMAND...`` confined."""
    parent, uid, gid = (int(word) for word in sys.argv[1:4])
    confine(uid, gid, oom_score=200)
    die_with(parent)
    os.execvp(sys.argv[4], sys.argv[4:])  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    main()
