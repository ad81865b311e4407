-- Reports for people. All are bound to one organization and read no more than the time that they report on: partitions
-- are left out by time, rows by the primary key, whose second column is the time.

-- name: today_of_organization
-- $1 organization. Index: primary key.
SELECT (now() AT TIME ZONE time_zone)::date FROM organizations WHERE organization_id = $1;

-- name: page_of_dashboard
-- One day by completion, highest first; the rate is compared in whole millionths, so that pages meet exactly.
-- $1 organization, $2 day, $3 after this rate or NULL, $4 and slot, $5 how many. Reads the rows of the day. Index:
-- daily_work_tracking_slot, primary key of work_slots.
SELECT slot_id, keyword, work_date, quota, allocated, succeeded, failed, blocked, expired, released,
  round(completion_rate * 1e6)::bigint AS rate
FROM work_dashboard
WHERE organization_id = $1 AND work_date = $2
  AND ($3::bigint IS NULL OR round(completion_rate * 1e6)::bigint < $3
    OR round(completion_rate * 1e6)::bigint = $3 AND slot_id > $4::uuid)
ORDER BY rate DESC, slot_id LIMIT $5;

-- name: client_performance
-- One day's reports by client, most first. A client that was purged since has no name. $1 organization, $2 day, $3 how
-- many. Index: primary keys.
WITH bounds AS MATERIALIZED (
  SELECT $2::date::timestamp AT TIME ZONE time_zone AS begins, ($2::date + 1)::timestamp AT TIME ZONE time_zone AS ends
  FROM organizations WHERE organization_id = $1
)
SELECT r.client_id, coalesce(c.client_name, '') AS client_name, coalesce(c.client_ip, '') AS client_ip,
  r.active_instances, r.tasks, r.mean_execution_ms, r.succeeded
FROM (
  SELECT client_id, count(DISTINCT instance_number) AS active_instances, count(*) AS tasks,
    avg(execution_time_ms)::double precision AS mean_execution_ms, count(*) FILTER (WHERE status = 2) AS succeeded
  FROM client_activity_logs
  WHERE organization_id = $1 AND reported_at >= (SELECT begins FROM bounds) AND reported_at < (SELECT ends FROM bounds)
  GROUP BY client_id
  ORDER BY tasks DESC, client_id LIMIT $3
) r
LEFT JOIN clients c ON c.organization_id = $1 AND c.client_id = r.client_id
ORDER BY r.tasks DESC, r.client_id;

-- name: settings_effect
-- Results by the settings that were applied, best first: since the organization's midnight 7 days ago, as the documents
-- have it, groups of at least 10. $1 organization, $2 names of the settings that tell groups apart, or none for all,
-- $3 target or NULL, $4 how many. Index: primary key, or work_results_target.
WITH bounds AS MATERIALIZED (
  SELECT ((now() AT TIME ZONE time_zone)::date - 7)::timestamp AT TIME ZONE time_zone AS begins FROM organizations
  WHERE organization_id = $1
),
-- First as they are, since there are few combinations, and only then with the names that were asked for.
combinations AS (
  SELECT applied_settings, count(*) AS results, count(*) FILTER (WHERE outcome = 2) AS succeeded,
    sum(execution_time_ms) AS milliseconds
  FROM work_results
  WHERE organization_id = $1 AND created_at >= (SELECT begins FROM bounds) AND ($3::text IS NULL OR target = $3)
  GROUP BY applied_settings
)
SELECT settings::text AS settings, sum(results)::bigint AS results, sum(succeeded)::bigint AS succeeded,
  (sum(milliseconds) / sum(results))::double precision AS mean_execution_ms
FROM (
  SELECT CASE WHEN cardinality($2::text[]) = 0 THEN c.applied_settings ELSE n.settings END AS settings, c.results,
    c.succeeded, c.milliseconds
  FROM combinations c
  CROSS JOIN LATERAL (SELECT coalesce(jsonb_object_agg(e.key, e.value), '{}') AS settings
    FROM jsonb_each(c.applied_settings) e WHERE e.key = ANY ($2::text[])) n
) g
GROUP BY g.settings
HAVING sum(results) >= 10
ORDER BY sum(succeeded)::numeric / sum(results) DESC, sum(results) DESC, g.settings::text LIMIT $4;

-- name: block_report
-- The last hour's blocked results by type, most first. $1 organization, $2 how many. Index: primary key.
SELECT block_type, count(*) AS count, count(DISTINCT client_id) AS affected_clients
FROM work_results
WHERE organization_id = $1 AND created_at >= now() - interval '1 hour' AND is_blocked
GROUP BY block_type ORDER BY count DESC, block_type LIMIT $2;

-- name: client_activity
-- What was reported in the last hour, by client. $1 organization, $2 client or NULL, $3 address or NULL, $4 how many.
-- Index: primary key.
SELECT client_id, max(reported_at) AS last_activity, count(DISTINCT instance_number) AS instances_used,
  count(DISTINCT user_folder_number) AS folders_used, count(*) AS reports
FROM client_activity_logs
WHERE organization_id = $1 AND reported_at >= now() - interval '1 hour'
  AND ($2::text IS NULL OR client_id = $2) AND ($3::text IS NULL OR client_ip = $3)
GROUP BY client_id ORDER BY client_id LIMIT $4;
