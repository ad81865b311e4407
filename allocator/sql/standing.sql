-- How slots and exits stand on the way to being handed out. Kinds are those of BlockerKind; 0 is a slot that nothing of
-- its own or its target's holds back. All but the last are bound to one organization
-- and read within one snapshot.

-- name: moment
-- The clock, the organization's next midnight, whether leases live whose units may come back, and whether a client is
-- told to drain. $1 organization, $2 client or ''. Index: leases_holder, primary keys.
SELECT now() AS now,
  (SELECT ((now() AT TIME ZONE time_zone)::date + 1)::timestamp AT TIME ZONE time_zone FROM organizations
    WHERE organization_id = $1) AS midnight,
  EXISTS (SELECT FROM leases WHERE organization_id = $1) AS leased,
  coalesce((SELECT draining FROM clients WHERE organization_id = $1 AND client_id = $2), false) AS draining;

-- name: plan_anew
-- For the rest of the transaction: a plan made for any target and region would expect few slots and compare each with
-- every target.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true);

-- name: groups_of_slots
-- Every slot, by the first thing that holds it back; those that nothing does by what they need besides. Looks at all
-- slots: for people. $1 organization, $2 slot or NULL, $3 target or NULL, $4 region or NULL. Index:
-- work_slots_organization, daily_work_tracking_slot.
WITH rooms AS MATERIALIZED (SELECT target, room FROM targets_now($1)),
stops AS MATERIALIZED (SELECT target, kind, until FROM stops_now($1))
SELECT kind, CASE WHEN kind = 0 THEN target ELSE '' END AS target, kind = 0 AND without_exit AS without_exit,
  CASE WHEN kind = 0 THEN exit_region ELSE '' END AS exit_region,
  CASE WHEN kind = 0 THEN exit_provider ELSE '' END AS exit_provider,
  CASE WHEN kind = 0 THEN coalesce(persona_need, '') ELSE '' END AS persona_need, count(*) AS slots,
  sum(CASE WHEN target = '' THEN least(open_units, room) ELSE open_units END)::bigint AS units,
  min(room) FILTER (WHERE target <> '') AS room,
  min(CASE WHEN kind = 10 THEN next_unit_at ELSE until END) AS until,
  -- Any five, and two: neither is worth sorting the slots.
  (array_agg(slot_id))[1:5] AS examples,
  array_remove(ARRAY[min(stopped) FILTER (WHERE kind > 10), max(stopped) FILTER (WHERE kind > 10)], NULL) AS targets
FROM (
  SELECT s.slot_id, s.target, s.without_exit, s.exit_region, s.exit_provider, s.persona_need, s.open_units,
    s.next_unit_at, r.room, h.until, h.target AS stopped,
    CASE WHEN NOT s.is_active THEN 2 WHEN NOT s.in_date THEN 3 WHEN s.taken >= s.quota THEN 4
      WHEN s.open_units <= 0 THEN 10 ELSE coalesce(h.kind, 0) END AS kind
  FROM slots_today($1) s
  CROSS JOIN LATERAL (SELECT CASE WHEN s.target = '' THEN 'slot:' || s.slot_id ELSE s.target END AS name) n
  LEFT JOIN stops h ON h.target = n.name
  LEFT JOIN rooms r ON r.target = n.name
  WHERE ($2::uuid IS NULL OR s.slot_id = $2) AND ($3::text IS NULL OR s.target = $3)
    AND ($4::text IS NULL OR s.exit_region IN ('', $4))
  -- Worked out once, not once for every use below.
  OFFSET 0
) g
GROUP BY 1, 2, 3, 4, 5, 6;

-- name: groups_of_classes
-- The same without counts, from one look into an index for each class of slots: for callers who find no work. Counts on
-- the day's rows standing. Slots that are held for themselves are looked at one by one, and passed over by a look into
-- a hash table where their class is looked at: there may be as many of them as slots.
-- $1 organization, $2 target or NULL, $3 region or NULL. Index: daily_work_tracking_open, work_slots_class,
-- daily_work_tracking_slot.
WITH today AS MATERIALIZED (
  SELECT (now() AT TIME ZONE time_zone)::date AS work_date, extract(epoch FROM now())::double precision AS now
  FROM organizations WHERE organization_id = $1
),
stops AS MATERIALIZED (SELECT target, kind, until FROM stops_now($1)),
classes AS MATERIALIZED (
  SELECT class_id, target, without_exit, exit_region, exit_provider, persona_need FROM slot_classes
  WHERE organization_id = $1 AND ($2::text IS NULL OR target = $2) AND ($3::text IS NULL OR exit_region IN ('', $3))
),
apart AS MATERIALIZED (
  SELECT target, kind, until,
    CASE WHEN target ~ '^slot:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN substr(target, 6)::uuid END AS slot_id
  FROM stops WHERE target LIKE 'slot:%'
),
apart_today AS MATERIALIZED (
  SELECT a.target, a.kind, a.until, t.class_id, t.open_at
  FROM apart a
  CROSS JOIN LATERAL (
    SELECT t.class_id, t.open_at FROM daily_work_tracking t
    WHERE t.organization_id = $1 AND t.work_date = (SELECT work_date FROM today) AND t.slot_id = a.slot_id
      AND t.open_at IS NOT NULL
    OFFSET 0
  ) t
),
opened AS MATERIALIZED (
  SELECT c.*, (
    SELECT t.open_at FROM daily_work_tracking t
    WHERE t.organization_id = $1 AND t.work_date = (SELECT work_date FROM today) AND t.class_id = c.class_id
      AND t.open_at IS NOT NULL AND t.slot_id NOT IN (SELECT a.slot_id FROM apart a WHERE a.slot_id IS NOT NULL)
    ORDER BY t.open_at LIMIT 1) AS open_at
  FROM classes c
)
SELECT kind, CASE WHEN kind = 0 THEN target ELSE '' END AS target, kind = 0 AND without_exit AS without_exit,
  CASE WHEN kind = 0 THEN exit_region ELSE '' END AS exit_region,
  CASE WHEN kind = 0 THEN exit_provider ELSE '' END AS exit_provider,
  CASE WHEN kind = 0 THEN persona_need ELSE '' END AS persona_need, count(*) AS slots, 0::bigint AS units,
  NULL::bigint AS room, min(until) AS until, NULL::uuid[] AS examples,
  array_remove(ARRAY[min(stopped), max(stopped)], NULL) AS targets
