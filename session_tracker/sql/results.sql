-- Statements on the schema "session_tracker".

-- name: record_results
-- Records results that are not on record yet, and returns those. Arrays of equal length, one entry for each result:
-- $1 organization, $2 session, $3 status, $4 stage, $5 pages, $6 products, $7 errors, $8 start, $9 snapshot as JSON text
-- or NULL, $10 slot, $11 client, $12 message. In key order, so that two replicas do not lock each other out; a session
-- that stands twice in the arrays is recorded by its first entry. Their checkpoints go with it. Index: primary keys.
WITH forgotten AS (
  DELETE FROM session_checkpoints
  WHERE (organization_id, session_id) IN (
    SELECT organization_id, session_id
    FROM session_checkpoints
    JOIN unnest($1::uuid[], $2::text[]) AS ended (organization_id, session_id) USING (organization_id, session_id)
    ORDER BY organization_id, session_id
    FOR UPDATE OF session_checkpoints)
)
INSERT INTO crawling_results (
  organization_id, session_id, status, stage, total_pages, products_found, errors_count, started_at, completed_at,
  execution_time_seconds, config_snapshot, slot_id, client_id, message)
SELECT
  organization_id, session_id, status, stage, total_pages, products_found, errors_count, started_at, now(),
  greatest(0, extract(epoch FROM now() - started_at)), config_snapshot::jsonb, slot_id, client_id, message
FROM unnest(
  $1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[], $8::timestamptz[],
  $9::text[], $10::text[], $11::text[], $12::text[])
WITH ORDINALITY AS given (
  organization_id, session_id, status, stage, total_pages, products_found, errors_count, started_at,
  config_snapshot, slot_id, client_id, message, place)
ORDER BY organization_id, session_id, place
ON CONFLICT (organization_id, session_id) DO NOTHING
RETURNING organization_id, session_id, status, stage, total_pages, products_found, errors_count, started_at,
  completed_at, execution_time_seconds, config_snapshot::text AS config_snapshot, slot_id, client_id, message;

-- name: find_results
-- The results on record of some sessions. $1 organizations, $2 sessions: arrays of equal length. Index: primary key.
SELECT organization_id, session_id, status, stage, total_pages, products_found, errors_count, started_at,
  completed_at, execution_time_seconds, config_snapshot::text AS config_snapshot, slot_id, client_id, message
FROM unnest($1::uuid[], $2::text[]) AS wanted (organization_id, session_id)
JOIN crawling_results USING (organization_id, session_id);

-- name: list_results
-- A page, newest first. $1 organization, $2 status or NULL, $3 not before, $4 before (both or NULL), $5 and $6 the
-- completion and session of the last row before the page, or NULL, $7 rows. Index: crawling_results_newest.
SELECT organization_id, session_id, status, stage, total_pages, products_found, errors_count, started_at,
  completed_at, execution_time_seconds, config_snapshot::text AS config_snapshot, slot_id, client_id, message
FROM crawling_results
WHERE organization_id = $1
  AND ($2::text IS NULL OR status = $2)
  AND completed_at >= coalesce($3::timestamptz, '-infinity')
  AND completed_at < coalesce($4::timestamptz, 'infinity')
  AND (completed_at, session_id) < (coalesce($5::timestamptz, 'infinity'), coalesce($6::text, ''))
ORDER BY completed_at DESC, session_id DESC
LIMIT $7;

-- name: list_results_of_slot
-- As list_results, of one slot only: $8, not empty; and of one client: $9 or NULL. Index: crawling_results_of_slot.
SELECT organization_id, session_id, status, stage, total_pages, products_found, errors_count, started_at,
  completed_at, execution_time_seconds, config_snapshot::text AS config_snapshot, slot_id, client_id, message
FROM crawling_results
WHERE organization_id = $1 AND slot_id = $8 AND slot_id <> ''
  AND ($9::text IS NULL OR client_id = $9)
  AND ($2::text IS NULL OR status = $2)
  AND completed_at >= coalesce($3::timestamptz, '-infinity')
  AND completed_at < coalesce($4::timestamptz, 'infinity')
  AND (completed_at, session_id) < (coalesce($5::timestamptz, 'infinity'), coalesce($6::text, ''))
ORDER BY completed_at DESC, session_id DESC
LIMIT $7;

-- name: list_results_of_client
-- As list_results, of one client only: $8, not empty. Index: crawling_results_of_client.
SELECT organization_id, session_id, status, stage, total_pages, products_found, errors_count, started_at,
  completed_at, execution_time_seconds, config_snapshot::text AS config_snapshot, slot_id, client_id, message
FROM crawling_results
WHERE organization_id = $1 AND client_id = $8 AND client_id <> ''
  AND ($2::text IS NULL OR status = $2)
  AND completed_at >= coalesce($3::timestamptz, '-infinity')
  AND completed_at < coalesce($4::timestamptz, 'infinity')
  AND (completed_at, session_id) < (coalesce($5::timestamptz, 'infinity'), coalesce($6::text, ''))
ORDER BY completed_at DESC, session_id DESC
LIMIT $7;
