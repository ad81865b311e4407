-- What the metrics show of the whole service: over all organizations, and bound to none.

-- name: gauges
-- Read every few seconds. Small tables only: leases that live, what waits, and what is in quarantine.
SELECT l.live_leases, l.overdue_leases,
  (SELECT count(*) FROM outbox) AS outbox_pending,
  coalesce((SELECT extract(epoch FROM clock_timestamp() - min(created_at)) FROM outbox), 0)::float8 AS outbox_seconds,
  (SELECT count(*) FROM quarantined_results) AS quarantined
FROM (
  SELECT count(*) AS live_leases,
    count(*) FILTER (WHERE expires_at < clock_timestamp() - interval '1 minute') AS overdue_leases
  FROM leases
) l;

-- name: slow_gauges
-- Read once a minute. $1 the seconds of silence after which a client is offline; of those only the ones count that spoke
-- within a day and were not told to drain: who goes on purpose is not missed. Index: work_slots_active, clients_last_seen_at.
SELECT
  (SELECT count(*) FROM work_slots s JOIN organizations o USING (organization_id)
    WHERE s.is_active AND (now() AT TIME ZONE o.time_zone)::date BETWEEN s.start_date AND s.end_date) AS active_slots,
  (SELECT count(*) FROM clients WHERE last_seen_at > now() - $1::float8 * interval '1 second') AS clients_online,
  (SELECT count(*) FROM clients WHERE last_seen_at <= now() - $1::float8 * interval '1 second'
    AND last_seen_at > now() - interval '1 day' AND NOT draining) AS clients_offline;
