-- Who was here, and where its days begin. Learned from the caller's key at the first contact.
CREATE TABLE organizations (
  organization_id uuid PRIMARY KEY,
  time_zone text NOT NULL
);

-- Request ids of mutations, kept for 24 hours.
CREATE TABLE requests (
  organization_id uuid NOT NULL,
  method text NOT NULL,
  request_id uuid NOT NULL,
  request_sha256 bytea NOT NULL,
  -- For AllocateWork the keys of the leases, 16 bytes each; for CreateSlot the slot's id.
  answer bytea NOT NULL DEFAULT '',
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (organization_id, method, request_id)
) WITH (fillfactor = 70);
CREATE INDEX requests_created_at ON requests (created_at);

CREATE TABLE clients (
  organization_id uuid NOT NULL,
  client_id text NOT NULL CHECK (length(client_id) BETWEEN 1 AND 128),
  client_name text NOT NULL DEFAULT '',
  client_ip text NOT NULL DEFAULT '',
  -- Set while the machine is to be emptied: it gets no new work.
  draining boolean NOT NULL DEFAULT false,
  first_seen_at timestamptz NOT NULL DEFAULT now(),
  last_seen_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (organization_id, client_id)
) WITH (fillfactor = 50);

CREATE TABLE client_instances (
  organization_id uuid NOT NULL,
  client_id text NOT NULL,
  instance_number integer NOT NULL CHECK (instance_number BETWEEN 0 AND 65535),
  user_folder_number integer NOT NULL CHECK (user_folder_number BETWEEN 0 AND 65535),
  last_seen_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (organization_id, client_id, instance_number)
) WITH (fillfactor = 50);

-- Kept for ever; switched off, not deleted.
CREATE TABLE work_slots (
  slot_id uuid PRIMARY KEY,
  organization_id uuid NOT NULL,
  -- NULL when no external site knows the slot.
  external_id text,
  keyword text NOT NULL CHECK (length(keyword) BETWEEN 1 AND 200),
  code text NOT NULL,
  target text NOT NULL,
  start_date date NOT NULL,
  end_date date NOT NULL,
  daily_quota integer NOT NULL CHECK (daily_quota BETWEEN 1 AND 1000000),
  -- json and not jsonb: the text is kept, so a double comes back as a double even when it is whole.
  settings json NOT NULL,
  is_active boolean NOT NULL,
  priority integer NOT NULL CHECK (priority BETWEEN -1000 AND 1000),
  weight integer NOT NULL CHECK (weight BETWEEN 1 AND 1000),
  without_exit boolean NOT NULL,
  -- Canonical JSON of the personas that may do the work; NULL when it needs none.
  persona_need text,
  -- Of the contents at creation, by which a repeated intake is told from another slot.
  spec_sha256 bytea NOT NULL CHECK (length(spec_sha256) = 32),
  -- Grows with every update; the etag.
  version bigint NOT NULL DEFAULT 1,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT work_slots_dates CHECK (start_date <= end_date)
);
CREATE INDEX work_slots_organization ON work_slots (organization_id, slot_id);
CREATE UNIQUE INDEX work_slots_external_id ON work_slots (organization_id, external_id) WHERE external_id IS NOT NULL;

-- Append-only; monthly partitions.
CREATE TABLE work_slots_history (
  organization_id uuid NOT NULL,
  slot_id uuid NOT NULL,
  change_id uuid NOT NULL,
  changed_at timestamptz NOT NULL DEFAULT now(),
  actor text NOT NULL,
  reason text NOT NULL,
  -- Field name to [old, new].
  difference jsonb NOT NULL,
  PRIMARY KEY (organization_id, slot_id, changed_at, change_id)
) PARTITION BY RANGE (changed_at);

-- One row per slot and work date, made when it is first needed and at midnight. Monthly partitions with fill factor 50;
-- no column that changes is indexed, so that every update stays within its page.
CREATE TABLE daily_work_tracking (
  organization_id uuid NOT NULL,
  work_date date NOT NULL,
  slot_id uuid NOT NULL,
  quota integer NOT NULL CHECK (quota > 0),
  allocated integer NOT NULL DEFAULT 0,
  succeeded integer NOT NULL DEFAULT 0 CHECK (succeeded >= 0),
  failed integer NOT NULL DEFAULT 0 CHECK (failed >= 0),
  blocked integer NOT NULL DEFAULT 0 CHECK (blocked >= 0),
  expired integer NOT NULL DEFAULT 0 CHECK (expired >= 0),
  released integer NOT NULL DEFAULT 0 CHECK (released >= 0),
  PRIMARY KEY (organization_id, work_date, slot_id),
  CONSTRAINT within_quota CHECK (allocated - expired - released <= quota),
  CONSTRAINT no_more_ends_than_beginnings CHECK (succeeded + failed + blocked + expired + released <= allocated)
) PARTITION BY RANGE (work_date);

