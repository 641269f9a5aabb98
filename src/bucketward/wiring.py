"""The only module that opens backends: from configuration to the objects that agents are given."""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import parse_qs, unquote_to_bytes, urlencode, urlsplit

from bucketward import findings
from bucketward.agents.event import EventAgent
from bucketward.agents.heartbeat import Heartbeat
from bucketward.agents.keeper import Keeper, sweep
from bucketward.agents.watch import Watch, Watches
from bucketward.cache import Cache
from bucketward.config import ClamavEngine, Config, YaraEngine, url_path
from bucketward.errors import Changed, ConfigError, Error, NotFound, Unavailable, Unsupported
from bucketward.events import encode
from bucketward.guard import merged, statements
from bucketward.interfaces import (
    Cloud,
    CredentialsProvider,
    Engine,
    Notifier,
    Queue,
    State,
    Store,
)
from bucketward.ledger import (
    TABLES,
    CurrentVerdict,
    Due,
    Ledger,
    Protected,
    QueuedResults,
    Results,
    SettingsReader,
    object_id,
)
from bucketward.model import (
    Note,
    ObjectInfo,
    ObjectRef,
    QuarantineSpec,
    Reason,
    ScanResult,
    Spooled,
    Verdict,
)
from bucketward.notes import matches, scan_result
from bucketward.policy import Policy, Settings, check_loops, decide, merge_tags
from bucketward.scan import Scanner
from bucketward.spool import Spool

if TYPE_CHECKING:
    from bucketward.metrics import Meters

log = logging.getLogger(__name__)

OPENERS: Mapping[str, Mapping[str, str]] = {
    "store": {
        "file": "bucketward.stores.file:open_file",
        "memory": "bucketward.stores.memory:open_memory",
        "s3": "bucketward.stores.s3:open_s3",
    },
    "queue": {
        "memory": "bucketward.queues.memory:open_memory",
        "sqlite": "bucketward.queues.sqlite:open_sqlite",
        "sqs": "bucketward.queues.sqs:open_sqs",
    },
    "state": {
        "memory": "bucketward.states.memory:open_memory",
        "sqlite": "bucketward.states.sqlite:open_sqlite",
    },
    "engine": {
        "clamav": "bucketward.engines.clamav:open_clamav",
        "yara": "bucketward.engines.yara:open_yara",
    },
    "notifier": {
        "apprise": "bucketward.notifiers.apprise:open_apprise",
        "eventbridge": "bucketward.notifiers.eventbridge:open_eventbridge",
        "http": "bucketward.notifiers.webhook:open_webhook",
        "https": "bucketward.notifiers.webhook:open_webhook",
        "log": "bucketward.notifiers.log:open_log",
        "memory": "bucketward.notifiers.memory:open_memory",
        "securityhub": "bucketward.notifiers.securityhub:open_securityhub",
        "sns": "bucketward.notifiers.sns:open_sns",
    },
    "cloud": {
        "aws": "bucketward.clouds.aws:open_aws",
        "local": "bucketward.clouds.local:open_local",
        "memory": "bucketward.clouds.memory:open_memory",
        "s3": "bucketward.clouds.s3:open_s3",
    },
}
"""URL scheme -> opener, imported on first use so that an SDK that is not needed is not loaded."""

_EXTRAS = {"apprise": "chat"} | dict.fromkeys(
    ("s3", "sqs", "sns", "eventbridge", "securityhub"), "aws"
)
"""URL scheme -> the extra that installs its SDK, where it is called otherwise."""


def opener(kind: str, url: str) -> Callable[..., Any]:
    """Return the function that opens a backend; `ConfigError` if there is none for the URL."""
    scheme = urlsplit(url).scheme
    target = OPENERS[kind].get(scheme)
    if target is None:
        known = ", ".join(sorted(OPENERS[kind]))
        raise ConfigError(f"no {kind} speaks {scheme or url!r}; known are {known}")
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]  # the table above
    except ImportError as error:
        extra = _EXTRAS.get(scheme, scheme)
        raise ConfigError(
            f"{kind} {scheme} needs {error.name}; install bucketward[{extra}]"
        ) from error


class _Closes(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closes)


