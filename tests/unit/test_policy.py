"""The decisions: which engines vote, what their votes make, what is done, and from which layer."""

import json
import re
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketward.errors import ConfigError
from bucketward.model import (
    EngineReport,
    Finding,
    ObjectInfo,
    ObjectRef,
    Principal,
    Reason,
    ScanResult,
    Verdict,
)
from bucketward.policy import (
    ACTIONS,
    RIGHTS,
    Decision,
    EngineRule,
    Lists,
    Policy,
    Settings,
    TagNames,
    check_loops,
    choose,
    combine,
    decide,
    is_left_out,
    may,
    merge_tags,
    needs_type,
    quarantine_key,
    reclassify,
    strip_tags,
    tag_value,
)

NOW = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
BOTH = (EngineRule("clamav"), EngineRule("yara", required=False))


def says(engine, verdict, *coverage, findings=()):
    names = findings or (("X",) if verdict in {Verdict.INFECTED, Verdict.SUSPICIOUS} else ())
    return EngineReport(engine, verdict, coverage, tuple(Finding(engine, name) for name in names))


def clean(engine, *coverage):
    return says(engine, Verdict.CLEAN, *coverage)


def infected(engine, *findings):
    return says(engine, Verdict.INFECTED, findings=findings)


def suspicious(engine):
    return says(engine, Verdict.SUSPICIOUS)


def unscannable(engine, *reasons):
    return says(engine, Verdict.UNSCANNABLE, *reasons)


def failed(engine, *reasons):
    return says(engine, Verdict.ERROR, *(reasons or (Reason.ENGINE_FAILED,)))


def an_object(key="in/a.zip", size=100, **changes):
    return ObjectInfo("s3://b", key, size, "etag", NOW, **changes)


def result(verdict, *reasons, reports=(), **changes):
    return ScanResult("id", an_object(), verdict, NOW, tuple(reasons), tuple(reports), **changes)


class TestChoose:
    def test_every_engine_votes_unless_told_otherwise(self):
        assert choose(Policy(), {"clamav", "yara"}, "k", 1, "") == BOTH

    def test_a_missing_optional_engine_does_not_vote_and_a_missing_required_one_does(self):
        assert choose(Policy(), (), "k", 1, "") == (EngineRule("clamav"),)
        assert combine((), choose(Policy(), (), "k", 1, ""))[0] is Verdict.ERROR

    @pytest.mark.parametrize(
        ("rule", "key", "size", "content_type", "votes"),
        [
            (EngineRule("e", min_size=10), "k", 9, "", False),
            (EngineRule("e", min_size=10), "k", 10, "", True),
            (EngineRule("e", max_size=10), "k", 10, "", True),
            (EngineRule("e", max_size=10), "k", 11, "", False),
            (EngineRule("e", max_size=0), "k", 0, "", True),
            (EngineRule("e", types=("application/*",)), "k", 1, "application/zip", True),
            (EngineRule("e", types=("application/*",)), "k", 1, "Application/ZIP", True),
            (EngineRule("e", types=("image/*", "text/*")), "k", 1, "application/zip", False),
            (EngineRule("e", not_types=("text/*",)), "k", 1, "text/plain", False),
            (EngineRule("e", not_types=("text/*",)), "k", 1, "application/zip", True),
            (EngineRule("e", types=("*",), not_types=("text/*",)), "k", 1, "text/x", False),
            (EngineRule("e", keys=("in/*.zip",)), "in/a/b.zip", 1, "", True),
            (EngineRule("e", keys=("in/*.zip",)), "in/a.ZIP", 1, "", False),
            (EngineRule("e", keys=("in/*",)), "out/in/a", 1, "", False),
            (EngineRule("e", keys=("in/*",)), "in/a\nb", 1, "", True),
        ],
    )
    def test_size_type_and_key_decide_whether_it_votes(self, rule, key, size, content_type, votes):
        policy = Policy(engines=(rule,))

        assert choose(policy, {"e"}, key, size, content_type) == ((rule,) if votes else ())

    def test_an_unknown_type_excludes_no_engine(self):
        rule = EngineRule("e", types=("image/*",), not_types=("text/*",))

        assert choose(Policy(engines=(rule,)), {"e"}, "k", 1, "") == (rule,)

    def test_an_engine_with_two_rules_is_asked_once_and_required_if_either_says_so(self):
        policy = Policy(
            engines=(
                EngineRule("e", required=False),
                EngineRule("f"),
                EngineRule("e", keys=("*.exe",)),
            )
        )

        chosen = choose(policy, {"e", "f"}, "a.exe", 1, "")
        assert [(rule.engine, rule.required) for rule in chosen] == [("e", True), ("f", True)]
        chosen = choose(policy, {"e", "f"}, "a.txt", 1, "")
        assert [(rule.engine, rule.required) for rule in chosen] == [("e", False), ("f", True)]

    def test_the_type_is_only_needed_where_a_rule_asks_for_it(self):
        assert not needs_type(Policy())
        assert needs_type(Policy(engines=(EngineRule("e", types=("a/*",)),)))
        assert needs_type(Policy(engines=(EngineRule("e", not_types=("a/*",)),)))


