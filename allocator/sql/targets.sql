-- Politeness and back-off. Rows are locked by name, after leases and before daily_work_tracking.

-- name: standing_of_targets
-- How targets stand of which results came, and the block rate of those that may be paused: of the results since
-- counted_from in the window, the latest so many. Locks nothing. $1 organization, $2 targets, $3 their slots, NULL for
-- those with a name, $4 whether to count, $5 how many, $6 window in seconds. Index: primary key; work_results_target;
-- work_results_slot.
SELECT u.target, coalesce(t.crawl_delay_ms, 0) AS crawl_delay_ms, t.counted_from, c.counts, r.results,
  r.blocked
FROM unnest($2::text[], $3::uuid[], $4::boolean[], $5::bigint[]) AS u (target, slot_id, counts, at_most)
LEFT JOIN targets t ON t.organization_id = $1 AND t.target = u.target
CROSS JOIN LATERAL (
  SELECT greatest(t.counted_from, statement_timestamp() - $6::float8 * interval '1 second') AS since,
    u.counts AND t.paused_at IS NULL AND coalesce(t.auto_pause, true) AS counts
) c
CROSS JOIN LATERAL (
  SELECT count(*) AS results, count(*) FILTER (WHERE l.is_blocked) AS blocked
  FROM (
    (SELECT w.is_blocked FROM work_results w
    WHERE c.counts AND u.slot_id IS NULL AND w.organization_id = $1 AND w.target = u.target AND w.target <> ''
      AND w.created_at > c.since
    ORDER BY w.created_at DESC LIMIT u.at_most)
    UNION ALL
    (SELECT w.is_blocked FROM work_results w
    WHERE c.counts AND u.slot_id IS NOT NULL AND w.organization_id = $1 AND w.slot_id = u.slot_id AND w.target = ''
      AND w.created_at > c.since
    ORDER BY w.created_at DESC LIMIT u.at_most)
  ) l
) r;

-- name: lock_targets
-- Locks targets by name, and makes those that are not on record. $1 organization, $2 targets. Index: primary key.
INSERT INTO targets (organization_id, target) SELECT $1, u.target FROM unnest($2::text[]) AS u (target) ORDER BY u.target
ON CONFLICT (organization_id, target) DO UPDATE SET updated_at = statement_timestamp();

-- name: move_targets
-- Moves locked targets by what results say. A pause is only begun by figures of the time since the last resumption, and
-- only the probe that is out ends one or prolongs it. $1 organization, $2 targets, $3 retry-after in milliseconds or
-- NULL, $4 crawl delays in milliseconds or NULL, $5 reasons to pause or NULL, $6 counted_from of those figures, $7 keys
-- of probes or NULL, $8 whether they were blocked, $9 first wait for a probe and $10 the longest, in seconds. Returns
-- what stopped or goes on. Index: primary key.
UPDATE targets t
SET blocked_until = greatest(t.blocked_until, m.held_until),
  crawl_delay_ms = coalesce(m.crawl_delay_ms, t.crawl_delay_ms),
  paused_at = CASE WHEN m.is_good THEN NULL WHEN m.begins THEN statement_timestamp() ELSE t.paused_at END,
  pauses = CASE WHEN m.is_good THEN 0 WHEN m.begins OR m.is_bad THEN t.pauses + 1 ELSE t.pauses END,
  probe_at = CASE WHEN m.is_good THEN NULL
    WHEN m.begins OR m.is_bad THEN statement_timestamp()
      + least($10::float8, $9::float8 * power(2, least(t.pauses, 30))) * interval '1 second'
    ELSE t.probe_at END,
  probe_key = CASE WHEN m.is_good OR m.is_bad THEN NULL ELSE t.probe_key END,
  counted_from = CASE WHEN m.is_good THEN statement_timestamp() ELSE t.counted_from END,
  reason = CASE WHEN m.begins THEN m.pause WHEN m.is_bad THEN 'the probe was blocked'
    WHEN m.held_until > t.blocked_until AND (t.paused_at IS NULL OR m.is_good) THEN m.hold
    WHEN NOT m.is_good THEN t.reason
    WHEN t.blocked_until > statement_timestamp() THEN 'held while it was paused' ELSE '' END
