-- Pooled exits. All are bound to one organization. A count whose window has ended is shown as 0, as exits_now sees it.
-- Rows are locked in the order leases (by key), exits (by id).

-- name: lock_exit_imports
-- One import at a time for an organization, so that the limit holds. $1 organization.
SELECT pg_advisory_xact_lock(hashtextextended('muster exits of ' || $1::uuid, 0));

-- name: count_exits_after
-- How many exits there would be after an import. $1 organization, $2 endpoints. Index: exits_endpoint.
SELECT count(DISTINCT endpoint) FROM (
  SELECT endpoint FROM exits WHERE organization_id = $1 UNION ALL SELECT unnest($2::text[])) e;

-- name: lock_leases_of_exits
-- Locks, in key order, the leases that a new epoch of these exits moves. $1 organization, $2 exits.
-- Index: leases_holder, by organization: there is none by exit, since only operators ask so.
SELECT allocation_key FROM leases WHERE organization_id = $1 AND exit_id = ANY ($2::uuid[])
ORDER BY allocation_key FOR UPDATE;

-- name: lock_exits
-- Locks the exits of these endpoints in key order, before an import changes them. $1 organization, $2 endpoints.
SELECT exit_id FROM exits WHERE organization_id = $1 AND endpoint = ANY ($2::text[]) ORDER BY exit_id FOR UPDATE;

-- name: change_cap_modes
-- Begins a new epoch for locked exits whose mode changes, or whose window has ended. The count is carried over, except
-- that an exit that turns concurrent waits for move_leases. $1 organization, $2 endpoints,
-- $3 modes, $4 window seconds. Index: exits_endpoint.
UPDATE exits e
SET cap_mode = u.cap_mode, window_seconds = u.window_seconds, toggle_epoch = e.toggle_epoch + 1, use_count = n.uses,
  window_ends_at = CASE WHEN u.cap_mode = 3 AND n.uses > 0 THEN now() + u.window_seconds * interval '1 second'
    ELSE '-infinity' END
FROM unnest($2::text[], $3::smallint[], $4::integer[]) AS u (endpoint, cap_mode, window_seconds)
JOIN exits o ON o.organization_id = $1 AND o.endpoint = u.endpoint
CROSS JOIN LATERAL (SELECT o.cap_mode = 3 AND o.window_ends_at <= now() AS ended) w
CROSS JOIN LATERAL (SELECT CASE WHEN w.ended OR u.cap_mode = 2 THEN 0 ELSE o.use_count END AS uses) n
WHERE e.organization_id = $1 AND e.exit_id = o.exit_id
  AND (o.cap_mode <> u.cap_mode OR w.ended AND o.use_count > 0);

-- name: move_leases
-- Moves the leases of locked concurrent exits into the exits' epoch and counts them there. Leases are counted as they
-- are moved, since one that ends at this moment may still be seen otherwise. $1 organization, $2 exits.
-- Index: leases_holder, exits_exit_id.
WITH moved AS (
  UPDATE leases l SET exit_epoch = e.toggle_epoch, exit_returns = true
  FROM exits e
  WHERE l.organization_id = $1 AND l.exit_id = ANY ($2::uuid[])
    AND e.organization_id = $1 AND e.exit_id = l.exit_id AND e.cap_mode = 2
  RETURNING l.exit_id
)
UPDATE exits e SET use_count = m.leases, cap = greatest(e.cap, m.leases)
FROM (SELECT exit_id, count(*)::integer AS leases FROM moved GROUP BY exit_id) m
WHERE e.organization_id = $1 AND e.exit_id = m.exit_id;

-- name: import_exits
-- One that stands, locked, keeps its counters and takes the other values; its cap never falls below the uses that count.
-- Needs the lock of imports, for no unique index would see the same endpoint made twice.
-- $1 organization, $2 ids in order of the endpoints, $3 endpoints, $4 regions, $5 modes, $6 caps, $7 window seconds.
-- Index: exits_endpoint.
WITH given AS MATERIALIZED (
  SELECT * FROM unnest($2::uuid[], $3::text[], $4::text[], $5::smallint[], $6::integer[], $7::integer[])
    AS u (exit_id, endpoint, region, cap_mode, cap, window_seconds)
), kept AS (
  UPDATE exits e
  SET region = g.region, cap = greatest(g.cap, e.use_count), window_seconds = g.window_seconds
  FROM given g
  WHERE e.organization_id = $1 AND e.endpoint = g.endpoint
)
INSERT INTO exits (exit_id, organization_id, endpoint, region, cap_mode, cap, window_seconds)
SELECT g.exit_id, $1, g.endpoint, g.region, g.cap_mode, g.cap, g.window_seconds
FROM given g
WHERE NOT EXISTS (SELECT FROM exits e WHERE e.organization_id = $1 AND e.endpoint = g.endpoint);