class TestCombine:
    @pytest.mark.parametrize(
        ("reports", "rules", "verdict", "reasons"),
        [
            ([clean("clamav"), clean("yara")], BOTH, Verdict.CLEAN, ()),
            # YARA opened no container; ClamAV looked at everything.
            ([clean("clamav"), clean("yara", "container-unopened")], BOTH, Verdict.CLEAN, ()),
            ([clean("clamav"), unscannable("yara", "too-large")], BOTH, Verdict.CLEAN, ()),
            ([clean("clamav"), failed("yara")], BOTH, Verdict.CLEAN, ()),
            ([clean("clamav")], BOTH, Verdict.CLEAN, ()),
            # ClamAV is required.
            ([failed("clamav"), clean("yara")], BOTH, Verdict.ERROR, ("engine-failed",)),
            ([clean("yara")], BOTH, Verdict.ERROR, ("no-engine",)),
            (
                [unscannable("clamav", "encrypted"), clean("yara", "container-unopened")],
                BOTH,
                Verdict.UNSCANNABLE,
                ("container-unopened", "encrypted"),
            ),
            ([unscannable("clamav", "too-large"), clean("yara")], BOTH,
             Verdict.UNSCANNABLE, ("too-large",)),
            # A failure may pass, so the object has to come back; it must not end as Unscannable
            # because YARA opens no containers.
            (
                [failed("clamav"), clean("yara", "container-unopened")],
                BOTH,
                Verdict.ERROR,
                ("container-unopened", "engine-failed"),
            ),
            # YARA alone.
            (
                [clean("yara", "container-unopened")],
                (EngineRule("yara"),),
                Verdict.UNSCANNABLE,
                ("container-unopened",),
            ),
            ([clean("yara")], (EngineRule("yara", required=False),), Verdict.CLEAN, ()),
            ([failed("yara")], (EngineRule("yara", required=False),),
             Verdict.ERROR, ("engine-failed",)),
            # Nobody.
            ([], (), Verdict.ERROR, ("no-engine",)),
            ([], BOTH, Verdict.ERROR, ("no-engine",)),
            ([], (EngineRule("yara", required=False),), Verdict.ERROR, ("no-engine",)),
            # One that was not asked does not make anything Clean.
            ([clean("other")], (), Verdict.ERROR, ("no-engine",)),
            ([clean("clamav", "timed-out"), clean("other")], BOTH[:1],
             Verdict.UNSCANNABLE, ("timed-out",)),
            # Findings come before everything.
            ([failed("clamav"), infected("yara")], BOTH, Verdict.INFECTED, ()),
            ([suspicious("clamav"), infected("yara")], BOTH, Verdict.INFECTED, ()),
            ([suspicious("clamav"), clean("yara")], BOTH, Verdict.SUSPICIOUS, ()),
            ([unscannable("clamav", "encrypted"), suspicious("yara")], BOTH,
             Verdict.SUSPICIOUS, ()),
            ([infected("clamav")], BOTH, Verdict.INFECTED, ()),
            # Two parts of one object: one unreadable part is enough.
            ([clean("clamav"), unscannable("clamav", "corrupt")], BOTH[:1],
             Verdict.UNSCANNABLE, ("corrupt",)),
            ([clean("clamav"), clean("clamav", "archive-limit")], BOTH[:1],
             Verdict.UNSCANNABLE, ("archive-limit",)),
        ],
    )  # fmt: skip
    def test_silence_is_never_clean(self, reports, rules, verdict, reasons):
        assert combine(reports, rules) == (verdict, reasons)

    reports = st.lists(
        st.builds(
            lambda engine, verdict, reasons: says(
                engine,
                verdict,
                *(
                    reasons
                    or (("corrupt",) if verdict in {Verdict.UNSCANNABLE, Verdict.ERROR} else ())
                ),
            ),
            st.sampled_from("abc"),
            st.sampled_from([v for v in Verdict if v is not Verdict.INFECTED_ALLOWED]),
            st.lists(st.sampled_from(list(Reason)), max_size=2).map(tuple),
        ),
        max_size=5,
    )
    rules = st.lists(
        st.builds(EngineRule, st.sampled_from("abc"), st.booleans()),
        max_size=3,
        unique_by=lambda rule: rule.engine,
    )

    @given(reports, rules)
    def test_clean_means_that_each_required_engine_said_so_and_one_saw_everything(
        self, reports, rules
    ):
        verdict, reasons = combine(reports, rules)

        if verdict is Verdict.CLEAN:
            for rule in rules:
                own = [report for report in reports if report.engine == rule.engine]
                if rule.required:
                    assert own
                    assert all(report.verdict is Verdict.CLEAN for report in own)
            chosen = {rule.engine for rule in rules}
            assert any(
                report.engine in chosen and report.verdict is Verdict.CLEAN and report.is_full
                for report in reports
            )
        assert (verdict in {Verdict.ERROR, Verdict.UNSCANNABLE}) == bool(reasons)

    @given(reports, rules)
    def test_any_finding_decides_and_nothing_else_makes_one(self, reports, rules):
        verdict, _ = combine(reports, rules)
        verdicts = {report.verdict for report in reports}

        assert (verdict is Verdict.INFECTED) == (Verdict.INFECTED in verdicts)
        if Verdict.INFECTED not in verdicts:
            assert (verdict is Verdict.SUSPICIOUS) == (Verdict.SUSPICIOUS in verdicts)

    @given(reports, rules, st.randoms())
    def test_the_order_of_reports_and_rules_does_not_matter(self, reports, rules, random):
        expected = combine(reports, rules)
        random.shuffle(reports)
        random.shuffle(rules)

        assert combine(reports, rules) == expected

    @given(reports, rules, st.sampled_from("abcd"))
    def test_one_more_infected_makes_infected(self, reports, rules, engine):
        assert combine([*reports, infected(engine)], rules)[0] is Verdict.INFECTED

    @given(reports, rules, st.sampled_from("abcd"))
    def test_one_more_required_engine_never_makes_clean_of_what_was_not(
        self, reports, rules, engine
    ):
        if any(rule.engine == engine for rule in rules):
            return
        before, _ = combine(reports, rules)
        after, _ = combine(reports, [*rules, EngineRule(engine)])

        silent = all(report.engine != engine for report in reports)
        assert not (silent and after is Verdict.CLEAN)
        if before is Verdict.INFECTED:
            assert after is Verdict.INFECTED


