-- How leases live and end. All are bound to one organization. Rows are locked in the order leases (by key),
-- work_allocations (by key), targets (by name), daily_work_tracking (by day and slot), exits (by id), by every
-- transaction.
-- A lease is looked up by its key, however few there were when the plan was made: IS TRUE keeps the planner off the
-- indexes that begin with the organization, and = ANY (ARRAY[key]) from joining all leases.
-- Days that come from a join are written = ANY (array_fill(day, '{1}')), of which the planner makes no pruning of
-- partitions while the statement runs: PostgreSQL 18.6 falls over when such a plan looks again at a row that moved on.

-- name: renew_leases
-- Moves the expiry of live leases that the caller proves to hold. $1 organization, $2 keys, $3 tokens, $4 duration in
-- seconds. Index: primary key. Stays within the page: no changed column is indexed.
WITH held AS MATERIALIZED (
  SELECT l.allocation_key
  FROM unnest($2::uuid[], $3::uuid[]) AS u (key, token)
  JOIN leases l ON (l.organization_id = $1) IS TRUE AND l.allocation_key = ANY (ARRAY[u.key])
    AND l.lease_token = u.token
  WHERE l.expires_at > clock_timestamp() AND l.expires_at < l.renewable_until
  ORDER BY u.key
  FOR UPDATE OF l
)
UPDATE leases l
SET expires_at = greatest(l.expires_at,
  least(l.renewable_until, statement_timestamp() + $4::float8 * interval '1 second'))
FROM held h
WHERE (l.organization_id = $1) IS TRUE AND l.allocation_key = ANY (ARRAY[h.allocation_key])
RETURNING l.allocation_key, l.lease_token, l.expires_at, l.client_id, l.instance_number;

-- name: lock_leases
-- Locks leases in key order. $1 organization, $2 keys. Index: primary key.
SELECT allocation_key, lease_token, work_date, slot_id, exit_id, exit_epoch, persona_need IS NOT NULL AS needs_persona,
  persona_id, client_id, instance_number, traceparent, granted_at, expires_at, renewable_until,
  expires_at > clock_timestamp() AS is_live, target, exit_returns, exit_provider, exit_ip
FROM leases WHERE (organization_id = $1) IS TRUE AND allocation_key = ANY ($2::uuid[])
ORDER BY allocation_key
FOR UPDATE;

-- name: leases_of_instance
-- $1 organization, $2 client, $3 instance, $4 only if it was silent for so many seconds, or NULL. Index: leases_holder.
SELECT allocation_key FROM leases WHERE organization_id = $1 AND client_id = $2 AND instance_number = $3
  AND ($4::float8 IS NULL OR EXISTS (SELECT FROM client_instances i
    WHERE i.organization_id = $1 AND i.client_id = $2 AND i.instance_number = $3
      AND i.last_seen_at < statement_timestamp() - $4 * interval '1 second'));

-- name: find_ended
-- Allocations that have ended. $1 organization, $2 keys, $3 the days that their keys allow: the only partitions looked
-- into. Index: primary key.
SELECT allocation_key, lease_token, work_date, slot_id, exit_id, persona_id, client_id, instance_number, traceparent,
  status, late, recorded_at, quarantined
FROM work_allocations
WHERE organization_id = $1 AND work_date = ANY ($3::date[]) AND allocation_key = ANY ($2::uuid[])
ORDER BY allocation_key;

-- name: lock_ended
-- As find_ended, under row locks in key order. $1 organization, $2 keys, $3 days. Index: primary key.
SELECT allocation_key, lease_token, work_date, slot_id, exit_id, persona_id, client_id, instance_number, traceparent,
  status, late, recorded_at, quarantined
FROM work_allocations
WHERE organization_id = $1 AND work_date = ANY ($3::date[]) AND allocation_key = ANY ($2::uuid[])
ORDER BY allocation_key
FOR UPDATE;

-- name: organizations_to_sweep
-- Whose leases the sweep must look at. The only statement over all organizations. Reads what is overdue once, as each
-- step of the sweep does: with a limit, an organization whose many leases stay would hide the others'.
-- Index: leases_sweep_at.
SELECT DISTINCT organization_id FROM leases WHERE sweep_at <= statement_timestamp();

-- name: postpone_sweep
-- Leases that were renewed since they were last looked at come up again when they expire. $1 organization, $2 at most.
-- Index: leases_sweep_at.
UPDATE leases SET sweep_at = expires_at
WHERE allocation_key = ANY (ARRAY(
  SELECT allocation_key FROM leases
  WHERE organization_id = $1 AND sweep_at <= statement_timestamp() AND expires_at > statement_timestamp()
  ORDER BY allocation_key LIMIT $2 FOR UPDATE SKIP LOCKED));

