-- Statements on the schema "session_tracker".

-- name: save_checkpoints
-- Writes where sessions stand. Arrays of equal length, one entry for each session, each once: $1 organization, $2 session,
-- $3 description, empty when the one on record stands, $4 sequence, $5 pages, $6 total, $7 products, $8 errors, $9 time of
-- report. In key order, so that two replicas do not lock each other out; the greater sequence stands. Index: primary key.
INSERT INTO session_checkpoints AS saved (
  organization_id, session_id, described, sequence, current_page, total_pages, products_found, errors_count, reported_at)
SELECT
  organization_id, session_id, described, sequence, current_page, total_pages, products_found, errors_count, reported_at
FROM unnest(
  $1::uuid[], $2::text[], $3::text[], $4::numeric[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[],
  $9::timestamptz[])
AS given (
  organization_id, session_id, described, sequence, current_page, total_pages, products_found, errors_count, reported_at)
ORDER BY organization_id, session_id
ON CONFLICT (organization_id, session_id) DO UPDATE SET
  described = coalesce(nullif(EXCLUDED.described, ''), saved.described),
  sequence = EXCLUDED.sequence,
  current_page = EXCLUDED.current_page,
  total_pages = EXCLUDED.total_pages,
  products_found = EXCLUDED.products_found,
  errors_count = EXCLUDED.errors_count,
  reported_at = EXCLUDED.reported_at,
  saved_at = now()
WHERE saved.sequence <= EXCLUDED.sequence;

-- name: forget_checkpoints
-- Deletes checkpoints. $1 organizations, $2 sessions: arrays of equal length. Index: primary key.
DELETE FROM session_checkpoints
WHERE (organization_id, session_id) IN (SELECT * FROM unnest($1::uuid[], $2::text[]));

-- name: forget_completed_checkpoints
-- Deletes checkpoints of sessions whose result is on record: one that was being saved while its session was completed.
DELETE FROM session_checkpoints AS saved
WHERE EXISTS (
  SELECT FROM crawling_results AS result
  WHERE result.organization_id = saved.organization_id AND result.session_id = saved.session_id);

-- name: read_checkpoints
-- A page of all checkpoints, in key order: after $1 organization and $2 session, at most $3. Index: primary key.
SELECT
  organization_id, session_id, described, sequence, current_page, total_pages, products_found, errors_count, reported_at
FROM session_checkpoints
WHERE (organization_id, session_id) > ($1, $2)
ORDER BY organization_id, session_id
LIMIT $3;