CREATE TABLE exits (
  exit_id uuid PRIMARY KEY,
  organization_id uuid NOT NULL,
  endpoint text NOT NULL,
  region text NOT NULL,
  -- 1 until_toggle: a use counts until the next toggle, unless its lease expires or is released.
  cap_mode smallint NOT NULL CHECK (cap_mode = 1),
  cap integer NOT NULL CHECK (cap BETWEEN 1 AND 100000),
  use_count integer NOT NULL DEFAULT 0 CHECK (use_count >= 0),
  toggle_epoch integer NOT NULL DEFAULT 0,
  enabled boolean NOT NULL DEFAULT true,
  toggled_at timestamptz,
  created_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (organization_id, endpoint),
  CONSTRAINT within_cap CHECK (use_count <= cap)
) WITH (fillfactor = 50);

-- Append-only; monthly partitions.
CREATE TABLE exit_toggle_logs (
  organization_id uuid NOT NULL,
  toggled_at timestamptz NOT NULL DEFAULT now(),
  toggle_id uuid NOT NULL,
  exit_id uuid NOT NULL,
  actor text NOT NULL,
  reason text NOT NULL,
  use_count_before integer NOT NULL,
  PRIMARY KEY (organization_id, toggled_at, toggle_id)
) PARTITION BY RANGE (toggled_at);