FROM (
  SELECT CASE WHEN c.open_at > y.now THEN 10 ELSE coalesce(h.kind, 0) END AS kind, c.target, c.without_exit,
    c.exit_region, c.exit_provider, c.persona_need,
    CASE WHEN c.open_at > y.now THEN to_timestamp(c.open_at) ELSE h.until END AS until,
    CASE WHEN c.open_at <= y.now THEN h.target END AS stopped
  FROM today y
  CROSS JOIN opened c
  LEFT JOIN stops h ON h.target = c.target
  WHERE c.open_at IS NOT NULL
  UNION ALL
  SELECT CASE WHEN t.open_at > y.now THEN 10 ELSE t.kind END, '', c.without_exit, c.exit_region, c.exit_provider,
    c.persona_need, CASE WHEN t.open_at > y.now THEN to_timestamp(t.open_at) ELSE t.until END,
    CASE WHEN t.open_at <= y.now THEN t.target END
  FROM today y
  CROSS JOIN apart_today t
  JOIN classes c ON c.class_id = t.class_id AND c.target = ''
  UNION ALL
  -- Of the classes without an open slot only the nearest step counts, so the first that reaches it will do. The order
  -- is the index's own.
  SELECT CASE
      WHEN EXISTS (SELECT FROM opened c CROSS JOIN LATERAL (SELECT FROM work_slots s WHERE s.class_id = c.class_id
        AND s.is_active AND s.end_date >= y.work_date AND s.start_date <= y.work_date
        ORDER BY s.end_date DESC LIMIT 1) s
        WHERE c.open_at IS NULL) THEN 4
      WHEN EXISTS (SELECT FROM opened c CROSS JOIN LATERAL (SELECT FROM work_slots s WHERE s.class_id = c.class_id
        AND s.is_active ORDER BY s.end_date DESC LIMIT 1) s WHERE c.open_at IS NULL) THEN 3
      WHEN EXISTS (SELECT FROM opened c CROSS JOIN LATERAL (SELECT FROM work_slots s WHERE s.class_id = c.class_id
        ORDER BY s.is_active, s.end_date LIMIT 1) s WHERE c.open_at IS NULL) THEN 2 END,
    '', false, '', '', '', NULL, NULL
  FROM today y
  OFFSET 0
) g
WHERE kind IS NOT NULL
GROUP BY 1, 2, 3, 4, 5, 6;

-- name: standing_of_slot
-- One slot, with everything that may hold it back. A target may hold it back in several ways at once, so `room` does
-- not say whether its probe is out. $1 organization, $2 slot. Index: primary keys, daily_work_tracking_slot.
SELECT s.slot_id, s.target, s.is_active, s.in_date, s.taken, s.quota, s.open_units, s.next_unit_at, s.without_exit,
  s.exit_region, s.exit_provider, coalesce(s.persona_need, '') AS persona_need, r.room,
  CASE WHEN r.blocked_until > now() THEN r.blocked_until END AS held_until, coalesce(r.is_paused, false) AS is_paused,
  CASE WHEN r.probe_at > now() THEN r.probe_at END AS probe_at,
  EXISTS (SELECT FROM targets t JOIN leases l ON l.allocation_key = t.probe_key
    WHERE t.organization_id = $1 AND t.target = r.target AND l.organization_id = $1 AND l.expires_at > now())
    AS probe_is_out,
  CASE WHEN r.delay_ms > 0 AND r.next_at > now() THEN r.next_at END AS next_at,
  coalesce(r.in_flight >= r.max_in_flight, false) AS is_full, coalesce(r.reason, '') AS reason
FROM slots_today($1) s
LEFT JOIN targets_now($1) r ON r.target = CASE WHEN s.target = '' THEN 'slot:' || s.slot_id ELSE s.target END
WHERE s.slot_id = $2;

