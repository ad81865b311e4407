-- Statements in the archiver's own schema.

-- name: list_policies
-- All policies, by name. Index: primary key.
SELECT name, source, schema_name, table_name, interval, ahead, hot_retention_days, cold_retention_days, legal_hold,
       key_column, organization_column, partition_column, version
FROM policies ORDER BY name;

-- name: find_policy
-- $1 name. Index: primary key.
SELECT name, source, schema_name, table_name, interval, ahead, hot_retention_days, cold_retention_days, legal_hold,
       key_column, organization_column, partition_column, version
FROM policies WHERE name = $1;

-- name: put_policy
-- Makes or replaces a policy; no row when it does not stand at the expected version. $1 to $12 the columns in order,
-- $13 the version it is based on, NULL for whatever stands. Index: primary key.
INSERT INTO policies AS p (name, source, schema_name, table_name, interval, ahead, hot_retention_days,
                           cold_retention_days, legal_hold, key_column, organization_column, partition_column,
                           version)
SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, nextval('policy_versions')
WHERE $13::bigint IS NULL OR EXISTS (SELECT FROM policies WHERE name = $1 AND version = $13)
ON CONFLICT (name) DO UPDATE
SET source = excluded.source, schema_name = excluded.schema_name, table_name = excluded.table_name,
    interval = excluded.interval, ahead = excluded.ahead, hot_retention_days = excluded.hot_retention_days,
    cold_retention_days = excluded.cold_retention_days, legal_hold = excluded.legal_hold,
    key_column = excluded.key_column, organization_column = excluded.organization_column,
    partition_column = excluded.partition_column, version = excluded.version, updated_at = now()
WHERE $13::bigint IS NULL OR p.version = $13
RETURNING version;

-- name: delete_policy
-- $1 name. Index: primary key.
DELETE FROM policies WHERE name = $1;

-- name: offer_default
-- A row when the default was never offered before. $1 name. Index: primary key.
INSERT INTO seeded_policies (name) VALUES ($1) ON CONFLICT (name) DO NOTHING RETURNING name;

-- name: was_offered
-- $1 name. Index: primary key.
SELECT EXISTS (SELECT FROM seeded_policies WHERE name = $1);

-- name: today
-- The day that retention is counted from, in UTC.
SELECT (now() AT TIME ZONE 'UTC')::date;

-- name: lock_run
-- Says for as long as the session lasts that the run is alive. $1 run.
SELECT pg_advisory_lock(hashtextextended('muster archiver run ' || $1::uuid::text, 0));

-- name: unlock_run
-- $1 run.
SELECT pg_advisory_unlock(hashtextextended('muster archiver run ' || $1::uuid::text, 0));

-- name: begin_run
-- $1 run, $2 job, $3 actor.
INSERT INTO runs (run_id, job, actor) VALUES ($1, $2, $3);

-- name: end_run
-- $1 run, $2 state, $3 partitions, $4 rows, $5 bytes, $6 message. Index: primary key.
UPDATE runs SET state = $2, ended_at = clock_timestamp(), partitions = $3, rows = $4, bytes = $5, message = $6
WHERE run_id = $1;

-- name: end_lost_runs
-- Ends the runs whose process is gone: nobody holds their lock. Index: runs_running.
WITH running AS MATERIALIZED (SELECT run_id FROM runs WHERE state = 1)
UPDATE runs SET state = 3, ended_at = clock_timestamp(), message = 'interrupted: the process ended; the next run goes on from there'
WHERE state = 1 AND run_id IN (
  SELECT run_id FROM running
  WHERE pg_try_advisory_xact_lock(hashtextextended('muster archiver run ' || run_id::text, 0)));

-- name: list_runs
-- A page, newest first (a UUIDv7 begins with its time). $1 job or '', $2 the last run of the page before or NULL, $3 how many.
-- Index: primary key, or runs_job.
SELECT run_id, job, state, actor, started_at, ended_at, partitions, rows, bytes, message
FROM runs
WHERE ($1::text = '' OR job = $1) AND ($2::uuid IS NULL OR run_id < $2)
ORDER BY run_id DESC LIMIT $3;

-- name: last_run_began
-- When a run of a job last began, by anyone; NULL for never. $1 job. Index: runs_job.
SELECT started_at FROM runs WHERE job = $1 ORDER BY run_id DESC LIMIT 1;

-- name: last_success
-- When a job last succeeded; NULL for never. $1 job. Index: runs_job.
SELECT ended_at FROM runs WHERE job = $1 AND state = 2 ORDER BY run_id DESC LIMIT 1;

