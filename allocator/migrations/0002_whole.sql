-- Slots that are served alike: by them the index finds slots with room without looking at those without. Few rows.
CREATE TABLE slot_classes (
  class_id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  organization_id uuid NOT NULL,
  target text NOT NULL,
  priority integer NOT NULL,
  without_exit boolean NOT NULL,
  -- '' for any.
  exit_region text NOT NULL,
  -- '' for the pool.
  exit_provider text NOT NULL,
  -- '' for none; otherwise as in work_slots.
  persona_need text NOT NULL,
  -- Of all the above, since a persona need may be longer than an index entry.
  class_sha256 bytea NOT NULL,
  UNIQUE (organization_id, class_sha256)
);

-- The class of a slot, made if need be. The one definition of what makes slots alike.
CREATE FUNCTION class_of(organization uuid, target text, priority integer, without_exit boolean, exit_region text,
  exit_provider text, persona_need text) RETURNS integer
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
  digest bytea := sha256(convert_to(
    json_build_array(target, priority, without_exit, exit_region, exit_provider, coalesce(persona_need, ''))::text, 'UTF8'));
  found integer;
BEGIN
  LOOP
    SELECT c.class_id INTO found FROM slot_classes c WHERE c.organization_id = organization AND c.class_sha256 = digest;
    IF found IS NOT NULL THEN
      RETURN found;
    END IF;
    INSERT INTO slot_classes AS c (organization_id, target, priority, without_exit, exit_region, exit_provider,
      persona_need, class_sha256)
    VALUES (organization, target, priority, without_exit, exit_region, exit_provider, coalesce(persona_need, ''), digest)
    ON CONFLICT (organization_id, class_sha256) DO NOTHING
    RETURNING c.class_id INTO found;
    IF found IS NOT NULL THEN
      RETURN found;
    END IF;
  END LOOP;
END $$;

ALTER TABLE work_slots
  -- 1 asap; 2 even: the day's quota becomes available unit by unit, from midnight to midnight.
  ADD COLUMN pacing smallint NOT NULL DEFAULT 1 CHECK (pacing IN (1, 2)),
  -- Only exits of this region; '' for any.
  ADD COLUMN exit_region text NOT NULL DEFAULT '',
  -- The external provider of its exits; '' for the pool.
  ADD COLUMN exit_provider text NOT NULL DEFAULT '',
  ADD COLUMN class_id integer;
UPDATE work_slots SET class_id = class_of(organization_id, target, priority, without_exit, '', '', persona_need);
ALTER TABLE work_slots ALTER COLUMN class_id SET NOT NULL;
CREATE INDEX work_slots_code ON work_slots (organization_id, code, slot_id) WHERE code <> '';
CREATE INDEX work_slots_active ON work_slots (organization_id, slot_id) WHERE is_active;
-- Whether a class has any slot, any active one, any in its dates, without looking at the others.
CREATE INDEX work_slots_class ON work_slots (class_id, is_active, end_date);

-- The day's row knows what the allocator asks, so that slots with room are found by one index. `open_at` is the moment,
-- in seconds of the epoch, at which the next unit is available: -infinity when paced asap, NULL when the quota is taken
-- or the slot is switched off. It changes when that does and not with every unit, so updates still stay in their page.
ALTER TABLE daily_work_tracking
  ADD COLUMN class_id integer NOT NULL DEFAULT 0,
  ADD COLUMN active boolean NOT NULL DEFAULT true,
  -- By how many units an operator reopened the day, beyond the slot's quota; kept when the slot changes.
  ADD COLUMN reopened integer NOT NULL DEFAULT 0 CHECK (reopened >= 0),
  -- Midnight in seconds of the epoch, and the day's length; NULL when paced asap.
  ADD COLUMN paced_from double precision,
  ADD COLUMN paced_seconds double precision,
  ADD COLUMN open_at double precision GENERATED ALWAYS AS (
    CASE WHEN NOT active OR allocated - expired - released >= quota THEN NULL
      WHEN paced_seconds IS NULL THEN '-infinity'::double precision
      ELSE paced_from + (allocated - expired - released) * paced_seconds / quota END) STORED,
  ADD CONSTRAINT paced_whole CHECK ((paced_from IS NULL) = (paced_seconds IS NULL));
