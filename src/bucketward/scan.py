"""The one pipeline: read the exact object, hold it, hash it, ask every engine, combine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType

from bucketward.cache import Cache, Cached
from bucketward.errors import Denied, Unavailable, Unsupported
from bucketward.interfaces import Engine, Store
from bucketward.model import (
    EngineReport,
    ObjectInfo,
    ObjectRef,
    Reason,
    ScanResult,
    Spooled,
    Verdict,
    scan_id,
)
from bucketward.policy import (
    EngineRule,
    Policy,
    choose,
    combine,
    is_left_out,
    needs_type,
    reclassify,
)
from bucketward.spool import Slot, Spool, sha256

_FINAL = frozenset({Verdict.CLEAN, Verdict.INFECTED, Verdict.SUSPICIOUS})
_LASTING = frozenset({Reason.CONTAINER_UNOPENED})
_ROOM_WAIT = 600.0  # seconds a message may wait for room in the spool before it is given back


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the engines made of one file."""

    verdict: Verdict
    reasons: tuple[str, ...]
    reports: tuple[EngineReport, ...]
    engines: str
    sha256: str | None = None
    cached_from: str = ""


class Scan:
    """A finished scan: the result, and the bytes it is about until it is closed.

    `file` is `None` where no byte was read.  `is_pinned` says whether `result.object` is what a
    store said, not only what an event claims: nothing may be done to what is not pinned.
    """

    def __init__(
        self,
        result: ScanResult,
        file: Spooled | None = None,
        slot: Slot | None = None,
        *,
        is_pinned: bool = True,
    ) -> None:
        self.result = result
        self.file = file
        self.is_pinned = is_pinned
        self._slot = slot

    def __enter__(self) -> Scan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._slot is not None:
            self._slot.close()


class _Stop(Exception):  # noqa: N818 - not an error: the answer is known without the body
    def __init__(self, info: ObjectInfo, reason: str, message: str = "") -> None:
        super().__init__(reason)
        self.info = info
        self.reason = reason
        self.message = message