class TestReclassify:
    def test_a_glob_of_a_signature_turns_infected_into_suspicious_and_back(self):
        policy = Policy(classify={"*Toolbar*": "Suspicious", "yara:evil*": "Infected"})

        toolbar = infected("clamav", "Win.Toolbar.X-1")
        assert reclassify(policy, toolbar).verdict is Verdict.SUSPICIOUS
        assert reclassify(policy, toolbar).findings == toolbar.findings
        evil = says("yara", Verdict.SUSPICIOUS, findings=("evil_rule",))
        assert reclassify(policy, evil).verdict is Verdict.INFECTED
        other = says("clamav", Verdict.SUSPICIOUS, findings=("evil_rule",))
        assert reclassify(policy, other) is other

    def test_one_finding_that_stays_infected_keeps_the_report_infected(self):
        policy = Policy(classify={"PUA.*": "Suspicious"})
        report = infected("clamav", "PUA.Tool", "Win.Worm-1")

        assert reclassify(policy, report).verdict is Verdict.INFECTED

    def test_a_report_without_findings_stays_what_it_is(self):
        policy = Policy(classify={"*": "Suspicious"})

        assert reclassify(policy, clean("clamav")) == clean("clamav")
        assert reclassify(policy, failed("clamav")) == failed("clamav")

    def test_the_first_glob_that_fits_holds_and_the_bucket_comes_before_the_global(self):
        settings = Settings(
            global_={"classify": {"*": "Suspicious"}},
            buckets={"s3://b": {"classify": {"Win.*": "Infected"}}},
        )
        report = says("clamav", Verdict.SUSPICIOUS, findings=("Win.Worm",))

        assert reclassify(settings.resolve("", "", "s3://b"), report).verdict is Verdict.INFECTED
        assert reclassify(settings.resolve("", "", "s3://c"), report).verdict is Verdict.SUSPICIOUS


class TestLists:
    @pytest.mark.parametrize(
        ("lists", "thing"),
        [
            (Lists(prefixes=("in/",)), an_object("in/a")),
            (Lists(globs=("*.tmp",)), an_object("a/b/c.tmp")),
            (Lists(globs=("a?c[0-9]",)), an_object("abc5")),
            (Lists(extensions=("zip",)), an_object("A.ZIP")),
            (Lists(extensions=(".Zip",)), an_object("a.zIp")),
            (Lists(extensions=("tar.gz",)), an_object("a.tar.GZ")),
            (Lists(min_size=100), an_object(size=100)),
            (Lists(max_size=100), an_object(size=100)),
            (Lists(max_size=0), an_object(size=0)),
            (Lists(min_size=5, max_size=200), ObjectRef("s3://b", "k", size=100)),
            (Lists(storage_classes=("GLACIER",)), an_object(storage_class="GLACIER")),
            (Lists(storage_classes=("STANDARD",)), an_object(storage_class="")),
            (Lists(prefixes=("x",), extensions=("zip",)), an_object("a.zip")),
        ],
    )
    def test_one_entry_that_fits_is_enough_to_skip_or_to_scan(self, lists, thing):
        assert is_left_out(Policy(skip=lists), thing).startswith("on the skip list: ")
        assert is_left_out(Policy(scan=lists), thing) == ""
        assert is_left_out(Policy(scan=lists, skip=lists), thing) != ""

    @pytest.mark.parametrize(
        ("lists", "thing"),
        [
            (Lists(prefixes=("in/",)), an_object("IN/a")),
            (Lists(prefixes=("in/",)), an_object("x/in/a")),
            (Lists(globs=("*.tmp",)), an_object("a.TMP")),
            (Lists(globs=("a",)), an_object("ab")),
            (Lists(extensions=("zip",)), an_object("azip")),
            (Lists(extensions=("zip",)), an_object("a.zip/b")),
            (Lists(extensions=("zip",)), an_object("a.zip ")),
            (Lists(min_size=101), an_object(size=100)),
            (Lists(max_size=99), an_object(size=100)),
            (Lists(storage_classes=("STANDARD",)), an_object(storage_class="GLACIER")),
        ],
    )
    def test_what_fits_no_entry_is_not_skipped_and_not_scanned(self, lists, thing):
        assert is_left_out(Policy(skip=lists), thing) == ""
        assert is_left_out(Policy(scan=lists), thing) == "not on the scan list"

    def test_empty_lists_leave_nothing_out(self):
        assert is_left_out(Policy(), an_object("")) == ""

    @pytest.mark.parametrize("lists", [Lists(max_size=5), Lists(storage_classes=("GLACIER",))])
    def test_a_reference_that_does_not_say_is_not_left_out_yet(self, lists):
        unknown = ObjectRef("s3://b", "k")

        assert is_left_out(Policy(skip=lists), unknown) == ""
        assert is_left_out(Policy(scan=lists), unknown) == ""
        assert is_left_out(Policy(scan=Lists(prefixes=("x",))), unknown) != ""