UPDATE daily_work_tracking t SET class_id = s.class_id, active = s.is_active
FROM work_slots s WHERE s.slot_id = t.slot_id AND t.work_date >= (now() AT TIME ZONE 'UTC')::date - 1;
CREATE INDEX daily_work_tracking_open ON daily_work_tracking (organization_id, work_date, class_id, open_at, slot_id)
  WHERE open_at IS NOT NULL;

-- How far the rows of a day have been made; the rest is made in pieces, by whoever needs the day first.
CREATE TABLE tracked_days (
  organization_id uuid NOT NULL,
  work_date date NOT NULL,
  -- The last slot that has been looked at; NULL before the first.
  tracked_to uuid,
  complete boolean NOT NULL DEFAULT false,
  PRIMARY KEY (organization_id, work_date)
);

-- The units that may be taken by `at` (seconds of the epoch), beyond those that are taken.
CREATE FUNCTION open_units(quota integer, taken integer, paced_from double precision, paced_seconds double precision,
  at double precision) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
  SELECT greatest(0, CASE WHEN paced_seconds IS NULL THEN quota
    ELSE least(quota, floor((at - paced_from) * quota / paced_seconds)::bigint + 1)::integer END - taken)
$$;

-- Makes the rows of one day for slots, or makes them follow their slots; the only place where rows are made. A quota
-- never falls below the units that count against it. A slot outside its dates gets no row; one that stands is closed.
CREATE FUNCTION track_slots(organization uuid, day date, slots uuid[]) RETURNS void
LANGUAGE sql VOLATILE AS $$
  INSERT INTO daily_work_tracking AS t (organization_id, work_date, slot_id, quota, class_id, active, paced_from,
    paced_seconds)
  SELECT s.organization_id, day, s.slot_id, s.daily_quota, s.class_id, s.is_active AND day BETWEEN s.start_date AND s.end_date,
    CASE WHEN s.pacing = 2 THEN extract(epoch FROM day::timestamp AT TIME ZONE o.time_zone) END,
    CASE WHEN s.pacing = 2 THEN extract(epoch FROM (day + 1)::timestamp AT TIME ZONE o.time_zone)
      - extract(epoch FROM day::timestamp AT TIME ZONE o.time_zone) END
  FROM organizations o JOIN work_slots s USING (organization_id)
  WHERE o.organization_id = organization AND s.slot_id = ANY (slots)
    AND (s.is_active AND day BETWEEN s.start_date AND s.end_date
      OR EXISTS (SELECT FROM daily_work_tracking d
        WHERE d.organization_id = organization AND d.work_date = day AND d.slot_id = s.slot_id))
  ORDER BY s.slot_id
  FOR SHARE OF s
  ON CONFLICT (organization_id, work_date, slot_id) DO UPDATE
  SET quota = greatest(least(excluded.quota + t.reopened, 1000000), t.allocated - t.expired - t.released, 1),
    class_id = excluded.class_id, active = excluded.active, paced_from = excluded.paced_from,
    paced_seconds = excluded.paced_seconds
  WHERE (t.quota, t.class_id, t.active, t.paced_from, t.paced_seconds) IS DISTINCT FROM
    (greatest(least(excluded.quota + t.reopened, 1000000), t.allocated - t.expired - t.released, 1), excluded.class_id,
      excluded.active, excluded.paced_from, excluded.paced_seconds)
$$;

-- Politeness and back-off. A slot without a target is a target of its own, named slot:<its id>.
CREATE TABLE targets (
  organization_id uuid NOT NULL,
  target text NOT NULL CHECK (length(target) BETWEEN 1 AND 128),
  -- The operator's policy. NULL: no limit.
  max_in_flight integer CHECK (max_in_flight > 0),
  min_delay_ms integer NOT NULL DEFAULT 0 CHECK (min_delay_ms >= 0),
  auto_pause boolean NOT NULL DEFAULT true,
  -- What the target asked for, as workers report it (robots.txt); the greater of both delays counts.
  crawl_delay_ms integer NOT NULL DEFAULT 0 CHECK (crawl_delay_ms >= 0),
  -- With a delay, the next unit goes out not before.
  next_at timestamptz NOT NULL DEFAULT '-infinity',
  -- Retry-After, or an operator's hold: no unit before.
  blocked_until timestamptz NOT NULL DEFAULT '-infinity',
  -- Set while paused because too many results were blocked. One probe at a time goes out from probe_at on.
  paused_at timestamptz,
  -- Pauses in a row without a good probe: each doubles the wait.
  pauses integer NOT NULL DEFAULT 0,
  probe_at timestamptz,
  -- The lease of the probe that is out; NULL when none was sent.
  probe_key uuid,
  -- Results from before do not count in the block rate.
  counted_from timestamptz NOT NULL DEFAULT '-infinity',
  -- Why it is paused or held, for people.
  reason text NOT NULL DEFAULT '',
  updated_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (organization_id, target),
  CHECK ((paused_at IS NULL) = (probe_at IS NULL))
) WITH (fillfactor = 50);
-- The probes that are out, by which a batch of results finds its own among them. Hardly ever any.
CREATE INDEX targets_probe ON targets (organization_id, probe_key) WHERE probe_key IS NOT NULL;

