"""Credentials of AWS accounts other than the one we run in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from bucketward.errors import ConfigError, Denied, Unavailable
from bucketward.interfaces import CredentialsProvider
from bucketward.model import Credentials

PERMISSIONS: Mapping[str, str] = {
    "sts:AssumeRole": "work on the buckets of a linked account as the role it grants",
}

_EARLY = timedelta(minutes=5)  # renewed so long before they end: a request may take a while


def assume_role(
    role_arn: str,
    *,
    external_id: str = "",
    region: str = "",
    profile: str = "",
    endpoint: str = "",
) -> CredentialsProvider:
    """Return a provider of credentials for `role_arn`, or of `profile`'s own if that is empty.

    Credentials are fetched on first use and renewed five minutes before they end.  The provider
    raises `Denied` if the role may not be assumed, and `Unavailable` if STS cannot be reached;
    a profile that is not there is `ConfigError` at once.
    """
    import boto3
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ParamValidationError,
        ProfileNotFound,
    )

    try:
        session = boto3.Session(profile_name=profile or None, region_name=region or None)
    except ProfileNotFound as error:
        raise ConfigError(
            f"the AWS configuration has no profile {profile}", backend="aws"
        ) from error
    lock = threading.Lock()
    current: Credentials | None = None

    def provide() -> Credentials:
        nonlocal current
        with lock:
            if current is None or (
                current.expires_at is not None and current.expires_at - _EARLY <= datetime.now(UTC)
            ):
                current = fetch()
            return current

    def fetch() -> Credentials:
        try:
            if not role_arn:
                found = session.get_credentials()
                if found is None:
                    raise Denied(f"profile {profile} has no credentials", backend="aws")
                frozen = found.get_frozen_credentials()
                expires = datetime.now(UTC) + 2 * _EARLY if frozen.token else None
                return Credentials(
                    frozen.access_key or "", frozen.secret_key or "", frozen.token or "", expires
                )
            sts = session.client("sts", endpoint_url=endpoint or None)
            more = {"ExternalId": external_id} if external_id else {}
            answer = sts.assume_role(
                RoleArn=role_arn,
                RoleSessionName="bucketward",
                **more,
            )["Credentials"]
            return Credentials(
                answer["AccessKeyId"],
                answer["SecretAccessKey"],
                answer["SessionToken"],
                answer["Expiration"],
            )
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in {"Throttling", "ServiceUnavailable", "InternalFailure"}:
                raise Unavailable(f"STS answered {code}", backend="aws") from error
            raise Denied(
                f"cannot assume {role_arn}: {code}; let it trust this account, with the external "
                "id if it wants one",
                backend="aws",
                reason="sts:AssumeRole",
            ) from error
        except ParamValidationError as error:
            raise Denied(
                f"{role_arn} is no role: use arn:aws:iam::<account>:role/<name>",
                backend="aws",
                reason="sts:AssumeRole",
            ) from error
        except BotoCoreError as error:
            raise Unavailable(
                f"no credentials for {role_arn or profile}: {type(error).__name__}", backend="aws"
            ) from error

    return provide