class TestDecide:
    @pytest.mark.parametrize(
        ("verdict", "action"),
        [
            (Verdict.CLEAN, "keep"),
            (Verdict.INFECTED_ALLOWED, "keep"),
            (Verdict.INFECTED, "move"),
            (Verdict.SUSPICIOUS, "keep"),
            (Verdict.ERROR, "keep"),
            (Verdict.UNSCANNABLE, "keep"),
        ],
    )
    def test_by_default_only_what_is_infected_is_moved(self, verdict, action):
        assert decide(result(verdict), Policy()).action == action

    def test_each_verdict_has_its_own_action(self):
        policy = Policy(
            infected="delete", suspicious="move", error="move", unscannable={"*": "delete"}
        )

        assert decide(result(Verdict.INFECTED), policy).action == "delete"
        assert decide(result(Verdict.SUSPICIOUS), policy).action == "move"
        assert decide(result(Verdict.ERROR), policy).action == "move"
        assert decide(result(Verdict.UNSCANNABLE), policy).action == "delete"
        assert decide(result(Verdict.CLEAN), policy).action == "keep"
        assert decide(result(Verdict.INFECTED_ALLOWED), policy).action == "keep"

    def test_of_several_reasons_the_most_severe_action_holds(self):
        policy = Policy(unscannable={"encrypted": "move", "corrupt": "delete", "*": "keep"})

        assert decide(result(Verdict.UNSCANNABLE, "encrypted"), policy).action == "move"
        both = result(Verdict.UNSCANNABLE, "corrupt", "encrypted", "too-large")
        assert decide(both, policy).action == "delete"
        assert decide(result(Verdict.UNSCANNABLE, "too-large"), policy).action == "keep"
        assert decide(result(Verdict.UNSCANNABLE, "an-engines-own"), policy).action == "keep"

    def test_what_we_were_told_to_skip_is_not_deleted_with_all_that_cannot_be_scanned(self):
        policy = Policy(unscannable={"*": "delete"})
        skipped = result(Verdict.UNSCANNABLE, Reason.SKIPPED)

        assert decide(skipped, policy) == Decision("keep", None)
        assert decide(skipped, Policy(unscannable={"skipped": "move"})).action == "move"

    def test_a_clean_object_gets_the_verdict_and_the_time_in_utc(self):
        at = NOW.astimezone(timezone(timedelta(hours=5)))
        tags = decide(
            replace(result(Verdict.CLEAN, uploaded_by="AWS:AIDA1"), scanned_at=at), Policy()
        ).tags

        assert tags == {"scan-result": "Clean", "date-scanned": "2026-02-03T04:05:06Z"}

    def test_an_infected_one_also_gets_signatures_and_who_uploaded_it(self):
        reports = [infected("clamav", "Win.A-1", "Win.B-2"), infected("yara", "Win.A-1")]
        for verdict in (Verdict.INFECTED, Verdict.INFECTED_ALLOWED):
            tags = decide(result(verdict, reports=reports, uploaded_by="AWS:AIDA1"), Policy()).tags

            assert tags == {
                "scan-result": verdict.value,
                "date-scanned": "2026-02-03T04:05:06Z",
                "virus-name": "Win.A-1 Win.B-2",
                "uploaded-by": "AIDA1",
            }

    def test_a_suspicious_one_gets_signatures_only(self):
        reports = [suspicious("clamav")]
        tags = decide(result(Verdict.SUSPICIOUS, reports=reports, uploaded_by="me"), Policy()).tags

        assert set(tags) == {"scan-result", "date-scanned", "virus-name"}

    def test_one_that_could_not_be_judged_gets_the_reasons(self):
        for verdict in (Verdict.UNSCANNABLE, Verdict.ERROR):
            tags = decide(
                result(verdict, "encrypted", "corrupt", message="no key; (ask)"), Policy()
            ).tags

            assert tags["message"] == "encrypted corrupt: no key_ _ask_"
            assert set(tags) == {"scan-result", "date-scanned", "message"}
        assert "message" not in decide(result(Verdict.ERROR), Policy()).tags

    def test_many_signatures_are_cut_between_names_and_counted(self):
        names = [f"Win.Trojan.Agent-{number}" for number in range(1000)]
        tags = decide(result(Verdict.INFECTED, reports=[infected("e", *names)]), Policy()).tags

        *shown, more = tags["virus-name"].split(" ")
        assert 230 < len(tags["virus-name"]) <= 256
        assert shown == names[: len(shown)]
        assert more == f"+{1000 - len(shown)}"

        long = infected("e", "x" * 300, "y")
        tags = decide(result(Verdict.INFECTED, reports=[long]), Policy()).tags
        assert tags["virus-name"] == "x" * 253 + " +1"

    def test_tags_can_be_renamed_and_switched_off_one_by_one_or_all(self):
        found = result(Verdict.CLEAN)

        names = TagNames(result="av", date="")
        assert decide(found, Policy(tags=names)).tags == {"av": "Clean"}
        assert decide(found, Policy(tagging=False)).tags is None
        assert decide(found, Policy(tags=TagNames("", "", "", "", ""))).tags is None

    def test_what_is_left_out_is_tagged_only_if_asked(self):
        skipped = result(Verdict.UNSCANNABLE, Reason.SKIPPED)

        assert decide(skipped, Policy()).tags is None
        assert decide(skipped, Policy(tag_skipped=True)).tags["scan-result"] == "Unscannable"

    @given(
        st.sampled_from(list(Verdict)),
        st.lists(st.sampled_from(list(Reason)), max_size=4),
        st.text(max_size=600),
        st.lists(st.text(max_size=300), max_size=5),
    )
    def test_whatever_was_found_the_tags_are_valid(self, verdict, reasons, text, names):
        reports = [infected("e", *names)] if names else []
        tags = decide(
            result(verdict, *reasons, reports=reports, message=text, uploaded_by=text), Policy()
        ).tags

        for name, value in (tags or {}).items():
            assert re.fullmatch(r"[A-Za-z0-9 +\-=._:/@]{1,256}", value), name
            assert value == value.strip()


