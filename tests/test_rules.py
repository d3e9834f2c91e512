"""The rules, on values alone."""

import itertools
import sys

import hypothesis.strategies as some
import msgspec
import pytest
from hypothesis import given

import kirosync
from kirosync import advance, canonical, merge_command, merge_messages

CONTENT = some.text("ab", max_size=3)
TIME = some.integers(1, 3) | some.sampled_from([1.0, 2.5])
EXTRA = some.dictionaries(some.sampled_from(["model", "x"]), some.integers(0, 2) | some.text("ab", max_size=1))
MESSAGE = some.builds(
    lambda extra, metadata, **fields: {**extra, **fields, **({"metadata": metadata} if metadata else {})},
    extra=EXTRA,
    metadata=EXTRA,
    role=some.sampled_from(["user", "assistant"]),
    content=CONTENT,
    timestamp=TIME,
) | some.builds(
    lambda extra, **fields: {**extra, **fields},
    extra=EXTRA,
    id=some.sampled_from(["m1", "m2"]),
    role=some.just("user"),
    content=CONTENT,
    timestamp=TIME,
)
MESSAGES = some.lists(MESSAGE, max_size=6)
DOCUMENT = some.builds(lambda extra, **fields: {**extra, **fields}, extra=EXTRA, content=CONTENT, timestamp=TIME)


def merged(*parts):
    """The messages of all *parts*, merged from left to right."""
    result = []
    for part in parts:
        result, _ = merge_messages(result, part)
    return result


def as_set(messages):
    return sorted(map(canonical, messages))


@given(MESSAGES, MESSAGES)
def test_merging_messages_twice_changes_nothing(mine, theirs):
    once = merged(mine, theirs)
    assert list(map(canonical, merged(once, theirs))) == list(map(canonical, once))
    assert list(map(canonical, merged(once, once))) == list(map(canonical, once))


@given(MESSAGES, MESSAGES)
def test_merging_messages_is_commutative(mine, theirs):
    assert as_set(merged(mine, theirs)) == as_set(merged(theirs, mine))


@given(MESSAGES, MESSAGES, MESSAGES)
def test_merging_messages_is_associative(one, two, three):
    assert as_set(merged(merged(one, two), three)) == as_set(merged(one, merged(two, three)))


@given(MESSAGES, MESSAGES)
def test_messages_stand_by_time_and_those_of_equal_time_as_first_seen(mine, theirs):
    first, both = merged(mine), merged(mine, theirs)
    assert [m["timestamp"] for m in both] == sorted(m["timestamp"] for m in both)
    places = {canonical(message): place for place, message in enumerate(both)}
    kept = [places[canonical(message)] for message in first if canonical(message) in places]
    assert kept == sorted(kept)


@given(DOCUMENT, DOCUMENT, DOCUMENT)
def test_merging_documents_is_idempotent_commutative_and_associative(one, two, three):
    def merge(mine, theirs):
        return kirosync.join(mine, theirs, kirosync.document_rank)[0]

    assert canonical(merge(one, one)) == canonical(one)
    assert canonical(merge(one, two)) == canonical(merge(two, one))
    assert canonical(merge(merge(one, two), three)) == canonical(merge(one, merge(two, three)))


@given(some.lists(MESSAGES, min_size=3, max_size=3), some.permutations(range(3)))
def test_nothing_that_any_client_sent_is_lost_in_any_order(clients, order):
    """Clocks hours apart: every content is a message, the beginning of one, or among the losers."""
    hours = [0, 7_200_000, -10_800_000]
    sent = [[{**m, "timestamp": m["timestamp"] + hours[i]} for m in part] for i, part in enumerate(clients)]
    state, lost = [], []
    for client in order:
        state, losers = merge_messages(state, sent[client])
        lost += losers
    for message in itertools.chain(*sent):
        kept = [m["content"] for m in state] + [m["content"] for m in lost]
        assert any(content.startswith(message["content"]) for content in kept)
        fields = [m.keys() | m.get("metadata", {}).keys() for m in state + lost]
        assert any(message.keys() | message.get("metadata", {}).keys() <= each for each in fields)


def test_a_reply_that_is_still_streaming_is_replaced_by_its_longer_self():
    parts = [{"role": "assistant", "content": "Hello world"[:n], "timestamp": 5} for n in (3, 11, 7)]
    assert merged(*[[part] for part in parts]) == [parts[1]]


def test_two_contents_of_one_moment_are_two_messages():
    two = [{"role": "user", "content": text, "timestamp": 5} for text in ("yes", "no")]
    assert merged(two[:1], two[1:]) == two


def test_the_greater_version_of_a_message_with_an_id_wins_and_the_other_is_kept_as_loser():
    old, new = ({"id": "m", "role": "user", "content": text, "timestamp": t} for text, t in (("draft", 1), ("done", 2)))
    assert merge_messages([new], [old]) == ([new], [old])