ALTER TABLE leases
  -- The slot's target at the grant; '' when it has none.
  ADD COLUMN target text NOT NULL DEFAULT '',
  -- Whether the exit's use returns however the lease ends (cap mode concurrent).
  ADD COLUMN exit_returns boolean NOT NULL DEFAULT false,
  -- The provider of an external exit; '' for none. Its lease is named by our allocation key.
  ADD COLUMN exit_provider text NOT NULL DEFAULT '',
  -- All that is recorded of an external exit; '' until it is known.
  ADD COLUMN exit_ip text NOT NULL DEFAULT '';
CREATE INDEX leases_target ON leases (organization_id, target) WHERE target <> '';

ALTER TABLE work_allocations
  ADD COLUMN target text NOT NULL DEFAULT '',
  ADD COLUMN exit_ip text NOT NULL DEFAULT '';

ALTER TABLE work_results
  ADD COLUMN target text NOT NULL DEFAULT '',
  -- What the run says of its exit: 0 nothing, 1 rate limited, 2 blocked, 3 transport error.
  ADD COLUMN exit_signal smallint NOT NULL DEFAULT 0 CHECK (exit_signal BETWEEN 0 AND 3);
CREATE INDEX work_results_target ON work_results (organization_id, target, created_at) WHERE target <> '';
CREATE INDEX work_results_slot ON work_results (organization_id, slot_id, created_at) WHERE target = '';

ALTER TABLE exits
  DROP CONSTRAINT exits_cap_mode_check,
  -- 1 until_toggle: a use counts until the next toggle, unless its lease expires or is released. 2 concurrent: until its
  -- lease ends. 3 per_window: until the window ends, unless its lease expires or is released before.
  ADD CONSTRAINT exits_cap_mode CHECK (cap_mode IN (1, 2, 3)),
  ADD COLUMN window_seconds integer CHECK (window_seconds BETWEEN 1 AND 86400),
  -- The count starts afresh, under a new toggle_epoch, with the first use after it.
  ADD COLUMN window_ends_at timestamptz NOT NULL DEFAULT '-infinity',
  ADD CONSTRAINT window_of_mode CHECK ((cap_mode = 3) = (window_seconds IS NOT NULL)),
  -- An exit's counters move all day. While another transaction keeps their old versions from being removed, a unique
  -- index visits every one of them at every update that leaves its page. Rows are made by imports alone, one at a time
  -- in an organization, and these make no endpoint twice; ids are made afresh.
  DROP CONSTRAINT exits_pkey,
  DROP CONSTRAINT exits_organization_id_endpoint_key;
CREATE INDEX exits_exit_id ON exits (exit_id);
CREATE INDEX exits_endpoint ON exits (organization_id, endpoint);

-- Exits that a target does not take for now. Few rows: one is written when a run reports a fault.
CREATE TABLE exit_health (
  organization_id uuid NOT NULL,
  exit_id uuid NOT NULL,
  target text NOT NULL,
  -- As exit_signal of work_results.
  signal smallint NOT NULL CHECK (signal BETWEEN 1 AND 3),
  -- Faults in a row: each doubles the cool-down.
  faults integer NOT NULL,
  cooling_until timestamptz NOT NULL,
  reported_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (organization_id, exit_id, target)
) WITH (fillfactor = 50);

