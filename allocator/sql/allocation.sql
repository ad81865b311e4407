-- What AllocateWork runs. All are bound to one organization. Rows are locked in the order targets (by name),
-- daily_work_tracking (by slot), exits (by id); leases and the ids of requests are written last, each in order.

-- name: moment
-- The work date, and whether every slot has its row of it. $1 organization. Index: primary keys.
SELECT d.work_date, coalesce((SELECT t.complete FROM tracked_days t
  WHERE t.organization_id = $1 AND t.work_date = d.work_date), false) AS complete
FROM (SELECT (now() AT TIME ZONE o.time_zone)::date AS work_date FROM organizations o WHERE o.organization_id = $1) d;

-- name: classes
-- The classes of slots, the greatest priority first. Few, and never changed. $1 organization. Index:
-- slot_classes_organization_id_class_sha256_key.
SELECT class_id, target, priority, without_exit, exit_region, exit_provider, persona_need
FROM slot_classes WHERE organization_id = $1
ORDER BY priority DESC, class_id;

-- name: plan_windows
-- For the transaction in hand: the next statement must walk its index in order and stop, even where statistics of a new
-- day make it look cheaper to read a class whole.
SELECT set_config('enable_bitmapscan', 'off', true), set_config('enable_sort', 'off', true);

-- name: windows
-- Of each class up to so many slots with units for now, from a place on and round again. $1 organization, $2 work date,
-- $3 classes, $4 and $5 the places (open_at, slot), $6 how many of each. Index: daily_work_tracking_open, primary key of
-- work_slots.
SELECT c.class_id, w.slot_id, w.open_at, w.quota, w.taken, w.units, w.place,
  (SELECT s.weight FROM work_slots s WHERE s.slot_id = w.slot_id) AS weight
FROM unnest($3::integer[], $4::float8[], $5::uuid[]) AS c (class_id, at, slot)
CROSS JOIN LATERAL (
  SELECT o.slot_id, o.open_at, o.quota, o.allocated - o.expired - o.released AS taken,
    open_units(o.quota, o.allocated - o.expired - o.released, o.paced_from, o.paced_seconds,
      extract(epoch FROM statement_timestamp())::float8) AS units, o.place
  FROM (
    (SELECT t.slot_id, t.open_at, t.quota, t.allocated, t.expired, t.released, t.paced_from, t.paced_seconds,
      t.ctid AS place
    FROM daily_work_tracking t
    WHERE t.organization_id = $1 AND t.work_date = $2 AND t.class_id = c.class_id
      AND t.open_at <= extract(epoch FROM statement_timestamp())::float8 AND (t.open_at, t.slot_id) > (c.at, c.slot)
    ORDER BY t.open_at, t.slot_id LIMIT $6)
    UNION ALL
    (SELECT t.slot_id, t.open_at, t.quota, t.allocated, t.expired, t.released, t.paced_from, t.paced_seconds,
      t.ctid AS place
    FROM daily_work_tracking t
    WHERE t.organization_id = $1 AND t.work_date = $2 AND t.class_id = c.class_id
      AND t.open_at <= extract(epoch FROM statement_timestamp())::float8 AND (t.open_at, t.slot_id) <= (c.at, c.slot)
    ORDER BY t.open_at, t.slot_id LIMIT $6)
  ) o
  LIMIT $6
) w;

-- name: keywords
-- $1 organization, $2 slots. Index: primary key.
SELECT slot_id, keyword FROM work_slots WHERE organization_id = $1 AND slot_id = ANY ($2::uuid[]);

-- name: exits_with_room
-- $1 organization. Index: exits_endpoint.
SELECT exit_id, region, cap, use_count FROM exits_now($1) WHERE enabled AND room > 0 ORDER BY exit_id;

-- name: draining_clients
-- $1 organization. Index: primary key of clients.
SELECT client_id FROM clients WHERE organization_id = $1 AND draining;

