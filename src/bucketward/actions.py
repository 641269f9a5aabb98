"""Do what the policy decided: tag, move to quarantine, delete, keep; always that exact object."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from bucketward.errors import (
    Changed,
    ConfigError,
    Denied,
    NotFound,
    Unavailable,
    Unsupported,
)
from bucketward.interfaces import Store
from bucketward.model import ObjectInfo, ObjectRef, ScanResult, Spooled
from bucketward.policy import Policy, decide, merge_tags, quarantine_key, strip_tags
from bucketward.scan import Scan

log = logging.getLogger(__name__)

_TAG_TRIES = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a scan; `is_replaced` if the key held another object in the end."""

    result: ScanResult
    is_replaced: bool = False


@dataclass(frozen=True, slots=True)
class Actor:
    """Executes decisions.  Safe from any thread.

    `record` makes a result durable before anything is destroyed: if we die between the deletion
    and its record, the redelivered message finds what was about to happen.
    """

    record: Callable[[ScanResult], None]

    def act(
        self, store: Store, scan: Scan, policy: Policy, quarantine: Callable[[], Store]
    ) -> Outcome:
        """Carry out the policy's decision and return the result with what became of it.

        `Changed` if the object was replaced meanwhile (nothing was done to the new one),
        `NotFound` if it vanished, `Unavailable` to try again; doing it all again is harmless.
        """
        result = scan.result
        if not scan.is_pinned:
            note = "nothing was done to the object: the store does not say what it is"
            return Outcome(replace(result, tag_note=note))
        decision = decide(result, policy)
        tags = decision.tags or {}
        if decision.action == "keep":
            note = self._tag(store, result.object, tags, policy)
            return Outcome(replace(result, tag_note=note))
        result = replace(result, action=decision.action, action_state="pending")
        try:
            if decision.action == "move":
                target = quarantine()
                key = _quarantine_key(result)
                try:
                    self._move(store, scan, target, key, policy, tags)
                except NotFound as error:
                    store.stat(result.object.ref)  # it raises if it is the object that is gone
                    raise Unsupported(f"the quarantine is not there: {error}") from error
                result = replace(result, moved_to=(target.bucket, key))
            self.record(result)
            try:
                store.delete(result.object)
            except NotFound:
                pass  # somebody else was quicker; the bytes are gone from there all the same
            except Changed:
                return Outcome(replace(result, action_state="done"), is_replaced=True)
        except (Denied, Unsupported, ConfigError) as error:
            log.warning("cannot %s %r: %s", decision.action, result.object.key, error)
            note = self._tag(store, result.object, tags, policy)
            text = f"could not {decision.action} it: {error}"
            return Outcome(replace(result, action_state="failed", message=text, tag_note=note))
        return Outcome(replace(result, action_state="done"))

    def _move(  # noqa: PLR0917 - one call, all of it needed
        self,
        store: Store,
        scan: Scan,
        target: Store,
        key: str,
        policy: Policy,
        tags: Mapping[str, str],
    ) -> None:
        """Put exactly the scanned bytes into quarantine; repeated, it lands on itself."""
        info = scan.result.object
        carried: Mapping[str, str] = {}
        if target.has_tags:
            try:
                existing = store.tags(info) if store.has_tags else {}
            except Denied:
                existing = {}
            merged = merge_tags(existing, tags, policy.tags, target.max_tags)
            carried = existing if merged is None else merged
        try:
            target.copy_from(store, info, key, tags=carried if target.has_tags else None)
            return
        except (Unsupported, Denied) as error:
            if scan.file is None:
                raise
            log.debug("no copy on the server's side, streaming instead: %s", error)
        self._stream(target, key, scan.file, info, carried)

    def _stream(
        self, target: Store, key: str, file: Spooled, info: ObjectInfo, tags: Mapping[str, str]
    ) -> None:
        target.put(key, file.fd, file.size, tags=tags, metadata=info.metadata, headers=info.headers)

    def _tag(self, store: Store, info: ObjectInfo, ours: Mapping[str, str], policy: Policy) -> str:
        """Merge our tags into the object's and return why they are not there, "" if they are."""
        if not ours:
            return ""
        if not store.has_tags:
            return "the store has no tags"
        for _ in range(_TAG_TRIES):
            try:
                # A count that is absent is unknown, not zero: it takes a permission of its own.
                existing = {} if info.tag_count == 0 else store.tags(info)
            except Denied as error:
                return f"tags cannot be read, so none are written: {error}"
            merged = merge_tags(existing, ours, policy.tags, store.max_tags)
            if merged is None:
                return "no room for our tags: the object carries as many as it can"
            try:
                store.replace_tags(info, merged)
                if not existing or store.tags(info) == merged:
                    return ""
            except Changed:
                self._take_back(store, info, ours, policy)
                raise
            except Unsupported as error:
                return str(error)
            except Denied as error:
                return f"tags cannot be written: {error}"
            # Somebody else wrote tags between our reading and now: merge with theirs.
            info = replace(info, tag_count=None)
        return "another writer keeps replacing the tags"

    def _take_back(
        self, store: Store, info: ObjectInfo, ours: Mapping[str, str], policy: Policy
    ) -> None:
        """Take our tags off an object that slid in under a store without a condition on tags."""
        if "tag" in store.conditions:
            return
        try:
            current = store.stat(ObjectRef(info.bucket, info.key))
            existing = store.tags(current)
            result = policy.tags.result
            if result and existing.get(result) == ours.get(result) and result in existing:
                store.replace_tags(current, strip_tags(existing, policy.tags))
        except (NotFound, Changed, Denied, Unsupported, Unavailable) as error:
            log.warning("cannot take our tags off the new %r: %s", info.key, error)


def _quarantine_key(result: ScanResult) -> str:
    info = result.object
    return quarantine_key(info.bucket, info.key, info.version_id, info.etag, result.sha256 or "")
