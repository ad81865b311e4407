-- Organizations, clients, the outbox and what is done by the clock.

-- name: today
-- In UTC, where timestamp partitions are cut.
SELECT (now() AT TIME ZONE 'UTC')::date;

-- name: loosen_tracking
-- Statements that give partitions of daily_work_tracking room for updates within the page. $1 schema.
SELECT format('ALTER TABLE %I.%I SET (fillfactor = 50)', n.nspname, c.relname) AS statement
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
JOIN pg_class p ON p.oid = i.inhparent
JOIN pg_namespace n ON n.oid = p.relnamespace
WHERE n.nspname = $1 AND p.relname = 'daily_work_tracking' AND c.reloptions IS NULL;

-- name: meet_organization
-- $1 organization, $2 time zone. Index: primary key.
INSERT INTO organizations (organization_id, time_zone) VALUES ($1, $2)
ON CONFLICT (organization_id) DO UPDATE SET time_zone = excluded.time_zone
WHERE organizations.time_zone <> excluded.time_zone;

-- name: organizations
-- All of them.
SELECT organization_id FROM organizations ORDER BY organization_id;

-- name: meet_client
-- Registers a machine and a process on it, or notes that they live. $1 organization, $2 client, $3 name or '' to keep
-- it, $4 address, $5 instance, $6 user folder. Index: primary keys.
WITH machine AS (
  INSERT INTO clients (organization_id, client_id, client_name, client_ip) VALUES ($1, $2, $3, $4)
  ON CONFLICT (organization_id, client_id) DO UPDATE
  SET client_name = CASE WHEN excluded.client_name = '' THEN clients.client_name ELSE excluded.client_name END,
    client_ip = excluded.client_ip, last_seen_at = statement_timestamp()
)
INSERT INTO client_instances (organization_id, client_id, instance_number, user_folder_number) VALUES ($1, $2, $5, $6)
ON CONFLICT (organization_id, client_id, instance_number) DO UPDATE
SET user_folder_number = excluded.user_folder_number, last_seen_at = statement_timestamp();

-- name: heartbeat
-- The clock, and whether a client should drain. $1 organization, $2 client. Index: primary key.
SELECT statement_timestamp() AS server_time,
  coalesce((SELECT draining FROM clients WHERE organization_id = $1 AND client_id = $2), false) AS draining;

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

-- name: gauges
-- What the metrics show of the whole service, with the invariants that no row may break.
SELECT
  (SELECT count(*) FROM leases) AS live_leases,
  (SELECT count(*) FROM leases WHERE expires_at < clock_timestamp() - interval '1 minute') AS overdue_leases,
  (SELECT count(*) FROM outbox) AS outbox_pending,
  (SELECT count(*) FROM quarantined_results) AS quarantined,
  (SELECT count(*) FROM daily_work_tracking WHERE work_date >= (now() AT TIME ZONE 'UTC')::date - 1
    AND allocated - expired - released > quota) AS quota_violations,
  (SELECT count(*) FROM exits WHERE use_count > cap) AS cap_violations;