-- name: cooling_exits
-- Few rows. $1 organization. Index: primary key.
SELECT target, exit_id FROM exit_health WHERE organization_id = $1 AND cooling_until > now();

-- name: limited_targets
-- Few rows. $1 organization. Index: primary key; leases_target.
SELECT target, room FROM targets_now($1) WHERE room IS NOT NULL;

-- name: begin_day
-- $1 organization, $2 work date or NULL for today. Index: primary keys.
INSERT INTO tracked_days AS d (organization_id, work_date)
SELECT o.organization_id, coalesce($2::date, (now() AT TIME ZONE o.time_zone)::date)
FROM organizations o WHERE o.organization_id = $1
ON CONFLICT (organization_id, work_date) DO NOTHING;

-- name: lock_day
-- Before the slots of a piece are looked at, so that none is made or changed meanwhile. $1 organization, $2 work date or
-- NULL for today. Index: primary key.
SELECT d.work_date, d.tracked_to, d.complete FROM tracked_days d
WHERE d.organization_id = $1 AND d.work_date = coalesce($2::date,
  (SELECT (now() AT TIME ZONE o.time_zone)::date FROM organizations o WHERE o.organization_id = $1))
FOR UPDATE;

-- name: next_slots
-- The slots of the next piece of a day. $1 organization, $2 the last slot of the piece before, $3 how many. Index:
-- work_slots_active.
SELECT slot_id FROM work_slots WHERE organization_id = $1 AND is_active AND slot_id > $2 ORDER BY slot_id LIMIT $3;

-- name: track_slots
-- Makes the rows of slots for a day that is locked, and notes how far it is. $1 organization, $2 work date, $3 slots,
-- $4 the last slot looked at, $5 whether there are no more. Index: primary keys; daily_work_tracking_slot.
WITH made AS (
  SELECT track_slots($1, $2, $3::uuid[])
)
UPDATE tracked_days d SET tracked_to = $4, complete = $5
FROM made
WHERE d.organization_id = $1 AND d.work_date = $2;

-- name: begin_batch
-- Requests that are on record, and the targets that may hold something back, locked by name. $1 organization, $2 ids of
-- requests, $3 targets. Index: primary keys.
SELECT r.request_id, r.request_sha256, r.answer, NULL::text AS target FROM requests r
WHERE r.organization_id = $1 AND r.method = 'AllocateWork' AND r.request_id = ANY ($2::uuid[])
UNION ALL
SELECT NULL, NULL, NULL, l.target FROM (
  SELECT t.target FROM targets t
  WHERE t.organization_id = $1 AND t.target = ANY ($3::text[])
  ORDER BY t.target FOR UPDATE) l;

-- name: room_of_targets
-- What locked targets let out at this moment; one without a limit is missing. $1 organization, $2 targets. Index:
-- primary key; leases_target.
SELECT target, room FROM targets_now($1) WHERE target = ANY ($2::text[]) AND room IS NOT NULL;

-- name: note_targets
-- Notes on locked targets what went out: the probe of one that is paused, and the next moment of one with a delay.
-- $1 organization, $2 targets, $3 a key of each. Index: primary key.
UPDATE targets t
SET probe_key = CASE WHEN t.paused_at IS NOT NULL THEN u.key ELSE t.probe_key END,
  next_at = CASE WHEN greatest(t.min_delay_ms, t.crawl_delay_ms) > 0
    THEN statement_timestamp() + greatest(t.min_delay_ms, t.crawl_delay_ms) * interval '1 millisecond'
    ELSE t.next_at END
FROM unnest($2::text[], $3::uuid[]) AS u (target, key)
WHERE t.organization_id = $1 AND t.target = u.target
  AND (t.paused_at IS NOT NULL OR greatest(t.min_delay_ms, t.crawl_delay_ms) > 0);

