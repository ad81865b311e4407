-- What AllocateWork runs. All are bound to one organization.

-- name: slots_with_room
-- Slots to propose: the best first. $1 organization, $2 target or NULL for any, $3 only slots without exit,
-- $4 persona needs to leave out ('*' for all), $5 how many. Index: work_slots_organization, primary key of daily_work_tracking.
SELECT slot_id, priority, weight, quota, taken, tracked, without_exit, coalesce(persona_need, '') AS persona_need
FROM slots_today($1)
WHERE is_active AND in_date AND taken < quota
  AND ($2::text IS NULL OR target = $2)
  AND (NOT $3 OR without_exit)
  AND (persona_need IS NULL OR NOT (persona_need = ANY ($4::text[]) OR '*' = ANY ($4::text[])))
ORDER BY priority DESC, taken::float8 / quota / weight, slot_id
LIMIT $5;

-- name: exits_with_room
-- $1 organization. Index: exits_organization_id_endpoint_key.
SELECT exit_id, region, cap, use_count FROM exits_now($1) WHERE enabled AND room > 0;

-- name: draining_clients
-- $1 organization. Index: primary key of clients.
SELECT client_id FROM clients WHERE organization_id = $1 AND draining;

-- name: ensure_tracking
-- Makes today's rows of slots that have none. $1 organization, $2 slot ids, or NULL for all. Index: primary keys.
SELECT track_slots($1, (now() AT TIME ZONE o.time_zone)::date, coalesce($2::uuid[],
  ARRAY(SELECT s.slot_id FROM work_slots s WHERE s.organization_id = $1 AND s.is_active)))
FROM organizations o WHERE o.organization_id = $1;

-- name: claim_requests
-- Claims request ids and returns the fresh ones; waits while another transaction holds one. $1 organization, $2 ids in
-- order, $3 their digests. Index: primary key.
INSERT INTO requests (organization_id, method, request_id, request_sha256)
SELECT $1, 'AllocateWork', u.request_id, u.digest FROM unnest($2::uuid[], $3::bytea[]) AS u (request_id, digest)
ON CONFLICT (organization_id, method, request_id) DO NOTHING
RETURNING request_id;

-- name: find_requests
-- Requests on record. $1 organization, $2 ids. Index: primary key.
SELECT request_id, request_sha256, answer FROM requests
WHERE organization_id = $1 AND method = 'AllocateWork' AND request_id = ANY ($2::uuid[]);

-- name: reserve_slots
-- Takes up to the asked units of each slot, as many as its day has room for, under row locks in key order; the
-- predicates are those of slots_today. $1 organization, $2 slot ids, $3 units. Index: primary key of
-- daily_work_tracking and of work_slots.
WITH today AS MATERIALIZED (
  SELECT (now() AT TIME ZONE time_zone)::date AS work_date FROM organizations WHERE organization_id = $1
), granted AS MATERIALIZED (
  SELECT t.slot_id, t.work_date, least(u.units, t.quota - (t.allocated - t.expired - t.released)) AS units,
    s.keyword, s.code, s.target, s.settings, s.without_exit, s.persona_need
  FROM unnest($2::uuid[], $3::integer[]) AS u (slot_id, units)
  JOIN daily_work_tracking t ON t.organization_id = $1 AND t.slot_id = u.slot_id
    AND t.work_date = (SELECT work_date FROM today)
  JOIN work_slots s ON s.organization_id = $1 AND s.slot_id = u.slot_id
  WHERE s.is_active AND t.work_date BETWEEN s.start_date AND s.end_date
  ORDER BY t.slot_id
  FOR UPDATE OF t
)
UPDATE daily_work_tracking t SET allocated = t.allocated + g.units
FROM granted g
WHERE t.organization_id = $1 AND t.work_date = (SELECT work_date FROM today) AND t.slot_id = g.slot_id AND g.units > 0
RETURNING g.slot_id, g.work_date, g.units, g.keyword, g.code, g.target, g.settings, g.without_exit, g.persona_need;

-- name: return_slots
-- Takes back units reserved in this transaction, which nobody has seen. $1 organization, $2 work date, $3 slot ids,
-- $4 units. Index: primary key.
UPDATE daily_work_tracking t SET allocated = t.allocated - u.units
FROM unnest($3::uuid[], $4::integer[]) AS u (slot_id, units)
WHERE t.organization_id = $1 AND t.work_date = $2 AND t.slot_id = u.slot_id;

