-- The invariants of the design as questions whose answer is 0. Read by a loop, seldom and bounded; each statement sees one
-- moment, since rows move between tables in single transactions.

-- name: invariant_days
-- Today and yesterday of every organization. Over all organizations, as the clock's work.
SELECT o.organization_id, (now() AT TIME ZONE o.time_zone)::date - back AS work_date
FROM organizations o CROSS JOIN generate_series(0, 1) back;

-- name: quota
-- Days of slots above their quota, or with more than one row. $1 organization, $2 day. Index: daily_work_tracking_slot.
SELECT count(*) FROM (
  SELECT FROM daily_work_tracking WHERE organization_id = $1 AND work_date = $2
  GROUP BY slot_id HAVING count(*) > 1 OR bool_or(allocated - expired - released > quota)
) d;

-- name: exit_cap
-- Exits above their cap, concurrent ones that count other than their live leases, and others that count less than those.
-- Over all organizations: a small table.
SELECT count(*) FROM exits e
LEFT JOIN (
  SELECT exit_id, exit_epoch, count(*) AS uses FROM leases WHERE exit_id IS NOT NULL GROUP BY exit_id, exit_epoch
) l ON l.exit_id = e.exit_id AND l.exit_epoch = e.toggle_epoch
WHERE e.use_count > e.cap OR e.use_count < coalesce(l.uses, 0)
  OR (e.cap_mode = 2 AND e.use_count <> coalesce(l.uses, 0));

-- name: one_lease
-- Keys that live and have ended, and personas that are out under several leases. Over all organizations: a small table.
SELECT
  (SELECT count(*) FROM leases l JOIN work_allocations a
    ON a.organization_id = l.organization_id AND a.work_date = l.work_date AND a.allocation_key = l.allocation_key)
  + (SELECT count(*) FROM (SELECT FROM leases WHERE persona_id IS NOT NULL
    GROUP BY organization_id, persona_id HAVING count(*) > 1) p);

-- name: counters
-- Days of slots whose counters are not the count of their allocations. $1 organization, $2 day. Index: primary keys,
-- daily_work_tracking_slot; all allocations of the day are read.
SELECT count(*) FROM (
  SELECT slot_id, sum(units) AS allocated, sum(units) FILTER (WHERE status = 2) AS succeeded,
    sum(units) FILTER (WHERE status = 3) AS failed, sum(units) FILTER (WHERE status = 4) AS blocked,
    sum(units) FILTER (WHERE status = 5) AS expired, sum(units) FILTER (WHERE status = 6) AS released
  FROM (
    SELECT slot_id, status, count(*) AS units FROM work_allocations
    WHERE organization_id = $1 AND work_date = $2 GROUP BY slot_id, status
    UNION ALL
    SELECT slot_id, 1, count(*) FROM leases WHERE organization_id = $1 AND work_date = $2 GROUP BY slot_id
  ) a GROUP BY slot_id
) r
FULL JOIN (SELECT * FROM daily_work_tracking WHERE organization_id = $1 AND work_date = $2) t USING (slot_id)
WHERE (coalesce(r.allocated, 0), coalesce(r.succeeded, 0), coalesce(r.failed, 0), coalesce(r.blocked, 0),
    coalesce(r.expired, 0), coalesce(r.released, 0))
  IS DISTINCT FROM (t.allocated, t.succeeded, t.failed, t.blocked, t.expired, t.released);

-- name: result_kept
-- Of the last $3 allocations of a day: those that ended with a result of which there is no row, and those said to be in
-- quarantine that are not. (A result that an operator discarded is in the audit log.) $1 organization, $2 day. Index:
-- primary keys.
SELECT count(*) FROM (
  SELECT allocation_key, status, recorded_at, quarantined FROM work_allocations
  WHERE organization_id = $1 AND work_date = $2 ORDER BY allocation_key DESC LIMIT $3
) a
-- OFFSET 0: one look-up for each, whatever is known of the tables.
WHERE (a.status IN (2, 3, 4) AND NOT EXISTS (SELECT FROM work_results r
    WHERE r.organization_id = $1 AND r.created_at = a.recorded_at AND r.allocation_key = a.allocation_key OFFSET 0))
  OR (a.quarantined AND NOT EXISTS (SELECT FROM quarantined_results q
    WHERE q.organization_id = $1 AND q.allocation_key = a.allocation_key OFFSET 0));

-- name: acknowledged_kept
-- Of the last $1 requests of the hour that were answered with leases: those of whose leases none is on record, neither
-- live nor ended. (Some may have been withdrawn before they were told of; with the last the request goes.) Over all
-- organizations, as the clock's work. Index: requests_created_at, primary keys.
SELECT count(*) FROM (
  SELECT organization_id, answer, (created_at AT TIME ZONE 'UTC')::date AS day FROM requests
  WHERE created_at > now() - interval '1 hour' AND method = 'AllocateWork' AND length(answer) >= 16
  ORDER BY created_at DESC LIMIT $1
) r
WHERE NOT EXISTS (
  SELECT FROM generate_series(1, length(r.answer) - 15, 16) AS at
  CROSS JOIN LATERAL (SELECT encode(substring(r.answer FROM at FOR 16), 'hex')::uuid AS key) k
  -- OFFSET 0 as above.
  WHERE EXISTS (SELECT FROM leases l WHERE (l.organization_id = r.organization_id) IS TRUE AND l.allocation_key = k.key
      OFFSET 0)
    OR EXISTS (SELECT FROM work_allocations a WHERE a.organization_id = r.organization_id
      AND a.work_date BETWEEN r.day - 1 AND r.day + 1 AND a.allocation_key = k.key OFFSET 0));

-- name: before_no_work
-- What is visible now, and what day it is. $1 organization. Index: primary key.
SELECT pg_current_snapshot()::text AS snapshot, extract(epoch FROM now())::double precision AS at,
  (now() AT TIME ZONE time_zone)::date AS work_date
FROM organizations WHERE organization_id = $1;

-- name: after_no_work
-- Slots whose day has had room since before the look: that very version of the row was visible then and still is, so it
-- had room all the while. A version is told by the transaction that wrote it; a row lock does not make a new one. Of each
-- class the 16 that opened first. $1 organization, $2 day, $3 target or NULL for any, $4 snapshot and $5 seconds of the
-- epoch from before. Index: daily_work_tracking_open.
SELECT count(*)
FROM slot_classes c
CROSS JOIN LATERAL (
  SELECT t.xmin::text::bigint AS version FROM daily_work_tracking t
  WHERE t.organization_id = $1 AND t.work_date = $2 AND t.class_id = c.class_id AND t.open_at <= $5
  ORDER BY t.open_at, t.slot_id LIMIT 16
) o
-- A row knows the lower 32 bits of its transaction's number.
CROSS JOIN LATERAL (SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS newest) n
CROSS JOIN LATERAL (SELECT (n.newest >> 32 << 32) + o.version AS whole) w
WHERE c.organization_id = $1 AND ($3::text IS NULL OR c.target = $3)
  AND pg_visible_in_snapshot((CASE WHEN w.whole >= n.newest THEN w.whole - (1::bigint << 32) ELSE w.whole END)::text::xid8,
    $4::text::pg_snapshot);
