-- Row locks are taken in one order everywhere: requests, check_outs by (organization, persona, holder), personas by
-- (organization, persona), generations, pending_objects. The unique indexes decide between transactions at once:
-- an insert waits for one in flight and then gives way to it.
--
-- OFFSET 0 keeps "is it held?" a look into the unique index for each candidate. Without it the planner joins, and with
-- statistics from a quiet hour it joins every candidate with every check-out (measured: 75 ms for 0.1 ms at 5,000).

-- name: sweep_check_outs
-- Ends up to 1000 check-outs that ran out; the holder may have used the persona, so it rests from now on. Returns how
-- many ended. Index: check_outs_expiry.
WITH expired AS (
  SELECT organization_id, holder, persona_id, mode FROM check_outs
  WHERE expires_at <= clock_timestamp()
  ORDER BY organization_id, persona_id, holder
  LIMIT 1000
  FOR UPDATE
), ended AS (
  DELETE FROM check_outs c USING expired e
  WHERE c.organization_id = e.organization_id AND c.holder = e.holder
  RETURNING c.organization_id, c.persona_id, c.mode, c.expires_at
), rested AS (
  UPDATE personas p SET last_used_at = greatest(p.last_used_at, e.expires_at)
  FROM ended e
  WHERE e.mode = 1 AND p.organization_id = e.organization_id AND p.persona_id = e.persona_id
)
SELECT count(*) FROM ended;

-- name: any_expired
-- Whether a sweep would end any. Index: check_outs_expiry.
SELECT EXISTS (SELECT FROM check_outs WHERE expires_at <= clock_timestamp());

-- name: count_live
-- Check-outs by mode, for the gauge. Scans the small table.
SELECT mode, count(*) AS live FROM check_outs WHERE expires_at > clock_timestamp() GROUP BY mode;

-- name: find_holders
-- Live check-outs by holder. $1 organizations, $2 holders, pairwise. Index: check_outs_pkey.
SELECT c.organization_id, c.holder, c.persona_id, c.mode, c.lease_token, c.expires_at
FROM unnest($1::uuid[], $2::text[]) AS wanted (organization_id, holder)
JOIN check_outs c USING (organization_id, holder)
WHERE c.expires_at > clock_timestamp();

-- name: find_exclusive
-- Live exclusive check-outs by persona. $1 organizations, $2 personas, pairwise. Index: check_outs_exclusive.
SELECT c.organization_id, c.persona_id, c.expires_at
FROM unnest($1::uuid[], $2::uuid[]) AS wanted (organization_id, persona_id)
JOIN check_outs c USING (organization_id, persona_id)
WHERE c.mode = 1 AND c.expires_at > clock_timestamp();

-- name: matching_pools
-- $1 organization, $2 region or '', $3 tags, $4 least aging level. Index: the unique one, or pools_tags.
SELECT pool_id FROM pools
WHERE organization_id = $1 AND ($2::text = '' OR region = $2) AND tags @> $3::text[] AND aging_level >= $4;

-- name: pick_from_pools
-- Idle personas of few pools, longest idle first. $1 organization, $2 pools, $3 cool-down, $4 personas to leave out,
-- $5 how many. Index: personas_pool_turn, once for each pool.
SELECT idle.persona_id
FROM unnest($2::integer[]) AS pool (pool_id)
CROSS JOIN LATERAL (
  SELECT p.persona_id, p.turn_at FROM personas p
  WHERE p.pool_id = pool.pool_id AND p.status = 2 AND p.organization_id = $1
    AND p.turn_at <= coalesce(now() - nullif($3::interval, interval '0'), 'infinity')
    AND p.last_used_at <= coalesce(now() - nullif($3::interval, interval '0'), 'infinity')
    AND p.persona_id <> ALL ($4::uuid[])
    AND NOT EXISTS (
      SELECT FROM check_outs c
      WHERE c.organization_id = $1 AND c.persona_id = p.persona_id AND c.mode = 1 AND c.expires_at > now() OFFSET 0)
  ORDER BY p.turn_at
  LIMIT $5
) AS idle
ORDER BY idle.turn_at
LIMIT $5;

