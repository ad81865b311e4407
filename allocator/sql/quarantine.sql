-- Results in quarantine, and what becomes of them. All are bound to one organization.

-- name: page_of_quarantine
-- Of a page the first results whose texts have at most so many bytes together, and one at least; `found` is how many the
-- page would have. $1 organization, $2 slot or NULL, $3 the key after which the page begins or NULL, $4 size, $5 bytes.
-- Index: primary key.
WITH sized AS (
  SELECT allocation_key, octet_length(result::text) AS bytes
  FROM quarantined_results
  WHERE organization_id = $1 AND ($2::uuid IS NULL OR slot_id = $2) AND ($3::uuid IS NULL OR allocation_key > $3)
  ORDER BY allocation_key LIMIT $4
), summed AS (
  SELECT allocation_key, sum(bytes) OVER (ORDER BY allocation_key) AS bytes,
    row_number() OVER (ORDER BY allocation_key) AS number, count(*) OVER () AS found
  FROM sized
)
SELECT q.allocation_key, q.slot_id, q.work_date, q.client_id, q.quarantined_at,
  (q.result ->> 'status')::integer AS status, jsonb_array_length(q.result -> 'products') AS products,
  q.result::text AS result, s.found
FROM summed s JOIN quarantined_results q ON q.organization_id = $1 AND q.allocation_key = s.allocation_key
WHERE s.bytes <= $5 OR s.number = 1
ORDER BY q.allocation_key;

-- name: lock_quarantine
-- Locks results in key order. $1 organization, $2 keys. Index: primary key.
SELECT allocation_key, work_date, slot_id
FROM quarantined_results WHERE organization_id = $1 AND allocation_key = ANY ($2::uuid[])
ORDER BY allocation_key
FOR UPDATE;

-- name: lock_allocations
-- Locks their allocations in key order. $1 organization, $2 keys, $3 the days that their keys allow. Index: primary key.
SELECT FROM work_allocations
WHERE organization_id = $1 AND work_date = ANY ($3::date[]) AND allocation_key = ANY ($2::uuid[])
ORDER BY allocation_key
FOR UPDATE;

-- name: accept_results
-- Records results whose rows in quarantine, allocations and days are locked. They stand in the month in which they came,
-- or four weeks ago if that is longer: partitions as young as that are always there. What the archive has taken of
-- their allocations and days stays as it is. The quota of a day grows to the units that count against it, if need be.
-- $1 organization, $2 keys. Index: primary keys.
WITH gone AS (
  DELETE FROM quarantined_results WHERE organization_id = $1 AND allocation_key = ANY ($2::uuid[])
  RETURNING allocation_key, work_date, slot_id, client_id, result, (result ->> 'status')::smallint AS outcome,
    greatest(quarantined_at, now() - interval '28 days') AS at
), ended AS (
  UPDATE work_allocations a
  SET status = g.outcome, late = true, quarantined = false, ended_at = greatest(statement_timestamp(),
    a.recorded_at + interval '1 microsecond')
  FROM gone g
  WHERE a.organization_id = $1 AND a.work_date = ANY (array_fill(g.work_date, '{1}'))
    AND a.allocation_key = g.allocation_key
  RETURNING a.allocation_key, a.exit_id, a.persona_id, a.traceparent, a.target, a.exit_ip
), counted AS (
  SELECT work_date, slot_id, count(*) AS units, count(*) FILTER (WHERE outcome = 2) AS succeeded,
    count(*) FILTER (WHERE outcome = 3) AS failed, count(*) FILTER (WHERE outcome = 4) AS blocked
  FROM gone GROUP BY work_date, slot_id
), moved AS (
  UPDATE daily_work_tracking t
  SET succeeded = t.succeeded + c.succeeded, failed = t.failed + c.failed, blocked = t.blocked + c.blocked,
    expired = t.expired - c.units, quota = greatest(t.quota, t.allocated - (t.expired - c.units) - t.released)
  FROM counted c
  WHERE t.organization_id = $1 AND t.work_date = ANY (array_fill(c.work_date, '{1}')) AND t.slot_id = c.slot_id
), results AS (
  INSERT INTO work_results (organization_id, created_at, allocation_key, work_date, slot_id, exit_id, persona_id,
    client_id, client_ip, instance_number, outcome, is_blocked, block_type, execution_time_ms, applied_settings, exit_ip,
    retry_after_ms, error_message, persona_used, product_count, late, traceparent, target, exit_signal)
  SELECT $1, g.at, g.allocation_key, g.work_date, g.slot_id, e.exit_id, e.persona_id, g.client_id,
    g.result #>> '{client,client_ip}', (g.result #>> '{client,instance_number}')::integer, g.outcome, g.outcome = 4,
    g.result ->> 'block_type', (g.result ->> 'execution_time_ms')::integer, g.result -> 'applied_settings',
    coalesce(nullif(g.result ->> 'exit_ip', ''), e.exit_ip, ''), (g.result ->> 'retry_after_ms')::integer,
    g.result ->> 'error_message', (g.result ->> 'persona_used')::boolean, jsonb_array_length(g.result -> 'products'),
    true, e.traceparent, coalesce(e.target, ''), coalesce((g.result ->> 'exit_signal')::smallint, 0)
  FROM gone g LEFT JOIN ended e USING (allocation_key)
)
INSERT INTO product_results (organization_id, created_at, allocation_key, position, slot_id, product_id, title, url,
  rank, attributes)
SELECT $1, g.at, g.allocation_key, p.number - 1, g.slot_id, p.product ->> 'product_id', p.product ->> 'title',
  p.product ->> 'url', (p.product ->> 'rank')::bigint, p.product -> 'attributes'
FROM gone g CROSS JOIN LATERAL jsonb_array_elements(g.result -> 'products') WITH ORDINALITY AS p (product, number);

-- name: discard_results
-- Gives up results whose rows in quarantine and allocations are locked. $1 organization, $2 keys. Index: primary keys.
WITH gone AS (
  DELETE FROM quarantined_results WHERE organization_id = $1 AND allocation_key = ANY ($2::uuid[])
  RETURNING allocation_key, work_date
)
UPDATE work_allocations a SET quarantined = false
FROM gone g
WHERE a.organization_id = $1 AND a.work_date = ANY (array_fill(g.work_date, '{1}'))
  AND a.allocation_key = g.allocation_key;
