"""What is told to notifiers: the note that a scan result makes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bucketward.model import Note, ScanResult

_FINDINGS = 100
_BODY = 200 * 1024  # bytes; SNS, SQS and EventBridge take 256 KiB with everything around it


def scan_result(result: ScanResult, *, vendor_compatible: bool = False) -> Note:
    """Return the note of one scan result; its id is the same however often it is made.

    `bucket` and `key` are where the object was scanned, `quarantine` where it is now.
    With `vendor_compatible` they are where the object is now, as in the notifications of the
    commercial product, and `scanned` says where it was; the attributes, which filters are
    about, stay those of the bucket that was scanned.
    """
    info = result.object
    findings = [
        {"engine": f.engine, "signature": f.signature, "member": f.member} for f in result.findings
    ]
    fields: dict[str, Any] = {
        "notificationType": "scanResult",
        "scanResult": result.verdict,
        "bucket": info.bucket,
        "bucketName": info.bucket.partition("://")[2],
        "key": info.key,
        "versionId": info.version_id,
        "etag": info.etag,
        "size": info.size,
        "sha256": result.sha256,
        "account": result.account,
        "region": result.region,
        "dateScanned": result.scanned_at.isoformat(),
        "findings": findings[:_FINDINGS],
        "findingsTotal": len(findings),
        "truncated": len(findings) > _FINDINGS,
        "reasons": result.reasons,
        "signatureVersions": {
            r.engine: r.signatures.version for r in result.reports if r.signatures
        },
        "action": result.action,
        "actionState": result.action_state,
        "quarantine": result.moved_to and {"bucket": result.moved_to[0], "key": result.moved_to[1]},
        "message": result.message,
        "scanId": result.id,
    }
    if vendor_compatible and result.moved_to:
        bucket, key = result.moved_to
        fields |= {"bucket": bucket, "bucketName": bucket.partition("://")[2], "key": key}
        fields["scanned"] = {"bucket": info.bucket, "key": info.key}
    body = json.dumps(fields)
    while len(body) > _BODY and fields["findings"]:
        fields["findings"] = findings[: len(fields["findings"]) // 2]
        fields["truncated"] = True
        body = json.dumps(fields)
    attributes = {
        "notificationType": "scanResult",
        "scanResult": str(result.verdict),
        "bucket": info.bucket,
        "account": result.account,
        "region": result.region,
    }
    return Note(
        f"{result.id}.scanResult",
        "scanResult",
        f"{result.verdict}: {info.key}",
        body,
        {name: value for name, value in attributes.items() if value},
    )


def matches(wanted: Mapping[str, Sequence[str]], note: Note) -> bool:
    """Return whether a subscription's filter selects the note, as SNS does.

    AND between attributes, OR within one; an attribute that the note lacks selects nothing; no
    filter selects everything.
    """
    return all(note.attributes.get(name) in values for name, values in wanted.items())