-- name: reserve_slots
-- Takes up to the asked units of each slot, as many as are open now, under row locks in key order; a slot that is in
-- another class by now is passed over, and a work date that has passed gives nothing. A row is looked for where it was
-- last seen, so that versions which nobody may remove yet are not walked through, and else by the index. $1 organization,
-- $2 work date, $3 slots, $4 their classes, $5 units, $6 places, each NULL when not known. Index:
-- daily_work_tracking_slot, primary key of work_slots.
-- What a constraint looks at is set from the locked row: PostgreSQL checks constraints on the version that the statement
-- began with, before it finds that the row has moved on.
WITH granted AS MATERIALIZED (
  SELECT u.slot_id, l.place, l.is_there, l.quota, l.allocated, l.expired, l.released, least(u.units, open_units(l.quota,
    l.allocated - l.expired - l.released, l.paced_from, l.paced_seconds,
    extract(epoch FROM clock_timestamp())::float8)) AS units, s.keyword, s.code, s.settings
  FROM (
    SELECT a.slot_id, a.class_id, a.units, a.place
    FROM unnest($3::uuid[], $4::integer[], $5::integer[], $6::tid[]) AS a (slot_id, class_id, units, place)
    ORDER BY a.slot_id
  ) u
  CROSS JOIN LATERAL (
    SELECT * FROM (
      SELECT t.ctid AS place, true AS is_there, t.quota, t.allocated, t.expired, t.released, t.paced_from,
        t.paced_seconds, t.class_id, t.active
      FROM daily_work_tracking t
      WHERE t.ctid = u.place AND t.organization_id = $1 AND t.work_date = $2 AND t.slot_id = u.slot_id
      FOR UPDATE) there
    UNION ALL
    SELECT * FROM (
      SELECT t.ctid, false, t.quota, t.allocated, t.expired, t.released, t.paced_from, t.paced_seconds, t.class_id,
        t.active
      FROM daily_work_tracking t
      WHERE t.organization_id = $1 AND t.work_date = $2 AND t.slot_id = u.slot_id
      FOR UPDATE) elsewhere
    LIMIT 1
  ) l
  JOIN work_slots s ON s.slot_id = u.slot_id
  WHERE (SELECT (now() AT TIME ZONE o.time_zone)::date FROM organizations o WHERE o.organization_id = $1) = $2
    AND l.class_id = u.class_id AND l.active
), there AS (
  UPDATE daily_work_tracking t
  SET quota = g.quota, allocated = g.allocated + g.units, expired = g.expired, released = g.released
  FROM granted g
  -- As an array the places are gone to; as a join alone all rows of the day would be read.
  WHERE t.ctid = ANY (ARRAY(SELECT p.place FROM granted p WHERE p.is_there)) AND t.work_date = $2
    AND g.is_there AND t.ctid = g.place AND g.units > 0
  RETURNING g.slot_id, g.units, g.keyword, g.code, g.settings
), elsewhere AS (
  UPDATE daily_work_tracking t
  SET quota = g.quota, allocated = g.allocated + g.units, expired = g.expired, released = g.released
  FROM granted g
  WHERE NOT g.is_there AND t.organization_id = $1 AND t.work_date = $2 AND t.slot_id = g.slot_id AND g.units > 0
    AND EXISTS (SELECT FROM granted m WHERE NOT m.is_there)
  RETURNING g.slot_id, g.units, g.keyword, g.code, g.settings
)
SELECT * FROM there UNION ALL SELECT * FROM elsewhere;

-- name: return_slots
-- Takes back units reserved in this transaction, which nobody has seen. $1 organization, $2 work date, $3 slots,
-- $4 units. Index: daily_work_tracking_slot.
UPDATE daily_work_tracking t SET allocated = t.allocated - u.units
FROM unnest($3::uuid[], $4::integer[]) AS u (slot_id, units)
WHERE t.organization_id = $1 AND t.work_date = $2 AND t.slot_id = u.slot_id;

