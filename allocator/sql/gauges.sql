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

-- name: clients
-- Read once a minute. $1 the seconds of silence after which a client is offline. Of those only the ones count that were
-- not told to drain and have an instance on record that spoke within a day; one that said goodbye has gone from it: who
-- goes on purpose is not missed. Index: clients_last_seen_at, primary key of client_instances.
SELECT
  (SELECT count(*) FROM clients WHERE last_seen_at > now() - $1::float8 * interval '1 second') AS clients_online,
  (SELECT count(*) FROM clients c WHERE c.last_seen_at <= now() - $1::float8 * interval '1 second'
    AND c.last_seen_at > now() - interval '1 day' AND NOT c.draining
    AND EXISTS (SELECT FROM client_instances i WHERE i.organization_id = c.organization_id
      AND i.client_id = c.client_id AND i.last_seen_at > now() - interval '1 day')) AS clients_offline;

-- name: active_slots
-- Read once a minute, or where that takes seconds more rarely. Index: work_slots_active.
SELECT count(*) AS active_slots FROM work_slots s JOIN organizations o USING (organization_id)
WHERE s.is_active AND (now() AT TIME ZONE o.time_zone)::date BETWEEN s.start_date AND s.end_date;