-- name: open_archive
-- Begins the way of a partition, or takes up the one that is open. $1 archive, $2 policy, $3 source, $4 schema, $5 partition,
-- $6 first day, $7 day after the last, $8 run. Index: archives_open.
INSERT INTO archives AS a (archive_id, policy, source, schema_name, partition, from_date, to_date, run_id)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
ON CONFLICT (source, schema_name, partition) WHERE step < 6
DO UPDATE SET run_id = excluded.run_id, updated_at = now()
RETURNING archive_id, policy, schema_name, partition, from_date, to_date, step, rows, bytes;

-- name: open_archives
-- The partitions of a policy that are on their way. $1 policy. Index: archives_policy.
SELECT archive_id, policy, schema_name, partition, from_date, to_date, step, rows, bytes
FROM archives WHERE policy = $1 AND step < 6 ORDER BY from_date;

-- name: step_archive
-- Takes a step, if the archive still stands where it was. $1 archive, $2 the step before, $3 the step after. Index: primary key.
UPDATE archives SET step = $3, message = '', updated_at = now() WHERE archive_id = $1 AND step = $2 RETURNING archive_id;

-- name: sum_archive
-- Sets rows and bytes from its files. $1 archive. Index: primary key, cold_files_archive.
UPDATE archives SET (rows, bytes) = (
  SELECT coalesce(sum(f.rows), 0), coalesce(sum(f.size_bytes), 0) FROM cold_files f WHERE f.archive_id = $1)
WHERE archive_id = $1 RETURNING rows, bytes;

-- name: note_archive
-- Says why an attempt failed. $1 archive, $2 message. Index: primary key.
UPDATE archives SET message = $2, updated_at = now() WHERE archive_id = $1;

-- name: insert_file
-- $1 key, $2 archive, $3 policy, $4 organization, $5 first day, $6 day after the last, $7 rows, $8 bytes, $9 SHA-256,
-- $10 columns, $11 fingerprint.
INSERT INTO cold_files (key, archive_id, policy, organization_id, from_date, to_date, rows, size_bytes, sha256, columns, fingerprint)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::jsonb, $11::jsonb);

-- name: archive_files
-- $1 archive. Index: cold_files_archive.
SELECT key, organization_id, from_date, to_date, rows, size_bytes, sha256, columns::text, fingerprint::text, published_at
FROM cold_files WHERE archive_id = $1 ORDER BY key;

-- name: forget_files
-- $1 archive. Index: cold_files_archive.
DELETE FROM cold_files WHERE archive_id = $1;

-- name: publish_files
-- $1 archive. Index: cold_files_archive.
UPDATE cold_files SET published_at = clock_timestamp() WHERE archive_id = $1;

-- name: unpublish_files
-- $1 archive. Index: cold_files_archive.
UPDATE cold_files SET published_at = NULL WHERE archive_id = $1;

-- name: next_manifest
-- $1 policy. Index: primary key.
INSERT INTO manifests AS m (policy, number) VALUES ($1, 1)
ON CONFLICT (policy) DO UPDATE SET number = m.number + 1
RETURNING number;

-- name: unwritten_manifest
-- The newest manifest of a policy that is not on the object store yet. $1 policy. Index: primary key.
SELECT number FROM manifests WHERE policy = $1 AND number > written_number;

-- name: manifest_written
-- $1 policy, $2 number. Index: primary key.
UPDATE manifests SET written_number = greatest(written_number, $2) WHERE policy = $1;

-- name: published_files
-- The published files of a policy, with the partition they came from. $1 policy. Index: cold_files_policy.
SELECT f.key, f.organization_id, a.schema_name || '.' || a.partition AS partition, a.step >= 5 AS detached,
       f.from_date, f.to_date, f.rows, f.size_bytes, f.sha256, f.columns::text, f.published_at
FROM cold_files f JOIN archives a USING (archive_id)
WHERE f.policy = $1 AND f.published_at IS NOT NULL
ORDER BY f.from_date, f.key;

-- name: readable_files
-- The same for one organization: what its queries may read. $1 policy, $2 organization. Index: cold_files_policy.
SELECT f.key, f.organization_id, a.schema_name || '.' || a.partition AS partition, a.step >= 5 AS detached,
       f.from_date, f.to_date, f.rows, f.size_bytes, f.sha256, f.columns::text, f.published_at
FROM cold_files f JOIN archives a USING (archive_id)
WHERE f.policy = $1 AND f.organization_id = $2 AND f.published_at IS NOT NULL
ORDER BY f.from_date, f.key;

-- name: expire_files
-- Forgets the files that have stayed as long as they should, of partitions that are gone. $1 policy, $2 days.
-- Index: cold_files_policy.
DELETE FROM cold_files f USING archives a
WHERE f.policy = $1 AND a.archive_id = f.archive_id AND a.step = 6 AND f.published_at < now() - make_interval(days => $2)
RETURNING f.key;
