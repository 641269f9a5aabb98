"""Configuration: one TOML file with the environment on top, checked as a whole at the start.

What can change while we run (policies, protected buckets, schedules) are settings in the ledger
and not here, but for the seeds that a new ledger is given.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from bucketward.errors import ConfigError

PREFIX = "BUCKETWARD_"

SEARCHED = ("./bucketward.toml", "/etc/bucketward/bucketward.toml")
"""Where a configuration file is looked for if none is named; the first one found is read."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_UNSAFE = re.compile("[%?#\x00-\x1f\x7f\udc80-\udcff]")
_MAX_SECRET = 64 << 10
_SECRET_WORDS = re.compile(r"passw|secret|token|credential|signature|access_?key", re.IGNORECASE)

_Path = tuple[str, ...]
"""The names that lead to an option, such as ``("event", "threads")``."""


# How texts become values.  `context` holds the folders that relative paths and $DATA stand for.


def _flag(value: Any) -> Any:
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise ValueError("is neither true nor false")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("is true or false, and should be a number")  # noqa: TRY004 - pydantic's way
    return value


def _size(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("is no size: give bytes, or such as 512 MiB or 2 GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _folder(value: Any, info: ValidationInfo) -> Any:
    return _path(value, info.context or {})


def _path(value: Any, context: Mapping[str, Path]) -> Path:
    text = str(value)
    if not isinstance(value, str | Path) or not text or "\0" in text:
        raise ValueError("is no path")
    if text == "$DATA" or text.startswith("$DATA/"):
        return context["data"] / text[6:]
    # Not resolve(): a symbolic link may be moved to another target later.
    return Path(os.path.normpath(context["folder"] / Path(text).expanduser()))


def _url(value: Any, info: ValidationInfo) -> Any:
    """Return a URL that identifies something; `file` and `sqlite` ones with an absolute path."""
    if not isinstance(value, str):
        raise ValueError("is no URL")  # noqa: TRY004 - pydantic's way
    if any(character.isspace() or not character.isprintable() for character in value):
        raise ValueError("is no URL: it has blanks or control characters")
    try:
        parts = urlsplit(value)
    except ValueError:
        raise ValueError("is no URL") from None
    if not parts.scheme:
        raise ValueError("is no URL: it has no scheme, as in s3://bucket or file:///folder")
    if "@" in parts.netloc or any(
        _SECRET_WORDS.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)
    ):
        raise ValueError(
            "has credentials in it: a URL identifies and never authenticates; credentials come "
            "from the platform's own chain, or from an option of their own"
        )
    for scheme in ("file://", "sqlite:///"):
        if value.startswith(scheme + "$DATA/"):
            path = _path(value[len(scheme) :], info.context or {})
            return f"{scheme[:-1] if scheme.endswith('///') else scheme}" + url_path(path)
    if parts.scheme == "file" and not value.startswith("file:///"):
        raise ValueError("needs an absolute path with three slashes, as in file:///srv/drop")
    if parts.scheme == "sqlite" and not value.startswith("sqlite:///"):
        raise ValueError("needs an absolute path, as in sqlite:///srv/state.db, or $DATA")
    return value


def url_path(path: Path) -> str:
    """Return a path as the file store writes it in a URL: only the needful is encoded."""
    text = os.fsencode(path).decode("utf-8", "surrogateescape")
    return _UNSAFE.sub(lambda found: quote(os.fsencode(found[0]), safe=""), text)


def _optional_url(value: Any, info: ValidationInfo) -> Any:
    return "" if value == "" else _url(value, info)


def _bucket(value: Any, info: ValidationInfo) -> Any:
    url = _url(value, info)
    if "?" in url or "#" in url or "://" not in url:
        raise ValueError("is no bucket, as in s3://name or file:///folder")
    return url.rstrip("/")


def _optional_bucket(value: Any, info: ValidationInfo) -> Any:
    return "" if value == "" else _bucket(value, info)


Flag = Annotated[bool, BeforeValidator(_flag)]
Number = Annotated[int, BeforeValidator(_number)]
Seconds = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Port = Annotated[int, BeforeValidator(_number), Field(ge=0, le=65535)]
Folder = Annotated[Path, BeforeValidator(_folder)]
Url = Annotated[str, BeforeValidator(_url)]
OptionalUrl = Annotated[str, BeforeValidator(_optional_url)]
Bucket = Annotated[str, BeforeValidator(_bucket)]
OptionalBucket = Annotated[str, BeforeValidator(_optional_bucket)]


class Table(BaseModel):
    """One table: frozen, complete, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class StateTable(Table):
    """Where the ledger is kept: results, settings, protected buckets."""

    url: Url = Field(
        "sqlite:///$DATA/state.db",
        description="The database: `sqlite:///` and a path.",
    )


class QueueTable(Table):
    """Where the events wait for the event agent."""

    url: Url = Field(
        "sqlite:///$DATA/queue.db",
        description="The queue: `sqlite:///` and a path, or `sqs://region/account/name`.",
    )
    max_deliveries: Annotated[Number, Field(ge=2, le=1000)] = Field(
        5,
        description="How often a message is delivered before it goes to the dead letters; SQS goes "
        "by the redrive policy of its own.",
    )
    lease: Annotated[Seconds, Field(ge=5, le=43200)] = Field(
        120.0,
        description="Seconds for which a message is ours; extended while work on it runs.",
    )


class ResultsTable(Table):
    """What is kept of each scan."""

    url: OptionalUrl = Field(
        "",
        description="A queue that results pass through on their way to the ledger; empty to write "
        "them to the state at once.",
    )
    keep: Literal["all", "problems"] = Field(
        "all",
        description="Keep `all` results in full, or only the `problems`; the verdict on every "
        "live version is kept anyway.",
    )
    retention_days: Annotated[Number, Field(ge=0)] = Field(
        365, description="Days after which results are dropped; 0 for never."
    )


class EventTable(Table):
    """The event agent, which scans what the queue announces."""

    enabled: Flag = Field(default=True, description="Run it as a part of `bucketward up`.")
    threads: Annotated[Number, Field(ge=1, le=256)] = Field(
        8, description="How many objects are fetched and scanned at a time."
    )
    drain_seconds: Seconds = Field(
        25.0,
        description="How long a stop waits for scans in hand; the platform must grant a bit more.",
    )


class ReceiverTable(Table):
    """The event receiver, to which stores such as Ceph and MinIO push their events by HTTP.

    Make Ceph's topics with `persistent=true`: of others an event that cannot be taken is lost, and
    only a sweep finds its object.
    """

    enabled: Flag = Field(default=False, description="Run it as a part of `bucketward up`.")
    host: str = Field("127.0.0.1", description="The address to listen on; `0.0.0.0` for all.")
    port: Port = Field(8082, description="The port to listen on.")
    secret: SecretStr = Field(
        SecretStr(""),
        description="What a store has to know to post events, at least 16 characters: as bearer "
        "token, as password, or as the end of the path (`/events/<secret>`).",
    )

    @model_validator(mode="after")
    def _has_secret(self) -> ReceiverTable:
        if self.enabled and len(self.secret.get_secret_value()) < 16:
            raise ValueError("needs a secret of at least 16 characters: set receiver.secret")
        return self


class WatchTable(Table):
    """The directory watch, which announces what is written into directory buckets.

    It does not hear of what other machines write on a network file system; a sweep does.
    """

    enabled: Flag = Field(
        default=True, description="Watch the protected directories of this machine."
    )
    settle_seconds: Annotated[Seconds, Field(ge=0.1, le=3600)] = Field(
        1.0, description="How long a file must not have changed before it is scanned."
    )


class KeeperTable(Table):
    """The keeper, which does the background chores."""

    enabled: Flag = Field(default=True, description="Run it as a part of `bucketward up`.")
    sweep_minutes: Annotated[Number, Field(ge=0)] = Field(
        60,
        description="How often the protected buckets are compared with the ledger, to find "
        "objects whose event never came; 0 for never.",
    )


class ClamavEngine(Table):
    """ClamAV: a clamd of our own, or one that somebody else runs."""

    kind: Literal["clamav"] = Field("clamav", description="What it is; by default its name.")
    enabled: Flag = Field(default=True, description="Use it.")
    url: Url = Field(
        "clamav:managed",
        description="`clamav:managed` for a clamd that Bucketward starts and keeps fresh; "
        "`clamav:///run/clamd.ctl` or `clamav://host:3310` for another, whose limits are then its "
        "own.",
    )
    threads: Annotated[Number, Field(ge=1, le=256)] = Field(
        16, description="How many files the managed clamd looks at at a time."
    )
    max_file_size: Annotated[Size, Field(ge=1, le=2_147_483_645)] = Field(
        2_147_483_645,
        description="The largest file or archive member that is looked at; clamd cannot do more "
        "than 2 GiB.",
    )
    max_scan_size: Annotated[Size, Field(ge=1, le=4000 << 20)] = Field(
        4000 << 20, description="How much is looked at in one file with all its members."
    )
    max_files: Annotated[Number, Field(ge=1)] = Field(
        100_000, description="How many members of one archive are looked at."
    )
    max_recursion: Annotated[Number, Field(ge=1, le=100)] = Field(
        20, description="How deep archives may be nested."
    )
    scan_time: Annotated[Seconds, Field(ge=1)] = Field(
        120.0, description="Seconds for one file in the managed clamd."
    )
    pua: Flag = Field(
        default=False, description="Also look for potentially unwanted applications: Suspicious."
    )
    user: str = Field(
        "", description="The user as whom the managed clamd runs if we are root; empty for ours."
    )
    options: Mapping[str, str] = Field(
        default_factory=dict,
        description="Further lines for the managed clamd's configuration; those on which verdicts "
        "rest are refused.",
    )


class YaraEngine(Table):
    """YARA: rules of your own, in worker processes.  It opens no containers."""

    kind: Literal["yara"] = Field("yara", description="What it is; by default its name.")
    enabled: Flag = Field(default=True, description="Use it.")
    rules: Folder = Field(
        Path("$DATA/rules"), description="The folder of the rules (`*.yar`, `*.yara`)."
    )
    workers: Annotated[Number, Field(ge=1, le=64)] = Field(
        2, description="How many worker processes scan."
    )
    max_file_size: Annotated[Size, Field(ge=1)] = Field(
        1 << 30, description="The largest file that is looked at."
    )


_KINDS = ("clamav", "yara")
Engine = Annotated[ClamavEngine | YaraEngine, Field(discriminator="kind")]


class SignaturesTable(Table):
    """The signature databases."""

    directory: Folder = Field(
        Path("$DATA/signatures"),
        description="The folder that the managed clamd is fed from; new files are picked up.",
    )


class SpoolTable(Table):
    """Where objects are held while they are scanned."""

    memory: Size = Field(512 << 20, description="How much memory all of them may take together.")
    disk: Size = Field(10 << 30, description="How much disk all of them may take together.")
    directory: Folder = Field(Path("$DATA/spool"), description="The folder for the larger ones.")
    in_memory_below: Size = Field(
        16 << 20, description="Smaller objects are held in memory, others on disk."
    )


class CacheTable(Table):
    """The cache of verdicts, by content, engines and signatures.

    What was judged completely is not scanned again until the signatures change: the same bytes
    under another name, or an event that comes again.
    """

    enabled: Flag = Field(default=True, description="Use it.")
    entries: Annotated[Number, Field(ge=1, le=1_000_000)] = Field(
        4096,
        description="How many verdicts an agent holds in memory, of at most 16 KiB each; the "
        "ledger holds them all.",
    )
    days: Annotated[Number, Field(ge=1, le=365)] = Field(
        30, description="Days after which a verdict is forgotten."
    )


class MetricsTable(Table):
    """Metrics for Prometheus, liveness and readiness, of each agent and of `bucketward up`.

    Agents that share a machine need a port each.
    """

    enabled: Flag = Field(default=False, description="Serve `/metrics`, `/health` and `/ready`.")
    host: str = Field("127.0.0.1", description="The address to listen on; `0.0.0.0` for all.")
    port: Port = Field(
        9464, description="The port to listen on; 0 for any free one, which the log names."
    )


class LogTable(Table):
    """The log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least that is logged."
    )
    format: Literal["auto", "json", "text"] = Field(
        "auto",
        description="`json` for one JSON object a line, `text` for people, `auto` for text on a "
        "terminal and JSON elsewhere.",
    )


class AccountTable(Table):
    """Another account, whose buckets we may work on."""

    id: str = Field("", description="The account's number or name at its provider.")
    region: str = Field("", description="The region to work in; empty for the platform's own.")
    role_arn: str = Field("", description="The AWS role to assume there.")
    external_id: str = Field("", description="The external id that the role wants.")
    profile: str = Field("", description="The profile of the AWS configuration to start from.")
    endpoint: OptionalUrl = Field(
        "", description="The address of an S3-compatible server; empty for Amazon's."
    )


class NotifierTable(Table):
    """One place that is told about results."""

    url: Url = Field(
        description="Where to: `https://...` for a webhook, `log://` for the log, "
        "`sns://region/account/topic`, `eventbridge://region/bus`, `securityhub://region/account` "
        "(infected objects only), or `apprise:` for Slack, Teams, e-mail and what else Apprise "
        "speaks to. Those of AWS take `?endpoint=https://...`."
    )
    secret: SecretStr = Field(
        SecretStr(""),
        description="The secret that signs what a webhook is sent (`whsec_...`); for `apprise:` "
        "the Apprise URLs themselves, separated by blanks or line breaks.",
    )
    vendor_compatible: Flag = Field(
        default=False,
        description="Name the quarantine in `bucket` and `key` of what was moved there, as the "
        "commercial product does; `scanned` then says where it was.",
    )
    allow_private: Flag = Field(
        default=False, description="Also http, and addresses that are not public."
    )
    only: Mapping[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description='Which notes, by attribute, such as `scanResult = ["Infected"]`: all '
        "attributes named must have one of their values; empty for every note.",
    )
    ca_file: Folder | None = Field(
        None, description="Certificates to trust in place of the system's."
    )


class Config(Table):
    """All of the configuration."""

    data: Folder = Field(
        Path("./bucketward-data"),
        description="The folder of everything that Bucketward keeps itself; `$DATA` elsewhere. "
        "One `bucketward up` per folder.",
    )
    protect: tuple[Bucket, ...] = Field(
        ("file://$DATA/drop",),
        description="The buckets that a new ledger begins with. Afterwards they are settings, and "
        "this changes nothing.",
    )
    quarantine: OptionalBucket = Field(
        "file://$DATA/quarantine",
        description="The bucket that infected objects are moved to where the settings name no "
        "other.",
    )
    policy: Mapping[str, Any] = Field(
        default_factory=dict,
        description="The global settings that a new ledger begins with, see the page on policies.",
    )
    state: StateTable
    queue: QueueTable
    results: ResultsTable
    event: EventTable
    receiver: ReceiverTable
    watch: WatchTable
    keeper: KeeperTable
    engines: Mapping[str, Engine]
    signatures: SignaturesTable
    spool: SpoolTable
    cache: CacheTable
    metrics: MetricsTable
    log: LogTable
    accounts: Mapping[str, AccountTable]
    notifiers: Mapping[str, NotifierTable]

    @field_validator("quarantine")
    @classmethod
    def _has_no_loop(cls, quarantine: str, info: ValidationInfo) -> str:
        for bucket in info.data.get("protect", ()):
            if quarantine and (quarantine + "/").startswith(bucket + "/"):
                raise ValueError(
                    f"is in the protected bucket {bucket}: what is moved there would be scanned "
                    "and moved for ever"
                )
        return quarantine


def find(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Return the configuration file to read, `None` for none.

    That is `path`, or what the environment names, or the first of `SEARCHED` that is there.
    """
    if path is None and environ.get(PREFIX + "CONFIG"):
        path = Path(environ[PREFIX + "CONFIG"])
    if path is not None:
        return path
    return next((found for name in SEARCHED if (found := Path(name)).is_file()), None)


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """Return the configuration that the file and, above it, the environment make.

    `ConfigError` names everything that is wrong at once, one problem a line.
    """
    file = find(path, environ)
    problems: list[str] = []
    values = _read(file) if file else {}
    variables = _overlay(values, environ, problems)
    folder = file.absolute().parent if file else Path.cwd()
    data = _data(values, Path.cwd() if ("data",) in variables else folder)
    context = {"folder": folder, "data": data}
    _fill(values, context, problems)
    try:
        config = Config.model_validate(values, context=context)
    except ValidationError as error:
        problems += [_explain(each, file, variables) for each in error.errors(include_input=False)]
    if problems:
        lines = "\n".join(dict.fromkeys(problems))
        raise ConfigError(f"the configuration is not valid:\n{lines}")
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the configuration {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {file} is no text in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration {file} is no TOML: {error}") from error


def _data(values: dict[str, Any], folder: Path) -> Path:
    """Settle what $DATA is, and put it into `values`."""
    text = values.setdefault("data", str(Path.cwd() / "bucketward-data"))
    with contextlib.suppress(ValueError):
        data = _path(text, {"folder": folder, "data": folder})
        values["data"] = str(data)
        return data
    return folder  # and the validation says what is wrong


# The environment.


def _overlay(
    values: dict[str, Any], environ: Mapping[str, str], problems: list[str]
) -> dict[_Path, str]:
    """Lay the variables of `environ` over `values`; return which variable gave which option."""
    variables: dict[_Path, str] = {}
    for variable in sorted(environ):
        name = variable.removeprefix(PREFIX)
        # BUCKETWARD_TEST_REQUIRE and the like are for our own tests.
        if name in {variable, "CONFIG"} or name.startswith("TEST_"):
            continue
        path = tuple(name.lower().split("__"))
        field, known = _option(path)
        if field is None or variable != _variable(path):
            meant = [each for each in (path, *known, *_options()) if _option(each)[0]]
            guess = _guess(variable, map(_variable, meant))
            problems.append(f"{variable}: unknown variable{guess}")
            continue
        try:
            value = _parsed(field, environ[variable])
        except ValueError as error:
            problems.append(f"{_dotted(path)}: {error} (from {variable})")
            continue
        variables[path] = variable
        table = values
        for part in path[:-1]:
            if not isinstance(table.get(part), dict):
                table[part] = {}
            table = table[part]
        table[path[-1]] = value
        if field.annotation is SecretStr and (other := _other(path)) not in variables:
            # The file's own word on the same secret, in the other form.
            table.pop(other[-1], None)
    return variables


def _parsed(field: FieldInfo, text: str) -> Any:
    origin = typing.get_origin(field.annotation)
    if origin is tuple:
        if not text.lstrip().startswith("["):
            return [part.strip() for part in text.split(",") if part.strip()]
        return _json(text)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        value = _json(text)
        if not isinstance(value, dict):
            raise ValueError("should be a JSON object")  # noqa: TRY004 - a problem of the value
        return value
    return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError("is no JSON") from None


# The file and the environment together.


def _fill(
    values: dict[str, Any],
    context: Mapping[str, Path],
    problems: list[str],
    models: tuple[type[Table], ...] = (),
    path: _Path = (),
) -> None:
    """Put in what was not written: empty tables, built-in engines, secrets from their files."""
    if not models:
        models = (Config,)
        engines = values.setdefault("engines", {})
        if isinstance(engines, dict):
            _fill_engines(engines, context["data"])
    for name, field in _fields(models).items():
        named, tables = _tables(field.annotation)
        if field.annotation is SecretStr and name.endswith("_file"):
            _fill_secret(values, (*path, name), context, problems)
        elif named:
            inner = values.setdefault(name, {})
            for key, table in inner.items() if isinstance(inner, dict) else ():
                if isinstance(table, dict):
                    _fill(table, context, problems, tables, (*path, name, key))
        elif tables:
            inner = values.setdefault(name, {})
            if isinstance(inner, dict):
                _fill(inner, context, problems, tables, (*path, name))


def _fill_engines(engines: dict[str, Any], data: Path) -> None:
    engines.setdefault("clamav", {})
    rules = data / "rules"
    if any(next(rules.glob(f"**/*{ending}"), None) for ending in (".yar", ".yara")):
        engines.setdefault("yara", {})
    for name, table in engines.items():
        if isinstance(table, dict) and name in _KINDS:
            table.setdefault("kind", name)


def _fill_secret(
    values: dict[str, Any], path: _Path, context: Mapping[str, Path], problems: list[str]
) -> None:
    name, other = path[-1], _other(path)[-1]
    if name not in values:
        return
    text = values.pop(name)
    if other in values:
        problems.append(f"{_dotted(path)}: is given together with {other}: keep one of the two")
        return
    try:
        with _path(text, context).open(encoding="utf-8") as file:
            secret = file.read(_MAX_SECRET).rstrip("\r\n")
        if not secret:
            raise ValueError("is an empty file")
        values[other] = secret
    except OSError as error:
        problems.append(f"{_dotted(path)}: the file cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        problems.append(f"{_dotted(path)}: is no text in UTF-8")
    except ValueError as error:
        problems.append(f"{_dotted(path)}: {error}")


def _explain(error: ErrorDetails, file: Path | None, variables: Mapping[_Path, str]) -> str:
    """Return one line about what the validation found."""
    loc = [str(part) for part in error["loc"]]
    if loc[:1] == ["engines"] and len(loc) > 2:
        del loc[2]  # which kind of engine was tried
    path = tuple(loc)
    message = error["msg"][:1].lower() + error["msg"][1:]
    match error["type"]:
        case "value_error":
            message = str(error["ctx"]["error"])
        case "extra_forbidden":
            message = "unknown option" + _guess(_dotted(path), map(_dotted, _option(path)[1]))
        case "missing":
            message = "is missing"
        case "model_type" | "model_attributes_type" | "dict_type" | "mapping_type":
            message = "should be a table"
        case "union_tag_invalid" | "union_tag_not_found":
            message = f"needs a kind, one of: {', '.join(_KINDS)}"
    source = next(
        (variables[path[:end]] for end in range(len(path), 0, -1) if path[:end] in variables),
        None,
    )
    if source is None and path[:1] and file is not None:
        return f"{_dotted(path)}: {message} (in {file})"
    return f"{_dotted(path)}: {message}" + (f" (from {source})" if source else "")


# What options there are.


def _tables(annotation: Any) -> tuple[bool, tuple[type[Table], ...]]:
    """Return the tables that an option of this type holds, and whether they have names."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _tables(typing.get_args(annotation)[0])
    if origin in {typing.Union, types.UnionType}:
        found = [_tables(each)[1] for each in typing.get_args(annotation)]
        return False, tuple(table for tables in found for table in tables)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        tables = _tables(typing.get_args(annotation)[1])[1]
        return bool(tables), tables
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return False, (annotation,)
    return False, ()


def _fields(models: Iterable[type[Table]]) -> dict[str, FieldInfo]:
    """Return the options of a table, a secret also under the name of its file."""
    fields = {}
    for model in models:
        for name, field in model.model_fields.items():
            fields[name] = field
            if field.annotation is SecretStr:
                fields[name + "_file"] = field
    return fields


def _option(path: _Path) -> tuple[FieldInfo | None, list[_Path]]:
    """Return the option at `path`; `None`, and those that might be meant, if there is none."""
    models: tuple[type[Table], ...] = (Config,)
    taken: _Path = ()
    field = None
    while len(taken) < len(path) and models:
        fields = _fields(models)
        field = fields.get(path[len(taken)])
        if field is None:
            return None, [(*taken, name, *path[len(taken) + 1 :]) for name in fields]
        named, models = _tables(field.annotation)
        taken = path[: len(taken) + 1 + named]
    if taken != path or models:
        return None, [(*path, name) for name in _fields(models)]
    return field, []


def _options() -> Iterator[_Path]:
    """Yield every option but those of tables that have names."""
    for name, field in Config.model_fields.items():
        named, tables = _tables(field.annotation)
        if not tables:
            yield (name,)
        elif not named:
            yield from ((name, inner) for inner in _fields(tables))


def _other(path: _Path) -> _Path:
    """Return the other way to give the same secret: itself, or its file."""
    name = path[-1]
    is_file = name.endswith("_file")
    return (*path[:-1], name.removesuffix("_file") if is_file else name + "_file")


def _dotted(path: Iterable[str]) -> str:
    return ".".join(path) or "the whole"


def _variable(path: _Path) -> str:
    return PREFIX + "__".join(path).upper()


def _guess(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f", did you mean {close[0]}?" if close else ""


# The reference page.


def reference() -> str:
    """Return the page that describes every option, in Markdown."""
    top = [name for name, field in Config.model_fields.items() if not _tables(field.annotation)[1]]
    parts = [_PREFACE, "## Top level\n", _rows({name: Config.model_fields[name] for name in top})]
    for name, field in Config.model_fields.items():
        named, tables = _tables(field.annotation)
        for table in tables:
            title = f"`[{name}.<name>]`" if named else f"`[{name}]`"
            if len(tables) > 1:
                title += f" of kind `{table.model_fields['kind'].default}`"
            parts += [
                f"## {title}\n",
                f"{inspect.cleandoc(table.__doc__ or '')}\n",
                _rows(table.model_fields),
            ]
    return "\n".join(parts)


def _rows(fields: Mapping[str, FieldInfo]) -> str:
    rows = ["| option | default | |", "| --- | --- | --- |"]
    for name, field in fields.items():
        secret = f" or `{name}_file`" if field.annotation is SecretStr else ""
        rows.append(f"| `{name}`{secret} | {_default(field)} | {field.description} |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, SecretStr) or value in ("", None):
        return ""
    if _size in [getattr(each, "func", None) for each in field.metadata]:
        for unit, bytes_ in (("GiB", 1 << 30), ("MiB", 1 << 20)):
            if value % bytes_ == 0:
                return f"`{value // bytes_} {unit}`"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value}`" if isinstance(value, Path) else f"`{json.dumps(value)}`"


_PREFACE = """# Configuration

<!-- Made by `python -m bucketward.config` from the descriptions in config.py. -->

Bucketward runs without any configuration. What it reads is one TOML file, the first of: the one
that `--config` names, the one that `BUCKETWARD_CONFIG` names, `./bucketward.toml`,
`/etc/bucketward/bucketward.toml`. Options that it does not know stop the start, and so does
everything else that is wrong, all of it named at once. The file is read at the start only.

Environment variables have the last word: `BUCKETWARD_EVENT__THREADS=8` is `threads` in `[event]`,
`BUCKETWARD_ENGINES__CLAMAV__PUA=true` is `pua` in `[engines.clamav]`. Lists are JSON or separated
by commas, tables are JSON. A secret can also be the content of a file, whose name is then given
with `_file` behind the option's (`BUCKETWARD_RECEIVER__SECRET_FILE`). True and false are
spelled so, or `1` and `0`. Sizes are bytes, or such as `512 MiB` or `2 GB`. Relative paths start at
the folder of the configuration file, or at the current one where there is none; `$DATA` is the
folder that `data` names (`BUCKETWARD_DATA`).

Backends are URLs that identify and never authenticate: one with credentials in it is refused.
They come from the platform's own chain, or from an option of their own.

The engines `clamav` and, if there are rules in `$DATA/rules`, `yara` are there without being
configured; `enabled = false` takes them out. Others of the same kinds can be added under names of
their own, with `kind`.
"""


if __name__ == "__main__":
    sys.stdout.write(reference())
