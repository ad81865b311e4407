-- What SubmitResults reads and writes. All are bound to one organization and run in one transaction, in the order that
-- sql/leases.sql states; leases are looked up as is said there.

-- name: lock_submitted
-- Locks leases whose results came, in key order; `is_probe` when a paused target waits for this one. $1 organization,
-- $2 keys. Index: primary key; targets_probe.
SELECT allocation_key, lease_token, work_date, slot_id, target, exit_id,
  allocation_key = ANY (ARRAY(
    SELECT probe_key FROM targets WHERE organization_id = $1 AND probe_key IS NOT NULL)) AS is_probe
FROM leases
WHERE (organization_id = $1) IS TRUE AND allocation_key = ANY ($2::uuid[])
ORDER BY allocation_key
FOR UPDATE;

-- name: lock_late
-- Likewise for allocations whose lease has ended; `was_kept` when the result went into quarantine first: a row that is
-- recorded in one go ends at the same moment. $1 organization, $2 keys, $3 the days that their keys allow. Index:
-- primary key; targets_probe.
SELECT allocation_key, lease_token, work_date, slot_id, target, exit_id, status, late, recorded_at,
  status = 5 OR recorded_at < ended_at AS was_kept,
  allocation_key = ANY (ARRAY(
    SELECT probe_key FROM targets WHERE organization_id = $1 AND probe_key IS NOT NULL)) AS is_probe
FROM work_allocations
WHERE organization_id = $1 AND work_date = ANY ($3::date[]) AND allocation_key = ANY ($2::uuid[])
ORDER BY allocation_key
FOR UPDATE;

