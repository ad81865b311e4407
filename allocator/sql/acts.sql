-- What operators do to leases and days by hand. All are bound to one organization.

-- name: leases_by_age
-- Live leases that were granted longer ago than an age, the oldest first, and how many there are in all. $1 organization,
-- $2 seconds, $3 slot or NULL for any, $4 client or NULL for any, $5 at most. A rare act on a small table: no index.
SELECT allocation_key, count(*) OVER () AS matching
FROM leases
WHERE organization_id = $1 AND expires_at > clock_timestamp()
  AND granted_at <= clock_timestamp() - $2::float8 * interval '1 second'
  AND ($3::uuid IS NULL OR slot_id = $3) AND ($4::text IS NULL OR client_id = $4)
ORDER BY granted_at, allocation_key LIMIT $5;

-- name: today_of_organization
-- $1 organization. Index: primary key.
SELECT (now() AT TIME ZONE time_zone)::date FROM organizations WHERE organization_id = $1;

-- name: has_slot
-- $1 organization, $2 slot. Index: primary key.
SELECT EXISTS (SELECT FROM work_slots WHERE organization_id = $1 AND slot_id = $2);

-- name: track_slot
-- Makes the row of a slot's day if it may have one. $1 organization, $2 day, $3 slot. Index: primary keys; daily_work_tracking_slot.
SELECT track_slots($1, $2, ARRAY[$3::uuid]);

-- name: silence_instance
-- An instance that was declared dead is offline at once: its last contact counts as the given silence ago. $1
-- organization, $2 client, $3 instance, $4 seconds. Index: primary key.
UPDATE client_instances
SET last_seen_at = least(last_seen_at, statement_timestamp() - $4::float8 * interval '1 second')
WHERE organization_id = $1 AND client_id = $2 AND instance_number = $3
RETURNING instance_number;

-- name: reopen_quota
-- Lets a day hand out more: no row when it has no counters. $1 organization, $2 day, $3 slot, $4 units; 0 for as many
-- beyond the slot's own quota as failed or were blocked, so that the same ones are not added twice. Index:
-- daily_work_tracking_slot, primary key of work_slots.
WITH day AS MATERIALIZED (
  SELECT t.quota, s.daily_quota, greatest(t.quota, least(1000000,
    CASE WHEN $4 > 0 THEN t.quota + $4 ELSE s.daily_quota + t.failed + t.blocked END)) AS reopened_to
  FROM daily_work_tracking t JOIN work_slots s ON s.organization_id = $1 AND s.slot_id = $3
  WHERE t.organization_id = $1 AND t.work_date = $2 AND t.slot_id = $3
  FOR UPDATE OF t
)
UPDATE daily_work_tracking t
SET quota = d.reopened_to, reopened = greatest(t.reopened, d.reopened_to - d.daily_quota)
FROM day d
WHERE t.organization_id = $1 AND t.work_date = $2 AND t.slot_id = $3
RETURNING d.quota AS quota_before, t.quota, t.quota - (t.allocated - t.expired - t.released) AS room;
