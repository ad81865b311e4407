-- name: find_generation
-- A kept generation; its columns are NULL when the persona stands but the generation does not. $1 organization,
-- $2 persona, $3 generation, 0 for the newest. Index: personas_pkey, generations_pkey.
SELECT g.generation, g.committed_at, g.manifest
FROM personas p
LEFT JOIN generations g ON g.organization_id = p.organization_id AND g.persona_id = p.persona_id
  AND g.generation = CASE WHEN $3::integer = 0 THEN p.generation ELSE $3 END
WHERE p.organization_id = $1 AND p.persona_id = $2;

-- name: list_generations
-- Kept generations, newest first. $1 organization, $2 persona. Index: generations_pkey.
SELECT generation, committed_at, manifest FROM generations
WHERE organization_id = $1 AND persona_id = $2
ORDER BY generation DESC;

-- name: find_lease
-- The live check-out that a token names. $1 organization, $2 persona, $3 token. Index: check_outs_exclusive,
-- check_outs_read_only.
SELECT mode FROM check_outs
WHERE organization_id = $1 AND persona_id = $2 AND lease_token = $3 AND expires_at > clock_timestamp();

-- name: hold_lease
-- As before, and it cannot end before this transaction does: an end that is acknowledged has no save after it.
SELECT mode FROM check_outs
WHERE organization_id = $1 AND persona_id = $2 AND lease_token = $3 AND expires_at > clock_timestamp()
FOR KEY SHARE;

-- name: find_exclusive_holder
-- Who holds a persona exclusively. $1 organization, $2 persona. Index: check_outs_exclusive.
SELECT holder, expires_at FROM check_outs
WHERE organization_id = $1 AND persona_id = $2 AND mode = 1 AND expires_at > clock_timestamp();

-- name: reserve_generation
-- A number that no other save gets. $1 organization, $2 persona. Index: personas_pkey.
UPDATE personas SET generations_reserved = generations_reserved + 1
WHERE organization_id = $1 AND persona_id = $2
RETURNING generations_reserved;

-- name: insert_pending
-- Announces objects before they are written, or after the last generation with them was dropped. $1 organization,
-- $2 persona, $3 generations, $4 parts, pairwise, $5 the time until they are collected.
INSERT INTO pending_objects (organization_id, persona_id, generation, part, collect_at)
SELECT $1, $2, w.generation, w.part, clock_timestamp() + $5::interval
FROM unnest($3::integer[], $4::smallint[]) AS w (generation, part);

-- name: settle_pending
-- Takes the announced objects of a save into its commit; those that are doomed stay. $1 organization, $2 persona,
-- $3 generation. Index: primary key.
DELETE FROM pending_objects
WHERE organization_id = $1 AND persona_id = $2 AND generation = $3 AND NOT doomed
RETURNING part;

-- name: insert_generation
-- $1 organization, $2 persona, $3 generation, $4 manifest.
INSERT INTO generations (organization_id, persona_id, generation, manifest)
VALUES ($1, $2, $3, $4)
RETURNING committed_at;

-- name: set_generation
-- Of a locked persona. $1 organization, $2 persona, $3 generation. Index: personas_pkey.
UPDATE personas SET generation = $3, generations_reserved = greatest(generations_reserved, $3)
WHERE organization_id = $1 AND persona_id = $2;

-- name: drop_generations
-- $1 organization, $2 persona, $3 the oldest generation to keep. Index: generations_pkey.
DELETE FROM generations WHERE organization_id = $1 AND persona_id = $2 AND generation < $3;

-- name: doom_objects
-- Up to 256 objects whose time has come, and those that an earlier round doomed and did not finish. Two collectors
-- share the work. Index: pending_objects_collect_at.
UPDATE pending_objects o SET doomed = true
FROM (
  SELECT organization_id, persona_id, generation, part FROM pending_objects
  WHERE collect_at <= clock_timestamp()
  ORDER BY collect_at
  LIMIT 256
  FOR UPDATE SKIP LOCKED
) AS due
WHERE o.organization_id = due.organization_id AND o.persona_id = due.persona_id
  AND o.generation = due.generation AND o.part = due.part
RETURNING o.organization_id, o.persona_id, o.generation, o.part;

-- name: forget_doomed
-- After their objects are gone. $1 organizations, $2 personas, $3 generations, $4 parts, itemwise. Index: primary key.
DELETE FROM pending_objects o
USING unnest($1::uuid[], $2::uuid[], $3::integer[], $4::smallint[])
  AS w (organization_id, persona_id, generation, part)
WHERE o.organization_id = w.organization_id AND o.persona_id = w.persona_id
  AND o.generation = w.generation AND o.part = w.part AND o.doomed;

-- name: count_pending
-- Objects that wait to be committed or collected, for the gauge. Scans the small table.
SELECT count(*) FROM pending_objects;