class _NoRoom(Exception):  # noqa: N818
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class Scanner:
    """Every agent's way from an object to a verdict.  Safe from any thread.

    `engines` are those that are open here, by name.  `allowed` yields the signatures that an
    administrator allows in the bytes with this SHA-256, found in this bucket under this key.
    With a `cache`, bytes on which a complete verdict is known are not scanned again.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        spool: Spool,
        *,
        detect_type: Callable[[Spooled], str] = lambda _: "",
        allowed: Callable[[str, str, str], Collection[str]] = lambda *_: (),
        cache: Cache | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.engines = engines
        self.spool = spool
        self._detect_type = detect_type
        self._allowed = allowed
        self._cache = cache
        self._now = now

    def ping(self, policies: Collection[Policy] = ()) -> None:
        """Raise what keeps the spool, or an engine that is needed, from working.

        Needed is what one of `policies` requires, all engines if none is given, and one in any
        case: an optional engine that is broken holds up nobody.
        """
        self.spool.ping()
        needed = {rule.engine for policy in policies for rule in policy.engines if rule.required}
        problem: Unavailable | None = None
        working = 0
        for name, engine in self.engines.items():
            try:
                engine.ping()
                working += 1
            except Unavailable as error:
                if name in needed or not policies:
                    raise
                problem = error
        if problem is not None and not working:
            raise problem

    def scan(
        self, store: Store, ref: ObjectRef, policy: Policy, *, cause: str, alone: bool = False
    ) -> Scan:
        """Judge the object that `ref` names, and close what you get.

        What cannot be read by its nature, or may not be, has a verdict too.  `NotFound`,
        `Changed` and `Unavailable` come through: then there is nothing to record.
        """
        started = time.monotonic()
        slot: Slot | None = None
        pin: ObjectInfo | None

        def accept(info: ObjectInfo) -> int:
            nonlocal slot
            if slot is None or slot.size != info.size:
                if slot is not None:
                    slot.close()
                    slot = None
                self._refuse(info, policy)
                slot = self.spool.try_reserve(info.size)
                if slot is None:
                    raise _NoRoom(info.size)
            return slot.writable()

        try:
            while True:
                try:
                    info = store.read(ref, accept)
                    break
                except _NoRoom as full:
                    slot = self.spool.reserve(full.size, deadline=time.monotonic() + _ROOM_WAIT)
            if slot is None:
                raise AssertionError("a store returned without calling accept")
            file = slot.seal(ref.key)
            if file.size != info.size:
                raise Unavailable(
                    f"read {file.size} bytes of {ref.key!r}, which has {info.size}",
                    backend="scan",
                )
            judgement = self.judge(
                file,
                ref.key,
                policy,
                alone=alone,
                scan=scan_id(info, cause),
                allowed=lambda digest: self._allowed(digest, info.bucket, info.key),
            )
            result = self._result(ref, info, judgement, started, cause)
            scan = Scan(result, file, slot)
            slot = None
            return scan
        except _Stop as stop:
            pin, message = stop.info, stop.message
            judgement = _unread(Verdict.UNSCANNABLE, stop.reason)
        except Unsupported as error:
            pin, message = _pin(store, ref), str(error)
            verdict = Verdict.UNSCANNABLE if error.reason else Verdict.ERROR
            judgement = _unread(verdict, error.reason or Reason.UNSUPPORTED)
        except Denied as error:
            pin, message = _pin(store, ref), str(error)
            judgement = _unread(Verdict.ERROR, Reason.DENIED)
        finally:
            if slot is not None:
                slot.close()
        info = pin if pin is not None else claimed(ref, self._now())
        result = self._result(ref, info, judgement, started, cause)
        return Scan(replace(result, message=message), is_pinned=pin is not None)

    def _refuse(self, info: ObjectInfo, policy: Policy) -> None:
        """Raise `_Stop` if the answer is known without reading the object."""
        if why := is_left_out(policy, info):
            raise _Stop(info, Reason.SKIPPED, why)
        # The content type is not known yet: an engine that its type would rule out counts here.
        rules = choose(policy, self.engines, info.key, info.size, "")
        limits = [self.engines[r.engine].max_size for r in rules if r.engine in self.engines]
        if policy.max_size is not None:
            limits = [min(policy.max_size, limit) for limit in limits]
        limits = [min(self.spool.largest, limit) for limit in limits]
        if limits and info.size > max(limits):
            raise _Stop(
                info,
                Reason.TOO_LARGE,
                f"{info.size} bytes; at most {max(limits)} can be scanned",
            )

    def judge(
        self,
        file: Spooled,
        key: str,
        policy: Policy,
        *,
        alone: bool = False,
        scan: str = "",
        allowed: Callable[[str], Collection[str]] = lambda _: (),
    ) -> Judgement:
        """Ask every chosen engine in turn and combine what they say.

        `allowed` yields the signatures that may be found in the bytes with this SHA-256: such a
        finding stops nobody, and if every finding of every engine is one, and all else is Clean,
        the verdict is InfectedAllowed.  `scan` is the id under which the cache may name this
        judgement later.  `Unavailable` if a required engine could not say anything
        and no other found anything.
        """
        content_type = self._detect_type(file) if needs_type(policy) else ""
        rules = choose(policy, self.engines, key, file.size, content_type)
        content = sha256(file)
        judging_by = {} if alone else self._judging_by(rules, file)
        known = self._known(content, file.size, rules, judging_by)
        deadline = time.monotonic() + policy.deadline
        said: list[EngineReport] = []
        reports: list[EngineReport] = []
        counted: list[EngineReport] = []
        unavailable: Unavailable | None = None
        for rule in rules:
            try:
                if known is not None:
                    report = next(r for r in known.reports if r.engine == rule.engine)
                else:
                    report = self._ask(rule, file, deadline, alone=alone)
            except Unavailable as error:
                if rule.required and unavailable is None:
                    unavailable = error
                report = _failed(rule.engine, str(error))
            said.append(report)
            reports.append(reclassify(policy, report))
            counted.append(_without(reports[-1], allowed(content) if report.findings else ()))
            if policy.stop_at_first_hit and counted[-1].verdict is Verdict.INFECTED:
                break
        verdict, reasons = combine(counted, rules)
        if verdict is Verdict.CLEAN and any(report.findings for report in reports):
            verdict = Verdict.INFECTED_ALLOWED
        if unavailable is not None and verdict is not Verdict.INFECTED:
            raise unavailable
        if self._cache is not None and known is None and _is_complete(said, judging_by):
            cached = Cached(scan, tuple(said))
            self._cache.keep(content, file.size, _engine_set(rules, judging_by), cached)
        return Judgement(
            verdict,
            reasons,
            tuple(reports),
            digest(rules, reports),
            content,
            known.scan if known is not None else "",
        )

    def _judging_by(self, rules: Sequence[EngineRule], file: Spooled) -> Mapping[str, str]:
        """Return the signatures' digest of each engine, none where the cache is to stay out of it.

        Asked before the scan: what is kept was judged by these, or it is not kept.  The object's
        name plays no part: clamd is given a descriptor and YARA the bytes.
        """
        if self._cache is None or file.window is not None:
            return {}
        digests: dict[str, str] = {}
        for rule in rules:
            engine = self.engines.get(rule.engine)
            if engine is None or file.size > engine.max_size:
                return {}
            try:
                digests[rule.engine] = engine.signatures().digest
            except Unavailable:
                return {}
        return digests

    def _known(
        self, content: str, size: int, rules: Sequence[EngineRule], judging_by: Mapping[str, str]
    ) -> Cached | None:
        if self._cache is None or not judging_by:
            return None
        found = self._cache.find(content, size, _engine_set(rules, judging_by))
        return found if found is not None and _is_complete(found.reports, judging_by) else None

    def _ask(
        self, rule: EngineRule, file: Spooled, deadline: float, *, alone: bool
    ) -> EngineReport:
        engine = self.engines.get(rule.engine)
        if engine is None:
            return _failed(rule.engine, f"engine {rule.engine} is not open here")
        if file.size > engine.max_size:
            return EngineReport(
                rule.engine,
                Verdict.UNSCANNABLE,
                (Reason.TOO_LARGE,),
                signatures=engine.signatures(),
                message=f"{file.size} bytes; {rule.engine} scans at most {engine.max_size}",
            )
        return engine.scan(file, deadline, alone=alone)

    def _result(
        self, ref: ObjectRef, info: ObjectInfo, judgement: Judgement, started: float, cause: str
    ) -> ScanResult:
        message = "; ".join(r.message for r in judgement.reports if r.message)
        return ScanResult(
            id=scan_id(info, cause),
            object=info,
            verdict=judgement.verdict,
            scanned_at=self._now(),
            reasons=judgement.reasons,
            reports=judgement.reports,
            sha256=judgement.sha256,
            seconds=time.monotonic() - started,
            message=message,
            engines=judgement.engines,
            cached_from=judgement.cached_from,
            uploaded_by=ref.uploaded_by,
            sequencer=ref.sequencer,
        )


def _pin(store: Store, ref: ObjectRef) -> ObjectInfo | None:
    """Return the pin of an object whose body cannot be read, `None` if that is refused as well."""
    try:
        return store.stat(ref)
    except (Denied, Unsupported):
        return None


def claimed(ref: ObjectRef, now: datetime) -> ObjectInfo:
    """Return what is known of an object that could not be read: what the event claims."""
    return ObjectInfo(
        ref.bucket,
        ref.key,
        ref.size or 0,
        ref.etag or "",
        ref.event_at or now,
        version_id=ref.version_id,
    )


def digest(rules: Sequence[EngineRule], reports: Sequence[EngineReport]) -> str:
    """Return the digest of the engine set: who was asked, as what, with which signatures."""
    return _engine_set(
        rules, {r.engine: r.signatures.digest if r.signatures else "" for r in reports}
    )


def _engine_set(rules: Sequence[EngineRule], signatures: Mapping[str, str]) -> str:
    parts = [f"{r.engine}:{r.required}:{signatures.get(r.engine, '')}" for r in rules]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _without(report: EngineReport, allowed: Collection[str]) -> EngineReport:
    """Return the report as it counts if these signatures are allowed: all of them, or as it is."""
    if not report.findings or any(f.signature not in allowed for f in report.findings):
        return report
    return replace(report, verdict=Verdict.CLEAN, findings=())


def _is_complete(reports: Sequence[EngineReport], judging_by: Mapping[str, str]) -> bool:
    """Return whether engines, judging by exactly these signatures, would say the same again.

    Then each has said something of the content, one of them of all of it, and what the others left
    out they always leave out.
    """
    return (
        bool(judging_by)
        and len(reports) == len(judging_by)
        and {r.engine: r.signatures.digest for r in reports if r.signatures} == judging_by
        and all(r.verdict in _FINAL and _LASTING.issuperset(r.coverage) for r in reports)
        and any(r.is_full for r in reports)
    )


def _failed(engine: str, message: str) -> EngineReport:
    return EngineReport(engine, Verdict.ERROR, (Reason.ENGINE_FAILED,), message=message)


def _unread(verdict: Verdict, reason: str) -> Judgement:
    return Judgement(verdict, (reason,), (), "")


def give_up(
    ref: ObjectRef, cause: str, message: str, now: datetime, reason: str = Reason.GAVE_UP
) -> ScanResult:
    """Return the result of an object that no scan came to an end with: verdict Error."""
    info = claimed(ref, now)
    return ScanResult(
        id=scan_id(info, cause),
        object=info,
        verdict=Verdict.ERROR,
        scanned_at=now,
        reasons=(reason,),
        message=message,
        uploaded_by=ref.uploaded_by,
        sequencer=ref.sequencer,
    )