-- name: exits_by_endpoint
-- $1 organization, $2 endpoints. Index: exits_endpoint.
SELECT exit_id, endpoint, region, cap_mode, cap, window_seconds,
  CASE WHEN cap_mode = 3 AND window_ends_at <= now() THEN 0 ELSE use_count END AS use_count, toggle_epoch, enabled,
  toggled_at, created_at, nullif(window_ends_at, '-infinity') AS window_ends_at
FROM exits WHERE organization_id = $1 AND endpoint = ANY ($2::text[]);

-- name: exit_by_id
-- $1 organization, $2 exit. Index: exits_exit_id.
SELECT exit_id, endpoint, region, cap_mode, cap, window_seconds,
  CASE WHEN cap_mode = 3 AND window_ends_at <= now() THEN 0 ELSE use_count END AS use_count, toggle_epoch, enabled,
  toggled_at, created_at, nullif(window_ends_at, '-infinity') AS window_ends_at
FROM exits WHERE organization_id = $1 AND exit_id = $2;

-- name: page_of_exits
-- $1 organization, $2 after this id or NULL, $3 how many. An organization has hundreds at most: sorted.
SELECT exit_id, endpoint, region, cap_mode, cap, window_seconds,
  CASE WHEN cap_mode = 3 AND window_ends_at <= now() THEN 0 ELSE use_count END AS use_count, toggle_epoch, enabled,
  toggled_at, created_at, nullif(window_ends_at, '-infinity') AS window_ends_at
FROM exits WHERE organization_id = $1 AND ($2::uuid IS NULL OR exit_id > $2)
ORDER BY exit_id LIMIT $3;

-- name: set_exit_enabled
-- $1 organization, $2 exit, $3 enabled. Index: exits_exit_id.
UPDATE exits SET enabled = $3 WHERE organization_id = $1 AND exit_id = $2;

-- name: lock_exit
-- Holds an exit: who reserves it waits, and then sees what became of it. $1 organization, $2 exit. Index: exits_exit_id.
SELECT enabled FROM exits WHERE organization_id = $1 AND exit_id = $2 FOR UPDATE;

-- name: count_leases_of_exit
-- $1 organization, $2 exit. Index: leases_holder, by organization: there is none by exit, since only operators ask so.
SELECT count(*) FROM leases WHERE organization_id = $1 AND exit_id = $2;

-- name: delete_exit
-- Forgets a locked exit and its health. $1 organization, $2 exit. Index: exits_exit_id; primary key of exit_health.
WITH cleared AS (DELETE FROM exit_health WHERE organization_id = $1 AND exit_id = $2)
DELETE FROM exits WHERE organization_id = $1 AND exit_id = $2;

-- name: toggle_exit
-- Begins a new epoch, with the count at 0, and logs the toggle; no row when there is no such exit. A concurrent exit's
-- leases are to be moved after it. $1 organization, $2 exit, $3 toggle id, $4 actor, $5 reason. Index: exits_exit_id.
WITH before AS MATERIALIZED (
  SELECT exit_id, cap_mode, CASE WHEN cap_mode = 3 AND window_ends_at <= now() THEN 0 ELSE use_count END AS use_count
  FROM exits WHERE organization_id = $1 AND exit_id = $2 FOR UPDATE
), logged AS (
  INSERT INTO exit_toggle_logs (organization_id, toggled_at, toggle_id, exit_id, actor, reason, use_count_before)
  SELECT $1, statement_timestamp(), $3, exit_id, $4, $5, use_count FROM before
)
UPDATE exits e SET use_count = 0, toggle_epoch = e.toggle_epoch + 1, toggled_at = statement_timestamp(),
  window_ends_at = '-infinity'
FROM before b
WHERE e.organization_id = $1 AND e.exit_id = b.exit_id
RETURNING e.cap_mode;

-- name: page_of_toggles
-- Newest first. $1 organization, $2 exit or NULL, $3 before this time or NULL, $4 and id, $5 how many.
-- Index: primary key.
SELECT toggle_id, exit_id, toggled_at, actor, reason, use_count_before FROM exit_toggle_logs
WHERE organization_id = $1 AND ($2::uuid IS NULL OR exit_id = $2)
  AND ($3::timestamptz IS NULL OR (toggled_at, toggle_id) < ($3, $4::uuid))
ORDER BY toggled_at DESC, toggle_id DESC LIMIT $5;

-- name: sample_exits
-- Where every enabled exit stands. Of all organizations, for the forecast: an organization has hundreds at most.
SELECT e.organization_id, e.exit_id, e.region, e.cap_mode, e.cap, e.toggle_epoch,
  CASE WHEN e.cap_mode = 3 AND e.window_ends_at <= now() THEN 0 ELSE e.use_count END AS use_count
FROM exits e WHERE e.enabled;

-- name: pool
-- What enabled exits have left together, and the clock. $1 organization, $2 region or NULL for all.
-- Index: exits_endpoint.
SELECT coalesce(sum(room), 0)::bigint AS room, coalesce(sum(cap), 0)::bigint AS capacity, now() AS at
FROM exits_now($1) WHERE enabled AND ($2::text IS NULL OR region = $2);
