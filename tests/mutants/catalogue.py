"""What is broken, how, and by which tests it is caught."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Edit(NamedTuple):
    """A replacement in a module of the relay; what is replaced stands there once."""

    module: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A relay that breaks its promise."""

    name: str
    edits: Sequence[Edit]
    #: Each of these tests fails with it.
    caught_by: Sequence[str]

    def apply(self, package: Path) -> None:
        """
        Breaks the relay in *package*.

        Raises: LookupError if the code is no longer what the mutant was made for.
        """
        for module, old, new in self.edits:
            path = package / module
            source = path.read_text()
            if (times := source.count(old)) != 1:
                raise LookupError(f"{self.name}: in {module} there is not once, but {times} times:\n{old}")
            path.write_text(source.replace(old, new))


_STORE, _SPOOL = "tests/unit/test_store.py", "tests/unit/test_spool.py"
_PUBLISHER, _POWER = "tests/unit/test_publisher.py", "tests/unit/test_power_loss.py"
_SPOOL_MODEL = "tests/model/test_spool_model.py::TestSpoolModel"
_REQUEUE_MODEL = "tests/model/test_requeue_model.py::TestRequeueModel"
_PUBLISHER_MODEL = "tests/model/test_publisher_model.py::TestPublisherModel"
_KAFKA, _PUBLISHING = "tests/integration/test_kafka.py", "tests/integration/test_publishing.py"
_CHAOS = "tests/chaos/test_run.py::test_nothing_is_missing_doubled_or_reordered_in_a_short_run"
_LIMITS = "tests/acceptance/test_limits.py"
_CRASH, _FSYNC = "tests/acceptance/test_crash.py", "tests/acceptance/test_fsync.py"

_REPEATS = """\
        for digest, repeat in change.repeats.items():
            execute(
                "INSERT OR REPLACE INTO repeats VALUES (?, ?, ?, ?)",
                (digest, repeat.accepted_at, repeat.occurrence, repeat.answered),
            )
"""
_DIGESTS = """\
            if change.digests:
                execute("INSERT INTO digests VALUES (?, ?, ?)", (change.published, change.accepted_at, change.digests))
"""
_NO_MORE_DEAD = """\
        gone = [(sequence,) for sequence in change.requeued.values()]
        connection.executemany("DELETE FROM dead WHERE sequence = ?", gone)
        connection.executemany("DELETE FROM requests WHERE sequence = ?", gone)
"""
_BEGIN = '        execute("BEGIN IMMEDIATE")\n        if change.probe_bytes'
_COMMIT = """\
        execute("COMMIT")

    def _tidy"""
_READ_WATERMARK = "self._cluster.read_watermark(self._plan.watermarks, _WATERMARK_PARTITION, self._key)\n"