def test_unknown_fields_and_metadata_of_the_same_message_are_united():
    message = {"role": "user", "content": "hi", "timestamp": 1}
    one, two = {**message, "x": 1, "metadata": {"a": 1}}, {**message, "y": 2, "metadata": {"b": 2}}
    assert merged([one], [two]) == [{**message, "x": 1, "y": 2, "metadata": {"a": 1, "b": 2}}]


# Commands

STATUS = some.sampled_from(sorted(kirosync.NEXT))
PENDING = {"id": "c", "type": "execute_bash", "command": "true", "status": "pending", "createdAt": 0, "updatedAt": 0}
CLAIM = {"status": "processing"}


def test_a_plain_agent_claims_and_completes():
    claimed = advance(PENDING, CLAIM, now=1)
    assert (claimed["attempt"], claimed["startedAt"]) == (1, 1)
    done = advance(claimed, {"status": "completed", "result": {"exitCode": 0}}, now=2)
    assert (done["status"], done["outcome"], done["endedAt"]) == ("completed", "ok", 2)


def test_exactly_one_claim_is_taken():
    claimed = advance(PENDING, {**CLAIM, "agent": "a", "lease": 5}, now=1)
    for other in (CLAIM, {**CLAIM, "agent": "b"}):
        with pytest.raises(kirosync.Conflict, match="already claimed by a"):
            advance(claimed, other, now=2)
    assert advance(claimed, {**CLAIM, "agent": "a", "lease": 5}, now=2)["leaseUntil"] == 5002


def test_a_report_of_an_older_attempt_is_refused():
    claimed = advance(PENDING | {"attempt": 2}, {**CLAIM, "agent": "a"}, now=1)
    with pytest.raises(kirosync.Conflict, match="attempt 2, not 1"):
        advance(claimed, {"status": "completed", "attempt": 1}, now=2)


def test_the_same_report_again_is_no_change_and_another_is_refused():
    report = {"status": "completed", "result": 1}
    done = advance(advance(PENDING, CLAIM, 1), report, 2)
    assert advance(done, report, 3) is done
    for other in ({"status": "completed", "result": 2}, {"status": "failed"}, {"result": 2}, CLAIM):
        with pytest.raises(kirosync.Conflict):
            advance(done, other, 3)


def test_what_was_ordered_cannot_be_changed_by_a_report():
    with pytest.raises(kirosync.Conflict, match="command is set when it is queued"):
        advance(PENDING, {**CLAIM, "command": "rm"}, now=1)


@given(STATUS, STATUS)
def test_a_status_is_only_reached_along_the_table(was, status):
    command = {**PENDING, "status": was}
    try:
        after = advance(command, {"status": status, "agent": "a"}, now=1)["status"]
    except kirosync.Conflict:
        return
    assert after == status
    assert status in kirosync.NEXT[was] | {was}


def test_a_failed_command_that_ran_has_outcome_exit_and_one_that_did_not_error():
    running = advance(PENDING, CLAIM, 1)
    assert advance(running, {"status": "failed", "result": {"exitCode": 2}}, 2)["outcome"] == "exit"
    assert advance(running, {"status": "failed", "error": "no such file"}, 2)["outcome"] == "error"


def test_what_nobody_took_expires_and_what_nobody_reported_is_lost():
    day = kirosync.EXPIRES_S * 1000
    assert kirosync.overdue(PENDING, day) is PENDING
    assert kirosync.overdue(PENDING, day + 1)["outcome"] == "expired"
    leased = advance(PENDING, {**CLAIM, "agent": "a", "lease": 5}, now=0)
    assert kirosync.overdue(leased, 5000) is leased
    assert kirosync.overdue(leased, 5001)["outcome"] == "lost"
    plain = advance({**PENDING, "timeout": 10}, CLAIM, now=0)
    assert kirosync.overdue(plain, 70_000) is plain
    assert kirosync.overdue(plain, 70_001)["outcome"] == "lost"


def test_a_retryable_command_goes_back_to_the_queue_and_its_old_attempt_is_refused():
    leased = advance({**PENDING, "retryable": True}, {**CLAIM, "agent": "a", "lease": 5}, now=0)
    again = kirosync.overdue(leased, 6000)
    assert (again["status"], again["attempt"], "agent" in again) == ("pending", 2, False)
    second = advance(again, {**CLAIM, "agent": "b", "lease": 5}, now=6001)
    assert second["attempt"] == 2
    with pytest.raises(kirosync.Conflict):
        advance(second, {"status": "completed", "agent": "a", "attempt": 1}, now=6002)


def test_a_stale_client_never_causes_an_old_command_to_run():
    old = {**PENDING, "createdAt": 0}
    assert merge_command(None, old, now=kirosync.EXPIRES_S * 1000 + 1)["outcome"] == "expired"
    done = advance(advance(PENDING, CLAIM, 1), {"status": "completed"}, 2)
    assert merge_command(done, old, now=3) is done
    assert merge_command(None, done, now=3)["status"] == "completed"
    elsewhere = {**old, "status": "processing", "agent": "a", "claim": "x", "retryable": True, "leaseUntil": 10**15}
    taken = merge_command(None, elsewhere, now=3)
    assert not taken.keys() & {"agent", "claim", "retryable", "leaseUntil"}
    assert kirosync.overdue(taken, 10**10)["outcome"] == "lost"