-- name: lock_expired
-- Leases that ran out, in key order; those that another transaction ends at this moment are passed over, since they
-- need no sweep or come up again. $1 organization, $2 at most. Index: leases_sweep_at.
SELECT allocation_key, lease_token, work_date, slot_id, exit_id, exit_epoch, persona_need IS NOT NULL AS needs_persona,
  persona_id, client_id, instance_number, traceparent, granted_at, expires_at, renewable_until, false AS is_live, target,
  exit_returns, exit_provider, exit_ip
FROM leases
WHERE organization_id = $1 AND sweep_at <= statement_timestamp() AND expires_at <= statement_timestamp()
ORDER BY allocation_key LIMIT $2
FOR UPDATE SKIP LOCKED;

-- name: lock_tracking
-- Locks days of slots in order and returns the room of each. $1 organization, $2 days, $3 slots. Index:
-- daily_work_tracking_slot.
SELECT t.work_date, t.slot_id, t.quota - (t.allocated - t.expired - t.released) AS room
FROM unnest($2::date[], $3::uuid[]) AS u (work_date, slot_id)
JOIN daily_work_tracking t ON t.organization_id = $1 AND t.work_date = ANY (array_fill(u.work_date, '{1}'))
  AND t.slot_id = u.slot_id
ORDER BY t.work_date, t.slot_id
FOR UPDATE OF t;

-- name: count_ends
-- Moves the counters of days, locked in order. $1 organization, $2 days, $3 slots, $4 succeeded, $5 failed, $6 blocked,
-- $7 expired (negative for results that came late), $8 released. Index: daily_work_tracking_slot.
-- Every column that a constraint looks at is set from the locked row: PostgreSQL checks constraints on the version that
-- the statement began with, before it finds that the row has moved on.
WITH moved AS MATERIALIZED (
  SELECT t.work_date, t.slot_id, t.quota, t.allocated, t.succeeded + u.succeeded AS succeeded,
    t.failed + u.failed AS failed, t.blocked + u.blocked AS blocked, t.expired + u.expired AS expired,
    t.released + u.released AS released
  FROM unnest($2::date[], $3::uuid[], $4::integer[], $5::integer[], $6::integer[], $7::integer[], $8::integer[])
    AS u (work_date, slot_id, succeeded, failed, blocked, expired, released)
  JOIN daily_work_tracking t ON t.organization_id = $1 AND t.work_date = ANY (array_fill(u.work_date, '{1}'))
    AND t.slot_id = u.slot_id
  ORDER BY t.work_date, t.slot_id
  FOR UPDATE OF t
)
UPDATE daily_work_tracking t
SET quota = m.quota, allocated = m.allocated, succeeded = m.succeeded, failed = m.failed, blocked = m.blocked,
  expired = m.expired, released = m.released
FROM moved m
WHERE t.organization_id = $1 AND t.work_date = ANY (array_fill(m.work_date, '{1}')) AND t.slot_id = m.slot_id;

-- name: return_exit_uses
-- Gives uses back, unless the exit began a new epoch since they were taken. To be run when the leases are locked by an
-- earlier statement, so that it sees the epoch that they are of. $1 organization, $2 exits, $3 epochs, $4 uses.
-- Index: exits_exit_id.
WITH returned AS MATERIALIZED (
  SELECT e.exit_id, e.cap, e.use_count - u.uses AS use_count
  FROM unnest($2::uuid[], $3::integer[], $4::integer[]) AS u (exit_id, epoch, uses)
  JOIN exits e ON e.organization_id = $1 AND e.exit_id = u.exit_id AND e.toggle_epoch = u.epoch
  ORDER BY e.exit_id
  FOR UPDATE OF e
)
UPDATE exits e SET use_count = r.use_count, cap = r.cap
FROM returned r
WHERE e.organization_id = $1 AND e.exit_id = r.exit_id;

-- name: end_leases
-- Ends locked leases: the row moves from leases to work_allocations, the check-in of its persona into the outbox, and
-- its external exit into exit_releases. $1 organization, $2 keys, $3 statuses, $4 late, $5 outcomes of the persona's use.
-- Returns when. Index: primary key.
WITH asked AS (
  SELECT * FROM unnest($2::uuid[], $3::smallint[], $4::boolean[], $5::smallint[]) AS u (key, status, late, outcome)
), gone AS (
  DELETE FROM leases l USING asked a
  WHERE (l.organization_id = $1) IS TRUE AND l.allocation_key = ANY (ARRAY[a.key])
  RETURNING l.*, a.status, a.late, a.outcome
), ended AS (
  INSERT INTO work_allocations (organization_id, work_date, allocation_key, slot_id, exit_id, persona_id, client_id,
    instance_number, lease_token, status, late, allocated_at, expires_at, ended_at, recorded_at, traceparent, target,
    exit_ip)
  SELECT organization_id, work_date, allocation_key, slot_id, exit_id, persona_id, client_id, instance_number,
    lease_token, status, late, granted_at, expires_at, statement_timestamp(),
    CASE WHEN status IN (2, 3, 4) THEN statement_timestamp() END, traceparent, target, exit_ip
  FROM gone
), told AS (
  INSERT INTO outbox (organization_id, holder, outcome)
  SELECT organization_id, allocation_key, outcome FROM gone WHERE persona_need IS NOT NULL
), released AS (
  INSERT INTO exit_releases (organization_id, provider, allocation_key)
  SELECT organization_id, exit_provider, allocation_key FROM gone WHERE exit_provider <> ''
)
SELECT statement_timestamp() AS ended_at;