-- name: reserve_exits
-- Takes up to the asked uses of each exit, as many as its cap leaves, under row locks in key order; the predicates are
-- those of exits_now. $1 organization, $2 exit ids, $3 uses. Index: primary key.
WITH granted AS MATERIALIZED (
  SELECT e.exit_id, least(u.uses, e.cap - e.use_count) AS uses
  FROM unnest($2::uuid[], $3::integer[]) AS u (exit_id, uses)
  JOIN exits e ON e.organization_id = $1 AND e.exit_id = u.exit_id
  WHERE e.enabled
  ORDER BY e.exit_id
  FOR UPDATE OF e
)
UPDATE exits e SET use_count = e.use_count + g.uses
FROM granted g
WHERE e.organization_id = $1 AND e.exit_id = g.exit_id AND g.uses > 0
RETURNING e.exit_id, g.uses, e.endpoint, e.region, e.toggle_epoch;

-- name: grant_leases
-- Writes the leases, records the answers of their requests and forgets the requests that got nothing. $1 organization,
-- $2 keys, $3 tokens, $4 work dates, $5 slots, $6 exits, $7 exit epochs, $8 clients, $9 instances, $10 persona needs,
-- $11 traceparents, $12 duration and $13 greatest age in seconds, $14 requests served, $15 their answers, $16 requests
-- that got nothing. Returns the times of the leases, one row.
WITH clock AS (
  SELECT statement_timestamp() AS granted_at,
    statement_timestamp() + $12::float8 * interval '1 second' AS expires_at,
    statement_timestamp() + $13::float8 * interval '1 second' AS renewable_until
), granted AS (
  INSERT INTO leases (allocation_key, organization_id, lease_token, work_date, slot_id, exit_id, exit_epoch, client_id,
    instance_number, persona_need, traceparent, granted_at, expires_at, renewable_until, sweep_at)
  SELECT u.*, c.granted_at, c.expires_at, c.renewable_until, c.expires_at
  FROM clock c, (
    SELECT key, $1::uuid, token, work_date, slot_id, exit_id, exit_epoch, client_id, instance_number, need, trace
    FROM unnest($2::uuid[], $3::uuid[], $4::date[], $5::uuid[], $6::uuid[], $7::integer[], $8::text[], $9::integer[],
      $10::text[], $11::text[])
      AS a (key, token, work_date, slot_id, exit_id, exit_epoch, client_id, instance_number, need, trace)) u
), answered AS (
  UPDATE requests r SET answer = a.answer
  FROM unnest($14::uuid[], $15::bytea[]) AS a (request_id, answer)
  WHERE r.organization_id = $1 AND r.method = 'AllocateWork' AND r.request_id = a.request_id
), forgotten AS (
  DELETE FROM requests r
  WHERE r.organization_id = $1 AND r.method = 'AllocateWork' AND r.request_id = ANY ($16::uuid[])
)
SELECT granted_at, expires_at, renewable_until FROM clock;

-- name: live_leases
-- The packages of live leases, for a retry. $1 organization, $2 keys. Index: primary keys.
SELECT l.allocation_key, l.lease_token, l.work_date, l.slot_id, l.expires_at, l.renewable_until, l.persona_need,
  l.persona_id, l.persona_token, l.persona_generation, l.traceparent, s.keyword, s.code, s.target, s.settings,
  l.exit_id, e.endpoint, e.region
FROM leases l
JOIN work_slots s ON s.organization_id = $1 AND s.slot_id = l.slot_id
LEFT JOIN exits e ON e.organization_id = $1 AND e.exit_id = l.exit_id
WHERE l.organization_id = $1 AND l.allocation_key = ANY ($2::uuid[]) AND l.expires_at > clock_timestamp()
ORDER BY l.allocation_key;

-- name: attach_personas
-- Notes the check-outs on their leases; a lease that ended meanwhile has no row. $1 organization, $2 keys, $3 personas,
-- $4 tokens, $5 generations. Index: primary key of leases.
UPDATE leases l SET persona_id = u.persona_id, persona_token = u.token, persona_generation = u.generation
FROM unnest($2::uuid[], $3::uuid[], $4::bytea[], $5::bigint[]) AS u (key, persona_id, token, generation)
WHERE l.organization_id = $1 AND l.allocation_key = u.key
RETURNING l.allocation_key;
