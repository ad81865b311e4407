-- The outbox and what is done by the clock.

-- name: today
-- In UTC, where timestamp partitions are cut.
SELECT (now() AT TIME ZONE 'UTC')::date;

-- name: days_of_leases
-- The days that live leases count on. Over all organizations, as the clock's work. Reads all of a small table.
SELECT DISTINCT work_date FROM leases;

-- name: standing_partitions
-- The names of all partitions of a schema. $1 schema.
SELECT c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relispartition AND c.relkind = 'r';

-- name: loosen_tracking
-- Statements that give partitions of daily_work_tracking room for updates within the page. $1 schema.
SELECT format('ALTER TABLE %I.%I SET (fillfactor = 25)', n.nspname, c.relname) AS statement
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
JOIN pg_class p ON p.oid = i.inhparent
JOIN pg_namespace n ON n.oid = p.relnamespace
WHERE n.nspname = $1 AND p.relname = 'daily_work_tracking' AND c.reloptions IS NULL;

-- name: days_to_track
-- Today of every organization, and the day that begins within $1 seconds. Over all organizations, as the clock's work.
SELECT o.organization_id, d.work_date
FROM organizations o
CROSS JOIN LATERAL (
  SELECT (now() AT TIME ZONE o.time_zone)::date AS work_date
  UNION SELECT ((now() + $1::float8 * interval '1 second') AT TIME ZONE o.time_zone)::date
) d
ORDER BY d.work_date, o.organization_id;

-- name: forget_tracked_days
-- Days long over: nobody makes rows of theirs any more. $1 days that are kept. Over all organizations, as the clock's
-- work. Reads the table, which has a row per organization and day.
DELETE FROM tracked_days WHERE work_date < (now() AT TIME ZONE 'UTC')::date - $1::integer;

-- name: take_check_ins
-- Takes due check-ins for delivery: they come up again if they are not deleted by then, later each time. $1 at most.
-- Index: outbox_due_at.
UPDATE outbox
SET attempts = attempts + 1, due_at = now() + least(5 * power(2, least(attempts, 5)), 60) * interval '1 second'
WHERE outbox_id = ANY (ARRAY(
  SELECT outbox_id FROM outbox WHERE due_at <= now() ORDER BY due_at, outbox_id LIMIT $1 FOR UPDATE SKIP LOCKED))
RETURNING outbox_id, organization_id, holder, outcome;

-- name: delete_check_ins
-- Delivered. $1 organization, $2 ids. Index: primary key.
DELETE FROM outbox WHERE organization_id = $1 AND outbox_id = ANY ($2::bigint[]);