-- name: pick_from_organization
-- Idle personas of many pools, or of any, longest idle first. $1 organization, $2 pools or NULL for any, $3 cool-down,
-- $4 personas to leave out, $5 how many. Index: personas_turn.
SELECT p.persona_id FROM personas p
WHERE p.organization_id = $1 AND p.status = 2
  AND ($2::integer[] IS NULL OR p.pool_id = ANY ($2))
  AND p.turn_at <= coalesce(now() - nullif($3::interval, interval '0'), 'infinity')
  AND p.last_used_at <= coalesce(now() - nullif($3::interval, interval '0'), 'infinity')
  AND p.persona_id <> ALL ($4::uuid[])
  AND NOT EXISTS (
    SELECT FROM check_outs c
    WHERE c.organization_id = $1 AND c.persona_id = p.persona_id AND c.mode = 1 AND c.expires_at > now() OFFSET 0)
ORDER BY p.turn_at
LIMIT $5;

-- name: pick_returned
-- Idle personas whose last check-out ended without use: their turn is late, but they have rested. Arguments as before.
-- Index: personas_returned.
SELECT p.persona_id FROM personas p
WHERE p.organization_id = $1 AND p.status = 2 AND p.returned
  AND ($2::integer[] IS NULL OR p.pool_id = ANY ($2))
  AND p.last_used_at <= now() - $3::interval
  AND p.persona_id <> ALL ($4::uuid[])
  AND NOT EXISTS (
    SELECT FROM check_outs c
    WHERE c.organization_id = $1 AND c.persona_id = p.persona_id AND c.mode = 1 AND c.expires_at > now() OFFSET 0)
ORDER BY p.turn_at
LIMIT $5;

-- name: count_held
-- Personas that match but are held. $1 organization, $2 pools or NULL for any. Index: check_outs_exclusive,
-- personas_pkey.
SELECT count(*) FROM check_outs c JOIN personas p USING (organization_id, persona_id)
WHERE c.organization_id = $1 AND c.mode = 1 AND c.expires_at > now() AND p.status = 2
  AND ($2::integer[] IS NULL OR p.pool_id = ANY ($2));

-- name: count_cooling_of_pools
-- Personas that match but rest, counted up to 1000. $1 organization, $2 pools, $3 cool-down. Index: personas_pool_turn.
SELECT count(*) FROM (
  SELECT FROM personas p
  WHERE p.organization_id = $1 AND p.status = 2 AND p.pool_id = ANY ($2::integer[])
    AND p.last_used_at > now() - $3::interval
    AND NOT EXISTS (
      SELECT FROM check_outs c
      WHERE c.organization_id = $1 AND c.persona_id = p.persona_id AND c.mode = 1 AND c.expires_at > now() OFFSET 0)
  LIMIT 1000
) AS cooling;

-- name: count_cooling
-- As before, of any pool. $1 organization, $2 cool-down. Index: personas_turn.
SELECT count(*) FROM (
  SELECT FROM personas p
  WHERE p.organization_id = $1 AND p.status = 2 AND p.last_used_at > now() - $2::interval
    AND NOT EXISTS (
      SELECT FROM check_outs c
      WHERE c.organization_id = $1 AND c.persona_id = p.persona_id AND c.mode = 1 AND c.expires_at > now() OFFSET 0)
  LIMIT 1000
) AS cooling;

-- name: insert_check_outs
-- Takes those that are free; no row for a persona that is held, discarded or not there, or a holder that holds another.
-- $1 organizations, $2 holders, $3 personas, $4 modes, $5 tokens, $6 durations, itemwise. Index: check_outs_pkey,
-- check_outs_exclusive.
INSERT INTO check_outs (organization_id, holder, persona_id, mode, lease_token, expires_at)
SELECT w.organization_id, w.holder, w.persona_id, w.mode, w.lease_token, clock_timestamp() + w.duration
FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::smallint[], $5::bytea[], $6::interval[])
  AS w (organization_id, holder, persona_id, mode, lease_token, duration)
JOIN personas p USING (organization_id, persona_id)
WHERE p.status <> 5
ORDER BY w.organization_id, w.persona_id, w.holder
ON CONFLICT DO NOTHING
RETURNING organization_id, holder, persona_id, mode, lease_token, expires_at;

