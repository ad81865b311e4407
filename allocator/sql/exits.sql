-- Pooled exits. All are bound to one organization.

-- name: lock_exit_imports
-- One import at a time for an organization, so that the limit holds. $1 organization.
SELECT pg_advisory_xact_lock(hashtextextended('muster exits of ' || $1::uuid, 0));

-- name: count_exits_after
-- How many exits there would be after an import. $1 organization, $2 endpoints. Index: exits_organization_id_endpoint_key.
SELECT count(DISTINCT endpoint) FROM (
  SELECT endpoint FROM exits WHERE organization_id = $1 UNION ALL SELECT unnest($2::text[])) e;

-- name: import_exits
-- One that stands keeps its counters and takes the other values; its cap never falls below the uses that count.
-- $1 organization, $2 ids in order of the endpoints, $3 endpoints, $4 regions, $5 caps.
-- Index: exits_organization_id_endpoint_key.
INSERT INTO exits (exit_id, organization_id, endpoint, region, cap_mode, cap)
SELECT exit_id, $1, endpoint, region, 1, cap
FROM unnest($2::uuid[], $3::text[], $4::text[], $5::integer[]) AS u (exit_id, endpoint, region, cap)
ON CONFLICT (organization_id, endpoint) DO UPDATE
SET region = excluded.region, cap = greatest(excluded.cap, exits.use_count);

-- name: lock_exits
-- Locks the exits of these endpoints in key order, before an import changes them. $1 organization, $2 endpoints.
SELECT exit_id FROM exits WHERE organization_id = $1 AND endpoint = ANY ($2::text[]) ORDER BY exit_id FOR UPDATE;

-- name: exits_by_endpoint
-- $1 organization, $2 endpoints. Index: exits_organization_id_endpoint_key.
SELECT exit_id, endpoint, region, cap, use_count, toggle_epoch, enabled, toggled_at, created_at
FROM exits WHERE organization_id = $1 AND endpoint = ANY ($2::text[]);

-- name: exit_by_id
-- $1 organization, $2 exit. Index: primary key.
SELECT exit_id, endpoint, region, cap, use_count, toggle_epoch, enabled, toggled_at, created_at
FROM exits WHERE organization_id = $1 AND exit_id = $2;

-- name: page_of_exits
-- $1 organization, $2 after this id or NULL, $3 how many. An organization has hundreds at most: sorted.
SELECT exit_id, endpoint, region, cap, use_count, toggle_epoch, enabled, toggled_at, created_at
FROM exits WHERE organization_id = $1 AND ($2::uuid IS NULL OR exit_id > $2)
ORDER BY exit_id LIMIT $3;

-- name: set_exit_enabled
-- $1 organization, $2 exit, $3 enabled. Index: primary key.
UPDATE exits SET enabled = $3 WHERE organization_id = $1 AND exit_id = $2
RETURNING exit_id, endpoint, region, cap, use_count, toggle_epoch, enabled, toggled_at, created_at;

-- name: toggle_exit
-- Starts the count afresh and logs the toggle; no row when there is no such exit. $1 organization, $2 exit,
-- $3 toggle id, $4 actor, $5 reason. Index: primary key.
WITH before AS MATERIALIZED (
  SELECT exit_id, use_count FROM exits WHERE organization_id = $1 AND exit_id = $2 FOR UPDATE
), logged AS (
  INSERT INTO exit_toggle_logs (organization_id, toggled_at, toggle_id, exit_id, actor, reason, use_count_before)
  SELECT $1, statement_timestamp(), $3, exit_id, $4, $5, use_count FROM before
)
UPDATE exits e SET use_count = 0, toggle_epoch = e.toggle_epoch + 1, toggled_at = statement_timestamp()
FROM before b
WHERE e.organization_id = $1 AND e.exit_id = b.exit_id
RETURNING e.exit_id, endpoint, region, cap, e.use_count, toggle_epoch, enabled, toggled_at, created_at;

-- name: page_of_toggles
-- Newest first. $1 organization, $2 exit or NULL, $3 before this time or NULL, $4 and id, $5 how many.
-- Index: primary key.
SELECT toggle_id, exit_id, toggled_at, actor, reason, use_count_before FROM exit_toggle_logs
WHERE organization_id = $1 AND ($2::uuid IS NULL OR exit_id = $2)
  AND ($3::timestamptz IS NULL OR (toggled_at, toggle_id) < ($3, $4::uuid))
ORDER BY toggled_at DESC, toggle_id DESC LIMIT $5;
