-- Statistics of weeks that are over.

-- name: weeks_due
-- Weeks that are over and were not computed yet, or are to be computed again: the last five, once a day, since a result
-- is accepted from quarantine into the last 28 days at most (`accept_results`), and the week of that may have been the
-- fourth last a day ago. Only weeks within the last 90 days, whose results the archive leaves in place unless it is told
-- otherwise. The newest first. $1 how many. Over all organizations, as the clock's work. Index: weekly_statistics_whole.
SELECT o.organization_id, w.week
FROM organizations o
CROSS JOIN LATERAL (SELECT date_trunc('week', now() AT TIME ZONE o.time_zone)::date AS monday) this
CROSS JOIN LATERAL (SELECT n, this.monday - 7 * n AS week FROM generate_series(1, 12) AS n) w
LEFT JOIN weekly_statistics s ON s.organization_id = o.organization_id AND s.week = w.week AND s.client_id = ''
  AND s.week >= (now() AT TIME ZONE 'UTC')::date - 98
WHERE w.week::timestamp AT TIME ZONE o.time_zone >= now() - interval '90 days'
  AND (s.week IS NULL OR w.n <= 5 AND s.computed_at <= now() - interval '1 day')
ORDER BY w.week DESC, o.organization_id
LIMIT $1;

-- name: compute_week
-- Computes one week by client and as a whole, in place of what stands. Of two that compute it at once, the one that
-- began later stays. Reads the results of the week and no others: partitions are left out by time, rows by the primary
-- key, whose second column is the time. $1 organization, $2 its Monday. Index: primary keys.
-- Results are only ever added, so fewer than stand mean that the archive has taken some: then what stands is kept, and
-- is looked at again a day later. Or the organization has moved to another time zone, which takes results to another
-- week, but not further than the 26 hours between the first midnight of a day on earth and the last.
WITH bounds AS MATERIALIZED (
  SELECT $2::date::timestamp AT TIME ZONE time_zone AS begins, ($2::date + 7)::timestamp AT TIME ZONE time_zone AS ends
  FROM organizations WHERE organization_id = $1
), counted AS MATERIALIZED (
  SELECT CASE WHEN grouping(client_id) = 1 THEN '' ELSE client_id END AS client_id, count(*) AS results,
    count(*) FILTER (WHERE outcome = 2) AS succeeded, count(*) FILTER (WHERE outcome = 3) AS failed,
    count(*) FILTER (WHERE outcome = 4) AS blocked, coalesce(sum(execution_time_ms), 0) AS execution_ms
  FROM work_results
  WHERE organization_id = $1 AND created_at >= (SELECT begins FROM bounds) AND created_at < (SELECT ends FROM bounds)
  GROUP BY GROUPING SETS ((client_id), ())
), standing AS MATERIALIZED (
  SELECT client_id, results, succeeded, failed, blocked, execution_ms FROM weekly_statistics
  WHERE organization_id = $1 AND week = $2
), taken AS MATERIALIZED (
  SELECT count(*) > 0 AS lost FROM standing s
  WHERE s.client_id = '' AND s.results > (SELECT results FROM counted WHERE client_id = '')
    AND s.results > (SELECT count(*) FROM work_results WHERE organization_id = $1
      AND created_at >= (SELECT begins - interval '26 hours' FROM bounds)
      AND created_at < (SELECT ends + interval '26 hours' FROM bounds))
), gone AS (
  -- Clients whose results lie in another week since the organization's time zone changed.
  DELETE FROM weekly_statistics s
  WHERE s.organization_id = $1 AND s.week = $2 AND s.computed_at <= now() AND NOT (SELECT lost FROM taken)
    AND NOT EXISTS (SELECT FROM counted c WHERE c.client_id = s.client_id)
)
INSERT INTO weekly_statistics AS s (organization_id, week, client_id, results, succeeded, failed, blocked, execution_ms,
  computed_at)
SELECT $1, $2, client_id, results, succeeded, failed, blocked, execution_ms, now()
FROM (
  SELECT * FROM counted WHERE NOT (SELECT lost FROM taken)
  UNION ALL SELECT * FROM standing WHERE (SELECT lost FROM taken)
) w
ORDER BY client_id
ON CONFLICT (organization_id, week, client_id) DO UPDATE
SET results = excluded.results, succeeded = excluded.succeeded, failed = excluded.failed, blocked = excluded.blocked,
  execution_ms = excluded.execution_ms, computed_at = excluded.computed_at
WHERE s.computed_at <= excluded.computed_at;

-- name: page_of_weeks
-- Newest first, by client within a week. $1 organization, $2 a day of the only week or NULL, $3 the only client or NULL,
-- $4 after this week or NULL, $5 and client, $6 how many. Index: primary key backwards.
SELECT week, client_id, results, succeeded, failed, blocked, execution_ms, computed_at
FROM weekly_statistics
WHERE organization_id = $1 AND results > 0 AND ($2::date IS NULL OR week = date_trunc('week', $2::date)::date)
  AND ($3::text IS NULL OR client_id = $3)
  AND ($4::date IS NULL OR week <= $4 AND (week < $4 OR client_id > $5::text))
ORDER BY week DESC, client_id LIMIT $6;
