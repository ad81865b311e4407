-- Live figures and allocations. All are bound to one organization.

-- name: totals
-- $1 organization.
WITH today AS MATERIALIZED (
  SELECT (now() AT TIME ZONE time_zone)::date AS work_date FROM organizations WHERE organization_id = $1
)
SELECT t.*, s.*, e.*, c.*, (SELECT work_date FROM today) AS work_date,
  (SELECT count(*) FROM leases WHERE organization_id = $1 AND expires_at > clock_timestamp()) AS leased,
  (SELECT count(*) FROM outbox WHERE organization_id = $1) AS check_ins_pending,
  (SELECT count(*) FROM quarantined_results WHERE organization_id = $1) AS quarantined
FROM (
  SELECT coalesce(sum(quota), 0)::bigint AS quota, coalesce(sum(allocated), 0)::bigint AS allocated,
    coalesce(sum(succeeded), 0)::bigint AS succeeded, coalesce(sum(failed), 0)::bigint AS failed,
    coalesce(sum(blocked), 0)::bigint AS blocked, coalesce(sum(expired), 0)::bigint AS expired,
    coalesce(sum(released), 0)::bigint AS released
  FROM daily_work_tracking WHERE organization_id = $1 AND work_date = (SELECT work_date FROM today)) t,
  (SELECT count(*) AS active_slots FROM work_slots WHERE organization_id = $1 AND is_active
    AND (SELECT work_date FROM today) BETWEEN start_date AND end_date) s,
  (SELECT count(*) FILTER (WHERE enabled) AS exits,
    coalesce(sum(use_count) FILTER (WHERE enabled), 0)::bigint AS exit_uses,
    coalesce(sum(cap) FILTER (WHERE enabled), 0)::bigint AS exit_capacity
  FROM exits_now($1)) e,
  (SELECT count(*) AS clients, count(*) FILTER (WHERE last_seen_at > now() - interval '10 minutes') AS clients_online
  FROM clients WHERE organization_id = $1) c;

-- name: page_of_allocations
-- Live leases and ended allocations of one day, newest first. $1 organization, $2 day, $3 status or NULL, $4 slot or
-- NULL, $5 before this key or NULL, $6 how many. Index: primary key of work_allocations backwards, leases_holder.
(SELECT allocation_key, slot_id, work_date, 1::smallint AS status, false AS late, client_id, instance_number, exit_id,
  persona_id, granted_at AS allocated_at, expires_at, NULL::timestamptz AS ended_at
FROM leases
WHERE organization_id = $1 AND work_date = $2 AND coalesce($3::smallint, 1) = 1
  AND ($4::uuid IS NULL OR slot_id = $4) AND ($5::uuid IS NULL OR allocation_key < $5)
ORDER BY allocation_key DESC LIMIT $6)
UNION ALL
(SELECT allocation_key, slot_id, work_date, status, late, client_id, instance_number, exit_id, persona_id, allocated_at,
  expires_at, ended_at
FROM work_allocations
WHERE organization_id = $1 AND work_date = $2 AND ($3::smallint IS NULL OR status = $3)
  AND ($4::uuid IS NULL OR slot_id = $4) AND ($5::uuid IS NULL OR allocation_key < $5)
ORDER BY allocation_key DESC LIMIT $6)
ORDER BY allocation_key DESC LIMIT $6;
