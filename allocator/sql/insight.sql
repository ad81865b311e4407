-- Reports and explanations. All are bound to one organization.

-- name: slot_standing
-- How far slots come: counts at every step of slots_today, with examples. $1 organization, $2 slot or NULL, $3 target or
-- NULL. Index: work_slots_organization, primary key of daily_work_tracking.
SELECT count(*) AS slots,
  count(*) FILTER (WHERE is_active) AS active,
  count(*) FILTER (WHERE is_active AND in_date) AS eligible,
  count(*) FILTER (WHERE is_active AND in_date AND taken < quota) AS with_room,
  coalesce(sum(quota - taken) FILTER (WHERE is_active AND in_date AND taken < quota AND without_exit), 0)::bigint
    AS units_without_exit,
  coalesce(sum(quota - taken) FILTER (WHERE is_active AND in_date AND taken < quota AND NOT without_exit), 0)::bigint
    AS units_with_exit,
  count(*) FILTER (WHERE NOT without_exit) AS slots_with_exit,
  (array_agg(slot_id ORDER BY slot_id) FILTER (WHERE NOT is_active))[1:5] AS inactive_examples,
  (array_agg(slot_id ORDER BY slot_id) FILTER (WHERE is_active AND NOT in_date))[1:5] AS out_of_date_examples,
  (array_agg(slot_id ORDER BY slot_id) FILTER (WHERE is_active AND in_date AND taken >= quota))[1:5]
    AS exhausted_examples
FROM slots_today($1)
WHERE ($2::uuid IS NULL OR slot_id = $2) AND ($3::text IS NULL OR target = $3);

-- name: exit_standing
-- Likewise for exits_now. $1 organization, $2 region or NULL.
SELECT count(*) AS exits,
  count(*) FILTER (WHERE enabled) AS enabled,
  coalesce(sum(room) FILTER (WHERE enabled AND room > 0), 0)::bigint AS room,
  (array_agg(exit_id ORDER BY exit_id) FILTER (WHERE NOT enabled))[1:5] AS disabled_examples,
  (array_agg(exit_id ORDER BY exit_id) FILTER (WHERE enabled AND room <= 0))[1:5] AS exhausted_examples
FROM exits_now($1)
WHERE $2::text IS NULL OR region = $2;

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

-- name: page_of_dashboard
-- By completion, highest first; the rate is compared in whole millionths, so that pages meet exactly. $1 organization,
-- $2 day or NULL for today, $3 after this rate or NULL, $4 and slot, $5 how many. Index: primary keys.
SELECT slot_id, keyword, work_date, quota, allocated, succeeded, failed, blocked, expired, released, rate
FROM (
  SELECT t.*, s.keyword, ((t.succeeded + t.failed + t.blocked)::bigint * 1000000 / t.quota) AS rate
  FROM daily_work_tracking t JOIN work_slots s ON s.organization_id = $1 AND s.slot_id = t.slot_id
  WHERE t.organization_id = $1 AND t.work_date = coalesce($2::date,
    (SELECT (now() AT TIME ZONE time_zone)::date FROM organizations WHERE organization_id = $1))
) d
WHERE $3::bigint IS NULL OR rate < $3 OR (rate = $3 AND slot_id > $4::uuid)
ORDER BY rate DESC, slot_id LIMIT $5;

-- name: page_of_allocations
-- Live leases and ended allocations of one day, newest first. $1 organization, $2 day or NULL for today, $3 status or
-- NULL, $4 slot or NULL, $5 before this key or NULL, $6 how many. Index: primary key of work_allocations backwards,
-- leases_holder.
WITH day AS MATERIALIZED (
  SELECT coalesce($2::date, (now() AT TIME ZONE time_zone)::date) AS work_date FROM organizations
  WHERE organization_id = $1
)
(SELECT allocation_key, slot_id, work_date, 1::smallint AS status, false AS late, client_id, instance_number, exit_id,
  persona_id, granted_at AS allocated_at, expires_at, NULL::timestamptz AS ended_at
FROM leases
WHERE organization_id = $1 AND work_date = (SELECT work_date FROM day) AND coalesce($3::smallint, 1) = 1
  AND ($4::uuid IS NULL OR slot_id = $4) AND ($5::uuid IS NULL OR allocation_key < $5)
ORDER BY allocation_key DESC LIMIT $6)
UNION ALL
(SELECT allocation_key, slot_id, work_date, status, late, client_id, instance_number, exit_id, persona_id, allocated_at,
  expires_at, ended_at
FROM work_allocations
WHERE organization_id = $1 AND work_date = (SELECT work_date FROM day) AND ($3::smallint IS NULL OR status = $3)
  AND ($4::uuid IS NULL OR slot_id = $4) AND ($5::uuid IS NULL OR allocation_key < $5)
ORDER BY allocation_key DESC LIMIT $6)
ORDER BY allocation_key DESC LIMIT $6;