-- Live leases only: a small table that every renewal and sweep works on. A row goes when its lease ends, in the
-- transaction that writes the row of work_allocations.
CREATE TABLE leases (
  allocation_key uuid PRIMARY KEY,
  organization_id uuid NOT NULL,
  -- 16 random bytes.
  lease_token uuid NOT NULL,
  work_date date NOT NULL,
  slot_id uuid NOT NULL,
  -- NULL when the slot uses none.
  exit_id uuid,
  -- The exit's toggle_epoch at the grant: the use is given back only while it is the same.
  exit_epoch integer,
  client_id text NOT NULL,
  instance_number integer NOT NULL,
  granted_at timestamptz NOT NULL,
  expires_at timestamptz NOT NULL,
  renewable_until timestamptz NOT NULL,
  -- When the sweep looks at the lease next. A renewal leaves it alone and so stays within its page; the sweep moves it
  -- to expires_at when it finds the lease renewed.
  sweep_at timestamptz NOT NULL,
  -- What its slot asked for at the grant; NULL when it needs no persona.
  persona_need text,
  persona_id uuid,
  persona_token bytea,
  persona_generation bigint,
  -- Of the caller; NULL when it gave none.
  traceparent text,
  CHECK ((exit_id IS NULL) = (exit_epoch IS NULL)),
  CHECK (expires_at <= renewable_until)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX leases_sweep_at ON leases (sweep_at);
CREATE INDEX leases_holder ON leases (organization_id, client_id, instance_number);

-- Every allocation that has ended, once; weekly partitions. Written when the lease ends, so it is append-only but for
-- expired rows whose result comes late.
CREATE TABLE work_allocations (
  organization_id uuid NOT NULL,
  work_date date NOT NULL,
  -- A UUIDv7: its time lies within a day of work_date, which names the partition.
  allocation_key uuid NOT NULL,
  slot_id uuid NOT NULL,
  exit_id uuid,
  persona_id uuid,
  client_id text NOT NULL,
  instance_number integer NOT NULL,
  lease_token uuid NOT NULL,
  -- 2 succeeded, 3 failed, 4 blocked: the result came. 6 released: given back. 5 expired: the lease ran out; becomes
  -- 2, 3 or 4 with late = true when its result comes and the slot still has room. (1, leased, is a row of leases.)
  status smallint NOT NULL CHECK (status BETWEEN 2 AND 6),
  late boolean NOT NULL DEFAULT false,
  allocated_at timestamptz NOT NULL,
  expires_at timestamptz NOT NULL,
  ended_at timestamptz NOT NULL,
  -- When its result was recorded, or put in quarantine; NULL when none came.
  recorded_at timestamptz,
  quarantined boolean NOT NULL DEFAULT false,
  traceparent text,
  PRIMARY KEY (organization_id, work_date, allocation_key),
  CHECK (NOT quarantined OR (status = 5 AND recorded_at IS NOT NULL)),
  CHECK (status NOT IN (2, 3, 4) OR recorded_at IS NOT NULL)
) PARTITION BY RANGE (work_date);

-- Append-only; monthly partitions.
CREATE TABLE work_results (
  organization_id uuid NOT NULL,
  created_at timestamptz NOT NULL,
  allocation_key uuid NOT NULL,
  work_date date NOT NULL,
  slot_id uuid NOT NULL,
  exit_id uuid,
  persona_id uuid,
  client_id text NOT NULL,
  client_ip text NOT NULL,
  instance_number integer NOT NULL,
  -- 2 succeeded, 3 failed, 4 blocked.
  outcome smallint NOT NULL CHECK (outcome BETWEEN 2 AND 4),
  is_blocked boolean NOT NULL,
  block_type text NOT NULL,
  execution_time_ms integer NOT NULL CHECK (execution_time_ms >= 0),
  applied_settings jsonb NOT NULL,
  exit_ip text NOT NULL,
  -- What the target asked for; NULL when it did not.
  retry_after_ms integer,
  error_message text NOT NULL,
  persona_used boolean NOT NULL,
  product_count integer NOT NULL,
  late boolean NOT NULL,
  traceparent text,
  PRIMARY KEY (organization_id, created_at, allocation_key)
) PARTITION BY RANGE (created_at);

-- Append-only; monthly partitions.
CREATE TABLE product_results (
  organization_id uuid NOT NULL,
  created_at timestamptz NOT NULL,
  allocation_key uuid NOT NULL,
  -- Its place in the result, from 0.
  position smallint NOT NULL,
  slot_id uuid NOT NULL,
  product_id text NOT NULL,
  title text NOT NULL,
  url text NOT NULL,
  rank bigint NOT NULL,
  attributes jsonb NOT NULL,
  PRIMARY KEY (organization_id, created_at, allocation_key, position)
) PARTITION BY RANGE (created_at);

-- Append-only; weekly partitions.
CREATE TABLE client_activity_logs (
  organization_id uuid NOT NULL,
  reported_at timestamptz NOT NULL,
  allocation_key uuid NOT NULL,
  client_id text NOT NULL,
  client_ip text NOT NULL,
  instance_number integer NOT NULL,
  user_folder_number integer NOT NULL,
  execution_time_ms integer NOT NULL,
  -- As outcome of work_results; 5 for a result in quarantine.
  status smallint NOT NULL CHECK (status BETWEEN 2 AND 5),
  PRIMARY KEY (organization_id, reported_at, allocation_key)
) PARTITION BY RANGE (reported_at);

-- Results whose unit was handed out again before they came: kept whole, not counted, until an operator decides.
CREATE TABLE quarantined_results (
  organization_id uuid NOT NULL,
  allocation_key uuid NOT NULL,
  work_date date NOT NULL,
  slot_id uuid NOT NULL,
  client_id text NOT NULL,
  quarantined_at timestamptz NOT NULL,
  -- The result as it was submitted.
  result jsonb NOT NULL,
  PRIMARY KEY (organization_id, allocation_key)
);

-- Check-ins that the persona store has yet to hear of. Written with the end of the lease, deleted once delivered.
CREATE TABLE outbox (
  outbox_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  organization_id uuid NOT NULL,
  -- The allocation key.
  holder uuid NOT NULL,
  -- 1 not used, 2 succeeded, 3 failed, 4 blocked.
  outcome smallint NOT NULL CHECK (outcome BETWEEN 1 AND 4),
  attempts integer NOT NULL DEFAULT 0,
  -- Not delivered before; moved ahead by whoever takes the row.
  due_at timestamptz NOT NULL DEFAULT now(),
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX outbox_due_at ON outbox (due_at);

-- What decides whether a slot gets work today: the one definition that allocation and explanation share. The planner
-- inlines it. `taken` are the units that count against `quota`.
CREATE FUNCTION slots_today(organization uuid)
RETURNS TABLE (
  slot_id uuid, target text, keyword text, is_active boolean, in_date boolean, quota integer, taken integer,
  tracked boolean, priority integer, weight integer, without_exit boolean, persona_need text
)
LANGUAGE sql STABLE AS $$
  SELECT s.slot_id, s.target, s.keyword, s.is_active,
    (SELECT (now() AT TIME ZONE o.time_zone)::date FROM organizations o WHERE o.organization_id = organization)
      BETWEEN s.start_date AND s.end_date,
    coalesce(t.quota, s.daily_quota), coalesce(t.allocated - t.expired - t.released, 0),
    t.slot_id IS NOT NULL, s.priority, s.weight, s.without_exit, s.persona_need
  FROM work_slots s
  LEFT JOIN daily_work_tracking t
    ON t.organization_id = organization AND t.slot_id = s.slot_id AND t.work_date =
      (SELECT (now() AT TIME ZONE o.time_zone)::date FROM organizations o WHERE o.organization_id = organization)
  WHERE s.organization_id = organization
$$;

-- Likewise what decides whether an exit can be used: `room` uses more, if it is enabled.
CREATE FUNCTION exits_now(organization uuid)
RETURNS TABLE (exit_id uuid, region text, enabled boolean, cap integer, use_count integer, room integer)
LANGUAGE sql STABLE AS $$
  SELECT e.exit_id, e.region, e.enabled, e.cap, e.use_count, e.cap - e.use_count
  FROM exits e
  WHERE e.organization_id = organization
$$;