-- name: reserve_exits
-- Takes up to the asked uses of each exit, as many as its cap leaves, under row locks in key order; the predicates are
-- those of exits_now, and the first use after a window has ended begins the next; an exit that has moved to another region
-- since it was proposed gives none. A row is looked for where it was last seen, so that versions which nobody may remove
-- yet are not walked through, and else by the index. $1 organization, $2 exits, $3 uses, $4 places, each NULL when not
-- known, $5 regions. Index: exits_exit_id. What a constraint looks at is set from the locked row, as in reserve_slots.
WITH granted AS MATERIALIZED (
  SELECT u.exit_id, l.place, l.is_there, l.cap, l.cap_mode, l.window_seconds, c.counted,
    least(u.uses, l.cap - c.counted) AS uses, l.toggle_epoch + w.restarts::integer AS toggle_epoch,
    CASE WHEN w.restarts THEN now() + l.window_seconds * interval '1 second' ELSE l.window_ends_at END AS window_ends_at
  FROM (
    SELECT a.exit_id, a.uses, a.place, a.region
    FROM unnest($2::uuid[], $3::integer[], $4::tid[], $5::text[]) AS a (exit_id, uses, place, region)
    ORDER BY a.exit_id
  ) u
  CROSS JOIN LATERAL (
    SELECT * FROM (
      SELECT e.ctid AS place, true AS is_there, e.enabled, e.region, e.cap, e.use_count, e.cap_mode, e.toggle_epoch,
        e.window_seconds, e.window_ends_at
      FROM exits e
      WHERE e.ctid = u.place AND e.exit_id = u.exit_id AND e.organization_id = $1
      FOR UPDATE) there
    UNION ALL
    SELECT * FROM (
      SELECT e.ctid, false, e.enabled, e.region, e.cap, e.use_count, e.cap_mode, e.toggle_epoch, e.window_seconds,
        e.window_ends_at
      FROM exits e
      WHERE e.exit_id = u.exit_id AND e.organization_id = $1
      FOR UPDATE) elsewhere
    LIMIT 1
  ) l
  CROSS JOIN LATERAL (SELECT l.cap_mode = 3 AND l.window_ends_at <= now() AS restarts) w
  CROSS JOIN LATERAL (SELECT CASE WHEN w.restarts THEN 0 ELSE l.use_count END AS counted) c
  WHERE l.enabled AND l.region = u.region
), there AS (
  UPDATE exits e
  SET use_count = g.counted + g.uses, cap = g.cap, cap_mode = g.cap_mode, window_seconds = g.window_seconds,
    toggle_epoch = g.toggle_epoch, window_ends_at = g.window_ends_at
  FROM granted g
  -- As an array the places are gone to; as a join alone all exits would be read. The rows are locked, so they are still
  -- the organization's exits that were asked for; any column more would let an index in.
  WHERE e.ctid = ANY (ARRAY(SELECT p.place FROM granted p WHERE p.is_there))
    AND g.is_there AND e.ctid = g.place AND g.uses > 0
  RETURNING e.exit_id, g.uses, e.endpoint, e.region, e.toggle_epoch, e.cap_mode, e.ctid
), elsewhere AS (
  UPDATE exits e
  SET use_count = g.counted + g.uses, cap = g.cap, cap_mode = g.cap_mode, window_seconds = g.window_seconds,
    toggle_epoch = g.toggle_epoch, window_ends_at = g.window_ends_at
  FROM granted g
  -- Whether there are any is asked first: most times none has moved, and nothing is read.
  WHERE NOT g.is_there AND e.organization_id = $1 AND e.exit_id = g.exit_id AND g.uses > 0
    AND EXISTS (SELECT FROM granted m WHERE NOT m.is_there)
  RETURNING e.exit_id, g.uses, e.endpoint, e.region, e.toggle_epoch, e.cap_mode, e.ctid
)
SELECT * FROM there UNION ALL SELECT * FROM elsewhere;

