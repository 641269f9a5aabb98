"""What is done about a verdict, and where each bucket's rules come from: pure decisions, no I/O.

`Settings` hold the rules of all buckets in layers and resolve them to one `Policy`; `choose`,
`combine`, `decide` and their kin apply it.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from bucketward.errors import ConfigError
from bucketward.model import (
    NOTHING,
    EngineReport,
    ObjectInfo,
    ObjectRef,
    Principal,
    Reason,
    ScanResult,
    Verdict,
)

ACTIONS = ("keep", "move", "delete")
"""What can become of an object, the mildest first.  "move" is to the quarantine."""


@dataclass(frozen=True, slots=True)
class EngineRule:
    """One engine, and which objects it votes on; where it does not vote, it is not asked.

    A `required` engine must say Clean for an object to be Clean.  It votes on objects of
    `min_size` to `max_size` bytes (`None`: any), whose key matches one of `keys` and whose detected
    content type one of `types` and none of `not_types` (all globs; empty means any).  A type that
    could not be detected excludes nothing: rather one scan too many.
    """

    engine: str
    required: bool = True
    min_size: int = 0
    max_size: int | None = None
    types: tuple[str, ...] = ()
    not_types: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lists:
    """A scan list or a skip list.  An object is on it if any one of its entries fits.

    `prefixes` are compared with the whole key.  `globs` too, by `fnmatch.fnmatchcase`: `*` crosses
    slashes, so ``in/*.zip`` also fits ``in/a/b.zip``, and there is no ``**``.  `extensions` are
    what the key ends with behind a dot, upper or lower case (``zip``, ``tar.gz``).  The sizes are
    one entry: it fits from `min_size` to `max_size` bytes, and is absent if neither is given.
    `storage_classes` are the provider's names; one that is not mentioned is ``STANDARD``.
    """

    prefixes: tuple[str, ...] = ()
    globs: tuple[str, ...] = ()
    extensions: tuple[str, ...] = ()
    min_size: int = 0
    max_size: int | None = None
    storage_classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TagNames:
    """The keys of our five tags, the most important first; "" switches one off."""

    result: str = "scan-result"
    date: str = "date-scanned"
    virus: str = "virus-name"
    message: str = "message"
    uploader: str = "uploaded-by"


@dataclass(frozen=True, slots=True)
class Policy:
    """How one bucket is treated.  The defaults are the product's."""

    engines: tuple[EngineRule, ...] = (EngineRule("clamav"), EngineRule("yara", required=False))
    """In the order in which they are asked.  An engine that is not open in this agent is left out
    if optional; if required, the object gets `Error`."""

    stop_at_first_hit: bool = False
    """Ask no further engine after the first that says Infected."""

    deadline: float = 300.0
    """Seconds for all engines together."""

    infected: str = "move"
    suspicious: str = "keep"
    error: str = "keep"

    unscannable: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    """Action by reason code, ``*`` for every other reason, else keep.  ``*`` does not speak for
    ``skipped``: nobody who says "do not scan these" means "move them all"."""

    tagging: bool = True
    tags: TagNames = TagNames()

    quarantine: str = ""
    """Bucket identity of the quarantine; "" is the agent's own."""

    scan: Lists = Lists()
    """If it has entries, only objects on it are scanned."""

    skip: Lists = Lists()
    """Objects on it are not scanned, whatever `scan` says."""

    tag_skipped: bool = False
    """Tag objects that are left out ``Unscannable``."""

    classify: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    """`Infected` or `Suspicious` by glob of ``signature`` or ``engine:signature``; the first glob
    that fits holds.  `Clean` is not offered: an engine may stop at its first hit, so nothing would
    be known of the rest of the file."""

    max_size: int | None = None
    """Larger objects are not even fetched, in bytes."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about a result: an action, and our tags (`None`: leave tags alone)."""

    action: str
    tags: Mapping[str, str] | None


def choose(
    policy: Policy,
    available: Collection[str],
    key: str,
    size: int,
    content_type: str,
) -> tuple[EngineRule, ...]:
    """Return the rules of the engines that vote on this object, in order, each engine once.

    A required engine is chosen even if it is not among the `available`: its missing report then
    makes the object `Error`, not Clean.  Two rules for one engine are one if both fit, required
    if either is.  `content_type` is the detected one, "" if unknown; it only matters if
    `needs_type`.
    """
    chosen: dict[str, EngineRule] = {}
    for rule in policy.engines:
        if not rule.required and rule.engine not in available:
            continue
        if not _votes(rule, key, size, content_type):
            continue
        earlier = chosen.get(rule.engine)
        if earlier is None:
            chosen[rule.engine] = rule
        elif rule.required:
            chosen[rule.engine] = replace(earlier, required=True)
    return tuple(chosen.values())


def needs_type(policy: Policy) -> bool:
    """Return whether `choose` would look at the content type."""
    return any(rule.types or rule.not_types for rule in policy.engines)


def reclassify(policy: Policy, report: EngineReport) -> EngineReport:
    """Return the report as `policy.classify` sees its findings: Infected, or Suspicious."""
    if not policy.classify or not report.findings:
        return report
    verdicts = {
        _classified(policy.classify, finding.engine, finding.signature) or report.verdict
        for finding in report.findings
    }
    verdict = Verdict.INFECTED if Verdict.INFECTED in verdicts else Verdict.SUSPICIOUS
    return report if verdict is report.verdict else replace(report, verdict=verdict)


def combine(
    reports: Sequence[EngineReport], rules: Sequence[EngineRule]
) -> tuple[Verdict, tuple[str, ...]]:
    """Return the verdict on an object, and why it is not Clean although nothing was found.

    `rules` are those that `choose` returned, `reports` what those engines said, in any order and
    possibly several of one engine.  Silence is never Clean:

    - any Infected makes Infected, else any Suspicious makes Suspicious;
    - Clean if at least one of the engines covered everything and said Clean, and every required
      one said Clean; an optional engine's failure does not matter then;
    - Unscannable if any said so;
    - Error if a required engine failed or did not report (``no-engine``): another try may help;
    - Unscannable if an engine said Clean of a part, with what the others missed;
    - Error else, ``no-engine`` if nobody reported.
    """
    said = [report.verdict for report in reports]
    for found in (Verdict.INFECTED, Verdict.SUSPICIOUS):
        if found in said:
            return found, ()
    by_engine: dict[str, list[EngineReport]] = {rule.engine: [] for rule in rules}
    for report in reports:
        by_engine.setdefault(report.engine, []).append(report)
    required = {rule.engine for rule in rules if rule.required}
    chosen = {rule.engine for rule in rules}

    content = all(_all_clean(by_engine[engine]) for engine in required)
    covered = any(
        _all_clean(by_engine[engine]) and all(report.is_full for report in by_engine[engine])
        for engine in chosen
    )
    if content and covered:
        return Verdict.CLEAN, ()

    reasons = {reason for report in reports for reason in report.coverage}
    if not reports or any(not by_engine[engine] for engine in required):
        reasons.add(Reason.NO_ENGINE.value)
    ordered = tuple(sorted(str(reason) for reason in reasons))
    if Verdict.UNSCANNABLE in said:
        return Verdict.UNSCANNABLE, ordered
    if content and any(_all_clean(by_engine[engine]) for engine in chosen):
        return Verdict.UNSCANNABLE, ordered
    return Verdict.ERROR, ordered or (Reason.NO_ENGINE.value,)


def is_left_out(policy: Policy, thing: ObjectInfo | ObjectRef) -> str:
    """Return why the policy's lists leave `thing` out, "" if they do not.

    What is left out gets `Unscannable` with reason ``skipped``, never Clean.  A reference may not
    know its size or storage class: then it is left out only by what is known, and asking again
    with the `ObjectInfo` decides.
    """
    fits = _fits(policy.skip, thing)
    if fits:
        return f"on the skip list: {fits}"
    scan = policy.scan
    if scan == Lists() or _fits(scan, thing):
        return ""
    if isinstance(thing, ObjectRef) and (
        scan.storage_classes or (thing.size is None and _has_sizes(scan))
    ):
        return ""
    return "not on the scan list"


def decide(result: ScanResult, policy: Policy) -> Decision:
    """Return what becomes of the object that `result` is about, and which tags it gets."""
    return Decision(_action(result, policy), _tags(result, policy))


def tag_value(text: str) -> str:
    """Return `text` as a tag value that S3 takes: at most 256 of its characters.

    S3 takes letters, digits, spaces and ``+ - = . _ : / @`` (user guide, "Categorizing your
    storage using tags"); others become ``_``.  Only ASCII letters are kept, as Azure takes no
    others; it does not take ``@`` either, which its store has to replace.
    """
    return re.sub(r"[^A-Za-z0-9 +\-=._:/@]", "_", text[:256]).strip(" ")


def merge_tags(
    existing: Mapping[str, str],
    ours: Mapping[str, str],
    names: TagNames,
    max_tags: int,
) -> Mapping[str, str] | None:
    """Return the tag set to write: everybody else's tags as they are, and ours anew.

    Every older tag under one of our five names is replaced or removed.  Where there is no room for
    all of ours, the most important are kept: result, date, virus, message, uploader.  `None` if not
    even one fits; then nothing is written and the result is still recorded.
    """
    merged = dict(strip_tags(existing, names))
    room = max_tags - len(merged)
    order = [name for name in _tag_names(names) if name in ours]
    order += [name for name in ours if name not in order]
    if order and room < 1:
        return None
    merged.update((name, ours[name]) for name in order[: max(room, 0)])
    return merged


def strip_tags(existing: Mapping[str, str], names: TagNames) -> Mapping[str, str]:
    """Return the tags without ours."""
    mine = set(_tag_names(names))
    return {name: value for name, value in existing.items() if name not in mine}


def quarantine_key(
    bucket: str, key: str, version_id: str | None, etag: str, sha256: str | None
) -> str:
    """Return the key under which an object lies in the quarantine.

    That is ``<source bucket>/<key>~<version id>``, or ``~<etag>-<12 digits of the SHA-256>``
    where there are no versions, so each version of each object has a place of its own and a second
    try finds the first's.  The source bucket is the name of an S3 bucket, and of any other the
    last part of its identity with a hash of the whole.  A key that would exceed 1,024 bytes in
    UTF-8, or that is no UTF-8, is cut between characters and ends in a hash of everything.
    """
    which = version_id if version_id is not None else f"{etag}-{(sha256 or '')[:12]}"
    which = which.replace("%", "%25").replace("~", "%7E")
    whole = f"{_bucket_name(bucket)}/{key}~{which}"
    encoded = whole.encode("utf-8", "replace")
    if len(encoded) <= _MAX_KEY and encoded.decode() == whole:
        return whole
    exact = "\0".join((bucket, key, which)).encode("utf-8", "surrogatepass")
    end = f"~{hashlib.sha256(exact).hexdigest()}"
    return encoded[: _MAX_KEY - len(end)].decode("utf-8", "ignore") + end


Layer = Mapping[str, Any]
"""A part of a `Policy`, as plain JSON data."""

_Problems = list[str]
_Reader = Callable[[Any, str, _Problems], None]
_LAYERS = ("global", "accounts", "regions", "buckets")


@dataclass(frozen=True, slots=True)
class Settings:
    """The policies of all buckets, in layers: global, then account, region and bucket.

    A layer is a part of a `Policy` as plain JSON data, under the names of the fields of `Policy`
    and its parts: ``{"infected": "delete", "tags": {"date": ""}, "engines": [{"engine":
    "clamav"}]}``.  A later layer wins; tables (`tags`, `scan`, `skip`, `unscannable`, `classify`)
    merge by field, lists are replaced whole.  ``null`` is "no limit", for `max_size` alone.

    Raises `ConfigError` with one problem per line, all of them at once, each with its path.
    """

    global_: Layer = field(default_factory=dict)
    accounts: Mapping[str, Layer] = field(default_factory=dict)
    regions: Mapping[str, Layer] = field(default_factory=dict)
    buckets: Mapping[str, Layer] = field(default_factory=dict)
    _resolved: dict[tuple[str, str, str], Policy] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        problems = _settings_problems(self._document())
        if problems:
            raise ConfigError("\n".join(problems))
        for name in ("global_", "accounts", "regions", "buckets"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Return the settings that `to_json` wrote, or an operator.

        ``{"global": {...}, "accounts": {id: {...}}, "regions": {name: {...}}, "buckets":
        {identity: {...}}}``.  An unknown name, a name given twice and a value of the wrong kind are
        `ConfigError`.
        """
        problems: _Problems = []
        try:
            document = json.loads(
                text,
                object_pairs_hook=lambda pairs: _unique(pairs, problems),
                parse_constant=lambda name: problems.append(f"settings: {name} is no JSON number"),
            )
        except RecursionError:
            raise ConfigError("settings: nested too deep") from None
        except ValueError as error:
            raise ConfigError(f"settings: not JSON: {error}") from error
        problems += _settings_problems(document)
        if problems:
            raise ConfigError("\n".join(problems))
        return cls(*(document.get(layer, {}) for layer in _LAYERS))

    def to_json(self) -> str:
        """Return the settings as JSON text; `from_json` reads them back, equal."""
        return json.dumps(_thawed(self._document()), indent=1)

    def resolve(self, account: str, region: str, bucket: str) -> Policy:
        """Return the policy of `bucket`.  Cheap: there is one per combination of layers."""
        # Only names that have a layer: whatever buckets events name, this does not grow.
        key = (
            account if account in self.accounts else "",
            region if region in self.regions else "",
            bucket if bucket in self.buckets else "",
        )
        policy = self._resolved.get(key)
        if policy is None:
            merged: Mapping[str, Any] = self.global_
            for layers, name in zip((self.accounts, self.regions, self.buckets), key, strict=True):
                merged = _merged(merged, layers.get(name, NOTHING))
            policy = self._resolved[key] = _policy(merged)
        return policy

    def _document(self) -> dict[str, Any]:
        layers = (self.global_, self.accounts, self.regions, self.buckets)
        return dict(zip(_LAYERS, layers, strict=True))


def check_loops(
    settings: Settings, protected: Collection[str], *, quarantine: str = ""
) -> list[str]:
    """Return why objects would go round in circles, one text per problem; empty if they do not.

    A quarantine must not be a protected bucket, nor, for directories, lie within one or around one.
    `quarantine` is the agent's own.  Directories are compared by name: a symbolic link is not seen
    through.
    """
    problems: _Problems = []
    targets = [("quarantine", quarantine)]
    targets += [
        (f"{path}.quarantine", layer.get("quarantine", "")) for path, layer in _layers(settings)
    ]
    for path, target in targets:
        if not target:
            continue
        place = _place(target)
        for bucket in sorted(protected):
            other = _place(bucket)
            if place == other:
                problems.append(f"{path}: {target} is itself protected; choose another bucket")
            elif place.startswith("file://") and _is_within(place, other):
                problems.append(f"{path}: {target} lies within {bucket}, which is protected")
            elif place.startswith("file://") and _is_within(other, place):
                problems.append(f"{path}: {target} contains {bucket}, which is protected")
    return problems


_READ = frozenset(
    f"{noun}.read"
    for noun in ("account", "agent", "bucket", "finding", "job", "result", "schedule", "setting")
)
_OPERATE = frozenset(
    {
        "bucket.protect",
        "finding.allow",
        "finding.restore",
        "job.cancel",
        "job.start",
        "message.redrive",
        "object.submit",
        "schedule.change",
    }
)
_ADMINISTER = frozenset(
    {
        "account.change",
        "bucket.guard",
        "finding.delete",
        "setting.change",
        "state.export",
        "user.change",
        "user.read",
    }
)

RIGHTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "viewer": _READ,
        "operator": _READ | _OPERATE,
        "admin": _READ | _OPERATE | _ADMINISTER,
        "agent": frozenset({"object.submit", "result.read", "setting.read"}),
    }
)
"""What each role may do: ``<noun>.<verb>``.  A new action is one word in one of these sets."""


def may(principal: Principal, action: str, bucket: str = "") -> bool:
    """Return whether `principal` may do `action`, to `bucket` if it is about one.

    `RIGHTS` says which roles may; an unknown role or action may not.  Groups only ever take away:
    somebody other than an admin who has groups ``bucket:<identity>`` may do nothing to any other
    bucket, and nothing that is about no bucket or about all of them.  (Groups that are managed in
    the console will resolve to these.)
    """
    if action not in RIGHTS.get(principal.role, frozenset()):
        return False
    if principal.role == "admin":
        return True
    allowed = {
        group.removeprefix("bucket:") for group in principal.groups if group.startswith("bucket:")
    }
    return not allowed or bucket in allowed


_MAX_KEY = 1024
_IDENTITY = re.compile(r"[a-z][a-z0-9+.-]*://[^?#]*[^?#/]", re.DOTALL)
_ENGINE = re.compile(r"[a-z0-9][a-z0-9._-]*")


def _is_sized(limits: EngineRule | Lists, size: int) -> bool:
    return limits.min_size <= size and (limits.max_size is None or size <= limits.max_size)


def _votes(rule: EngineRule, key: str, size: int, content_type: str) -> bool:
    if not _is_sized(rule, size):
        return False
    if rule.keys and not _any_glob(rule.keys, key):
        return False
    if not content_type:
        return True
    kind = content_type.lower()
    if rule.types and not _any_glob(rule.types, kind):
        return False
    return not _any_glob(rule.not_types, kind)


def _any_glob(globs: Iterable[str], text: str) -> bool:
    return any(fnmatchcase(text, glob) for glob in globs)


def _classified(classify: Mapping[str, str], engine: str, signature: str) -> Verdict | None:
    names = (signature, f"{engine}:{signature}")
    for glob, verdict in classify.items():
        if any(fnmatchcase(name, glob) for name in names):
            return Verdict(verdict)
    return None


def _all_clean(reports: Sequence[EngineReport]) -> bool:
    return bool(reports) and all(report.verdict is Verdict.CLEAN for report in reports)


def _has_sizes(lists: Lists) -> bool:
    return lists.min_size > 0 or lists.max_size is not None


def _fits(lists: Lists, thing: ObjectInfo | ObjectRef) -> str:
    key, size = thing.key, thing.size
    for prefix in lists.prefixes:
        if key.startswith(prefix):
            return f"prefix {prefix}"
    for glob in lists.globs:
        if fnmatchcase(key, glob):
            return f"glob {glob}"
    lower = key.lower()
    for extension in lists.extensions:
        if lower.endswith("." + extension.lower().removeprefix(".")):
            return f"extension {extension}"
    if size is not None and _has_sizes(lists) and _is_sized(lists, size):
        return f"size {size}"
    if isinstance(thing, ObjectInfo):
        # S3 does not mention the class of what is in STANDARD.
        storage_class = thing.storage_class or "STANDARD"
        if storage_class in lists.storage_classes:
            return f"storage class {storage_class}"
    return ""


def _action(result: ScanResult, policy: Policy) -> str:
    match result.verdict:
        case Verdict.INFECTED:
            return policy.infected
        case Verdict.SUSPICIOUS:
            return policy.suspicious
        case Verdict.ERROR:
            return policy.error
        case Verdict.UNSCANNABLE:
            actions = [_unscannable(policy, reason) for reason in result.reasons or ("*",)]
            return max(actions, key=ACTIONS.index)
        case _:
            return "keep"


def _unscannable(policy: Policy, reason: str) -> str:
    default = "keep" if reason == Reason.SKIPPED else policy.unscannable.get("*", "keep")
    return policy.unscannable.get(reason, default)


def _tags(result: ScanResult, policy: Policy) -> Mapping[str, str] | None:
    names, verdict = policy.tags, result.verdict
    if not policy.tagging or (Reason.SKIPPED in result.reasons and not policy.tag_skipped):
        return None
    tags: dict[str, str] = {}
    if result.uploaded_by and verdict in {Verdict.INFECTED, Verdict.INFECTED_ALLOWED}:
        # Amazon's "AWS:AIDA..." would be taken for a reserved tag.
        tags[names.uploader] = tag_value(result.uploaded_by.removeprefix("AWS:"))
    if verdict in {Verdict.ERROR, Verdict.UNSCANNABLE}:
        words = (" ".join(result.reasons), result.message)
        tags[names.message] = tag_value(": ".join(word for word in words if word))
    if result.findings and verdict not in {Verdict.CLEAN, Verdict.ERROR, Verdict.UNSCANNABLE}:
        tags[names.virus] = _joined(finding.signature for finding in result.findings)
    tags[names.date] = result.scanned_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    tags[names.result] = verdict.value
    tags.pop("", None)
    return {name: tags[name] for name in _tag_names(names) if tags.get(name)} or None


def _joined(names: Iterable[str]) -> str:
    """Return the names that fit into one tag value, and how many more there are."""
    unique = [name for name in dict.fromkeys(tag_value(name) for name in names) if name]
    text = ""
    for kept in range(min(len(unique), 256), 0, -1):  # more cannot fit
        more = f" +{len(unique) - kept}" if kept < len(unique) else ""
        text = " ".join(unique[:kept])
        if kept == 1:
            text = text[: 256 - len(more)]
        text += more
        if len(text) <= 256:
            break
    return text


def _tag_names(names: TagNames) -> list[str]:
    """Return our tags' names in the order of their importance."""
    ordered = (names.result, names.date, names.virus, names.message, names.uploader)
    return [name for name in ordered if name]


def _bucket_name(bucket: str) -> str:
    scheme, _, rest = bucket.partition("://")
    if scheme == "s3":
        return rest
    last = rest.rstrip("/").rpartition("/")[2]
    digest = hashlib.sha256(bucket.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{last}-{digest}" if last else digest


def _settings_problems(document: Any) -> _Problems:
    problems: _Problems = []
    if not isinstance(document, Mapping):
        return ["settings: must be a table"]
    problems += [
        f"{_show(name)}: unknown, use one of {', '.join(_LAYERS)}"
        for name in document
        if name not in _LAYERS
    ]
    base = document.get("global", {})
    if _policy_problems(base, "global", {}, problems):
        base = {}
    for kind in _LAYERS[1:]:
        layers = document.get(kind, {})
        if not isinstance(layers, Mapping):
            problems.append(f"{kind}: must be a table")
            continue
        for name, layer in layers.items():
            path = f"{kind}.{name}"
            if kind == "buckets" and not (isinstance(name, str) and _IDENTITY.fullmatch(name)):
                problems.append(f"{path}: is no bucket identity such as s3://name")
            elif not name:
                problems.append(f"{path}: has an empty name")
            _policy_problems(layer, path, base, problems)
    return problems


def _policy_problems(layer: Any, path: str, base: Mapping[str, Any], problems: _Problems) -> bool:
    """Add what is wrong with a layer, by itself and on top of `base`; return whether anything."""
    before = len(problems)
    _table(layer, path, problems, _POLICY)
    if len(problems) == before:
        merged = _merged(base, layer)
        for name in ("scan", "skip"):
            _ordered(merged.get(name, {}), f"{path}.{name}", problems)
        tags = TagNames(**merged.get("tags", {}))
        names = _tag_names(tags)
        problems += [
            f"{path}.tags: {_show(name)} is given to two tags"
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
    return len(problems) > before


def _table(value: Any, path: str, problems: _Problems, readers: Mapping[str, _Reader]) -> None:
    if not isinstance(value, Mapping):
        problems.append(f"{path}: must be a table")
        return
    for name, item in value.items():
        reader = readers.get(name)
        if reader is None:
            problems.append(f"{path}.{name}: unknown, use one of {', '.join(readers)}")
        else:
            reader(item, f"{path}.{name}", problems)


def _ordered(value: Mapping[str, Any], path: str, problems: _Problems) -> None:
    low, high = value.get("min_size", 0), value.get("max_size")
    if high is not None and low > high:
        problems.append(f"{path}: min_size {low} is above max_size {high}")


def _is_flag(value: Any, path: str, problems: _Problems) -> None:
    if not isinstance(value, bool):
        problems.append(f"{path}: {_show(value)} is neither true nor false")


def _is_seconds(value: Any, path: str, problems: _Problems) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= _MAX_SECONDS
        or not math.isfinite(value)
    ):
        problems.append(f"{path}: {_show(value)} is no number of seconds up to {_MAX_SECONDS}")


def _is_size(value: Any, path: str, problems: _Problems) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        problems.append(f"{path}: {_show(value)} is no number of bytes")


def _is_limit(value: Any, path: str, problems: _Problems) -> None:
    if value is not None:
        _is_size(value, path, problems)


def _is_texts(value: Any, path: str, problems: _Problems) -> None:
    if not isinstance(value, list | tuple):
        problems.append(f"{path}: must be a list of texts")
        return
    problems += [
        f"{path}[{number}]: {_show(item)} is no text"
        for number, item in enumerate(value)
        if not isinstance(item, str) or not item
    ]


def _is_one_of(choices: Sequence[str]) -> _Reader:
    def read(value: Any, path: str, problems: _Problems) -> None:
        if not isinstance(value, str) or value not in choices:
            problems.append(f"{path}: {_show(value)} is none of {', '.join(choices)}")

    return read


def _is_bucket(value: Any, path: str, problems: _Problems) -> None:
    if not isinstance(value, str) or (value and not _IDENTITY.fullmatch(value)):
        problems.append(f"{path}: {_show(value)} is no bucket identity such as s3://name")


def _is_tag_name(value: Any, path: str, problems: _Problems) -> None:
    if (
        not isinstance(value, str)
        or len(value) > 128
        or value != tag_value(value)
        or value.lower().startswith("aws:")
    ):
        problems.append(f"{path}: {_show(value)} cannot be the key of a tag")


def _is_engine(value: Any, path: str, problems: _Problems) -> None:
    if not isinstance(value, str) or not _ENGINE.fullmatch(value):
        problems.append(f"{path}: {_show(value)} is no engine's name")


def _is_engines(value: Any, path: str, problems: _Problems) -> None:
    if not isinstance(value, list | tuple) or not value:
        problems.append(f"{path}: must be a list of at least one engine, or nothing is ever Clean")
        return
    for number, rule in enumerate(value):
        here, before = f"{path}[{number}]", len(problems)
        _table(rule, here, problems, _ENGINE_RULE)
        if isinstance(rule, Mapping) and "engine" not in rule:
            problems.append(f"{here}: engine is missing")
        if len(problems) == before:
            _ordered(rule, here, problems)


def _is_reasons(value: Any, path: str, problems: _Problems) -> None:
    _table(value, path, problems, dict.fromkeys(("*", *Reason), _is_one_of(ACTIONS)))


def _is_classes(value: Any, path: str, problems: _Problems) -> None:
    if not isinstance(value, Mapping):
        problems.append(f"{path}: must be a table")
        return
    read = _is_one_of((Verdict.INFECTED.value, Verdict.SUSPICIOUS.value))
    for glob, verdict in value.items():
        read(verdict, f"{path}.{glob}", problems)


def _is_lists(value: Any, path: str, problems: _Problems) -> None:
    _table(value, path, problems, _LISTS)


def _is_tags(value: Any, path: str, problems: _Problems) -> None:
    _table(value, path, problems, {item.name: _is_tag_name for item in fields(TagNames)})


_MAX_SECONDS = 86_400
_SIZES: Mapping[str, _Reader] = {"min_size": _is_size, "max_size": _is_limit}
_LISTS: Mapping[str, _Reader] = {
    "prefixes": _is_texts,
    "globs": _is_texts,
    "extensions": _is_texts,
    **_SIZES,
    "storage_classes": _is_texts,
}
_ENGINE_RULE: Mapping[str, _Reader] = {
    "engine": _is_engine,
    "required": _is_flag,
    **_SIZES,
    "types": _is_texts,
    "not_types": _is_texts,
    "keys": _is_texts,
}
_POLICY: Mapping[str, _Reader] = {
    "engines": _is_engines,
    "stop_at_first_hit": _is_flag,
    "deadline": _is_seconds,
    "infected": _is_one_of(ACTIONS),
    "suspicious": _is_one_of(ACTIONS),
    "error": _is_one_of(ACTIONS),
    "unscannable": _is_reasons,
    "tagging": _is_flag,
    "tags": _is_tags,
    "quarantine": _is_bucket,
    "scan": _is_lists,
    "skip": _is_lists,
    "tag_skipped": _is_flag,
    "classify": _is_classes,
    "max_size": _is_limit,
}


def _policy(merged: Mapping[str, Any]) -> Policy:
    made: dict[str, Callable[[Any], Any]] = {
        "engines": lambda rules: tuple(EngineRule(**_tuples(rule)) for rule in rules),
        "tags": lambda names: TagNames(**names),
        "scan": lambda lists: Lists(**_tuples(lists)),
        "skip": lambda lists: Lists(**_tuples(lists)),
        "unscannable": _frozen,
        "classify": _frozen,
        "deadline": float,
    }
    return Policy(
        **{name: made[name](value) if name in made else value for name, value in merged.items()}
    )


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list | tuple) else value
        for name, value in table.items()
    }


def _merged(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `layer` on top; tables of tables merge, the layer's entries first.

    First, because in `classify` the order decides.
    """
    merged = dict(base)
    for name, value in layer.items():
        below = base.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = {**value, **{key: below[key] for key in below if key not in value}}  # noqa: PLW2901
        merged[name] = value
    return merged


def _layers(settings: Settings) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield "global", settings.global_
    for kind in _LAYERS[1:]:
        for name, layer in getattr(settings, kind).items():
            yield f"{kind}.{name}", layer


def _unique(pairs: list[tuple[str, Any]], problems: _Problems) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems += [f"settings: {_show(name)} is given twice" for name in twice]
    return table


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(item) for key, item in value.items()})
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thawed(item) for key, item in value.items()}
    return [_thawed(item) for item in value] if isinstance(value, list | tuple) else value


def _show(value: Any) -> str:
    text = json.dumps(value, default=lambda thing: type(thing).__name__)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place(bucket: str) -> str:
    """Return the identity of the bucket that a URL lies in, so that equal places are equal."""
    url = re.split("[?#]", bucket, maxsplit=1)[0]
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        return f"file://{posixpath.normpath('/' + rest.lstrip('/'))}"
    depth = 2 if scheme == "azblob" else 1
    return f"{scheme}://{'/'.join(rest.split('/')[:depth])}"


def _is_within(inner: str, outer: str) -> bool:
    return inner.startswith(outer.rstrip("/") + "/")