class TestTags:
    def test_values_keep_what_every_store_takes(self):
        assert tag_value("Win.Test_EICAR-1 a+b=c:d/e@f") == "Win.Test_EICAR-1 a+b=c:d/e@f"
        assert tag_value("a,b;c\n<é>\U0001f4a9\ud800\0") == "a_b_c_______"
        assert tag_value("  x ") == "x"
        assert len(tag_value("x" * 1000)) == 256

    def test_other_peoples_tags_stay_exactly_and_our_older_ones_go(self):
        existing = {
            "owner": " ünï,code ",
            "scan-result": "Infected",
            "virus-name": "Old",
            "": "empty key",
        }
        ours = {"scan-result": "Clean", "date-scanned": "now"}

        assert merge_tags(existing, ours, TagNames(), 10) == {
            "owner": " ünï,code ",
            "": "empty key",
            "scan-result": "Clean",
            "date-scanned": "now",
        }
        assert strip_tags(existing, TagNames()) == {"owner": " ünï,code ", "": "empty key"}

    def test_where_there_is_no_room_the_most_important_of_ours_are_kept(self):
        ours = {"uploaded-by": "u", "virus-name": "v", "date-scanned": "d", "scan-result": "r"}
        foreign = {f"k{number}": "v" for number in range(9)}

        assert merge_tags(foreign, ours, TagNames(), 10) == {**foreign, "scan-result": "r"}
        del foreign["k0"]
        assert merge_tags(foreign, ours, TagNames(), 10) == {
            **foreign,
            "scan-result": "r",
            "date-scanned": "d",
        }

    def test_where_not_one_fits_nothing_is_written(self):
        foreign = {f"k{number}": "v" for number in range(10)}

        assert merge_tags(foreign, {"scan-result": "r"}, TagNames(), 10) is None
        assert merge_tags(foreign, {}, TagNames(), 10) == foreign

    def test_our_own_older_tags_do_not_count_as_others(self):
        existing = {f"k{number}": "v" for number in range(9)} | {"scan-result": "Error"}

        merged = merge_tags(existing, {"scan-result": "Clean"}, TagNames(), 10)
        assert merged == existing | {"scan-result": "Clean"}

    tags = st.dictionaries(
        st.sampled_from(["scan-result", "date-scanned", "message", "a", "b", "c", "d"])
        | st.text(max_size=3),
        st.text(max_size=3),
        max_size=10,
    )

    @given(tags, st.sets(st.sampled_from(["scan-result", "date-scanned", "virus-name"])))
    def test_merging_never_touches_a_foreign_tag_nor_exceeds_the_limit(self, existing, keys):
        ours = dict.fromkeys(keys, "new")
        merged = merge_tags(existing, ours, TagNames(), 10)

        if merged is None:
            assert len(strip_tags(existing, TagNames())) == 10
        else:
            assert len(merged) <= 10
            assert strip_tags(merged, TagNames()) == strip_tags(existing, TagNames())
            assert merge_tags(merged, ours, TagNames(), 10) == merged
            if keys:
                assert "new" in merged.values()