-- name: take_turns
-- Sends exclusively taken personas to the end of the queue, and tells their status, which may have changed since they
-- were picked. $1 organizations, $2 personas, pairwise. Index: personas_pkey.
UPDATE personas p SET turn_at = clock_timestamp(), returned = false
FROM (
  SELECT organization_id, persona_id FROM personas
  WHERE (organization_id, persona_id) IN (SELECT * FROM unnest($1::uuid[], $2::uuid[]))
  ORDER BY organization_id, persona_id
  FOR NO KEY UPDATE
) AS locked
WHERE p.organization_id = locked.organization_id AND p.persona_id = locked.persona_id
RETURNING p.organization_id, p.persona_id, p.status;

-- name: withdraw_check_outs
-- Takes back check-outs of the transaction in hand. $1 organizations, $2 holders, pairwise. Index: check_outs_pkey.
DELETE FROM check_outs c USING unnest($1::uuid[], $2::text[]) AS w (organization_id, holder)
WHERE c.organization_id = w.organization_id AND c.holder = w.holder;

-- name: renew_check_outs
-- Fenced on holder, token and expiry. $1 organization, $2 holders, $3 tokens, $4 durations, itemwise; each holder once.
-- Index: check_outs_pkey.
WITH live AS (
  SELECT c.organization_id, c.holder, w.duration
  FROM unnest($2::text[], $3::bytea[], $4::interval[]) AS w (holder, lease_token, duration)
  JOIN check_outs c ON c.organization_id = $1 AND c.holder = w.holder AND c.lease_token = w.lease_token
  WHERE c.expires_at > clock_timestamp()
  ORDER BY c.organization_id, c.persona_id, c.holder
  FOR UPDATE OF c
)
UPDATE check_outs c SET expires_at = clock_timestamp() + live.duration
FROM live
WHERE c.organization_id = live.organization_id AND c.holder = live.holder
RETURNING c.holder, c.expires_at;

-- name: end_check_outs
-- Ends live check-outs by holder. $1 organization, $2 holders, each once. Index: check_outs_pkey.
WITH live AS (
  SELECT organization_id, holder FROM check_outs
  WHERE organization_id = $1 AND holder = ANY ($2::text[]) AND expires_at > clock_timestamp()
  ORDER BY organization_id, persona_id, holder
  FOR UPDATE
)
DELETE FROM check_outs c USING live
WHERE c.organization_id = live.organization_id AND c.holder = live.holder
RETURNING c.holder, c.persona_id, c.mode;

-- name: count_uses
-- Moves the counters of personas whose check-outs ended in this transaction. $1 organization, $2 personas, each once,
-- $3 uses, $4 successes, $5 blocks, $6 whether an exclusive check-out came back unused, $7 whether it was used by a
-- read-only holder, which sends it to the end of the queue as well. Index: personas_pkey.
UPDATE personas p SET
  total_uses = p.total_uses + w.uses,
  success_count = p.success_count + w.successes,
  blocked_count = p.blocked_count + w.blocks,
  last_used_at = CASE WHEN w.uses > 0 THEN clock_timestamp() ELSE p.last_used_at END,
  returned = p.returned OR w.unused,
  turn_at = CASE WHEN w.read THEN clock_timestamp() ELSE p.turn_at END
FROM (
  SELECT p.organization_id, p.persona_id, w.uses, w.successes, w.blocks, w.unused, w.read
  FROM unnest($2::uuid[], $3::integer[], $4::integer[], $5::integer[], $6::boolean[], $7::boolean[])
    AS w (persona_id, uses, successes, blocks, unused, read)
  JOIN personas p ON p.organization_id = $1 AND p.persona_id = w.persona_id
  ORDER BY p.persona_id
  FOR NO KEY UPDATE OF p
) AS w
WHERE p.organization_id = w.organization_id AND p.persona_id = w.persona_id;

-- name: release_by_force
-- Ends every check-out of a persona, live or not. $1 organization, $2 persona. Index: check_outs_exclusive,
-- check_outs_read_only.
WITH held AS (
  SELECT organization_id, holder FROM check_outs
  WHERE organization_id = $1 AND persona_id = $2
  ORDER BY organization_id, persona_id, holder
  FOR UPDATE
)
DELETE FROM check_outs c USING held
WHERE c.organization_id = held.organization_id AND c.holder = held.holder
RETURNING c.mode, c.expires_at > clock_timestamp() AS live;

-- name: rest
-- A persona taken from its holder may have been used: it rests from now on. $1 organization, $2 persona.
UPDATE personas SET last_used_at = clock_timestamp() WHERE organization_id = $1 AND persona_id = $2;
