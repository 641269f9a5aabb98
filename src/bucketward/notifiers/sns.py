"""Amazon SNS: each note one message on a topic, with attributes that subscriptions filter by."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bucketward.errors import Error
from bucketward.model import Note
from bucketward.notifiers.amazon import (
    batches,
    clean,
    client,
    deliver,
    parse,
    partition,
    refused,
    too_large,
    translating,
)

PERMISSIONS: Mapping[str, str] = {
    "kms:Decrypt": "publish to a topic that is encrypted with a key of the account",
    "kms:GenerateDataKey": "publish to a topic that is encrypted with a key of the account",
    "sns:GetTopicAttributes": "see that the topic is there",
    "sns:Publish": "publish notes to the topic",
}

_TEN = 10
_BYTES = 256 * 1024
"""Messages, and bytes of all of them with their attributes, in one request (PublishBatch)."""
_VALUE = 256
"""Characters of an attribute that filter policies can be about (SNS, filter policy constraints)."""


def open_sns(url: str) -> SnsNotifier:
    """Open ``sns://<region>/<account>/<topic>?endpoint=...``; nothing is connected yet."""
    region, found, endpoint = parse(
        url, r"(\d{12})/([\w-]{1,256})", "sns://<region>/<12 digits>/<standard topic>"
    )
    return SnsNotifier(found[2], account=found[1], region=region, endpoint=endpoint)


class SnsNotifier:
    """Publishes to a standard topic: the message is the note's body.

    The message attributes are the note's and ``noteId``, which stays the same over retries.  SNS
    knows no empty attribute, so an empty one is left out; characters that SNS refuses are
    replaced by U+FFFD in attributes, never in the body, and the subject is cut to what it takes:
    99 characters of ASCII.
    """

    def __init__(self, topic: str, *, account: str, region: str, endpoint: str = "") -> None:
        self._arn = f"arn:{partition(region)}:sns:{region}:{account}:{topic}"
        self._sns = client("sns", region, endpoint, "sns")

    def send(self, notes: Sequence[Note]) -> Mapping[str, Error]:
        failures: dict[str, Error] = {}
        pairs = []
        for note in notes:
            entry = _entry(note)
            if _size(entry) > _BYTES:
                failures[note.id] = too_large("sns", note)
            else:
                pairs.append((note, entry))
        for batch in batches(pairs, _size, entries=_TEN, total=_BYTES):
            failures |= deliver(batch, self._publish)
        return failures

    def ping(self) -> None:
        with translating("sns", self._arn, "sns:GetTopicAttributes"):
            self._sns.get_topic_attributes(TopicArn=self._arn)

    def close(self) -> None:
        self._sns.close()

    def _publish(self, batch: Sequence[tuple[Note, Mapping[str, Any]]]) -> Mapping[str, Error]:
        with translating("sns", self._arn, "sns:Publish"):
            answer = self._sns.publish_batch(
                TopicArn=self._arn,
                PublishBatchRequestEntries=[
                    {"Id": str(i), **entry} for i, (_, entry) in enumerate(batch)
                ],
            )
            taken = {each["Id"] for each in answer.get("Successful", ())}
            failed = {each["Id"]: each for each in answer.get("Failed", ())}
        failures = {}
        for i, (note, _) in enumerate(batch):
            # What is in neither list may not have arrived.
            if str(i) not in taken:
                why = failed.get(str(i), {})
                failures[note.id] = refused(
                    "sns",
                    f"a note to {self._arn}",
                    str(why.get("Code", "")),
                    str(why.get("Message", "")),
                    bool(why.get("SenderFault")),
                )
        return failures


def _entry(note: Note) -> Mapping[str, Any]:
    attributes = {**note.attributes, "noteId": note.id}
    entry: dict[str, Any] = {
        "Message": note.body,
        "MessageAttributes": {
            name: {"DataType": "String", "StringValue": clean(value, _VALUE)}
            for name, value in attributes.items()
            if value
        },
    }
    # Publish: ASCII that begins with a letter, number or punctuation mark; no control characters.
    subject = re.sub(r"[^ -~]+", "?", note.subject).strip()[:99]
    if subject:
        entry["Subject"] = subject
    return entry


def _size(entry: Mapping[str, Any]) -> int:
    size = len(entry["Message"].encode("utf-8", "surrogatepass")) + len(entry.get("Subject", ""))
    for name, attribute in entry["MessageAttributes"].items():
        size += len((name + attribute["DataType"] + attribute["StringValue"]).encode())
    return size