class TestQuarantineKey:
    def test_it_tells_where_the_object_was_and_which_version_it_is(self):
        assert quarantine_key("s3://in", "a/b.zip", "v1", "e", "f" * 64) == "in/a/b.zip~v1"
        assert quarantine_key("s3://in", "k", None, "abc-2", "0123456789abcdef") == (
            "in/k~abc-2-0123456789ab"
        )
        assert quarantine_key("s3://in", "k", None, "abc", None) == "in/k~abc-"

    def test_a_directory_has_its_name_and_a_hash_of_its_path(self):
        key = quarantine_key("file:///srv/drop", "k", "v", "e", None)

        assert re.fullmatch(r"drop-[0-9a-f]{8}/k~v", key)
        assert key != quarantine_key("file:///mnt/drop", "k", "v", "e", None)
        assert key == quarantine_key("file:///srv/drop", "k", "v", "e", None)
        assert quarantine_key("azblob://acc/drop", "k", "v", "e", None) != key

    def test_a_tilde_in_key_or_version_confuses_nothing(self):
        assert quarantine_key("s3://b", "k~v", "w", "", None) != quarantine_key(
            "s3://b", "k", "v~w", "", None
        )

    @pytest.mark.parametrize("key", ["k" * 1024, "ü" * 512, "\U0001f4a9" * 256, "k" * 1021])
    def test_a_long_key_is_cut_between_characters_and_stays_its_own(self, key):
        short = quarantine_key("s3://in", key, "v1", "e", None)
        other = quarantine_key("s3://in", key[:-1] + "x", "v1", "e", None)

        assert len(short.encode()) <= 1024
        assert short.startswith("in/" + key[:100])
        assert short != other
        assert short != quarantine_key("s3://in", key, "v2", "e", None)

    def test_a_key_that_is_no_utf8_becomes_one_that_is(self):
        keys = {quarantine_key("file:///d", f"a{c}", "v", "e", None) for c in "\udcfe\udcff?"}

        assert len(keys) == 3
        for key in keys:
            key.encode()

    any_text = st.text(alphabet=st.characters(exclude_categories=()), max_size=20)
    names = st.tuples(
        st.sampled_from(["s3://a", "s3://a-b", "file:///x/a", "azblob://a/b"]),
        (any_text | st.text("~/ab%", max_size=6)).map(lambda text: text + "k"),
        st.none() | st.text("~ab%", max_size=4),
        st.text("~ab%", max_size=4),
    )

    @given(names, names)
    def test_no_two_objects_share_a_place(self, one, other):
        def versioned(name):
            return name[:2] + (name[2:3] if name[2] is not None else ("etag", name[3]))

        a = quarantine_key(*one, "0" * 64 if one[2] is None else None)
        b = quarantine_key(*other, "0" * 64 if other[2] is None else None)

        assert (a == b) == (versioned(one) == versioned(other))
        assert len(a.encode()) <= 1024


