"""The guard's statements, and how they are put into a policy and taken out of it."""

import fnmatch
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketward.errors import ConfigError, Unsupported
from bucketward.guard import DIALECTS, SID, is_ours, merged, statements
from bucketward.policy import TagNames

SCANNER = "arn:aws:iam::111122223333:role/scanner"
ARN = "arn:aws:s3:::b-1/*"
OURS = statements("s3://b-1", TagNames(), [SCANNER])

sids = st.none() | st.text(max_size=9) | st.just(SID.lower())
statement = st.builds(
    lambda sid, more: {**more, **({} if sid is None else {"Sid": sid})},
    sids.filter(lambda sid: not (sid or "").startswith(SID)),
    st.dictionaries(st.sampled_from(["Effect", "Action", "Résource"]), st.text(max_size=5)),
)
policies = st.just("") | st.builds(
    lambda found, more: json.dumps({**more, "Statement": found}),
    st.lists(statement, min_size=1, max_size=4) | statement,
    st.dictionaries(st.sampled_from(["Version", "Id"]), st.text(max_size=5)),
)


def listed(document):
    found = json.loads(document)["Statement"] if document else []
    return found if isinstance(found, list) else [found]


# -- what the statements say at AWS, by the rules of IAM ---------------------------------------------


def holds(operator, key, wanted, context):
    """Evaluate one condition by the IAM user guide: a negated operator fits an absent key."""
    wanted = wanted if isinstance(wanted, list) else [wanted]
    there = context.get(key)
    if operator == "Null":
        return (there is None) == (wanted == ["true"])
    if operator == "ForAnyValue:StringEquals":
        return bool(set(there or ()) & set(wanted))
    if operator in ("StringNotEquals", "ArnNotEquals"):
        return there not in wanted
    like = there is not None and any(fnmatch.fnmatchcase(there, w) for w in wanted)
    return {"StringLike": like, "StringNotLike": not like}[operator]


def denies(action, *, who="arn:aws:iam::111122223333:role/reader", **context):
    context = {"aws:PrincipalArn": who, **context}
    return any(
        action in s["Action"]
        and all(
            holds(operator, key, wanted, context)
            for operator, keys in s["Condition"].items()
            for key, wanted in keys.items()
        )
        for s in OURS
    )


def existing(**tags):
    return {f"s3:ExistingObjectTag/{k.replace('_', '-')}": v for k, v in tags.items()}


def requested(*keys):
    return {"s3:RequestObjectTagKeys": list(keys)}


@pytest.mark.parametrize("action", ["s3:GetObject", "s3:GetObjectVersion"])
def test_at_aws_only_clean_and_allowed_objects_are_read_and_all_by_the_scanner(action):
    for verdict in ("Clean", "InfectedAllowed"):
        assert not denies(action, **existing(scan_result=verdict))
    for verdict in ("Infected", "Suspicious", "Unscannable", "Error", "clean", "Clean ", "*", ""):
        assert denies(action, **existing(scan_result=verdict)), verdict
    assert denies(action)
    assert denies(action, **existing(other="Clean"))
    assert denies(action, who=None)  # anonymous
    assert not denies(action, who=SCANNER)


@pytest.mark.parametrize(
    "action", ["s3:PutObject", "s3:PutObjectTagging", "s3:PutObjectVersionTagging"]
)
def test_at_aws_others_set_their_own_tags_and_none_of_ours(action):
    for key in ("scan-result", "date-scanned", "virus-name", "message", "uploaded-by"):
        assert denies(action, **requested("theirs", key))
        assert not denies(action, who=SCANNER, **requested("theirs", key))
    assert not denies(action, **requested("theirs", "Scan-Result"))
    assert not denies(action)


@pytest.mark.parametrize("action", ["s3:DeleteObjectTagging", "s3:DeleteObjectVersionTagging"])
def test_at_aws_others_do_not_take_our_tag_away(action):
    assert denies(action, **existing(scan_result="Infected"))
    assert denies(action, **existing(scan_result=""))
    assert not denies(action, **existing(theirs="x"))
    assert not denies(action, who=SCANNER, **existing(scan_result="Infected"))


def test_at_aws_tags_do_not_travel_in_with_a_copy_from_elsewhere():
    for source in ("evil/key", "/evil/key", "b-12/key", "arn:aws:s3:eu-west-1:1:accesspoint/x"):
        assert denies("s3:PutObject", **{"s3:x-amz-copy-source": source})
    assert not denies("s3:PutObject", **{"s3:x-amz-copy-source": "b-1/key"})
    assert not denies("s3:PutObject", **{"s3:x-amz-copy-source": "/b-1/key"})
    assert not denies("s3:PutObject", who=SCANNER, **{"s3:x-amz-copy-source": "evil/key"})


