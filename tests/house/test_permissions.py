"""What a backend calls at AWS, it declares: the operators' policies are made from `PERMISSIONS`."""

import ast
import importlib
import inspect
import re

import botocore.session
import pytest
from botocore import xform_name

#: backend module -> the services it has clients of
BACKENDS = {
    "bucketward.clouds.aws": ("s3", "s3control", "sns", "sqs", "events", "sts", "account"),
    "bucketward.notifiers.eventbridge": ("events",),
    "bucketward.notifiers.securityhub": ("securityhub",),
    "bucketward.notifiers.sns": ("sns",),
}

#: Operations whose permission is called otherwise, or that need several or none: from the
#: "Actions, resources, and condition keys" pages of the Service Authorization Reference.
ACTIONS = {
    "s3": {
        "create_bucket": {"s3:CreateBucket", "s3:PutBucketOwnershipControls", "s3:TagResource"},
        "delete_bucket_lifecycle": {"s3:PutLifecycleConfiguration"},
        "delete_object": {"s3:DeleteObjectVersion"},  # we never delete without a version
        "get_bucket_encryption": {"s3:GetEncryptionConfiguration"},
        "get_bucket_lifecycle_configuration": {"s3:GetLifecycleConfiguration"},
        "get_bucket_notification_configuration": {"s3:GetBucketNotification"},
        "get_object": {"s3:GetObject", "s3:GetObjectVersion", "kms:Decrypt"},
        "get_object_tagging": {"s3:GetObjectTagging", "s3:GetObjectVersionTagging"},
        "get_public_access_block": {"s3:GetBucketPublicAccessBlock"},
        "head_bucket": {"s3:ListBucket"},
        "list_buckets": {"s3:ListAllMyBuckets"},
        "list_object_versions": {"s3:ListBucketVersions"},
        "list_objects_v2": {"s3:ListBucket"},
        "put_bucket_encryption": {"s3:PutEncryptionConfiguration"},
        "put_bucket_lifecycle_configuration": {"s3:PutLifecycleConfiguration"},
        "put_bucket_notification_configuration": {"s3:PutBucketNotification"},
        "put_object_tagging": {"s3:PutObjectTagging", "s3:PutObjectVersionTagging"},
        "put_public_access_block": {"s3:PutBucketPublicAccessBlock"},
    },
    "s3control": {"get_public_access_block": {"s3:GetAccountPublicAccessBlock"}},
    "events": {"put_rule": {"events:PutRule", "events:TagResource"}},
    "sns": {"publish_batch": {"sns:Publish", "kms:Decrypt", "kms:GenerateDataKey"}},
    "sts": {"get_caller_identity": set()},  # always allowed
}


def operations(service):
    model = botocore.session.get_session().get_service_model(service)
    return {xform_name(name): name for name in model.operation_names}


def calls(tree, services):
    """Yield (service, method) of each client method named anywhere, paginators included.

    A client is an attribute or a variable named after its service, as in ``self._s3.head_bucket``
    or ``sqs.get_queue_url``.
    """
    known = {service: operations(service) for service in services}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value).rpartition(".")[2].lstrip("_")
        if owner in known and node.attr in known[owner]:
            yield owner, node.attr
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".get_paginator"):
            owner = ast.unparse(node.func).split(".")[-2].lstrip("_")
            yield owner, ast.literal_eval(node.args[0])


def needed(module):
    tree = ast.parse(inspect.getsource(module))
    services = BACKENDS[module.__name__]
    for service, method in calls(tree, services):
        own = {f"{service}:{operations(service)[method]}"}
        yield f"{service}.{method}", ACTIONS.get(service, {}).get(method, own)


@pytest.fixture(params=BACKENDS)
def module(request):
    return importlib.import_module(request.param)


def test_every_call_is_declared(module):
    missing = {
        call: actions - set(module.PERMISSIONS)
        for call, actions in needed(module)
        if actions - set(module.PERMISSIONS)
    }

    assert missing == {}


def test_nothing_is_declared_that_is_not_called(module):
    wanted = set().union(*(actions for _, actions in needed(module)))

    assert set(module.PERMISSIONS) - wanted == set()


def test_every_method_on_a_client_was_recognised(module):
    """A client under another name would hide its calls from the tests above."""
    source = inspect.getsource(module)
    services = BACKENDS[module.__name__]
    found = {method for _, method in calls(ast.parse(source), services)}
    everything = {method for service in services for method in operations(service)}
    named = {
        name
        for name in re.findall(r"\.([a-z0-9_]+)\b", source) + re.findall(r'"([a-z_]+)"', source)
        if name in everything and "_" in name
    }

    assert len(found) > (10 if module.__name__.startswith("bucketward.clouds.") else 1)
    assert named - found == set()


def test_each_has_a_reason_in_words(module):
    for action, reason in module.PERMISSIONS.items():
        assert re.fullmatch(r"[a-z0-9-]+:[A-Z][A-Za-z]+", action)
        assert len(reason.split()) >= 3