-- name: exits_by_region
-- Pooled exits. `until` is the next end of a window that has no room. $1 organization, $2 region or NULL. At most a few
-- hundred rows are read. Index: exits_endpoint.
SELECT n.region, count(*) AS exits, count(*) FILTER (WHERE n.enabled) AS enabled,
  count(*) FILTER (WHERE n.enabled AND n.room > 0) AS usable,
  coalesce(sum(n.room) FILTER (WHERE n.enabled AND n.room > 0), 0)::bigint AS room,
  min(n.window_ends_at) FILTER (WHERE n.enabled AND n.room <= 0 AND n.cap_mode = 3) AS until,
  (array_agg(n.exit_id ORDER BY n.exit_id) FILTER (WHERE NOT n.enabled))[1:5] AS disabled,
  (array_agg(n.exit_id ORDER BY n.exit_id) FILTER (WHERE n.enabled AND n.room <= 0))[1:5] AS exhausted
FROM exits_now($1) n
WHERE $2::text IS NULL OR n.region = $2
GROUP BY n.region;

-- name: cooling_by_target
-- Exits with room that cool down, by target and region. $1 organization, $2 region or NULL. Index: primary keys.
SELECT h.target, n.region, count(*) AS exits, sum(n.room)::bigint AS room, min(h.cooling_until) AS until,
  (array_agg(n.exit_id ORDER BY n.exit_id))[1:5] AS examples
FROM exit_health h JOIN exits_now($1) n ON n.exit_id = h.exit_id
WHERE h.organization_id = $1 AND h.cooling_until > now() AND n.enabled AND n.room > 0
  AND ($2::text IS NULL OR n.region = $2)
GROUP BY h.target, n.region;

-- name: open_units_of_classes
-- As groups_of_classes for slots that may go out now, with their units: of about $2 slots at most, so that the cost
-- does not grow with the number of slots. The classes with such slots share them evenly, and what small classes leave
-- goes evenly to the others. Slots that are held for themselves add nothing.
-- $1 organization. Index: daily_work_tracking_open.
WITH today AS MATERIALIZED (
  SELECT (now() AT TIME ZONE time_zone)::date AS work_date, extract(epoch FROM now())::double precision AS now
  FROM organizations WHERE organization_id = $1
),
rooms AS MATERIALIZED (SELECT target, room FROM targets_now($1)),
opened AS MATERIALIZED (
  SELECT c.class_id, c.target, c.without_exit, c.exit_region, c.exit_provider, c.persona_need
  FROM today y
  CROSS JOIN slot_classes c
  CROSS JOIN LATERAL (
    SELECT FROM daily_work_tracking t
    WHERE t.organization_id = $1 AND t.work_date = (SELECT work_date FROM today) AND t.class_id = c.class_id
      AND t.open_at <= y.now
    ORDER BY t.open_at LIMIT 1
  ) o
  WHERE c.organization_id = $1
),
even AS MATERIALIZED (SELECT $2::bigint / greatest(1, count(*)) + 1 AS share FROM opened),
sizes AS MATERIALIZED (
  SELECT s.slots
  FROM today y
  CROSS JOIN opened c
  CROSS JOIN LATERAL (
    SELECT count(*) AS slots FROM (
      SELECT FROM daily_work_tracking t
      WHERE t.organization_id = $1 AND t.work_date = (SELECT work_date FROM today) AND t.class_id = c.class_id
        AND t.open_at <= y.now
      ORDER BY t.open_at LIMIT (SELECT share FROM even)
    ) o
  ) s
),
-- Of a class that fills its even share.
shares AS MATERIALIZED (
  SELECT ($2 - coalesce(sum(s.slots) FILTER (WHERE s.slots < e.share), 0)::bigint)
    / greatest(1, count(*) FILTER (WHERE s.slots >= e.share)) + 1 AS share
  FROM even e CROSS JOIN sizes s
)
SELECT 0 AS kind, c.target, c.without_exit, c.exit_region, c.exit_provider, c.persona_need, f.slots, f.units,
  (SELECT r.room FROM rooms r WHERE r.target = c.target) AS room, NULL::timestamptz AS until, NULL::uuid[] AS examples,
  NULL::text[] AS targets
FROM today y
CROSS JOIN opened c
CROSS JOIN LATERAL (
  SELECT count(*) AS slots,
    coalesce(sum(least(open_units(o.quota, o.taken, o.paced_from, o.paced_seconds, y.now), r.room)), 0)::bigint AS units
  FROM (
    SELECT t.slot_id, t.quota, t.allocated - t.expired - t.released AS taken, t.paced_from, t.paced_seconds
    FROM daily_work_tracking t
    WHERE t.organization_id = $1 AND t.work_date = (SELECT work_date FROM today) AND t.class_id = c.class_id
      AND t.open_at <= y.now
    ORDER BY t.open_at, t.slot_id LIMIT (SELECT share FROM shares)
  ) o
  LEFT JOIN rooms r ON c.target = '' AND r.target = 'slot:' || o.slot_id
) f
WHERE f.units > 0;

-- name: organizations
-- All of them. Index: primary key.
SELECT organization_id FROM organizations ORDER BY organization_id;
