"""What people do about a finding: restore it as a false positive, delete it for good, rescan it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from bucketward.errors import Changed, Denied, NotFound, Unsupported
from bucketward.interfaces import Store
from bucketward.ledger import Allow, Ledger
from bucketward.model import ObjectInfo, ObjectRef, ScanResult, Verdict
from bucketward.policy import Policy, decide, merge_tags
from bucketward.spool import Spool, sha256


def restore(
    result: ScanResult,
    *,
    ledger: Ledger,
    source: Store,
    quarantine: Callable[[], Store],
    policy: Policy,
    spool: Spool,
    who: str,
    reason: str,
    only_here: bool = False,
    days: float = 0,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> ObjectInfo:
    """Bring a quarantined object back as a false positive and return what it is now.

    Each of its findings is allowed first, so that the event of its return finds it allowed.  The
    bytes are compared with the SHA-256 that was scanned.  `Changed` if its old place is taken,
    `NotFound` if it is not in quarantine any more, `Unsupported` if it never was.
    """
    if result.moved_to is None or result.action_state not in {"done", "restored"}:
        raise Unsupported(
            f"{result.object.key!r} was not moved to a quarantine; nothing to restore"
        )
    if result.sha256 is None or not result.findings:
        raise Unsupported(f"{result.object.key!r} has no finding that could be a false positive")
    at = now()
    for finding in result.findings:
        ledger.allow(
            Allow(
                result.sha256,
                finding.signature,
                who,
                reason,
                at,
                bucket=result.object.bucket if only_here else "",
                key=result.object.key if only_here else "",
                expires_at=at + timedelta(days=days) if days else None,
            )
        )
    store = quarantine()
    kept = store.stat(ObjectRef(store.bucket, result.moved_to[1]))
    existing = store.tags(kept) if store.has_tags else {}
    allowed = replace(result, verdict=Verdict.INFECTED_ALLOWED, scanned_at=at)
    tags = merge_tags(existing, decide(allowed, policy).tags or {}, policy.tags, source.max_tags)
    with spool.reserve(kept.size) as slot:
        pin = store.read(kept, lambda _: slot.writable())
        file = slot.seal()
        if sha256(file) != result.sha256:
            raise Changed(
                f"{result.moved_to[1]!r} in {store.bucket} is not what was quarantined; "
                "it stays where it is"
            )
        back = source.put(
            result.object.key,
            file.fd,
            file.size,
            tags=(existing if tags is None else tags) if source.has_tags else {},
            metadata=pin.metadata,
            headers=pin.headers,
            if_absent=True,
        )
    store.delete(kept)
    ledger.amend(replace(result, action_state="restored"), who, "finding.restore")
    return back


def delete(
    result: ScanResult, *, ledger: Ledger, quarantine: Callable[[], Store], who: str
) -> None:
    """Delete a quarantined object for good; fine if it is gone already."""
    if result.moved_to is None:
        raise Unsupported(f"{result.object.key!r} is in no quarantine; nothing to delete")
    store = quarantine()
    try:
        store.delete(store.stat(ObjectRef(store.bucket, result.moved_to[1])))
    except NotFound:
        pass
    except Denied as error:
        raise Denied(f"cannot delete it: {error.message}", reason=error.reason) from error
    ledger.amend(replace(result, action_state="deleted"), who, "finding.delete")