def test_a_pushed_report_is_taken_along_the_table_and_no_further():
    report = {**PENDING, "status": "completed", "result": 7}
    assert merge_command(PENDING, report, now=3)["result"] == 7
    again = {**PENDING, "attempt": 2}
    claimed = advance(again, {**CLAIM, "agent": "a"}, now=1)
    for attempt in ({}, {"attempt": 1}):
        assert merge_command(claimed, {**report, **attempt}, now=3) is claimed
        assert merge_command(again, {**report, **attempt}, now=3) is again
    assert merge_command(PENDING, {**report, "agent": "b"}, now=3)["agent"] == "b"


@given(some.text(max_size=140))
def test_every_id_is_a_file_name_or_refused(text):
    try:
        kirosync.check_id(text)
    except kirosync.Malformed:
        return
    name = kirosync.name_of(text)
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-%")
    assert not name.startswith(".")
    assert len(name) <= kirosync.NAME_BYTES


@given(some.text(min_size=1, max_size=9), some.text(min_size=1, max_size=9))
def test_different_ids_have_different_names(one, two):
    assert (kirosync.name_of(one) == kirosync.name_of(two)) == (one == two)


def test_a_claim_repeated_is_the_same_claim_and_that_of_a_namesake_is_not():
    claim = {**CLAIM, "agent": "a", "claim": "one", "lease": 5}
    claimed = advance(PENDING, claim, now=1)
    assert advance(claimed, claim, now=2)["leaseUntil"] == 5002
    for other in ({**claim, "claim": "two"}, {**CLAIM, "agent": "a"}):
        with pytest.raises(kirosync.Conflict, match="already claimed by a"):
            advance(claimed, other, now=2)


def test_only_who_holds_a_command_hands_it_back():
    claimed = advance(PENDING, {**CLAIM, "agent": "a"}, now=1)
    for other in ({"status": "pending"}, {"status": "pending", "agent": "b"}):
        with pytest.raises(kirosync.Conflict):
            advance(claimed, other, now=2)
    assert advance(claimed, {"status": "pending", "agent": "a"}, now=2)["attempt"] == 2


def test_an_outcome_fits_its_status_and_an_order_cannot_be_added_to():
    claimed = advance(PENDING, CLAIM, now=1)
    for patch in ({"status": "failed", "outcome": "ok"}, {"status": "completed", "outcome": "exit"}):
        with pytest.raises(kirosync.Malformed, match="cannot have the outcome"):
            advance(claimed, patch, now=2)
    for command, patch in ((claimed, {"outcome": "timeout"}), (PENDING, {**CLAIM, "outcome": "ok"})):
        with pytest.raises(kirosync.Conflict, match="an outcome is how it ends"):
            advance(command, patch, now=2)
    with pytest.raises(kirosync.Conflict, match="expiresIn is set when it is queued"):
        advance(claimed, {"expiresIn": "soon"}, now=2)


def test_a_service_that_was_down_gives_agents_time_to_be_heard():
    leased = advance(PENDING, {**CLAIM, "agent": "a", "lease": 5}, now=0)
    assert kirosync.overdue(leased, 100_000, listening=90_000) is leased
    assert kirosync.overdue(leased, 150_001, listening=90_000)["outcome"] == "lost"


def test_metadata_of_any_kind_merges():
    for one, two in itertools.product([None, "x", {"metadata": 1}, {"metadata": {"a": 1}}], repeat=2):
        document = {"content": "", "timestamp": 1}
        left, right = ({**document, "metadata": value} for value in (one, two))
        assert kirosync.unite(left, right) == kirosync.unite(right, left)


def test_merging_many_messages_of_one_moment_and_burying_many_is_not_quadratic():
    many = [{"role": "user", "content": f"{n:05}", "timestamp": 1} for n in range(20_000)]
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    state, _ = merge_messages(many, many)
    alive, dead = kirosync.risen(many, {"deletedBefore": 0, "messages": many})
    sys.setprofile(None)
    assert (len(state), len(alive), len(dead)) == (20_000, 0, 20_000)
    assert calls < 500 * len(many)  # quadratic would be 20,000 times


@given(some.lists(MESSAGES, max_size=6))
def test_merging_into_what_is_near_gives_what_merging_into_all_does(pushes):
    talk, whole = kirosync.talk_of({}, [], []), []
    for revision, push in enumerate(pushes, 1):
        before = talk
        talk, lost = talk.merged(push, revision)
        whole, losers = merge_messages(whole, push)
        assert list(map(canonical, talk.record()["messages"])) == list(map(canonical, whole))
        assert set(map(canonical, lost)) == set(map(canonical, losers))
        again = kirosync.talk_of({}, talk.messages, list(talk.revisions))
        assert talk == again, "the lists that stand beside the messages"
        unchanged = [message for message, when in zip(talk.messages, talk.revisions, strict=True) if when < revision]
        assert all(message in before.messages for message in unchanged)
        assert b"".join(talk.newer(0)) == msgspec.json.encode(talk.record()["messages"])