def test_at_aws_each_condition_key_is_one_that_its_actions_know():
    """By the Service Authorization Reference; AWS refuses the whole policy otherwise."""
    known = {
        "GetObject": {"Existing"},
        "GetObjectVersion": {"Existing"},
        "PutObject": {"Request", "Source"},
        "PutObjectTagging": {"Existing", "Request"},
        "PutObjectVersionTagging": {"Existing", "Request"},
        "DeleteObjectTagging": {"Existing"},
        "DeleteObjectVersionTagging": {"Existing"},
    }
    kinds = {
        "s3:ExistingObjectTag/scan-result": "Existing",
        "s3:RequestObjectTagKeys": "Request",
        "s3:x-amz-copy-source": "Source",
    }
    for s in OURS:
        used = {key for keys in s["Condition"].values() for key in keys} - {"aws:PrincipalArn"}
        for action in s["Action"]:
            assert {kinds[key] for key in used} <= known[action.removeprefix("s3:")], s


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_statement_denies_objects_of_this_bucket_and_exempts_the_roles(dialect):
    found = statements("s3://b-1", TagNames(), [SCANNER], dialect=dialect)

    assert len({s["Sid"] for s in found}) == len(found)
    for s in found:
        assert s["Effect"] == "Deny"
        assert s["Resource"] == ARN
        assert s["Sid"].isalnum()
        assert SCANNER in json.dumps(s)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_renamed_tags_are_guarded_and_those_switched_off_are_not(dialect):
    names = TagNames(result="av", date="")
    text = json.dumps(statements("s3://b-1", names, [SCANNER], dialect=dialect))

    assert "s3:ExistingObjectTag/av" in text
    assert "scan-result" not in text
    assert "date-scanned" not in text
    assert '""' not in text


def test_other_partitions_are_followed():
    roles = ["arn:aws-cn:iam::111122223333:role/scanner"]
    found = statements("s3://b-1", TagNames(), roles)

    assert {s["Resource"] for s in found} == {"arn:aws-cn:s3:::b-1/*"}


@pytest.mark.parametrize(
    "role",
    ["", "*", "arn:aws:iam::1:role/*", "arn:aws:iam::1:root", "scanner", SCANNER + "\n", '"'],
)
def test_a_role_that_is_none_or_everybody_is_refused(role):
    with pytest.raises(ConfigError, match="no ARN"):
        statements("s3://b-1", TagNames(), [SCANNER, role])


def test_a_guard_that_would_lock_everybody_out_is_refused():
    with pytest.raises(ConfigError, match="--role"):
        statements("s3://b-1", TagNames(), [])
    with pytest.raises(ConfigError, match=r"tags\.result"):
        statements("s3://b-1", TagNames(result=""), [SCANNER])


@pytest.mark.parametrize("bucket", ["file:///srv", "s3://b/../c", "s3://*", "s3://"])
def test_what_has_no_policy_is_refused(bucket):
    with pytest.raises(Unsupported):
        statements(bucket, TagNames(), [SCANNER])


# -- merging ---------------------------------------------------------------------------------------


@given(policies)
def test_what_is_not_ours_survives_apply_and_remove_in_order(document):
    applied = merged(document, OURS)
    assert [s for s in listed(applied) if not is_ours(s)] == listed(document)
    assert [s for s in listed(applied) if is_ours(s)] == list(OURS)
    rest = json.loads(document) if document else {"Version": "2012-10-17"}
    assert {**json.loads(applied), "Statement": 0} == {**rest, "Statement": 0}

    assert listed(merged(applied, ())) == listed(document)


@given(policies)
def test_applying_and_removing_twice_changes_nothing(document):
    applied = merged(document, OURS)
    assert merged(applied, OURS) == applied
    removed = merged(applied, ())
    assert merged(removed, ()) == removed
    assert merged(document, ()) == document


@given(policies)
def test_another_guard_takes_the_place_of_ours(document):
    other = statements("s3://b-1", TagNames(result="av"), [SCANNER])

    assert merged(merged(document, other), OURS) == merged(document, OURS)


def test_a_policy_that_was_only_ours_is_gone_after_remove():
    assert merged(merged("", OURS), ()) == ""


@pytest.mark.parametrize("document", ["x", "[]", "1", '{"Statement": 1}', "[" * 100_000])
def test_a_policy_that_is_none_is_refused_and_not_overwritten(document):
    with pytest.raises(Unsupported, match="mend it first"):
        merged(document, OURS)