-- External exits to be given back, written with the end of the lease, deleted once delivered.
CREATE TABLE exit_releases (
  release_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  organization_id uuid NOT NULL,
  provider text NOT NULL,
  allocation_key uuid NOT NULL,
  attempts integer NOT NULL DEFAULT 0,
  due_at timestamptz NOT NULL DEFAULT now(),
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX exit_releases_due_at ON exit_releases (due_at);

-- What operators did. Append-only; monthly partitions. Each entry holds the digest of the one before, per organization.
CREATE TABLE audit_log (
  organization_id uuid NOT NULL,
  at timestamptz NOT NULL,
  entry_id uuid NOT NULL,
  -- The id of the API key.
  actor text NOT NULL,
  action text NOT NULL,
  resource text NOT NULL,
  reason text NOT NULL,
  -- Of the request and what it changed; the payload itself is not kept.
  payload_sha256 bytea NOT NULL,
  previous_sha256 bytea NOT NULL,
  entry_sha256 bytea NOT NULL,
  PRIMARY KEY (organization_id, at, entry_id)
) PARTITION BY RANGE (at);

-- The end of each chain; locked while an entry is added.
CREATE TABLE audit_heads (
  organization_id uuid PRIMARY KEY,
  entry_sha256 bytea NOT NULL
);

-- What came of the work of a week that is over, by client: read from work_results while they are at hand, and kept.
CREATE TABLE weekly_statistics (
  organization_id uuid NOT NULL,
  -- Its Monday, in the organization's time zone.
  week date NOT NULL CHECK (extract(isodow FROM week) = 1),
  -- Who submitted; '' for the organization as a whole, whose row stands even when nothing came of the week.
  client_id text NOT NULL,
  results bigint NOT NULL,
  succeeded bigint NOT NULL,
  failed bigint NOT NULL,
  blocked bigint NOT NULL,
  execution_ms bigint NOT NULL,
  computed_at timestamptz NOT NULL,
  PRIMARY KEY (organization_id, week, client_id),
  CONSTRAINT all_outcomes CHECK (results = succeeded + failed + blocked)
);
-- Which weeks were computed, without the clients and without the years before.
CREATE INDEX weekly_statistics_whole ON weekly_statistics (week, organization_id) WHERE client_id = '';

CREATE INDEX clients_last_seen_at ON clients (last_seen_at);
CREATE INDEX client_instances_last_seen_at ON client_instances (last_seen_at);

DROP FUNCTION slots_today(uuid);
-- What decides whether a slot gets work today, as far as the slot itself goes. `taken` are the units that count against
-- `quota`; `open_units` those that may be taken now. A day without a row is as it would be made.
CREATE FUNCTION slots_today(organization uuid)
RETURNS TABLE (
  slot_id uuid, target text, keyword text, is_active boolean, in_date boolean, quota integer, taken integer,
  open_units integer, next_unit_at timestamptz, tracked boolean, priority integer, weight integer, without_exit boolean,
  exit_region text, exit_provider text, persona_need text
)
LANGUAGE sql STABLE AS $$
  SELECT s.slot_id, s.target, s.keyword, s.is_active, today.work_date BETWEEN s.start_date AND s.end_date,
    coalesce(t.quota, s.daily_quota), coalesce(t.allocated - t.expired - t.released, 0),
    CASE WHEN t.slot_id IS NULL THEN CASE WHEN s.pacing = 1 THEN s.daily_quota
        ELSE open_units(s.daily_quota, 0, today.begins, today.seconds, today.now) END
      ELSE open_units(t.quota, t.allocated - t.expired - t.released, t.paced_from, t.paced_seconds, today.now) END,
    CASE WHEN t.open_at > today.now THEN to_timestamp(t.open_at) END,
    t.slot_id IS NOT NULL, s.priority, s.weight, s.without_exit, s.exit_region, s.exit_provider, s.persona_need
  FROM (
    SELECT d.work_date, extract(epoch FROM now())::double precision AS now,
      extract(epoch FROM d.work_date::timestamp AT TIME ZONE d.time_zone)::double precision AS begins,
      (extract(epoch FROM (d.work_date + 1)::timestamp AT TIME ZONE d.time_zone)
        - extract(epoch FROM d.work_date::timestamp AT TIME ZONE d.time_zone))::double precision AS seconds
    FROM (SELECT o.time_zone, (now() AT TIME ZONE o.time_zone)::date AS work_date FROM organizations o
      WHERE o.organization_id = organization) d
  ) today
  JOIN work_slots s ON s.organization_id = organization
  -- The day by a query of its own, so that the partitions of other days are left out.
  LEFT JOIN daily_work_tracking t
    ON t.organization_id = organization AND t.slot_id = s.slot_id AND t.work_date =
      (SELECT (now() AT TIME ZONE o.time_zone)::date FROM organizations o WHERE o.organization_id = organization)
$$;

DROP FUNCTION exits_now(uuid);
-- Likewise what decides whether an exit can be used: `room` uses more, if it is enabled. A window that has ended counts
-- no more.
CREATE FUNCTION exits_now(organization uuid)
RETURNS TABLE (exit_id uuid, region text, enabled boolean, cap_mode smallint, cap integer, use_count integer, room integer)
LANGUAGE sql STABLE AS $$
  SELECT e.exit_id, e.region, e.enabled, e.cap_mode, e.cap, u.use_count, e.cap - u.use_count
  FROM exits e
  CROSS JOIN LATERAL (SELECT CASE WHEN e.cap_mode = 3 AND e.window_ends_at <= now() THEN 0 ELSE e.use_count END
    AS use_count) u
  WHERE e.organization_id = organization
$$;

-- Likewise for the targets that hold anything back: `room` is how many units may go out at this moment, NULL for any
-- number. `next_at` is when that may change by itself.
CREATE FUNCTION targets_now(organization uuid)
RETURNS TABLE (target text, is_paused boolean, blocked_until timestamptz, probe_at timestamptz, delay_ms integer,
  next_at timestamptz, max_in_flight integer, in_flight bigint, room bigint, reason text)
LANGUAGE sql STABLE AS $$
  SELECT t.target, t.paused_at IS NOT NULL, t.blocked_until, t.probe_at, greatest(t.min_delay_ms, t.crawl_delay_ms),
    t.next_at, t.max_in_flight, f.in_flight,
    least(
      CASE WHEN t.blocked_until > now() THEN 0 END,
      CASE WHEN t.paused_at IS NOT NULL THEN CASE WHEN t.probe_at > now() OR EXISTS (
        SELECT FROM leases l WHERE l.organization_id = organization AND l.allocation_key = t.probe_key
          AND l.expires_at > now()) THEN 0 ELSE 1 END END,
      CASE WHEN greatest(t.min_delay_ms, t.crawl_delay_ms) > 0 THEN CASE WHEN t.next_at > now() THEN 0 ELSE 1 END END,
      CASE WHEN t.max_in_flight IS NOT NULL THEN greatest(0, t.max_in_flight - f.in_flight) END),
    t.reason
  FROM targets t
  CROSS JOIN LATERAL (SELECT CASE WHEN t.max_in_flight IS NOT NULL THEN (SELECT count(*) FROM leases l
    WHERE l.organization_id = organization AND l.target = t.target AND l.expires_at > now()) ELSE 0 END AS in_flight) f
  WHERE t.organization_id = organization
$$;

-- Of those targets, the ones of which nothing may go out now, by the first reason that holds: 11 held, 12 paused, 13
-- busy (as BlockerKind in the contract). `until` is when that may end by itself; NULL when a lease must end first.
CREATE FUNCTION stops_now(organization uuid)
RETURNS TABLE (target text, kind integer, until timestamptz)
LANGUAGE sql STABLE AS $$
  SELECT t.target, CASE WHEN t.blocked_until > now() THEN 11 WHEN t.is_paused THEN 12 ELSE 13 END,
    CASE WHEN t.blocked_until > now() THEN t.blocked_until
      WHEN t.is_paused THEN CASE WHEN t.probe_at > now() THEN t.probe_at END
      WHEN t.delay_ms > 0 AND t.next_at > now() THEN t.next_at END
  FROM targets_now(organization) t
  WHERE t.room <= 0
$$;

-- A day's work for people, as the documents' dashboard: finished units by quota, 0 to 1, in steps of a millionth.
CREATE VIEW work_dashboard AS
  SELECT t.organization_id, t.work_date, t.slot_id,
    (SELECT s.keyword FROM work_slots s WHERE s.slot_id = t.slot_id) AS keyword,
    t.quota, t.allocated, t.succeeded, t.failed, t.blocked, t.expired, t.released,
    ((t.succeeded + t.failed + t.blocked)::bigint * 1000000 / t.quota) / 1e6::double precision AS completion_rate
  FROM daily_work_tracking t;
