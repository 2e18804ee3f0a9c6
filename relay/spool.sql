-- The spool file. Events are stored a batch at a time, one row for all that shared one fsync: the cost of a row is
-- paid once for them all. Column names are the file's format: a change needs a new user_version and a migration.

-- One row: whose spool this is. The identity names the transactional id and the watermark's key.
CREATE TABLE spool (
  identity   TEXT NOT NULL,    -- a UUID, made with the file
  created_at INTEGER NOT NULL  -- milliseconds since the epoch, as all times here
) STRICT;

-- Events not known to be on Kafka, in order of sequence.
CREATE TABLE batches (
  last_sequence INTEGER PRIMARY KEY,  -- of this batch
  accepted_at   INTEGER NOT NULL,     -- for the dedupe memory: no retry is older than its first try
  received_at   INTEGER NOT NULL,     -- of its first event
  total_events  INTEGER NOT NULL,     -- ever stored, up to and including this batch: depth without counting rows
  events        TEXT NOT NULL,        -- JSON: one array an event, its places named by the view `events`
  bodies        BLOB NOT NULL         -- one after the other
) STRICT;

-- The events one by one, for people with a SQLite shell.
CREATE VIEW events AS
SELECT json_extract(e.value, '$[0]')  AS sequence,
       json_extract(e.value, '$[1]')  AS workspace,
       json_extract(e.value, '$[2]')  AS type,
       json_extract(e.value, '$[3]')  AS key,
       json_extract(e.value, '$[4]')  AS digest,
       json_extract(e.value, '$[5]')  AS occurrence,
       json_extract(e.value, '$[6]')  AS received_at,
       json_extract(e.value, '$[7]')  AS time,
       json_extract(e.value, '$[8]')  AS reason,
       json_extract(e.value, '$[9]')  AS detail,
       json_extract(e.value, '$[12]') AS schema,
       substr(b.bodies, json_extract(e.value, '$[10]') + 1, json_extract(e.value, '$[11]')) AS body
FROM batches b, json_each(b.events) e;

-- One row: how far the events are known to be on Kafka, and how many were ever taken out of batches.
CREATE TABLE published (
  sequence     INTEGER NOT NULL,
  total_events INTEGER NOT NULL
) STRICT;
INSERT INTO published VALUES (0, 0);

-- Each start of a relay that stored events here, with the first sequence it gave. A watermark tells the runs that
-- led to it; where it and this table part ways, the file was restored from a copy.
CREATE TABLE runs (
  first_sequence INTEGER PRIMARY KEY,
  run            TEXT NOT NULL
) STRICT;

-- Events that the broker refused for themselves, with their bodies: never trimmed.
CREATE TABLE dead (
  sequence   INTEGER PRIMARY KEY,
  event      TEXT NOT NULL,  -- JSON as in batches, its body at offset 0
  body       BLOB NOT NULL,
  refused_at INTEGER NOT NULL,
  error      TEXT NOT NULL
) STRICT;

-- Dead events that an operator wants published after all. Written by `relay dead requeue`; the relay that owns the file
-- moves them from dead to batches, under a new sequence.
CREATE TABLE requests (
  sequence     INTEGER PRIMARY KEY,  -- in dead
  requested_at INTEGER NOT NULL
) STRICT;

-- Dedupe memory of the event types that never repeat byte for byte: 16 bytes of each event's digest. Only of events
-- that are no longer in batches; those tell it themselves.
CREATE TABLE digests (
  last_sequence INTEGER PRIMARY KEY,
  accepted_at   INTEGER NOT NULL,  -- when they left batches: later than they were, which does no harm
  digests       BLOB NOT NULL
) STRICT;

-- Dedupe memory of the types that may.
CREATE TABLE repeats (
  digest      BLOB PRIMARY KEY,
  accepted_at INTEGER NOT NULL,
  occurrence  INTEGER NOT NULL,  -- how many times it was accepted as a new event
  answered    INTEGER NOT NULL   -- 1 once an answer for it got out in time: the next one is no retry
) STRICT, WITHOUT ROWID;
CREATE INDEX repeats_by_age ON repeats (accepted_at);

-- Empty, but while it is tried whether the disk takes an event.
CREATE TABLE probe (
  id   INTEGER PRIMARY KEY,
  data BLOB NOT NULL
) STRICT;

-- Schema ids as a registry gave them, so that a start without the registry publishes.
CREATE TABLE schema_ids (
  registry    TEXT NOT NULL,     -- its URL: another registry gives other ids
  subject     TEXT NOT NULL,
  fingerprint TEXT NOT NULL,     -- of the schema file
  id          INTEGER NOT NULL,
  guid        BLOB,              -- 16 bytes, where the registry has GUIDs
  PRIMARY KEY (registry, subject, fingerprint)
) STRICT, WITHOUT ROWID;