-- name: withdraw_leases
-- Deletes locked leases that nobody was told of, without a trace but for the release of an external exit and the
-- check-in of a persona that are held for them, or may be. A check-out that went unanswered may take effect after the
-- check-in that goes out at once, so another follows. $1 organization, $2 keys, $3 those for which an exit may be held,
-- $4 those for which a persona may be, $5 after how many seconds the other check-in follows. Index: primary key.
WITH gone AS (
  DELETE FROM leases WHERE (organization_id = $1) IS TRUE AND allocation_key = ANY ($2::uuid[])
  RETURNING organization_id, allocation_key, persona_id, exit_provider, exit_ip
), released AS (
  INSERT INTO exit_releases (organization_id, provider, allocation_key)
  SELECT organization_id, exit_provider, allocation_key FROM gone
  WHERE exit_ip <> '' OR (exit_provider <> '' AND allocation_key = ANY ($3::uuid[]))
)
INSERT INTO outbox (organization_id, holder, outcome, due_at)
SELECT g.organization_id, g.allocation_key, 1, now() + d.seconds * interval '1 second'
FROM gone g
CROSS JOIN LATERAL (SELECT g.allocation_key = ANY ($4::uuid[]) AS may_be_held) m
CROSS JOIN LATERAL (VALUES (0), ($5::float8)) AS d (seconds)
WHERE m.may_be_held OR (g.persona_id IS NOT NULL AND d.seconds = 0);

-- name: withdraw_delays
-- Lets the next unit of a target go out at once if the one that it waits for is withdrawn. Units of a target with a
-- delay go out at least that long apart, so next_at is the withdrawn one's if it lies less than two delays after its
-- grant. $1 organization, $2 targets, $3 when their units went out. Index: primary key.
WITH withdrawn AS MATERIALIZED (
  SELECT t.target
  FROM unnest($2::text[], $3::timestamptz[]) AS u (target, granted_at)
  JOIN targets t ON t.organization_id = $1 AND t.target = u.target
  WHERE t.next_at > statement_timestamp()
    AND t.next_at < u.granted_at + 2 * greatest(t.min_delay_ms, t.crawl_delay_ms) * interval '1 millisecond'
  ORDER BY t.target
  FOR UPDATE OF t
)
UPDATE targets t SET next_at = statement_timestamp()
FROM withdrawn w
WHERE t.organization_id = $1 AND t.target = w.target;

-- name: withdraw_units
-- Takes back what was counted for leases that nobody was told of. $1 organization, $2 days, $3 slots, $4 units.
-- Index: daily_work_tracking_slot.
WITH withdrawn AS MATERIALIZED (
  SELECT t.work_date, t.slot_id, t.quota, t.allocated - u.units AS allocated, t.succeeded, t.failed, t.blocked,
    t.expired, t.released
  FROM unnest($2::date[], $3::uuid[], $4::integer[]) AS u (work_date, slot_id, units)
  JOIN daily_work_tracking t ON t.organization_id = $1 AND t.work_date = ANY (array_fill(u.work_date, '{1}'))
    AND t.slot_id = u.slot_id
  ORDER BY t.work_date, t.slot_id
  FOR UPDATE OF t
)
UPDATE daily_work_tracking t
SET quota = w.quota, allocated = w.allocated, succeeded = w.succeeded, failed = w.failed, blocked = w.blocked,
  expired = w.expired, released = w.released
FROM withdrawn w
WHERE t.organization_id = $1 AND t.work_date = ANY (array_fill(w.work_date, '{1}')) AND t.slot_id = w.slot_id;

-- name: enqueue_check_ins
-- For check-outs whose lease ended before they could be noted on it. $1 organization, $2 holders.
INSERT INTO outbox (organization_id, holder, outcome) SELECT $1, holder, 1 FROM unnest($2::uuid[]) AS u (holder);

-- name: forget_request
-- A request none of whose leases is left, so that its demand can be served otherwise. Locks it last, as an allocation
-- does. $1 organization, $2 id. Index: primary keys.
DELETE FROM requests r
WHERE r.organization_id = $1 AND r.method = 'AllocateWork' AND r.request_id = $2 AND NOT EXISTS (
  SELECT FROM generate_series(1, length(r.answer), 16) AS k (at)
  JOIN leases l ON (l.organization_id = $1) IS TRUE
    AND l.allocation_key = ANY (ARRAY[encode(substr(r.answer, k.at, 16), 'hex')::uuid]));