class TestSettings:
    def test_no_settings_are_the_products_defaults(self):
        assert Settings().resolve("1", "r", "s3://b") == Policy()
        assert Settings.from_json("{}") == Settings()
        assert Policy().infected == "move"
        assert Policy().engines == BOTH

    def test_global_then_account_then_region_then_bucket(self):
        settings = Settings(
            global_={"infected": "keep", "deadline": 1, "tags": {"date": "", "virus": "g"}},
            accounts={"1": {"infected": "move", "tags": {"virus": "a"}}},
            regions={"eu": {"infected": "delete", "error": "move"}},
            buckets={"s3://b": {"infected": "keep", "skip": {"prefixes": ["tmp/"]}}},
        )

        policy = settings.resolve("1", "eu", "s3://b")
        assert policy.infected == "keep"
        assert policy.error == "move"
        assert policy.deadline == 1.0
        assert policy.tags == TagNames(date="", virus="a")
        assert policy.skip == Lists(prefixes=("tmp/",))
        assert settings.resolve("1", "eu", "s3://c").infected == "delete"
        assert settings.resolve("1", "us", "s3://c").infected == "move"
        assert settings.resolve("2", "us", "s3://c").infected == "keep"
        assert settings.resolve("2", "us", "s3://c").tags.virus == "g"

    def test_tables_merge_by_field_and_lists_are_replaced(self):
        settings = Settings(
            global_={
                "unscannable": {"*": "move", "encrypted": "delete"},
                "scan": {"prefixes": ["a/", "b/"], "max_size": 5},
                "engines": [{"engine": "clamav"}, {"engine": "icap", "required": False}],
            },
            buckets={
                "s3://b": {
                    "unscannable": {"encrypted": "keep"},
                    "scan": {"prefixes": ["c/"], "max_size": None},
                    "engines": [{"engine": "yara", "types": ["image/*"], "max_size": 9}],
                }
            },
        )

        policy = settings.resolve("", "", "s3://b")
        assert policy.unscannable == {"*": "move", "encrypted": "keep"}
        assert policy.scan == Lists(prefixes=("c/",))
        assert policy.engines == (EngineRule("yara", max_size=9, types=("image/*",)),)

    def test_a_policy_is_made_once_and_strangers_do_not_fill_the_memory(self):
        settings = Settings(buckets={"s3://b": {"infected": "keep"}})

        assert settings.resolve("1", "r", "s3://b") is settings.resolve("2", "q", "s3://b")
        for number in range(1000):
            settings.resolve(f"{number}", f"{number}", f"s3://{number}")
        assert len(settings._resolved) == 2

    def test_settings_cannot_be_altered_from_outside(self):
        layer = {"unscannable": {"*": "move"}, "skip": {"prefixes": ["a"]}}
        settings = Settings(global_=layer)
        layer["unscannable"]["*"] = "delete"
        layer["skip"]["prefixes"].append("b")

        policy = settings.resolve("", "", "")
        assert policy.unscannable == {"*": "move"}
        assert policy.skip.prefixes == ("a",)
        with pytest.raises(TypeError):
            settings.global_["infected"] = "keep"
        with pytest.raises(TypeError):
            policy.unscannable["*"] = "keep"

    def test_every_field_of_a_policy_can_be_set_and_comes_back_from_json(self):
        layer = {
            "engines": [
                {"engine": "clamav", "required": False, "min_size": 1, "max_size": 2,
                 "types": ["a/*"], "not_types": ["b/*"], "keys": ["c"]}
            ],
            "stop_at_first_hit": True,
            "deadline": 12.5,
            "infected": "delete",
            "suspicious": "move",
            "error": "move",
            "unscannable": {"*": "move", "too-large": "keep"},
            "tagging": False,
            "tags": {"result": "a", "date": "b", "virus": "c", "message": "d", "uploader": ""},
            "quarantine": "s3://q",
            "scan": {"prefixes": ["a"], "globs": ["b*"], "extensions": ["c"], "min_size": 1,
                     "max_size": 2, "storage_classes": ["STANDARD"]},
            "skip": {"prefixes": ["z"]},
            "tag_skipped": True,
            "classify": {"clamav:PUA.*": "Infected"},
            "max_size": 3,
        }  # fmt: skip
        assert set(layer) == {item.name for item in fields(Policy)}

        settings = Settings(global_=layer, buckets={"file:///d": {"max_size": None}})
        again = Settings.from_json(settings.to_json())
        assert again == settings
        policy = again.resolve("", "", "")
        assert all(
            getattr(policy, item.name) != getattr(Policy(), item.name) for item in fields(Policy)
        )
        assert again.resolve("", "", "file:///d") == replace(policy, max_size=None)

    def test_all_problems_are_told_at_once_with_their_paths(self):
        text = json.dumps(
            {
                "global": {"infected": "mvoe", "colour": 1, "tags": {"result": "a,b"}},
                "accounts": [],
                "regions": {"eu": {"deadline": 0}},
                "buckets": {
                    "s3://b": {
                        "engines": [{"engine": "clamav", "max_size": -1}, {"required": 1}],
                        "unscannable": {"encryptd": "move", "corrupt": "burn"},
                        "scan": {"prefixes": "in/", "min_size": 9, "max_size": 5},
                    },
                    "b": {},
                },
                "bucket": {},
            }
        )

        with pytest.raises(ConfigError) as caught:
            Settings.from_json(text)
        problems = caught.value.message.splitlines()
        assert [problem.split(": ", 1)[0] for problem in problems] == [
            '"bucket"',
            "global.infected",
            "global.colour",
            "global.tags.result",
            "accounts",
            "regions.eu.deadline",
            "buckets.s3://b.engines[0].max_size",
            "buckets.s3://b.engines[1].required",
            "buckets.s3://b.engines[1]",
            "buckets.s3://b.unscannable.encryptd",
            "buckets.s3://b.unscannable.corrupt",
            "buckets.s3://b.scan.prefixes",
            "buckets.b",
        ]
        assert '"mvoe" is none of keep, move, delete' in problems[1]

    @pytest.mark.parametrize(
        ("layer", "path"),
        [
            ([], "global"),
            (None, "global"),
            ({"engines": []}, "global.engines"),
            ({"engines": [7]}, "global.engines[0]"),
            ({"engines": [{"engine": "Clam AV"}]}, "global.engines[0].engine"),
            ({"engines": [{"engine": "a", "max_size": 1, "min_size": 2}]}, "global.engines[0]"),
            ({"engines": [{"engine": "a", "types": "x"}]}, "global.engines[0].types"),
            ({"engines": [{"engine": "a", "types": [""]}]}, "global.engines[0].types[0]"),
            ({"stop_at_first_hit": 1}, "global.stop_at_first_hit"),
            ({"deadline": True}, "global.deadline"),
            ({"deadline": "5"}, "global.deadline"),
            ({"deadline": -1}, "global.deadline"),
            ({"deadline": 1e9}, "global.deadline"),
            ({"deadline": 10**400}, "global.deadline"),
            ({"infected": ["move"]}, "global.infected"),
            ({"infected": None}, "global.infected"),
            ({"unscannable": "move"}, "global.unscannable"),
            ({"classify": {"*": "Clean"}}, "global.classify.*"),
            ({"classify": {"*": "InfectedAllowed"}}, "global.classify.*"),
            ({"classify": []}, "global.classify"),
            ({"tags": {"result": "aws:x"}}, "global.tags.result"),
            ({"tags": {"result": "x" * 129}}, "global.tags.result"),
            ({"tags": {"result": " x"}}, "global.tags.result"),
            ({"tags": {"result": None}}, "global.tags.result"),
            ({"tags": {"result": "message"}}, "global.tags"),
            ({"quarantine": "q"}, "global.quarantine"),
            ({"quarantine": "s3://q?x=y"}, "global.quarantine"),
            ({"quarantine": "s3://q/"}, "global.quarantine"),
            ({"scan": {"min_size": None}}, "global.scan.min_size"),
            ({"skip": {"min_size": 9, "max_size": 5}}, "global.skip"),
            ({"skip": {"suffixes": []}}, "global.skip.suffixes"),
            ({"max_size": -1}, "global.max_size"),
            ({"max_size": 1.5}, "global.max_size"),
        ],
    )
    def test_a_value_of_the_wrong_kind_is_refused(self, layer, path):
        with pytest.raises(ConfigError) as caught:
            Settings.from_json(json.dumps({"global": layer}))

        (problem,) = caught.value.message.splitlines()
        assert problem.startswith(f"{path}: ")

    def test_settings_made_in_code_are_checked_too(self):
        with pytest.raises(ConfigError, match="mvoe"):
            Settings(buckets={"s3://b": {"infected": "mvoe"}})

    @pytest.mark.parametrize(
        ("base", "layer", "problem"),
        [
            ({"tags": {"result": "x"}}, {"tags": {"date": "x"}}, "s3://b.tags: .* two tags"),
            ({"scan": {"min_size": 9}}, {"scan": {"max_size": 5}}, "s3://b.scan: min_size 9"),
        ],
    )
    def test_layers_that_contradict_each_other_are_refused(self, base, layer, problem):
        with pytest.raises(ConfigError, match=problem):
            Settings(global_=base, buckets={"s3://b": layer})

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "not JSON"),
            ("[]", "must be a table"),
            ("[" * 100_000, "nested too deep"),
            ('{"global": {"infected": "move", "infected": "keep"}}', '"infected" is given twice'),
            ('{"global": {"deadline": NaN}}', "NaN is no JSON number"),
            ('{"global": {"deadline": Infinity}}', "Infinity is no JSON number"),
            ('{"accounts": {"": {}}}', "empty name"),
        ],
    )
    def test_text_that_is_no_settings_is_refused(self, text, problem):
        with pytest.raises(ConfigError, match=problem):
            Settings.from_json(text)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
            | st.sampled_from(["move", "keep", "s3://b", "Infected"]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                st.sampled_from([
                    "global", "buckets", "accounts", "s3://b", "engines", "engine", "tags",
                    "result", "scan", "min_size", "infected", "unscannable", "*", "classify",
                ]),
                inner,
                max_size=4,
            ),
            max_leaves=12,
        )
    )  # fmt: skip
    def test_any_json_is_settings_or_a_config_error(self, document):
        try:
            settings = Settings.from_json(json.dumps(document))
        except ConfigError as error:
            assert error.message
        else:
            assert Settings.from_json(settings.to_json()) == settings
            for bucket in ("s3://b", "s3://c"):
                decide(result(Verdict.INFECTED), settings.resolve("s3://b", "", bucket))