-- name: record_results
-- Ends leases by their results, in one go: the row from leases to work_allocations, the day's counters, the use of an
-- exit that returns with every lease, the check-in of its persona, the release of its external exit, the result and the
-- activity. Rows are locked in the order of all statements: leases by key, days, exits. Passes over leases that are gone
-- or have another token. $1 organization, then in key order, as texts of arrays, since a driver that encodes their
-- elements one by one takes longer than all the rest: $2 keys, $3 tokens, $4 outcomes, $5 milliseconds, $6 the place of
-- who submits in $15 to $18; as empty arrays if they have nothing to tell, with NULL where one has not: $7 block types,
-- $8 settings, $9 addresses of the exits, $10 retry-after in milliseconds, $11 errors, $12 whether the persona was used,
-- $13 numbers of products, $14 exit signals. $15 clients, $16 addresses, $17 instances, $18 user folders. Returns when,
-- how many, the keys of those that came late, whether a paused target waits for one of them, whether more may go out by
-- them, since an exit's use or a place of a target with a limit came back, and the exits that served well if any exit of
-- the organization had a fault. Index: primary keys; daily_work_tracking_slot; exits_exit_id; targets_probe.
WITH given AS MATERIALIZED (
  SELECT * FROM unnest($2::text::uuid[], $3::text::uuid[], $4::text::smallint[], $5::text::integer[],
    $6::text::smallint[], $7::text::text[], $8::text::text[], $9::text::text[], $10::text::integer[], $11::text::text[],
    $12::text::boolean[], $13::text::integer[], $14::text::smallint[])
    AS g (key, token, outcome, milliseconds, speaker, block_type, settings, seen_ip, retry_after, error, persona_used,
      products, signal)
), gone AS (
  DELETE FROM leases l USING given g
  WHERE (l.organization_id = $1) IS TRUE AND l.allocation_key = ANY (ARRAY[g.key]) AND l.lease_token = g.token
  RETURNING l.allocation_key, l.work_date, l.slot_id, l.exit_id, l.exit_epoch, l.exit_returns, l.persona_id,
    l.persona_need, l.exit_provider, l.client_id, l.instance_number, l.lease_token, l.granted_at, l.expires_at,
    l.traceparent, l.target, l.exit_ip, l.expires_at <= clock_timestamp() AS late, g.*
), counted AS (
  SELECT work_date, slot_id, count(*) FILTER (WHERE outcome = 2) AS succeeded,
    count(*) FILTER (WHERE outcome = 3) AS failed, count(*) FILTER (WHERE outcome = 4) AS blocked
  FROM gone GROUP BY work_date, slot_id
), days AS MATERIALIZED (
  SELECT t.work_date, t.slot_id, t.quota, t.allocated, t.expired, t.released, t.succeeded + c.succeeded AS succeeded,
    t.failed + c.failed AS failed, t.blocked + c.blocked AS blocked
  FROM counted c
  JOIN daily_work_tracking t ON t.organization_id = $1 AND t.work_date = ANY (array_fill(c.work_date, '{1}'))
    AND t.slot_id = c.slot_id
  ORDER BY t.work_date, t.slot_id
  FOR UPDATE OF t
), moved AS (
  -- Every column that a constraint looks at is set from the locked row: constraints are checked on the version that the
  -- statement began with, before PostgreSQL finds that the row has moved on.
  UPDATE daily_work_tracking t
  SET succeeded = d.succeeded, failed = d.failed, blocked = d.blocked, quota = d.quota, allocated = d.allocated,
    expired = d.expired, released = d.released
  FROM days d
  WHERE t.organization_id = $1 AND t.work_date = ANY (array_fill(d.work_date, '{1}')) AND t.slot_id = d.slot_id
), returning_exits AS (
  SELECT exit_id, exit_epoch, count(*) AS uses FROM gone WHERE exit_returns AND exit_id IS NOT NULL
  GROUP BY exit_id, exit_epoch
), exits_by_id AS MATERIALIZED (
  -- Locked first and compared then: a toggle may have moved leases to its epoch since this statement began.
  SELECT e.exit_id, e.toggle_epoch, e.use_count, e.cap FROM exits e
  WHERE e.organization_id = $1 AND e.exit_id IN (SELECT exit_id FROM returning_exits)
    AND (SELECT count(*) FROM days) >= 0
  ORDER BY e.exit_id
  FOR UPDATE OF e
), returned AS (
  UPDATE exits e SET use_count = x.use_count - r.uses, cap = x.cap
  FROM exits_by_id x JOIN returning_exits r ON r.exit_id = x.exit_id AND r.exit_epoch = x.toggle_epoch
  WHERE e.organization_id = $1 AND e.exit_id = x.exit_id
), ended AS (
  INSERT INTO work_allocations (organization_id, work_date, allocation_key, slot_id, exit_id, persona_id, client_id,
    instance_number, lease_token, status, late, allocated_at, expires_at, ended_at, recorded_at, traceparent, target,
    exit_ip)
  SELECT $1, work_date, allocation_key, slot_id, exit_id, persona_id, client_id, instance_number, lease_token, outcome,
    late, granted_at, expires_at, statement_timestamp(), statement_timestamp(), traceparent, target, exit_ip
  FROM gone
), told AS (
  INSERT INTO outbox (organization_id, holder, outcome)
  SELECT $1, allocation_key, CASE WHEN persona_used THEN outcome ELSE 1 END FROM gone WHERE persona_need IS NOT NULL
), released AS (
  INSERT INTO exit_releases (organization_id, provider, allocation_key)
  SELECT $1, exit_provider, allocation_key FROM gone WHERE exit_provider <> ''
), results AS (
  INSERT INTO work_results (organization_id, created_at, allocation_key, work_date, slot_id, exit_id, persona_id,
    client_id, client_ip, instance_number, outcome, is_blocked, block_type, execution_time_ms, applied_settings, exit_ip,
    retry_after_ms, error_message, persona_used, product_count, late, traceparent, target, exit_signal)
  SELECT $1, statement_timestamp(), allocation_key, work_date, slot_id, exit_id, persona_id, ($15::text[])[speaker],
    ($16::text[])[speaker], ($17::integer[])[speaker], outcome, outcome = 4, coalesce(block_type, ''), milliseconds,
    coalesce(settings, '{}')::jsonb, coalesce(seen_ip, exit_ip), retry_after, coalesce(error, ''),
    coalesce(persona_used, false), coalesce(products, 0), late, traceparent, target, coalesce(signal, 0)
  FROM gone
), activity AS (
  INSERT INTO client_activity_logs (organization_id, reported_at, allocation_key, client_id, client_ip,
    instance_number, user_folder_number, execution_time_ms, status)
  SELECT $1, statement_timestamp(), allocation_key, ($15::text[])[speaker], ($16::text[])[speaker],
    ($17::integer[])[speaker], ($18::integer[])[speaker], milliseconds, outcome
  FROM gone
)
SELECT statement_timestamp() AS recorded_at, (SELECT count(*) FROM gone) AS recorded,
  ARRAY(SELECT allocation_key FROM gone WHERE late) AS late,
  EXISTS (SELECT FROM targets t JOIN given g ON g.key = t.probe_key
    WHERE t.organization_id = $1 AND t.probe_key IS NOT NULL) AS has_probe,
  EXISTS (SELECT FROM returning_exits) OR EXISTS (SELECT FROM targets t
    WHERE t.organization_id = $1 AND t.target = ANY (ARRAY(SELECT DISTINCT target FROM gone WHERE target <> ''))
      AND t.max_in_flight IS NOT NULL) AS frees,
  ARRAY(SELECT (exit_id, target) FROM gone WHERE exit_id IS NOT NULL AND outcome = 2 AND signal IS NULL
    AND EXISTS (SELECT FROM exit_health WHERE organization_id = $1)) AS served_well;

