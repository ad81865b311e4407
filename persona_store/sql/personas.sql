-- name: find_personas
-- Personas as they stand, in no order. $1 organizations, $2 persona ids, pairwise. Index: personas_pkey,
-- check_outs_exclusive.
SELECT p.organization_id, p.persona_id, p.status, p.fingerprint_sha256, pools.base_profile, pools.aging_level,
  pools.region, pools.tags, p.generation, p.total_uses, p.success_count, p.blocked_count,
  nullif(p.last_used_at, '-infinity') AS last_used_at, coalesce(c.holder, '') AS held_by
FROM unnest($1::uuid[], $2::uuid[]) AS wanted (organization_id, persona_id)
JOIN personas p USING (organization_id, persona_id)
JOIN pools USING (pool_id)
LEFT JOIN check_outs c ON c.organization_id = p.organization_id AND c.persona_id = p.persona_id AND c.mode = 1
  AND c.expires_at > clock_timestamp();

-- name: list_personas
-- A page in the order of ids. $1 organization, $2 id to go on after, $3 status or NULL, $4 region or '', $5 tag or '',
-- $6 rows. Index: personas_pkey.
SELECT p.organization_id, p.persona_id, p.status, p.fingerprint_sha256, pools.base_profile, pools.aging_level,
  pools.region, pools.tags, p.generation, p.total_uses, p.success_count, p.blocked_count,
  nullif(p.last_used_at, '-infinity') AS last_used_at, coalesce(c.holder, '') AS held_by
FROM personas p
JOIN pools USING (pool_id)
LEFT JOIN check_outs c ON c.organization_id = p.organization_id AND c.persona_id = p.persona_id AND c.mode = 1
  AND c.expires_at > clock_timestamp()
WHERE p.organization_id = $1 AND p.persona_id > $2
  AND ($3::smallint IS NULL OR p.status = $3)
  AND ($4::text = '' OR pools.region = $4)
  AND ($5::text = '' OR pools.tags @> ARRAY[$5::text])
ORDER BY p.persona_id
LIMIT $6;

-- name: find_by_fingerprint
-- $1 organization, $2 SHA-256. Index: personas_fingerprint.
SELECT persona_id FROM personas WHERE organization_id = $1 AND fingerprint_sha256 = $2;

-- name: insert_pool
-- Makes a pool unless it stands. $1 organization, $2 region, $3 aging level, $4 base profile, $5 sorted tags.
-- Index: the unique one.
INSERT INTO pools (organization_id, region, aging_level, base_profile, tags)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (organization_id, region, aging_level, base_profile, tags) DO NOTHING;

-- name: find_pool
-- $1 organization, $2 region, $3 aging level, $4 base profile, $5 sorted tags. Index: the unique one.
SELECT pool_id FROM pools
WHERE organization_id = $1 AND region = $2 AND aging_level = $3 AND base_profile = $4 AND tags = $5;

-- name: insert_persona
-- No row when the fingerprint is taken. $1 organization, $2 id, $3 pool, $4 status, $5 fingerprint's SHA-256. Index:
-- personas_fingerprint.
INSERT INTO personas
  (organization_id, persona_id, pool_id, status, fingerprint_sha256, generation, generations_reserved)
VALUES ($1, $2, $3, $4, $5, 1, 1)
ON CONFLICT (organization_id, fingerprint_sha256) DO NOTHING
RETURNING persona_id;

-- name: lock_persona
-- Held to the end of the transaction. $1 organization, $2 persona. Index: personas_pkey.
SELECT status, generation, generations_reserved FROM personas
WHERE organization_id = $1 AND persona_id = $2
FOR NO KEY UPDATE;

-- name: set_status
-- Of a locked persona. $1 organization, $2 persona, $3 status. Index: personas_pkey.
UPDATE personas SET status = $3 WHERE organization_id = $1 AND persona_id = $2;

-- name: insert_event
-- $1 fresh id, $2 organization, $3 persona, $4 kind, $5 actor, $6 reason, $7 status before or NULL, $8 after or NULL,
-- $9 check-outs ended.
INSERT INTO persona_events
  (event_id, organization_id, persona_id, kind, actor, reason, from_status, to_status, released)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9);

-- name: find_answer
-- The answer to a request that was committed. $1 organization, $2 method, $3 request id. Index: primary key.
SELECT request_sha256, answer FROM requests WHERE organization_id = $1 AND method = $2 AND request_id = $3;