class House:
    """Everything one process has open: each thing opened on first use, closed in reverse order.

    Use it as a context manager.  Opening raises the six errors; `check` reports instead.
    """

    def __init__(self, config: Config, *, has_ledger: bool = True) -> None:
        self.config = config
        self._has_ledger = has_ledger
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self._open = ExitStack()
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._stores: dict[tuple[str, str], Store] = {}
        self._quarantines: dict[str, str] = {}
        self._watched_since: dict[str, datetime] = {}

    def __enter__(self) -> House:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._open.close()

    def _keep(self, backend: T) -> T:
        self._open.callback(backend.close)
        return backend

    # -- backends --------------------------------------------------------------------------------

    @cached_property
    def state(self) -> State:
        """The state that the ledger lies in."""
        url = self.config.state.url
        self._make_folder(url)
        state: State = self._keep(opener("state", url)(url, TABLES))
        return state

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger."""
        results = self.config.results
        return Ledger(
            self.state, keep=results.keep, retention_days=results.retention_days, notes=self._notes
        )

    @cached_property
    def queue(self) -> Queue:
        """The queue that events arrive on."""
        return self._queue(self.config.queue.url, "events")

    @cached_property
    def results_queue(self) -> Queue | None:
        """The queue that results travel on, `None` where they go straight to the ledger."""
        url = self.config.results.url
        return self._queue(url, "results") if url else None

    def _queue(self, url: str, name: str) -> Queue:
        self._make_folder(url)
        scheme = urlsplit(url).scheme
        options = self.config.queue
        if scheme == "sqlite" and "?" not in url:
            url += f"?name={name}&lease={options.lease}&max_deliveries={options.max_deliveries}"
        queue: Queue = self._keep(opener("queue", url)(url))
        return queue

    @cached_property
    def results(self) -> Results:
        """Where this process records what it found out."""
        return QueuedResults(self.results_queue) if self.results_queue else self.ledger

    @cached_property
    def engines(self) -> Mapping[str, Engine]:
        """The engines that are configured here, by name."""
        return {
            name: self._engine(name, options)
            for name, options in self.config.engines.items()
            if options.enabled
        }

    def _engine(self, name: str, options: ClamavEngine | YaraEngine) -> Engine:
        engine: Engine
        if isinstance(options, YaraEngine):
            url = f"yara://{_url_path(options.rules)}"
            engine = opener("engine", url)(
                url, name=name, workers=options.workers, max_size=options.max_file_size
            )
            return self._keep(engine)
        open_clamav = opener("engine", options.url)
        if options.url != "clamav:managed":
            engine = open_clamav(options.url, name=name, max_size=options.max_file_size)
            return self._keep(engine)
        from bucketward.engines.clamd import Limits

        engine = open_clamav(
            options.url,
            name=name,
            data_dir=self.config.data,
            signatures_dir=self.signatures,
            max_size=options.max_file_size,
            limits=Limits(
                file_size=options.max_file_size,
                scan_size=options.max_scan_size,
                files=options.max_files,
                recursion=options.max_recursion,
                scan_time=options.scan_time,
                threads=options.threads,
                pua=options.pua,
            ),
            options=options.options,
            user=options.user,
        )
        return self._keep(engine)

    @property
    def signatures(self) -> Path:
        """The folder that the managed engine is fed from."""
        return self.config.signatures.directory

    @cached_property
    def spool(self) -> Spool:
        """The spool that all scans of this process share."""
        spool = self.config.spool
        return Spool(
            memory=spool.memory,
            disk=spool.disk,
            in_memory_below=spool.in_memory_below,
            directory=spool.directory,
        )

    @cached_property
    def scanner(self) -> Scanner:
        """The pipeline."""
        return Scanner(self.engines, self.spool, detect_type=detect_type, allowed=self._allowed)

    def _allowed(self, sha256: str, bucket: str, key: str) -> Collection[str]:
        # Without the ledger, as on a spoke, nothing is allowed: a finding stays a finding.
        if not self._has_ledger or self.results_queue is not None:
            return ()
        return self.ledger.allowed(sha256, bucket, key)

    @cached_property
    def agents_scanner(self) -> Scanner:
        """The pipeline of the agents, which remembers verdicts unless that is switched off."""
        options = self.config.cache
        if not options.enabled:
            return self.scanner
        # An agent that sends its results away leaves the writing to the keeper.
        ledger = self.ledger if self.results_queue is None else None
        cache = self._keep(Cache(ledger, entries=options.entries, days=options.days))
        return Scanner(
            self.engines,
            self.spool,
            detect_type=detect_type,
            allowed=self._allowed,
            cache=cache,
        )

    @cached_property
    def notifiers(self) -> Mapping[str, Notifier]:
        """The configured notifiers, by name."""
        found: dict[str, Notifier] = {}
        for name, options in self.config.notifiers.items():
            given: dict[str, Any] = {}
            scheme = urlsplit(options.url).scheme
            if scheme == "apprise":
                given = {"secret": options.secret.get_secret_value()}
            elif scheme in {"http", "https"}:
                given = {
                    "secret": options.secret.get_secret_value(),
                    "allow_private": options.allow_private,
                }
                if options.ca_file is not None:
                    given["ca_file"] = str(options.ca_file)
            found[name] = self._keep(opener("notifier", options.url)(options.url, **given))
        return found

    def _notes(self, result: ScanResult) -> Sequence[Due]:
        dues = []
        notes: dict[bool, Note] = {}
        for name, options in self.config.notifiers.items():
            shape = options.vendor_compatible
            if shape not in notes:
                notes[shape] = scan_result(result, vendor_compatible=shape)
            if matches(options.only, notes[shape]):
                dues.append(Due(name, notes[shape]))
        return dues

    @cached_property
    def settings(self) -> SettingsReader:
        """The settings and protected buckets, read again every 30 s."""
        return SettingsReader(self.ledger)

    # -- buckets ---------------------------------------------------------------------------------

    def store(self, url: str, account: str = "") -> Store:
        """Open a bucket by URL, once per account."""
        with self._lock:
            store = self._stores.get((url, account))
            if store is None:
                open_store = opener("store", url)
                if urlsplit(url).scheme == "s3":
                    store = open_store(
                        url,
                        self.credentials(account),
                        connections=self._connections,
                        account=account,
                    )
                else:
                    store = open_store(url)
                self._stores[url, account] = self._keep(store)
            return store

    @cached_property
    def _connections(self) -> Any:
        from bucketward.stores.s3_http import Connections

        return self._keep(Connections())

    def credentials(self, account: str) -> CredentialsProvider | None:
        """Return the credentials of a configured account, `None` for the platform's own chain."""
        options = self.config.accounts.get(account)
        if options is None or not (options.role_arn or options.profile):
            return None
        from bucketward.clouds.aws_credentials import assume_role

        return assume_role(
            options.role_arn,
            external_id=options.external_id,
            region=options.region,
            profile=options.profile,
        )

    def protected_store(self, protected: Protected) -> Store:
        """Open a protected bucket, once."""
        return self.store(protected.url, protected.account)

    def quarantine(self, protected: Protected, name: str) -> Store:
        """Open the quarantine of a protected bucket: the one its policy names, or the default.

        For directories that is ``quarantine`` in the data folder, for S3 on AWS a bucket per
        account and region; both are made when first needed.  `Unsupported` where one has to be
        named.
        """
        if name:
            return self.store(_beside(protected.url, name), protected.account)
        default = self.config.quarantine
        if default and urlsplit(default).scheme == urlsplit(protected.url).scheme:
            if default.startswith("file://"):
                folder = folder_of(default)
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self.store(_beside(protected.url, default), protected.account)
        with self._lock:
            place = f"{protected.account}|{protected.region}"
            if place not in self._quarantines:
                cloud = self.cloud(protected.url, protected.account)
                if cloud is None:
                    raise Unsupported(
                        f"no quarantine for {protected.bucket}: name one in the policy, as in "
                        'quarantine = "s3://my-quarantine"',
                        backend="wiring",
                    )
                name = f"bucketward-quarantine-{cloud.account}-{cloud.region}"
                self._quarantines[place] = cloud.make_quarantine(QuarantineSpec(name, cloud.region))
            url = self._quarantines[place]
        return self.store(_beside(protected.url, url), protected.account)

    def cloud(self, url: str, account: str = "") -> Cloud | None:
        """Open the control plane that a bucket belongs to, `None` where we speak to none.

        An S3 bucket belongs to AWS (or a stand-in for it) if our queue is SQS at the same endpoint.
        """
        parts = urlsplit(url)
        cloud: Cloud
        if parts.scheme == "file":
            cloud = opener("cloud", "local:")(f"local://{_url_path(self.config.data)}", ())
            return self._keep(cloud)
        queue = urlsplit(self.config.queue.url)
        options, queued = parse_qs(parts.query), parse_qs(queue.query)
        endpoint = options.get("endpoint", [""])[0]
        if parts.scheme != "s3" or queue.scheme != "sqs":
            return None
        if endpoint != queued.get("endpoint", [""])[0]:
            return None
        region = options.get("region", [queue.netloc])[0]
        number = self.config.accounts[account].id if account in self.config.accounts else ""
        number = number or queue.path.strip("/").partition("/")[0]
        query = f"?endpoint={endpoint}" if endpoint else ""
        target = f"aws://{number}/{region}{query}"
        cloud = opener("cloud", target)(target, self.credentials(account))
        return self._keep(cloud)

    def protect(self, url: str, *, account: str = "") -> tuple[Protected, bool]:
        """Protect a bucket; return its entry and whether it is new.

        The bucket is opened and tried first.  `ConfigError` where objects would go in circles.
        """
        if url.startswith("file://"):
            folder_of(url).mkdir(parents=True, exist_ok=True)
        store = self.store(url, account)
        store.ping()
        known = self.ledger.protected()
        if store.bucket in known:
            return known[store.bucket], False
        self._check_loops({*known, store.bucket})
        since = "" if url.startswith("file://") else datetime.now(UTC).isoformat()
        protected = Protected(store.bucket, url, account, store.region, "", since)
        # The ledger first: an event of a bucket that it does not know is refused.
        if not self.ledger.protect(protected):
            return self.ledger.protected()[store.bucket], False
        try:
            cloud = self.cloud(url, account)
            if cloud is not None:
                route = cloud.enrol(store.bucket, self.config.queue.url)
                protected = replace(protected, route=route)
                self.ledger.protect(protected, again=True)
        except Error:
            self.ledger.unprotect(store.bucket)
            raise
        return protected, True

    def unprotect(self, bucket: str) -> None:
        """Stop protecting a bucket, given by identity or by the URL it was protected with."""
        name = bucket.partition("?")[0]
        if name.startswith("file://"):
            # As the store would name it, which may be gone by now.
            name = f"file://{url_path(Path(os.path.normpath(folder_of(bucket))))}"
        protected = self.ledger.protected().get(name)
        if protected is None:
            raise NotFound(f"{name} is not protected; see bucket list")
        cloud = self.cloud(protected.url, protected.account)
        if cloud is not None and protected.route:
            cloud.withdraw(protected.bucket)
        self.ledger.unprotect(protected.bucket)

    def change_settings(self, text: str, expected: int | None, who: str) -> int:
        """Replace the settings and return the new version.

        `ConfigError` names everything that is wrong with them; `Changed` if they are not version
        `expected` (`None`: whatever they are) any more.
        """
        settings = Settings.from_json(text)
        self._check_loops(self.ledger.protected(), settings)
        version = self.ledger.settings()[1] if expected is None else expected
        return self.ledger.change_settings(settings.to_json(), version, who)

    def _check_loops(self, protected: Collection[str], settings: Settings | None = None) -> None:
        if settings is None:
            settings = Settings.from_json(self.ledger.settings()[0])
        if problems := check_loops(settings, protected, quarantine=self.config.quarantine):
            raise ConfigError("; ".join(problems))

    # -- findings --------------------------------------------------------------------------------

    def restore(
        self, scan_id: str, *, who: str, reason: str, only_here: bool = False, days: float = 0
    ) -> ObjectInfo:
        """Restore a quarantined object as a false positive; see `bucketward.findings.restore`."""
        result = self._result(scan_id)
        protected = self._place_of(result)
        return findings.restore(
            result,
            ledger=self.ledger,
            source=self.protected_store(protected),
            quarantine=lambda: self._quarantine_of(result, protected),
            policy=self.settings.current().policy(protected),
            spool=self.spool,
            who=who,
            reason=reason,
            only_here=only_here,
            days=days,
        )

    def delete(self, scan_id: str, *, who: str) -> None:
        """Delete a quarantined object for good."""
        result = self._result(scan_id)
        protected = self._place_of(result)
        findings.delete(
            result,
            ledger=self.ledger,
            quarantine=lambda: self._quarantine_of(result, protected),
            who=who,
        )

    def rescan(self, scan_id: str) -> ObjectRef:
        """Enqueue what a result is about, in the version it is about, and return it."""
        result = self._result(scan_id)
        if result.object.bucket not in self.ledger.protected():
            raise Unsupported(f"{result.object.bucket} is not protected any more; protect it first")
        ref = ObjectRef(result.object.bucket, result.object.key, result.object.version_id)
        self.queue.send([encode([ref])])
        return ref

    def disallow(self, entry_id: str, *, who: str) -> None:
        """End an entry of the allow list."""
        cursor = ""
        while True:
            page = self.ledger.allow_list(cursor=cursor)
            for entry in page.items:
                if entry.id == entry_id:
                    self.ledger.allow(replace(entry, is_active=False, by=who))
                    return
            cursor = page.cursor
            if not cursor:
                raise NotFound(f"there is no entry {entry_id}; see finding allowed")

    def _result(self, scan_id: str) -> ScanResult:
        result = self.ledger.result(scan_id)
        if result is None:
            raise NotFound(f"there is no result {scan_id}; see finding list")
        return result

    def _place_of(self, result: ScanResult) -> Protected:
        bucket = result.object.bucket
        found = self.ledger.protected().get(bucket)
        return found or Protected(bucket, bucket, result.account, result.region)

    def _quarantine_of(self, result: ScanResult, protected: Protected) -> Store:
        assert result.moved_to is not None
        return self.store(_beside(protected.url, result.moved_to[0]), protected.account)

    def retro(self, bucket: str) -> int:
        """Enqueue every object version of a protected bucket that has no verdict, however old.

        Return how many.
        """
        protected = self.ledger.protected().get(_plain(bucket))
        if protected is None:
            raise NotFound(f"{_plain(bucket)} is not protected; see bucket list")
        store = self.protected_store(protected)
        return sweep(self.ledger, self.queue, store, replace(protected, since=""))

    # -- guard -----------------------------------------------------------------------------------

    def guard(self, url: str, roles: Sequence[str], *, account: str = "") -> str:
        """Return the guard of a bucket as a policy document of its own, protected or not."""
        ours = self._guard(self._entry(url, account), roles)
        return json.dumps(json.loads(merged("", ours)), indent=2)

    def guard_problems(self, url: str) -> Iterator[tuple[bool, str]]:
        """Yield why the guard should not be put on a bucket, and what nobody could read then.

        Each with whether it forbids `apply_guard`; objects without a tag are only told of.  Reads
        the tags of every object version.
        """
        protected = self._entry(url)
        if protected.bucket not in self.ledger.protected():
            yield True, f"{protected.bucket} is not protected; see bucketward bucket protect"
            return
        policy = self._policy_of(protected)
        store = self.protected_store(protected)
        if not store.has_tags or not policy.tagging:
            yield True, f"{protected.bucket}: tagging is off, so no object could be read"
            return
        if not policy.tags.result:
            yield True, f"{protected.bucket}: the result tag is off, so no object could be read"
            return
        if not store.has_versions:
            yield (
                True,
                (
                    f"{protected.bucket} is not versioned: a verdict could be written onto what "
                    "came after it; turn versioning on"
                ),
            )
            return
        unscanned, cursor = 0, ""
        with ThreadPoolExecutor(8) as threads:
            while True:
                page = store.list(cursor=cursor, versions=True)
                verdicts = self.ledger.verdicts(page.items)
                scanned = [i for i, v in zip(page.items, verdicts, strict=True) if v is not None]
                unscanned += len(page.items) - len(scanned)
                for info, tags in zip(
                    scanned, threads.map(partial(_tags_or_none, store), scanned), strict=True
                ):
                    if tags is None or policy.tags.result in tags:
                        continue
                    why = "unreadable until it is tagged: it has a verdict, but no tag that says so"
                    if len(tags) >= store.max_tags:
                        why = f"unreadable until a tag is freed: it has {len(tags)} tags of others"
                    yield False, f"{info.key!r} version {info.version_id}: {why}"
                cursor = page.cursor
                if not cursor:
                    break
        if unscanned:
            yield (
                True,
                (
                    f"{protected.bucket} has {unscanned} unscanned object versions, which nobody "
                    f"could read; scan them first: bucketward retro {protected.bucket}"
                ),
            )

    def apply_guard(self, url: str, roles: Sequence[str]) -> bool:
        """Merge the guard into a bucket's policy; return whether that changed it.

        Ask `guard_problems` first.
        """
        protected = self._entry(url)
        return self._change_policy(protected, self._guard(protected, roles))

    def remove_guard(self, url: str, *, account: str = "") -> bool:
        """Take the guard, and nothing else, out of a bucket's policy; return whether it was in."""
        return self._change_policy(self._entry(url, account), ())

    def mend_tags(self, bucket: str) -> int:
        """Write our tags anew, from the ledger, where somebody dropped or changed the verdict.

        Nothing is scanned.  Return how many object versions were mended.  Others' tags stay; where
        they leave no room, nothing is written.
        """
        protected = self._entry(bucket)
        policy = self._policy_of(protected)
        store = self.protected_store(protected)
        mended, cursor = 0, ""
        while True:
            page = store.list(cursor=cursor, versions=store.has_versions)
            for info, verdict in zip(page.items, self.ledger.verdicts(page.items), strict=True):
                if verdict is not None:
                    ours = decide(self._result_of(info, verdict), policy).tags
                    mended += bool(ours) and _mend(store, info, ours or {}, policy)
            cursor = page.cursor
            if not cursor:
                return mended

    def _result_of(self, info: ObjectInfo, verdict: CurrentVerdict) -> ScanResult:
        """Return the result behind a current verdict, or what is left of it."""
        history = self.ledger.results("object", object_id(info.bucket, info.key))
        for result in history.items:
            is_same = result.object.identity == info.identity
            if is_same and result.scanned_at == verdict.scanned_at:
                return result
        # Without its reasons, so it is not told from one that was skipped.
        is_vague = verdict.verdict is Verdict.UNSCANNABLE
        reasons = (Reason.SKIPPED.value,) if is_vague else ()
        return ScanResult("", info, verdict.verdict, verdict.scanned_at, reasons)

    def _policy_of(self, protected: Protected) -> Policy:
        return Settings.from_json(self.ledger.settings()[0]).resolve(
            protected.account, protected.region, protected.bucket
        )

    def _guard(self, protected: Protected, roles: Sequence[str]) -> Sequence[Mapping[str, object]]:
        policy = self._policy_of(protected)
        dialect = "aws" if self._speaks_aws(protected) else "ceph"
        return statements(protected.bucket, policy.tags, roles, dialect=dialect)

    def _entry(self, url: str, account: str = "") -> Protected:
        """Return the entry of a protected bucket, by its identity or URL, or one made up."""
        known = self.ledger.protected().get(_plain(url))
        region = parse_qs(urlsplit(url).query).get("region", ["us-east-1"])[0]
        return known or Protected(_plain(url), url, account, region)

    def _speaks_aws(self, protected: Protected) -> bool:
        endpoint = parse_qs(urlsplit(protected.url).query).get("endpoint", [""])[0]
        if not endpoint or (urlsplit(endpoint).hostname or "").endswith(_AWS_HOSTS):
            return True
        return self.cloud(protected.url, protected.account) is not None

    def _policies(self, protected: Protected) -> Cloud:
        """Open what reads and replaces the policy of an S3 bucket, on AWS or not."""
        if urlsplit(protected.url).scheme != "s3":
            raise Unsupported(f"{protected.bucket} has no policy; only S3 buckets can be guarded")
        cloud = self.cloud(protected.url, protected.account)
        if cloud is not None:
            return cloud
        options = parse_qs(urlsplit(protected.url).query)
        endpoint = options.get("endpoint", [""])[0]
        target = f"s3:///{options.get('region', ['us-east-1'])[0]}"
        target += f"?{urlencode({'endpoint': endpoint})}" if endpoint else ""
        opened: Cloud = opener("cloud", target)(target, self.credentials(protected.account))
        return self._keep(opened)

    def _change_policy(self, protected: Protected, ours: Sequence[Mapping[str, object]]) -> bool:
        cloud = self._policies(protected)
        for _ in range(4):
            document = cloud.bucket_policy(protected.bucket)
            wanted = merged(document, ours)
            if wanted == document:
                return False
            with suppress(Changed):
                cloud.replace_bucket_policy(protected.bucket, wanted, document)
                return True
        raise Unavailable(
            f"the policy of {protected.bucket} is being changed by somebody else; try again",
            backend="wiring",
        )

    # -- running ---------------------------------------------------------------------------------

    def seed(self) -> None:
        """Give a new ledger its first settings and buckets, and a new engine its first signatures.

        Done once; nothing that is there is overwritten.
        """
        if isinstance(self.config.engines.get("clamav"), ClamavEngine):
            self._seed_signatures()
        if self.ledger.settings()[1] == 0:
            for url in self.config.protect:
                self.protect(url)
            first = Settings(global_=self.config.policy).to_json()
            self.ledger.change_settings(first, 0, "configuration")
        self._check_loops(self.ledger.protected())

    def _seed_signatures(self) -> None:
        from bucketward.engines.clamd import SIGNATURE_SUFFIXES, demo_signatures

        folder = self.signatures
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.suffix[1:] in SIGNATURE_SUFFIXES for path in folder.iterdir()):
            return
        for path in demo_signatures().iterdir():
            if path.suffix[1:] in SIGNATURE_SUFFIXES:
                shutil.copyfile(path, folder / path.name)

    def parts(
        self, names: Collection[str], *, on_result: Callable[[ScanResult], None]
    ) -> Iterator[Part]:
        """Yield what is to run, by name: keeper, event, receiver, watch; and what measures it."""
        from bucketward.metrics import Meters, Monitor, Sources

        is_keeper, is_event = "keeper" in names, "event" in names
        options = self.config.metrics
        has_monitor = options.enabled and (is_keeper or is_event)
        meters = Meters(
            Sources(
                queue=self.queue if has_monitor else None,
                ledger=self.ledger if has_monitor and is_keeper else None,
                engines=self.engines if has_monitor and is_event else None,
                spool=self.spool if has_monitor and is_event else None,
            )
        )
        if not has_monitor:
            yield from self._parts(names, on_result, meters)
            return
        checks: dict[str, Callable[[], object]] = {
            "state": self.state.ping,
            "queue": self.queue.ping,
        }
        if is_event:
            checks["engines"] = self._ping_engines
        if self.results_queue is not None:
            checks["results"] = self.results_queue.ping
        running: list[Part] = []
        monitor = Monitor(meters, running, checks, options.host, options.port)
        yield monitor
        log.info("metrics at %s/metrics", monitor.url)
        for part in self._parts(names, on_result, meters):
            yield part
            running.append(part)
        monitor.all_started()

    def _ping_engines(self) -> None:
        snapshot = self.settings.current()
        self.scanner.ping([snapshot.policy(each) for each in snapshot.protected.values()])

    def _parts(
        self, names: Collection[str], on_result: Callable[[ScanResult], None], meters: Meters
    ) -> Iterator[Part]:
        config = self.config

        def note(result: ScanResult) -> None:
            meters.result(result)
            on_result(result)

        if "keeper" in names:
            yield Keeper(
                self.ledger,
                self.queue,
                self.settings.current,
                self.protected_store,
                self.notifiers,
                holder=self.name,
                results=self.results_queue,
                sweep_every=config.keeper.sweep_minutes * 60.0,
                on_dead=meters.dead,
                on_sweep=meters.swept,
            )
        if "event" in names:
            yield EventAgent(
                self.queue,
                self.agents_scanner,
                self.results,
                self.settings.current,
                self.protected_store,
                self.quarantine,
                refresh=self.settings.refresh,
                name=self.name,
                threads=config.event.threads,
                max_deliveries=config.queue.max_deliveries,
                drain=config.event.drain_seconds,
                # SQS bills each request, and a longer wait is one; the others cost nothing.
                poll=10.0 if urlsplit(config.queue.url).scheme == "sqs" else 1.0,
                on_result=note,
                on_latency=meters.latency,
                on_retry=meters.retry,
                on_ready=self._say_ready,
            )
            if self.results_queue is None:
                yield Heartbeat(self.ledger, self.name, self.engines)
        if "receiver" in names:
            from bucketward.agents.receiver import Receiver

            yield Receiver(
                self.queue,
                config.receiver.host,
                config.receiver.port,
                secret=config.receiver.secret.get_secret_value(),
            )
        if "watch" in names:
            yield Watches(self._watched, self._watch)

    def _watch(self, bucket: str, folder: Path) -> Watch:
        from bucketward.stores.file import key_of

        # Before its first event: one of a bucket that is not known to be protected is refused.
        self.settings.refresh()
        self._watched_since[bucket] = datetime.now(UTC)
        return Watch(
            {bucket: folder},
            lambda refs: self.queue.send([encode([ref]) for ref in refs]),
            key_of=lambda _, path: key_of(path.split(b"/")),
            resync=self._resync,
            settle=self.config.watch.settle_seconds,
        )

    def _watched(self) -> Mapping[str, Path]:
        return {
            protected.bucket: folder_of(protected.url)
            for protected in self.ledger.protected().values()
            if protected.url.startswith("file://")
        }

    def _resync(self, bucket: str) -> None:
        threading.Thread(target=self._sweep, args=(bucket,), daemon=True).start()

    def _sweep(self, bucket: str) -> None:
        """Compare a directory with the ledger until that has worked once."""
        settle = timedelta(seconds=self.config.watch.settle_seconds)
        while not self._closing.is_set():
            protected = self.settings.current().protected.get(bucket)
            if protected is None:
                return
            try:
                # What came since the watch began, the watch announces.
                older = self._watched_since.pop(bucket, datetime.now(UTC) - settle)
                store = self.protected_store(protected)
                found = sweep(
                    self.ledger,
                    self.queue,
                    store,
                    protected,
                    older_than=older,
                    stopping=self._closing.is_set,
                )
            except Error as error:
                log.warning("cannot compare %s with the ledger, trying again: %s", bucket, error)
                self._closing.wait(10)
                continue
            if found:
                log.info("%d unscanned objects found in %s", found, bucket)
            return

    def _say_ready(self) -> None:
        for name, engine in self.engines.items():
            try:
                signatures = engine.signatures()
            except Error as error:
                log.warning("engine %s does not work: %s", name, error)
                continue
            log.info("engine %s: %s, %d signatures", name, signatures.version, signatures.count)
            if signatures.is_demo:
                log.warning("%s", DEMO_WARNING.format(self.signatures))

    def welcome(self, names: Collection[str]) -> Iterator[str]:
        """Yield what somebody who has just started us wants to know."""
        if "watch" in names:
            yield f"infected files go to {self.config.quarantine.removeprefix('file://')}"
        if "receiver" in names and self.config.receiver.enabled:
            receiver = self.config.receiver
            yield f"stores may push events to http://{receiver.host}:{receiver.port}/events"

    # -- checking --------------------------------------------------------------------------------

    def check(self, *, patience: float = 120.0) -> Iterator[tuple[str, str]]:
        """Open and try everything that is configured; yield each name, and what is wrong with it.

        An engine that is loading its database is waited for, `patience` seconds at most.
        """
        yield from self._try("state " + _plain(self.config.state.url), lambda: self.state.ping())
        yield from self._try("queue " + _plain(self.config.queue.url), lambda: self.queue.ping())
        if self.config.results.url:
            yield from self._try("results", lambda: self.results.ping())
        for name, options in self.config.engines.items():
            if options.enabled:
                yield from self._try(f"engine {name}", partial(self._try_engine, name, patience))
        for name in self.config.notifiers:
            yield from self._try(f"notifier {name}", partial(self._ping_notifier, name))
        yield from self._try(
            "spool", lambda: self.spool.reserve(self.spool.in_memory_below).close()
        )
        if self.config.receiver.enabled:
            yield from self._try("receiver", self._try_receiver)
        try:
            buckets = self.ledger.protected()
        except Error:
            return
        yield from self._try("policies", lambda: self._check_loops(buckets))
        for protected in buckets.values():
            yield from self._try(f"bucket {protected.bucket}", partial(self._try_bucket, protected))

    def _try(self, name: str, attempt: Callable[[], object]) -> Iterator[tuple[str, str]]:
        try:
            said = attempt()
        except Error as error:
            yield name, str(error)
        else:
            yield f"{name} ({said})" if said else name, ""

    def _try_receiver(self) -> str:
        if is_up(self.config.data):
            return "bucketward up runs"
        (receiver,) = self.parts({"receiver"}, on_result=lambda _: None)
        receiver.start()
        receiver.stop()
        return f"port {self.config.receiver.port} is free"

    def _ping_notifier(self, name: str) -> None:
        self.notifiers[name].ping()

    def _try_engine(self, name: str, patience: float) -> str:
        self.wait_for_engine(name, patience)
        signatures = self.engines[name].signatures()
        if signatures.is_demo:
            return DEMO_WARNING.format(self.signatures)
        return f"{signatures.version}, {signatures.count} signatures"

    def wait_for_engine(self, name: str, patience: float) -> None:
        """Wait until an engine is ready: `patience` seconds if it loads, a few if it says why not.

        Raises what its ping does.
        """
        engine = self.engines[name]
        started = time.monotonic()
        while True:
            try:
                engine.ping()
            except Unavailable as error:
                waited = time.monotonic() - started
                if waited > (patience if error.reason == "loading" else min(patience, 3.0)):
                    raise
                time.sleep(0.05)
            else:
                return

    def _try_bucket(self, protected: Protected) -> str:
        store = self.protected_store(protected)
        store.ping()
        policy = self.settings.current().policy(protected)
        target = self.quarantine(protected, policy.quarantine)
        target.ping()
        missing = [
            name
            for name in ("tag", "copy-source", "delete")
            if name not in store.conditions and not store.has_versions
        ]
        notes = ["versioned" if store.has_versions else "not versioned"]
        if not store.has_tags:
            notes.append("no tags here, the ledger alone knows")
        if missing:
            notes.append(f"no condition on {', '.join(missing)}: versioning is recommended")
        return ", ".join(notes) + f", quarantine {target.bucket}"

    def _make_folder(self, url: str) -> None:
        if urlsplit(url).scheme == "sqlite":
            with suppress(OSError):  # opening it says what is wrong
                folder_of(url).parent.mkdir(parents=True, exist_ok=True)


