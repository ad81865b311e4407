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
-- Moves locked targets by what results say. A block rate only begins a pause by figures of the time since the last
-- resumption; a Retry-After holds and begins one, whose probe may go out when it has passed. Only the probe that is out
-- ends a pause or doubles the wait, and it ends none that a Retry-After has prolonged since. $1 organization,
-- $2 targets, $3 retry-after in milliseconds or NULL, $4 crawl delays in milliseconds or NULL, $5 reasons to pause or
-- NULL, $6 counted_from of those figures, $7 keys of probes or NULL, $8 whether they went well, NULL when they say
-- nothing of the target, $9 first wait for a probe and $10 the longest, in seconds. Returns what stopped or goes on.
-- Index: primary key.
UPDATE targets t
SET blocked_until = greatest(t.blocked_until, m.held_until),
  crawl_delay_ms = m.crawl_delay_ms,
  -- A delay that became shorter is in force from now on.
  next_at = least(t.next_at, statement_timestamp()
    + greatest(t.min_delay_ms, m.crawl_delay_ms) * interval '1 millisecond'),
  paused_at = CASE WHEN m.is_good THEN NULL WHEN m.begins THEN statement_timestamp() ELSE t.paused_at END,
  pauses = CASE WHEN m.is_good THEN 0 WHEN m.begins OR m.is_bad THEN t.pauses + 1 ELSE t.pauses END,
  probe_at = CASE WHEN m.is_good THEN NULL
    WHEN m.begins OR t.paused_at IS NOT NULL THEN greatest(t.probe_at, m.held_until,
      CASE WHEN m.is_blocking OR m.is_bad THEN statement_timestamp()
        + least($10::float8, $9::float8 * power(2, least(t.pauses, 30))) * interval '1 second' END) END,
  probe_key = CASE WHEN m.is_probe THEN NULL ELSE t.probe_key END,
  counted_from = CASE WHEN m.is_good THEN statement_timestamp() ELSE t.counted_from END,
  reason = CASE WHEN m.is_blocking THEN m.pause
    WHEN m.held_until > greatest(t.blocked_until, t.probe_at) THEN m.hold
    WHEN m.is_bad THEN 'the probe was refused'
    WHEN NOT m.is_good THEN t.reason
    WHEN t.blocked_until > statement_timestamp() THEN 'held while it was paused' ELSE '' END
FROM (
  SELECT s.target, coalesce(u.crawl_delay_ms, s.crawl_delay_ms) AS crawl_delay_ms, u.pause, h.held_until,
    format('the target asked to be left alone for %s s', round(u.retry_after_ms / 1000.0)) AS hold, h.is_blocking,
    h.is_blocking OR (h.held_until IS NOT NULL AND s.paused_at IS NULL AND s.auto_pause) AS begins, h.is_probe,
    h.is_probe AND coalesce(u.went_well, false) AND h.held_until IS NULL AND s.probe_at <= statement_timestamp()
      AS is_good,
    h.is_probe AND NOT coalesce(u.went_well, true) AS is_bad
  FROM unnest($2::text[], $3::integer[], $4::integer[], $5::text[], $6::timestamptz[], $7::uuid[], $8::boolean[])
    AS u (target, retry_after_ms, crawl_delay_ms, pause, counted_from, probe_key, went_well)
  JOIN targets s ON s.organization_id = $1 AND s.target = u.target
  CROSS JOIN LATERAL (
    SELECT statement_timestamp() + u.retry_after_ms * interval '1 millisecond' AS held_until,
      coalesce(s.probe_key = u.probe_key, false) AS is_probe,
      u.pause IS NOT NULL AND s.paused_at IS NULL AND s.auto_pause
        AND s.counted_from = coalesce(u.counted_from, s.counted_from) AS is_blocking
  ) h
) m
WHERE t.organization_id = $1 AND t.target = m.target
RETURNING t.target, t.reason, m.begins, m.is_good, m.is_bad, m.is_probe AND NOT m.is_good AND NOT m.is_bad AS is_void,
  m.held_until IS NOT NULL AND m.held_until = t.blocked_until AS is_held;

-- name: set_target_policy
-- A delay that became shorter is in force from now on. $1 organization, $2 target, $3 most in flight or NULL, $4 least
-- delay in milliseconds, $5 auto-pause. Index: primary key.
INSERT INTO targets AS t (organization_id, target, max_in_flight, min_delay_ms, auto_pause) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (organization_id, target) DO UPDATE
SET max_in_flight = excluded.max_in_flight, min_delay_ms = excluded.min_delay_ms, auto_pause = excluded.auto_pause,
  next_at = least(t.next_at,
    statement_timestamp() + greatest(excluded.min_delay_ms, t.crawl_delay_ms) * interval '1 millisecond'),
  updated_at = statement_timestamp();

-- name: hold_target
-- $1 organization, $2 target, $3 seconds from now, $4 why. Index: primary key.
INSERT INTO targets (organization_id, target, blocked_until, reason)
VALUES ($1, $2, statement_timestamp() + $3::float8 * interval '1 second', $4)
ON CONFLICT (organization_id, target) DO UPDATE
SET blocked_until = excluded.blocked_until, reason = excluded.reason, updated_at = statement_timestamp();

-- name: resume_target
-- Takes back all but the policy. Returns a row if the target is on record. $1 organization, $2 target. Index: primary
-- key.
UPDATE targets
SET blocked_until = '-infinity', paused_at = NULL, probe_at = NULL, probe_key = NULL, pauses = 0, crawl_delay_ms = 0,
  next_at = '-infinity', counted_from = statement_timestamp(), reason = '', updated_at = statement_timestamp()
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
-- For the gauges; over all organizations. Few rows: forget_targets sees to it.
SELECT count(*) FILTER (WHERE paused_at IS NOT NULL) AS paused,
  count(*) FILTER (WHERE blocked_until > statement_timestamp()) AS held
FROM targets;

-- name: forget_targets
-- Forgets targets of which nothing is in force and was not for a day, the longest time within which results count, so
-- that counted_from says nothing either. Over all organizations, as the clock's work; passes over rows that are in use.
-- $1 at most. Reads the table.
DELETE FROM targets t
USING (
  SELECT organization_id, target FROM targets
  WHERE max_in_flight IS NULL AND min_delay_ms = 0 AND auto_pause AND crawl_delay_ms = 0 AND paused_at IS NULL
    AND blocked_until <= statement_timestamp() AND updated_at < statement_timestamp() - interval '1 day'
  ORDER BY organization_id, target
  LIMIT $1
  FOR UPDATE SKIP LOCKED
) f
WHERE t.organization_id = f.organization_id AND t.target = f.target;
