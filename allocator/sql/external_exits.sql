-- External exits: what is recorded of them, and which are to be given back.

-- name: attach_exits
-- Notes the addresses of external exits on their leases, as long as these live. $1 organization, $2 keys in order,
-- $3 addresses. Index: primary key of leases.
WITH held AS MATERIALIZED (
  SELECT l.allocation_key, u.exit_ip
  FROM unnest($2::uuid[], $3::text[]) AS u (key, exit_ip)
  JOIN leases l ON (l.organization_id = $1) IS TRUE AND l.allocation_key = ANY (ARRAY[u.key])
  WHERE l.exit_provider <> '' AND l.expires_at > clock_timestamp()
  ORDER BY u.key
  FOR UPDATE OF l
)
UPDATE leases l SET exit_ip = h.exit_ip FROM held h
WHERE (l.organization_id = $1) IS TRUE AND l.allocation_key = ANY (ARRAY[h.allocation_key])
RETURNING l.allocation_key;

-- name: enqueue_exit_releases
-- For exits whose lease ended before they could be noted on it. $1 organization, $2 providers, $3 keys.
INSERT INTO exit_releases (organization_id, provider, allocation_key)
SELECT $1, u.provider, u.key FROM unnest($2::text[], $3::uuid[]) AS u (provider, key);

-- name: take_exit_releases
-- Takes due releases for delivery: they come up again if they are not deleted by then, later each time. Of all
-- organizations. $1 at most, $2 the providers that can be told. Index: exit_releases_due_at.
UPDATE exit_releases
SET attempts = attempts + 1, due_at = now() + least(5 * power(2, least(attempts, 5)), 60) * interval '1 second'
WHERE release_id = ANY (ARRAY(
  SELECT release_id FROM exit_releases WHERE due_at <= now() AND provider = ANY ($2::text[])
  ORDER BY due_at, release_id LIMIT $1 FOR UPDATE SKIP LOCKED))
RETURNING release_id, provider, allocation_key;

-- name: delete_exit_releases
-- Delivered. Of all organizations. $1 ids. Index: primary key.
DELETE FROM exit_releases WHERE release_id = ANY ($1::bigint[]);

-- name: count_exit_releases
-- Of all organizations, for the gauge and the state of providers.
SELECT provider, count(*) AS releases FROM exit_releases GROUP BY provider;

-- name: lock_reconciliation
-- Whether this session is now the one that reconciles; until it unlocks, or ends.
SELECT pg_try_advisory_lock(hashtextextended('muster exit reconciliation', 0));

-- name: unlock_reconciliation
-- Lets another.
SELECT pg_advisory_unlock(hashtextextended('muster exit reconciliation', 0));

-- name: sort_held
-- What stands here for leases that a provider holds, of all organizations: `live`, or `orphan` when nothing does, no
-- release of it waits, and the time in the key (milliseconds in the first 48 bits of a UUIDv7) is not younger than the
-- grace. A key that has no lease never gets one again. $1 keys, $2 grace in seconds. Index: primary key of leases.
SELECT u.key AS allocation_key, l.allocation_key IS NOT NULL AS live,
  l.allocation_key IS NULL
    AND ('x' || left(replace(u.key::text, '-', ''), 12))::bit(48)::bigint / 1000.0
      <= extract(epoch FROM clock_timestamp()) - $2::float8
    AND NOT EXISTS (SELECT FROM exit_releases r WHERE r.allocation_key = u.key) AS orphan
FROM unnest($1::uuid[]) AS u (key)
LEFT JOIN leases l ON l.allocation_key = u.key;