FROM (
  SELECT s.target, u.crawl_delay_ms, u.pause,
    statement_timestamp() + u.retry_after_ms * interval '1 millisecond' AS held_until,
    format('the target asked to be left alone for %s s', round(u.retry_after_ms / 1000.0)) AS hold,
    u.pause IS NOT NULL AND s.paused_at IS NULL AND s.auto_pause
      AND s.counted_from = coalesce(u.counted_from, s.counted_from) AS begins,
    coalesce(s.probe_key = u.probe_key AND NOT u.probe_blocked, false) AS is_good,
    coalesce(s.probe_key = u.probe_key AND u.probe_blocked, false) AS is_bad
  FROM unnest($2::text[], $3::integer[], $4::integer[], $5::text[], $6::timestamptz[], $7::uuid[], $8::boolean[])
    AS u (target, retry_after_ms, crawl_delay_ms, pause, counted_from, probe_key, probe_blocked)
  JOIN targets s ON s.organization_id = $1 AND s.target = u.target
) m
WHERE t.organization_id = $1 AND t.target = m.target
RETURNING t.target, t.reason, m.begins, m.is_good, m.is_bad,
  m.held_until IS NOT NULL AND m.held_until = t.blocked_until AS is_held;

-- name: set_target_policy
-- $1 organization, $2 target, $3 most in flight or NULL, $4 least delay in milliseconds, $5 auto-pause. Index: primary
-- key.
INSERT INTO targets (organization_id, target, max_in_flight, min_delay_ms, auto_pause) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (organization_id, target) DO UPDATE
SET max_in_flight = excluded.max_in_flight, min_delay_ms = excluded.min_delay_ms, auto_pause = excluded.auto_pause,
  updated_at = statement_timestamp();

-- name: hold_target
-- $1 organization, $2 target, $3 seconds from now, $4 why. Index: primary key.
INSERT INTO targets (organization_id, target, blocked_until, reason)
VALUES ($1, $2, statement_timestamp() + $3::float8 * interval '1 second', $4)
ON CONFLICT (organization_id, target) DO UPDATE
SET blocked_until = excluded.blocked_until, reason = excluded.reason, updated_at = statement_timestamp();

-- name: resume_target
-- Returns a row if the target is on record. $1 organization, $2 target. Index: primary key.
UPDATE targets
SET blocked_until = '-infinity', paused_at = NULL, probe_at = NULL, probe_key = NULL, pauses = 0,
  counted_from = statement_timestamp(), reason = '', updated_at = statement_timestamp()
WHERE organization_id = $1 AND target = $2
RETURNING target;

-- name: page_of_targets
-- $1 organization, $2 the target after which the page begins or NULL, $3 only those that are stopped, $4 size, $5 only
-- this one or NULL. Index: primary key; leases_target.
SELECT t.target, t.max_in_flight, t.min_delay_ms, t.auto_pause, t.crawl_delay_ms,
  CASE WHEN t.blocked_until > statement_timestamp() THEN t.blocked_until END AS held_until, t.paused_at, t.probe_at,
  t.pauses, CASE WHEN t.max_in_flight IS NULL THEN 0 ELSE (SELECT count(*) FROM leases l WHERE l.organization_id = $1
    AND l.target = t.target AND l.target <> '' AND l.expires_at > statement_timestamp()) END AS in_flight,
  CASE WHEN t.paused_at IS NULL AND t.blocked_until <= statement_timestamp() THEN '' ELSE t.reason END AS reason
FROM targets t
WHERE t.organization_id = $1 AND t.target > coalesce($2::text, '') AND ($5::text IS NULL OR t.target = $5)
  AND (NOT $3::boolean OR t.paused_at IS NOT NULL OR t.blocked_until > statement_timestamp())
ORDER BY t.target LIMIT $4;

-- name: stopped_targets
-- For the gauges; over all organizations. Few rows: a target is on record when something was said of it.
SELECT count(*) FILTER (WHERE paused_at IS NOT NULL) AS paused,
  count(*) FILTER (WHERE blocked_until > statement_timestamp()) AS held
FROM targets;