class TestLoops:
    @pytest.mark.parametrize(
        ("quarantine", "protected"),
        [
            ("s3://q", {"s3://q"}),
            ("s3://q/sub", {"s3://q"}),
            ("azblob://acc/q", {"azblob://acc/q"}),
            ("file:///srv/drop", {"file:///srv/drop"}),
            ("file:///srv/drop/quarantine", {"file:///srv/drop"}),
            ("file:///srv/x/../drop/q", {"file:///srv/drop"}),
            ("file:///srv//drop", {"file:///srv/drop"}),
            ("file:///srv", {"file:///srv/drop"}),
        ],
    )
    def test_a_quarantine_that_is_protected_itself_is_refused_wherever_it_is_set(
        self, quarantine, protected
    ):
        layer = {"quarantine": quarantine}
        for settings, path in (
            (Settings(global_=layer), "global"),
            (Settings(accounts={"1": layer}), "accounts.1"),
            (Settings(regions={"eu": layer}), "regions.eu"),
            (Settings(buckets={"s3://b": layer}), "buckets.s3://b"),
        ):
            (problem,) = check_loops(settings, protected)
            assert problem.startswith(f"{path}.quarantine: {quarantine} ")
        (problem,) = check_loops(Settings(), protected, quarantine=quarantine)
        assert problem.startswith("quarantine: ")

    @pytest.mark.parametrize(
        ("quarantine", "protected"),
        [
            ("s3://q", {"s3://q2", "s3://b", "gs://q"}),
            ("azblob://acc/q", {"azblob://acc/b", "azblob://other/q"}),
            ("file:///srv/quarantine", {"file:///srv/drop", "file:///srv/quar"}),
            ("", {"s3://q"}),
        ],
    )
    def test_a_quarantine_beside_the_protected_buckets_is_fine(self, quarantine, protected):
        assert check_loops(Settings(global_={"quarantine": quarantine}), protected) == []

    def test_every_loop_is_told(self):
        settings = Settings(
            global_={"quarantine": "s3://q"}, buckets={"s3://b": {"quarantine": "s3://b"}}
        )

        assert len(check_loops(settings, {"s3://q", "s3://b"})) == 2


class TestMay:
    def test_each_role_may_what_the_one_below_may_and_more(self):
        assert RIGHTS["viewer"] < RIGHTS["operator"] < RIGHTS["admin"]
        assert RIGHTS["agent"] < RIGHTS["admin"]

    @pytest.mark.parametrize(
        ("role", "action", "allowed"),
        [
            ("viewer", "result.read", True),
            ("viewer", "finding.restore", False),
            ("viewer", "user.read", False),
            ("operator", "finding.restore", True),
            ("operator", "bucket.protect", True),
            ("operator", "setting.change", False),
            ("operator", "finding.delete", False),
            ("admin", "setting.change", True),
            ("agent", "object.submit", True),
            ("agent", "bucket.protect", False),
            ("admin", "world.end", False),
            ("admin", "", False),
            ("root", "result.read", False),
            ("", "result.read", False),
            ("Admin", "result.read", False),
        ],
    )
    def test_roles_may_what_the_table_says_and_nothing_else(self, role, action, allowed):
        assert may(Principal("someone", role), action) is allowed
        assert may(Principal("someone", role), action, "s3://b") is allowed

    def test_groups_of_buckets_take_away_all_others_but_never_add(self):
        someone = Principal("someone", "operator", frozenset({"bucket:s3://a", "staff"}))

        assert may(someone, "finding.restore", "s3://a")
        assert not may(someone, "finding.restore", "s3://b")
        assert not may(someone, "finding.restore")
        assert not may(someone, "setting.change", "s3://a")
        assert may(Principal("p", "operator", frozenset({"staff"})), "finding.restore", "s3://b")
        assert may(Principal("p", "admin", frozenset({"bucket:s3://a"})), "setting.change")


def test_actions_are_ordered_by_severity():
    assert ACTIONS == ("keep", "move", "delete")
