"""The guard: statements for a bucket's policy that keep unscanned and infected objects unread.

Pure: documents in, documents out.  Ours are the statements whose Sid begins with `SID`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bucketward.errors import ConfigError, Unsupported
from bucketward.model import Verdict
from bucketward.policy import TagNames

SID = "BucketwardGuard"
"""What the Sid of each of our statements begins with."""

DIALECTS = ("aws", "ceph")

_READ = ("s3:GetObject", "s3:GetObjectVersion")
_TAG = ("s3:PutObjectTagging", "s3:PutObjectVersionTagging")
_UNTAG = ("s3:DeleteObjectTagging", "s3:DeleteObjectVersionTagging")
_ARN = re.compile(r"arn:[a-z-]+:iam::[A-Za-z0-9_.-]*:(?:role|user)/[A-Za-z0-9_+=,.@/-]+")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")

Statement = Mapping[str, Any]


def statements(
    bucket: str, names: TagNames, roles: Sequence[str], *, dialect: str = "aws"
) -> Sequence[Statement]:
    """Return the statements that guard `bucket` (``s3://name``) against all but `roles` (ARNs).

    An object is read only if its result tag is Clean or InfectedAllowed, and nobody else sets or
    deletes our tags.  `ConfigError` where the result tag is off or a role is no ARN of a role or
    user; ARNs are taken as they are, wildcards are refused.

    "aws" is what the Service Authorization Reference promises: ``s3:RequestObjectTagKeys`` for
    PutObject (multipart uploads, POST forms and copies are that too) and Put*Tagging,
    ``s3:ExistingObjectTag`` for Get* and *Tagging.  A copy into the bucket from another may carry
    that one's tags without any in the request, so it is denied.

    "ceph" is what Ceph 16.2 was seen to enforce: ``s3:RequestObjectTag`` for PutObject alone, so
    that others set no tags on existing objects and copy nothing into the bucket, whatever the tags.
    A POST form is not told from a PUT and its tags are not seen there: it can forge ours until the
    object is scanned.
    """
    if dialect not in DIALECTS:
        raise ConfigError(f"no guard for {dialect!r}; known are {', '.join(DIALECTS)}")
    if not names.result:
        raise ConfigError(
            'the result tag is switched off (tags.result = ""), so the guard has nothing to go by'
        )
    if not roles:
        raise ConfigError(
            "a guard without exempt roles locks the scanner out; name those of the scanner, the "
            "API agent and restore with --role ARN"
        )
    for role in roles:
        if not _ARN.fullmatch(role):
            raise ConfigError(
                f"{role[:120]!a} is no ARN of a role or user, as in "
                "arn:aws:iam::111122223333:role/scanner"
            )
    scheme, _, name = bucket.partition("://")
    if scheme != "s3" or not _BUCKET.fullmatch(name):
        raise Unsupported(f"{bucket[:80]!a} has no policy that a guard could be put in")
    partition = roles[0].split(":")[1]
    objects = f"arn:{partition}:s3:::{name}/*"
    keys = sorted({k for k in _keys(names) if k})

    def deny(what: str, actions: Sequence[str], condition: Mapping[str, Any]) -> Statement:
        """Return a statement.

        AWS advises against NotPrincipal, which would need each session of a role named; Ceph
        does not know aws:PrincipalArn, and takes an unknown key in a Deny for "does not match".
        """
        who: dict[str, Any] = {"NotPrincipal": {"AWS": list(roles)}}
        if dialect == "aws":
            who = {"Principal": "*"}
            condition = {**condition, "ArnNotEquals": {"aws:PrincipalArn": list(roles)}}
        found = {"Sid": SID + what, "Effect": "Deny", **who}
        found |= {"Action": list(actions), "Resource": objects}
        return {**found, "Condition": condition} if condition else found

    existing = f"s3:ExistingObjectTag/{names.result}"
    found = [
        # Not one operator with two values: Ceph 16.2 takes that for "differs from any of them".
        deny(
            "Read",
            _READ,
            {
                "StringNotEquals": {existing: Verdict.CLEAN.value},
                "StringNotLike": {existing: Verdict.INFECTED_ALLOWED.value},
            },
        ),
        # At AWS an absent tag is covered above; Ceph takes it for "does not match".
        deny("ReadUntagged", _READ, {"Null": {existing: "true"}}),
        # Not Null "false": Ceph 16.2 does not look at the value.
        deny("Untag", _UNTAG, {"StringLike": {existing: "*"}}),
    ]
    source = "s3:x-amz-copy-source"
    if dialect == "aws":
        found += [
            deny(
                "Tag",
                ("s3:PutObject", *_TAG),
                {"ForAnyValue:StringEquals": {"s3:RequestObjectTagKeys": keys}},
            ),
            deny(
                "Copy",
                ("s3:PutObject",),
                {
                    "StringLike": {source: "*"},
                    "StringNotLike": {source: [f"{name}/*", f"/{name}/*"]},
                },
            ),
        ]
    else:
        found += [
            *(
                deny(
                    f"Put{number}",
                    ("s3:PutObject",),
                    {"StringLike": {f"s3:RequestObjectTag/{key}": "*"}},
                )
                for number, key in enumerate(keys)
            ),
            deny("Tag", _TAG, {}),
            deny("Copy", ("s3:PutObject",), {"StringLike": {source: "*"}}),
        ]
    return found


def merged(document: str, ours: Sequence[Statement]) -> str:
    """Return the policy `document` ("" for none) with `ours` in the place of our older statements.

    Everybody else's statements and fields stay as they are.  "" if nothing is left.  Unchanged,
    to the letter, if it has exactly these already.  `Unsupported` if it is no policy document.
    """
    policy = _parsed(document)
    found = policy.get("Statement", [])
    there = found if isinstance(found, list) else [found]
    others = [statement for statement in there if not is_ours(statement)]
    wanted = [dict(statement) for statement in ours]
    if [statement for statement in there if is_ours(statement)] == wanted:
        return document
    if not others and not wanted:
        return ""
    return json.dumps({**policy, "Statement": [*others, *wanted]})


def is_ours(statement: object) -> bool:
    """Return whether a statement of a policy is one of the guard's."""
    return isinstance(statement, dict) and str(statement.get("Sid", "")).startswith(SID)


def _parsed(document: str) -> dict[str, Any]:
    if not document:
        return {"Version": "2012-10-17"}
    try:
        policy = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise Unsupported("the bucket's policy is not JSON; mend it first") from error
    if not isinstance(policy, dict) or not isinstance(policy.get("Statement", []), list | dict):
        raise Unsupported("the bucket's policy is no policy document; mend it first")
    return policy


def _keys(names: TagNames) -> Sequence[str]:
    return (names.result, names.date, names.virus, names.message, names.uploader)
