"""AWS Security Hub: each infected object one finding in the AWS Security Finding Format."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bucketward.errors import Error, Unsupported
from bucketward.model import Note
from bucketward.notifiers.amazon import (
    batches,
    clean,
    client,
    deliver,
    parse,
    partition,
    refused,
    translating,
)

PERMISSIONS: Mapping[str, str] = {
    "securityhub:BatchImportFindings": "report infected objects as findings",
    "securityhub:DescribeHub": "see that Security Hub is enabled in the account",
}

_HUNDRED = 100
_BYTES = 6 * 1000 * 1000
"""Findings, and bytes of all of them, in one request (BatchImportFindings)."""
_MALWARE = 5
"""Entries that `Malware` has room for (ASFF, Malware)."""


def open_securityhub(url: str) -> SecurityHubNotifier:
    """Open ``securityhub://<region>/<account>?endpoint=...``; nothing is connected yet."""
    region, found, endpoint = parse(url, r"(\d{12})", "securityhub://<region>/<12 digits>")
    return SecurityHubNotifier(account=found[1], region=region, endpoint=endpoint)


class SecurityHubNotifier:
    """Imports a finding for every note whose attribute `scanResult` is Infected.

    Any other note is none of Security Hub's business: it is passed over and is no failure.  The
    finding's `Id` is the note's, so that a note sent again updates its finding.  ASFF has no room
    for all of a note: of the findings the first five are in `Malware`, texts are cut, and
    `ProductFields` says what to look for in the ledger (``bucketward/noteId`` and the like).
    """

    def __init__(self, *, account: str, region: str, endpoint: str = "") -> None:
        self._account = account
        self._region = region
        self._partition = partition(region)
        self._what = f"Security Hub of {account} in {region}"
        self._securityhub = client("securityhub", region, endpoint, "securityhub")

    def send(self, notes: Sequence[Note]) -> Mapping[str, Error]:
        failures: dict[str, Error] = {}
        pairs = []
        for note in notes:
            if note.attributes.get("scanResult") != "Infected":
                continue
            try:
                pairs.append((note, self._finding(note)))
            except Unsupported as error:
                failures[note.id] = error
        for batch in batches(pairs, _size, entries=_HUNDRED, total=_BYTES):
            failures |= deliver(batch, self._import)
        return failures

    def ping(self) -> None:
        with translating("securityhub", self._what, "securityhub:DescribeHub"):
            self._securityhub.describe_hub()

    def close(self) -> None:
        self._securityhub.close()

    def _import(self, batch: Sequence[tuple[Note, Mapping[str, Any]]]) -> Mapping[str, Error]:
        with translating("securityhub", self._what, "securityhub:BatchImportFindings"):
            answer = self._securityhub.batch_import_findings(
                Findings=[finding for _, finding in batch]
            )
            failed = {each["Id"]: each for each in answer.get("FailedFindings", ())}
        return {
            note.id: refused(
                "securityhub",
                f"a finding to {self._what}",
                str(failed[finding["Id"]].get("ErrorCode", "")),
                str(failed[finding["Id"]].get("ErrorMessage", "")),
            )
            for note, finding in batch
            if finding["Id"] in failed
        }

    def _finding(self, note: Note) -> Mapping[str, Any]:
        try:
            fields = json.loads(note.body)
        except (ValueError, RecursionError) as error:
            raise Unsupported(
                f"the body of note {note.id[:64]!a} is not JSON", backend="securityhub"
            ) from error
        if not isinstance(fields, dict):
            fields = {}
        bucket, key = _text(fields, "bucket", 300), _text(fields, "key", 1024)
        when = _time(_text(fields, "dateScanned", 64))
        findings = fields.get("findings")
        findings = (
            [f for f in findings if isinstance(f, dict)] if isinstance(findings, list) else []
        )
        product = {
            "noteId": note.id,
            "scanId": _text(fields, "scanId", 1024),
            "bucket": bucket,
            "key": key,
            "action": _text(fields, "action", 64),
            "findingsTotal": str(fields.get("findingsTotal", len(findings)))[:32],
        }
        finding: dict[str, Any] = {
            "SchemaVersion": "2018-10-08",
            "Id": _some(note.id, 512),
            "ProductArn": f"arn:{self._partition}:securityhub:{self._region}:{self._account}"
            f":product/{self._account}/default",
            "GeneratorId": "bucketward",
            "AwsAccountId": self._account,
            "Types": ["TTPs/Initial Access/Malware in Object Storage"],
            "CreatedAt": when,
            "UpdatedAt": when,
            "Severity": {"Label": "HIGH"},
            "Title": _some(note.subject, 256),
            "Description": _some(f"Malware was found in {bucket}/{key}", 1024),
            "ProductFields": {
                f"bucketward/{name}": clean(value, 2048)
                for name, value in product.items()
                if value.strip()
            },
            "Resources": [self._resource(fields, bucket, key)],
            "RecordState": "ACTIVE",
        }
        removed = fields.get("action") in {"move", "delete"} and fields.get("actionState") == "done"
        malware = [
            {
                "Name": _some(_text(each, "signature", 64), 64),
                "State": "REMOVED" if removed else "OBSERVED",
                "Path": _some(_text(each, "member", 512) or key, 512),
            }
            for each in findings[:_MALWARE]
        ]
        if malware:
            finding["Malware"] = malware
        return finding

    def _resource(self, fields: Mapping[str, Any], bucket: str, key: str) -> Mapping[str, Any]:
        scheme, _, name = bucket.partition("://")
        if scheme != "s3":
            return {
                "Type": "Other",
                "Id": _some(f"{bucket}/{key}", 512),
                "Partition": self._partition,
                "Region": self._region,
            }
        details = {
            "ETag": _text(fields, "etag", 256),
            "VersionId": _text(fields, "versionId", 1024),
        }
        details = {name: value for name, value in details.items() if value.strip()}
        resource: dict[str, Any] = {
            "Type": "AwsS3Object",
            "Id": _some(f"arn:{self._partition}:s3:::{name}/{key}", 512),
            "Partition": self._partition,
            "Region": _text(fields, "region", 64) or self._region,
        }
        if details:
            resource["Details"] = {"AwsS3Object": details}
        return resource


def _text(fields: Mapping[str, Any], name: str, limit: int) -> str:
    value = fields.get(name)
    return clean(value, limit) if isinstance(value, str) else ""


def _some(text: str, limit: int) -> str:
    """Return `text` cut; ASFF refuses texts that are empty or blank."""
    text = clean(text, limit)
    return text if text.strip() else "(unnamed)"


def _time(text: str) -> str:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = datetime.now(UTC)
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _size(finding: Mapping[str, Any]) -> int:
    return len(json.dumps(finding))