MUTANTS = (
    Mutant(
        "the watermark is ignored",
        [
            Edit(
                "publisher.py",
                "return self._source.resume(watermark) if producer.transactional else 0",
                "self._source.resume(watermark)\n        return 0",
            )
        ],
        [
            f"{_PUBLISHER}::test_what_was_committed_although_the_answer_was_lost_is_not_published_again",
            f"{_PUBLISHER}::test_a_crash_between_commit_and_trim_publishes_nothing_twice",
            _PUBLISHER_MODEL,
            f"{_CRASH}::test_nothing_is_doubled_or_lost_by_a_death_at_the_commit",
            _CHAOS,
        ],
    ),
    Mutant(
        "the watermark is read before the producer has started",
        [
            Edit(
                "kafka.py",
                "            # With a missing coordinator this would wait for ever.\n",
                f"            assert self._plan.watermarks\n            found = await {_READ_WATERMARK}",
            ),
            Edit("kafka.py", f"        return await {_READ_WATERMARK}", "        return found\n"),
        ],
        [f"{_CRASH}::test_the_former_producer_is_ended_before_the_watermark_is_read"],
    ),
    Mutant(
        "another transactional id at each start",
        [
            Edit(
                "kafka.py",
                '"transactional_id": f"{TRANSACTIONAL_ID_PREFIX}{self._identity}",',
                '"transactional_id": f"{TRANSACTIONAL_ID_PREFIX}{self._identity}-{asyncio.get_running_loop().time()}",',
            )
        ],
        [f"{_KAFKA}::test_a_successor_fences_its_predecessor"],
    ),
    Mutant(
        "delivery futures are not looked at before the commit",
        [
            Edit(
                "kafka.py",
                """\
        if failures := [(outcome, batch) for outcome, batch in outcomes if isinstance(outcome, BaseException)]:
""",
                """\
        if failures := [(outcome, batch) for outcome, batch in outcomes if outcome is None]:
""",
            )
        ],
        [
            f"{_KAFKA}::test_a_record_that_the_broker_refuses_takes_the_whole_cycle_back",
            f"{_PUBLISHING}::test_an_event_that_the_broker_refuses_is_kept_and_announced_and_the_others_of_its_chat_go_on",
        ],
    ),
    Mutant(
        "the spool is trimmed before the commit",
        [
            Edit(
                "publisher.py",
                "            await producer.publish(records, self._source.watermark(entries[-1][0]))\n",
                "            self._source.published(entries[-1][0])\n"
                "            await producer.publish(records, self._source.watermark(entries[-1][0]))\n",
            )
        ],
        [f"{_PUBLISHER}::test_events_stay_in_the_spool_until_kafka_has_them", _PUBLISHER_MODEL],
    ),
    Mutant(
        "the answer comes before the fsync",
        [
            Edit(
                "spool.py",
                "        self._waiting[event.digest] = commit\n        await commit\n        return True\n",
                "        self._waiting[event.digest] = commit\n        return True\n",
            )
        ],
        [
            f"{_SPOOL}::test_append_does_not_return_before_the_commit",
            f"{_POWER}::test_an_event_survives_a_power_cut_right_after_its_answer",
            _SPOOL_MODEL,
            _FSYNC,
        ],
    ),
    Mutant(
        "synchronous=NORMAL",
        [
            Edit("store.py", "PRAGMA synchronous=FULL", "PRAGMA synchronous=NORMAL"),
            Edit("store.py", "_FULL = 2", "_FULL = 1"),
        ],
        [
            f"{_POWER}::test_an_event_survives_a_power_cut_right_after_its_answer",
            f"{_POWER}::test_every_answered_event_is_there_after_a_fault_at_any_moment",
            f"{_STORE}::test_sqlite_is_told_to_lose_nothing",
            _FSYNC,
        ],
    ),
    Mutant(
        "the spool's directory is not fsynced",
        [Edit("store.py", "            sync_directory(self._path.parent)\n", "")],
        [f"{_POWER}::test_an_event_survives_a_power_cut_right_after_its_answer"],
    ),
    Mutant(
        "the dedupe row is written after the event's transaction",
        [
            Edit("store.py", _REPEATS, ""),
            Edit("store.py", _COMMIT, _COMMIT.replace("\n", f"\n{_REPEATS}", 1)),
        ],
        [f"{_STORE}::test_a_crash_between_any_two_statements_leaves_a_change_whole_or_not_at_all"],
    ),
    Mutant(
        "the dedupe row is written before the event's transaction",
        [
            Edit("store.py", _REPEATS, ""),
            Edit("store.py", _BEGIN, f"{_REPEATS}{_BEGIN}"),
        ],
        [
            f"{_STORE}::test_a_crash_between_any_two_statements_leaves_a_change_whole_or_not_at_all",
            _SPOOL_MODEL,
        ],
    ),
    Mutant(
        "trimmed events are forgotten before their digests are kept",
        [
            Edit("store.py", _DIGESTS, ""),
            Edit(
                "store.py", _COMMIT, _COMMIT.replace("\n", f"\n        if change.published is not None:\n{_DIGESTS}", 1)
            ),
        ],
        [f"{_STORE}::test_a_crash_between_any_two_statements_leaves_a_change_whole_or_not_at_all"],
    ),
    Mutant(
        "events are committed out of order",
        [
            Edit(
                "spool.py",
                "        commit = self._gather()\n        commit.change.entries.append((",
                "        commit = self._gather()\n        commit.change.entries.insert(0, (",
            )
        ],
        [f"{_SPOOL}::test_events_that_arrive_together_share_a_commit", _SPOOL_MODEL],
    ),
    Mutant(
        "a refused event is dropped",
        [
            Edit(
                "publisher.py",
                "            await self._source.bury(entry, str(error))\n",
                "            self._done_with(entry)\n",
            )
        ],
        [
            f"{_PUBLISHER}::test_one_refused_event_is_found_buried_and_announced_in_its_place",
            _PUBLISHER_MODEL,
            f"{_PUBLISHING}::test_several_refused_events_are_all_found",
            _CHAOS,
        ],
    ),
    Mutant(
        "a requeued event stays dead",
        [Edit("store.py", _NO_MORE_DEAD, "")],
        [
            f"{_SPOOL}::test_a_requeued_event_is_in_the_file_with_its_return_and_no_more_dead",
            _REQUEUE_MODEL,
        ],
    ),
    Mutant(
        "a requeued event is taken out of the dead before the transaction of its return",
        [
            Edit("store.py", _NO_MORE_DEAD, ""),
            Edit("store.py", _BEGIN, f"{_NO_MORE_DEAD}{_BEGIN}"),
        ],
        [_REQUEUE_MODEL],
    ),
    Mutant(
        "a requeued event is taken out of the dead after the transaction of its return",
        [
            Edit("store.py", _NO_MORE_DEAD, ""),
            Edit("store.py", _COMMIT, _COMMIT.replace("\n", f"\n{_NO_MORE_DEAD}", 1)),
        ],
        [_REQUEUE_MODEL],
    ),
    Mutant(
        "a requeued event is remembered as a new delivery",
        [
            Edit(
                "store.py",
                "[event for sequence, event in self.entries if sequence not in self.requeued]",
                "[event for _, event in self.entries]",
            )
        ],
        [f"{_SPOOL}::test_the_dedupe_memory_knows_nothing_of_a_requeue", _REQUEUE_MODEL],
    ),
    Mutant(
        "an event is judged while Kafka takes nothing at all",
        [
            Edit(
                "publisher.py",
                "            await probe.publish(harmless, self._source.watermark(self._covered))\n",
                "",
            )
        ],
        [f"{_PUBLISHER}::test_an_event_is_not_judged_while_kafka_takes_nothing_at_all"],
    ),
    Mutant(
        "an event is judged without a look at its partition",
        [
            Edit(
                "publisher.py",
                "await probe.try_partition(self._record(entry))\n",
                "assert entry\n",
            )
        ],
        [f"{_PUBLISHER}::test_without_a_word_of_size_an_event_is_dead_only_after_its_partition_took_something"],
    ),
    Mutant(
        "an event is dead after one refusal without a word of its size",
        [Edit("publisher.py", "error.for_size or sequence == self._suspect", "True")],
        [
            f"{_PUBLISHER}::test_an_event_that_is_refused_in_passing_is_published_after_all",
            _PUBLISHER_MODEL,
        ],
    ),
    Mutant(
        "an event is judged although it is on Kafka",
        [Edit("publisher.py", "            if sequence <= self._covered:\n                return\n", "")],
        [f"{_PUBLISHER}::test_an_event_that_is_there_is_not_dead_whatever_was_refused"],
    ),
    Mutant(
        "a refused announcement is tried for ever",
        [
            Edit(
                "publisher.py",
                "            self._done_with(entry)  # The spool has its body",
                "            # The spool has its body",
            )
        ],
        [
            f"{_PUBLISHER}::test_a_refused_announcement_is_an_alarm_and_holds_up_no_other",
            f"{_LIMITS}::test_a_dead_event_whose_announcement_is_refused_holds_up_no_other",
        ],
    ),
    Mutant(
        "a refused watermark is blamed on the events",
        [Edit("kafka.py", "of_records=bool(refused)", "of_records=True")],
        [f"{_KAFKA}::test_a_watermark_that_is_refused_is_no_event_s_fault"],
    ),
    Mutant(
        "a producer outlives its sequence numbers",
        [Edit("kafka.py", "MAX_RECORDS = 1_000_000_000", "MAX_RECORDS = 1 << 31")],
        ["tests/unit/test_kafka.py::test_a_producer_is_spent_before_its_sequence_numbers_are"],
    ),
    Mutant(
        "backoff without a new producer",
        [
            Edit(
                "publisher.py",
                "        while True:\n            try:\n",
                "        kept = self._connect()\n        while True:\n            try:\n",
            ),
            Edit("publisher.py", "await self._publish_with(self._connect())", "await self._publish_with(kept)"),
            Edit(
                "publisher.py",
                "            await self._start(producer)\n",
                "            if not self.started.is_set():\n                await self._start(producer)\n",
            ),
            Edit(
                "publisher.py",
                "        finally:\n            await producer.close()\n\n    async def _start",
                "        finally:\n            pass\n\n    async def _start",
            ),
        ],
        [
            f"{_PUBLISHER}::test_what_was_in_hand_is_published_first_after_a_failure",
            _PUBLISHER_MODEL,
        ],
    ),
    Mutant(
        "two relays on one spool",
        [Edit("files.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB")],
        [
            f"{_STORE}::test_a_second_owner_is_refused_and_told_who_the_first_is",
            f"{_STORE}::test_another_process_is_refused",
        ],
    ),
    Mutant(
        "a spool belongs to who reaches it by one of its names",
        [
            Edit("store.py", "self._path = path = path.resolve()", "self._path = path"),
            Edit("files.py", "    path = path.resolve()\n", ""),
        ],
        [
            f"{_STORE}::test_a_second_owner_is_refused_by_another_name_too",
            f"{_STORE}::test_what_lies_beside_a_spool_is_where_its_file_is",
        ],
    ),
    Mutant(
        "the spool's file is never given back",
        [Edit("store.py", 'connection.execute("VACUUM")', 'connection.execute("SELECT 1")')],
        [
            f"{_STORE}::test_the_file_is_given_back_after_a_backlog",
            f"{_STORE}::test_a_file_that_cannot_be_given_back_takes_events_all_the_same_and_is_given_back_later",
        ],
    ),
    Mutant(
        "the spool's file is given back however much is left in it",
        [Edit("store.py", " and self._used_bytes < _LEFT_BYTES:", ":")],
        [f"{_STORE}::test_the_file_is_not_given_back_while_much_is_left_in_it"],
    ),
    Mutant(
        "an idle relay gives nothing back",
        [
            Edit(
                "spool.py",
                "self._loop.call_later(TIDY_SECONDS, self._tidy)\n        self._gather()",
                "self._tidy_timer",
            )
        ],
        [f"{_SPOOL}::test_an_idle_relay_forgets_what_the_dedupe_window_leaves_behind_and_gives_the_file_back"],
    ),
    Mutant(
        "the spool's file is cut off only when somebody else writes",
        [Edit("store.py", 'connection.execute("PRAGMA wal_checkpoint").fetchall()', "pass")],
        [f"{_STORE}::test_the_file_is_given_back_when_hardly_anything_waits_any_more"],
    ),
    Mutant(
        "the spool's file is given back however much waits in it",
        [Edit("store.py", "if spool_file.waiting_bytes(connection) > _WAITING_BYTES:", "if False:")],
        [f"{_STORE}::test_the_file_is_given_back_when_hardly_anything_waits_any_more"],
    ),
    Mutant(
        "the webhook's port accepts one connection in a turn of the loop",
        [Edit("listening.py", "_ACCEPTED_PER_TURN = 4", "_ACCEPTED_PER_TURN = 1")],
        ["tests/unit/test_listening.py::test_connections_do_not_wait_for_a_turn_of_the_loop_each"],
    ),
    Mutant(
        "a file that cannot be given back is compacted again with each commit",
        [Edit("store.py", "if now < self._compaction_failed_at + _COMPACTION_PAUSE:", "if now < 0:")],
        [f"{_STORE}::test_a_file_that_cannot_be_given_back_takes_events_all_the_same_and_is_given_back_later"],
    ),
    Mutant(
        "an event that its topic refuses for its age is taken for one that is refused for itself",
        [
            Edit(
                "connection.py",
                "((errors.InvalidTimestampError,), TimeRefused)",
                "((errors.InvalidTimestampError,), RecordsRefused)",
            )
        ],
        [f"{_LIMITS}::test_events_that_waited_for_longer_than_their_topic_lets_them_wait_on_until_it_does"],
    ),
    Mutant(
        "an event that is larger than its topic's segments is waited for",
        [Edit("connection.py", "            errors.RecordListTooLargeError,  # its segment.bytes\n", "")],
        [f"{_KAFKA}::test_what_a_partition_is_tried_with_is_never_committed"],
    ),
    Mutant(
        "a machine that was set back believes what it reads of its future",
        [Edit("watermark.py", "if covered > last or watermark == self._undone:", "if watermark == self._undone:")],
        [
            f"{_SPOOL}::test_what_a_machine_that_was_set_back_accepts_is_published_whatever_kafka_has",
            f"{_LIMITS}::test_what_a_machine_published_before_it_was_set_back_is_published_again_and_nothing_is_lost",
        ],
    ),
)