-- name: grant_leases
-- Writes the leases and the answers of their requests. $1 organization, $2 work date, then of each lease, as texts of
-- arrays, since a driver that encodes their elements one by one takes longer: $3 keys, $4 tokens, $5 slots, $6 clients,
-- $7 instances; as empty arrays if none has one, with NULL where one has not: $8 targets, $9 exits, $10 exit epochs,
-- $11 whether their uses return, $12 providers, $13 persona needs, $14 traceparents. $15 duration and $16 greatest age
-- in seconds, $17 requests in order, $18 their digests, $19 their answers. Returns the times of the leases and how many
-- requests were new, one row; fewer than given means that another transaction served one of them meanwhile.
WITH clock AS (
  SELECT statement_timestamp() AS granted_at,
    statement_timestamp() + $15::float8 * interval '1 second' AS expires_at,
    statement_timestamp() + $16::float8 * interval '1 second' AS renewable_until
), granted AS (
  INSERT INTO leases (allocation_key, organization_id, lease_token, work_date, slot_id, target, exit_id, exit_epoch,
    exit_returns, exit_provider, client_id, instance_number, persona_need, traceparent, granted_at, expires_at,
    renewable_until, sweep_at)
  SELECT u.key, $1, u.token, $2, u.slot_id, coalesce(u.target, ''), u.exit_id, u.exit_epoch,
    coalesce(u.exit_returns, false), coalesce(u.exit_provider, ''), u.client_id, u.instance_number, u.need, u.trace,
    c.granted_at, c.expires_at, c.renewable_until, c.expires_at
  FROM clock c, unnest($3::text::uuid[], $4::text::uuid[], $5::text::uuid[], $6::text::text[], $7::text::integer[],
    $8::text::text[], $9::text::uuid[], $10::text::integer[], $11::text::boolean[], $12::text::text[],
    $13::text::text[], $14::text::text[])
    AS u (key, token, slot_id, client_id, instance_number, target, exit_id, exit_epoch, exit_returns, exit_provider,
      need, trace)
), answered AS (
  INSERT INTO requests (organization_id, method, request_id, request_sha256, answer)
  SELECT $1, 'AllocateWork', a.request_id, a.digest, a.answer
  FROM unnest($17::uuid[], $18::bytea[], $19::bytea[]) AS a (request_id, digest, answer)
  ON CONFLICT (organization_id, method, request_id) DO NOTHING
  RETURNING request_id
)
SELECT expires_at, renewable_until, (SELECT count(*) FROM answered) AS answered FROM clock;

-- name: live_leases
-- What the packages of live leases are made of, for a retry. $1 organization, $2 keys. Index: primary keys;
-- exits_exit_id.
SELECT l.allocation_key, l.lease_token, l.work_date, l.slot_id, l.expires_at, l.renewable_until, l.persona_need,
  l.persona_id, l.persona_token, l.persona_generation, l.traceparent, l.exit_provider, l.exit_ip, s.keyword, s.code, s.target,
  s.settings, s.exit_region, l.exit_id, e.endpoint, e.region
FROM leases l
JOIN work_slots s ON s.organization_id = $1 AND s.slot_id = l.slot_id
LEFT JOIN exits e ON e.organization_id = $1 AND e.exit_id = l.exit_id
WHERE (l.organization_id = $1) IS TRUE AND l.allocation_key = ANY ($2::uuid[]) AND l.expires_at > clock_timestamp()
ORDER BY l.allocation_key;

-- name: attach_personas
-- Notes the check-outs on their leases; a lease that ended meanwhile has no row. $1 organization, $2 keys, $3 personas,
-- $4 tokens, $5 generations. Index: primary key of leases.
UPDATE leases l SET persona_id = u.persona_id, persona_token = u.token, persona_generation = u.generation
FROM unnest($2::uuid[], $3::uuid[], $4::bytea[], $5::bigint[]) AS u (key, persona_id, token, generation)
WHERE (l.organization_id = $1) IS TRUE AND l.allocation_key = ANY (ARRAY[u.key])
RETURNING l.allocation_key;