-- name: readmit_late
-- Expired allocations whose result came late and counts, locked. Their days' counters are moved apart. Arguments as of
-- record_results, with $19 the days, as the text of an array; $3 is not used. Returns when. Index: primary key.
WITH given AS MATERIALIZED (
  SELECT * FROM unnest($19::text::date[], $2::text::uuid[], $3::text::uuid[], $4::text::smallint[],
    $5::text::integer[], $6::text::smallint[], $7::text::text[], $8::text::text[], $9::text::text[],
    $10::text::integer[], $11::text::text[], $12::text::boolean[], $13::text::integer[], $14::text::smallint[])
    AS g (day, key, token, outcome, milliseconds, speaker, block_type, settings, seen_ip, retry_after, error,
      persona_used, products, signal)
), ended AS (
  UPDATE work_allocations a
  SET status = g.outcome, late = true, ended_at = statement_timestamp(), recorded_at = statement_timestamp()
  FROM given g
  WHERE a.organization_id = $1 AND a.work_date = g.day AND a.allocation_key = g.key AND a.status = 5
    AND a.work_date BETWEEN (SELECT min(day) FROM given) AND (SELECT max(day) FROM given)
  RETURNING a.allocation_key, a.work_date, a.slot_id, a.exit_id, a.persona_id, a.traceparent, a.target, a.exit_ip, g.*
), results AS (
  INSERT INTO work_results (organization_id, created_at, allocation_key, work_date, slot_id, exit_id, persona_id,
    client_id, client_ip, instance_number, outcome, is_blocked, block_type, execution_time_ms, applied_settings, exit_ip,
    retry_after_ms, error_message, persona_used, product_count, late, traceparent, target, exit_signal)
  SELECT $1, statement_timestamp(), allocation_key, work_date, slot_id, exit_id, persona_id, ($15::text[])[speaker],
    ($16::text[])[speaker], ($17::integer[])[speaker], outcome, outcome = 4, coalesce(block_type, ''), milliseconds,
    coalesce(settings, '{}')::jsonb, coalesce(seen_ip, exit_ip), retry_after, coalesce(error, ''),
    coalesce(persona_used, false), coalesce(products, 0), true, traceparent, target, coalesce(signal, 0)
  FROM ended
), activity AS (
  INSERT INTO client_activity_logs (organization_id, reported_at, allocation_key, client_id, client_ip,
    instance_number, user_folder_number, execution_time_ms, status)
  SELECT $1, statement_timestamp(), allocation_key, ($15::text[])[speaker], ($16::text[])[speaker],
    ($17::integer[])[speaker], ($18::integer[])[speaker], milliseconds, outcome
  FROM ended
)
SELECT statement_timestamp();

-- name: quarantine
-- Expired allocations, locked, whose result came too late to count. $1 organization, $2 days, $3 keys, $4 slots,
-- $5 clients, $6 the results as JSON. Returns when. Index: primary key.
WITH given AS MATERIALIZED (
  SELECT * FROM unnest($2::date[], $3::uuid[], $4::uuid[], $5::text[], $6::text[])
    AS g (day, key, slot_id, by_client, result)
), kept AS (
  INSERT INTO quarantined_results (organization_id, allocation_key, work_date, slot_id, client_id, quarantined_at, result)
  SELECT $1, key, day, slot_id, by_client, statement_timestamp(), result::jsonb FROM given
), activity AS (
  INSERT INTO client_activity_logs (organization_id, reported_at, allocation_key, client_id, client_ip,
    instance_number, user_folder_number, execution_time_ms, status)
  SELECT $1, statement_timestamp(), g.key, g.by_client, c.result #>> '{client,client_ip}',
    (c.result #>> '{client,instance_number}')::integer, (c.result #>> '{client,user_folder_number}')::integer,
    (c.result ->> 'execution_time_ms')::integer, 5
  FROM given g CROSS JOIN LATERAL (SELECT g.result::jsonb AS result) c
), ended AS (
  UPDATE work_allocations a SET quarantined = true, recorded_at = statement_timestamp()
  FROM given g
  WHERE a.organization_id = $1 AND a.work_date = g.day AND a.allocation_key = g.key AND a.status = 5
    AND a.work_date BETWEEN (SELECT min(d) FROM unnest($2::date[]) d) AND (SELECT max(d) FROM unnest($2::date[]) d)
)
SELECT statement_timestamp();

-- name: insert_products
-- Of results that were recorded in this transaction; of others it writes none. $1 organization, $2 created at, $3 keys,
-- $4 positions, $5 ids, $6 titles, $7 addresses, $8 ranks, $9 attributes. Index: primary key of work_results.
INSERT INTO product_results (organization_id, created_at, allocation_key, position, slot_id, product_id, title, url,
  rank, attributes)
SELECT $1, $2, u.key, u.position, r.slot_id, u.product_id, u.title, u.url, u.rank, u.attributes::jsonb
FROM unnest($3::uuid[], $4::smallint[], $5::text[], $6::text[], $7::text[], $8::bigint[], $9::text[])
  AS u (key, position, product_id, title, url, rank, attributes)
JOIN work_results r ON r.organization_id = $1 AND r.created_at = $2 AND r.allocation_key = u.key;