UP_LOCK = "up.lock"
"""Held by `bucketward up`, in the data folder."""

DEMO_WARNING = (
    "ONLY BUCKETWARD'S DEMONSTRATION SIGNATURES ARE LOADED: nothing but the EICAR test file is "
    "recognised. Put a ClamAV database (freshclam fetches it) into {}."
)


class Part(Protocol):
    """Something that runs until it is stopped."""

    def start(self) -> None:
        """Start and return."""

    def stop(self) -> None:
        """Stop in good order and return."""


def detect_type(file: Spooled) -> str:
    """Return the content type that the first bytes speak of, "" if they do not."""
    import puremagic

    try:
        return str(puremagic.from_string(os.pread(file.fd, 8192, 0), mime=True))
    except (puremagic.PureError, ValueError):
        return ""


def _beside(url: str, other: str) -> str:
    """Return `other` as a URL that opens it the way `url` is opened: same endpoint and region."""
    parts = urlsplit(url)
    if "?" in other or parts.scheme != urlsplit(other).scheme or not parts.query:
        return other
    return f"{other}?{parts.query}"


def is_up(data: Path) -> bool:
    """Return whether a `bucketward up` runs on a data folder."""
    try:
        with (data / UP_LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def folder_of(url: str) -> Path:
    """Return the path in a `file` or `sqlite` URL."""
    return Path(os.fsdecode(unquote_to_bytes(urlsplit(url).path)))


_AWS_HOSTS = (".amazonaws.com", ".amazonaws.com.cn")


def _mend(store: Store, info: ObjectInfo, ours: Mapping[str, str], policy: Policy) -> bool:
    with suppress(NotFound, Changed):
        for _ in range(3):
            existing = store.tags(info)
            if existing.get(policy.tags.result) == ours.get(policy.tags.result):
                return False
            wanted = merge_tags(existing, ours, policy.tags, store.max_tags)
            if wanted is None:
                return False
            store.replace_tags(info, wanted)
            if store.tags(info) == wanted:  # else somebody wrote meanwhile: merge with theirs
                return True
    return False


def _tags_or_none(store: Store, info: ObjectInfo) -> Mapping[str, str] | None:
    """Return the tags of an object, `None` if it has gone or changed meanwhile."""
    try:
        return store.tags(info)
    except (NotFound, Changed):
        return None


def _plain(url: str) -> str:
    return url.partition("?")[0]


def _url_path(path: Path) -> str:
    return path.absolute().as_uri().removeprefix("file://")
