-- Everything that many personas share, above all what a pick can ask for, once. Keeping it out of the persona's row
-- saves about 80 bytes of each and gives the pick one short index instead of one for each kind of question. Never
-- deleted.
CREATE TABLE pools (
  pool_id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  organization_id uuid NOT NULL,
  region text NOT NULL CHECK (length(region) <= 64),
  -- Sorted, each once.
  tags text[] NOT NULL CHECK (cardinality(tags) <= 16),
  aging_level smallint NOT NULL CHECK (aging_level BETWEEN 0 AND 100),
  base_profile text NOT NULL CHECK (length(base_profile) <= 20),
  UNIQUE (organization_id, region, aging_level, base_profile, tags)
);
CREATE INDEX pools_tags ON pools USING gin (tags);

-- One row for each persona, 382 bytes with every index (a million rows, random fingerprints; the bound is 400). Column
-- order leaves no padding. Nothing derivable is stored: the time of creation is in the id (UUIDv7), the holder is in
-- check_outs, the parts are in generations.
CREATE TABLE personas (
  organization_id uuid NOT NULL,
  persona_id uuid NOT NULL,
  -- The persona's place in the queue: when it was last checked out exclusively. Until then a thousand years before it
  -- was made, so that the unused come first, the oldest of them at the front.
  turn_at timestamptz NOT NULL DEFAULT clock_timestamp() - interval '1000 years',
  -- When it was last used; -infinity for never. Not indexed, so that a check-in stays a HOT update.
  last_used_at timestamptz NOT NULL DEFAULT '-infinity',
  pool_id integer NOT NULL REFERENCES pools,
  -- The newest committed generation.
  generation integer NOT NULL CHECK (generation >= 1),
  -- The highest number ever given to a save. A number whose save failed stays unused.
  generations_reserved integer NOT NULL,
  total_uses integer NOT NULL DEFAULT 0,
  success_count integer NOT NULL DEFAULT 0,
  blocked_count integer NOT NULL DEFAULT 0,
  -- 1 aging     -> 2 when it is ripe, 4, 5
  -- 2 active    -> 3 when it rests long, 4 when targets refuse it, 5
  -- 3 dormant   -> 2 when it is called back, 4, 5
  -- 4 blocked   -> 3 when it may be tried again, 5
  -- 5 discarded -> nothing: final
  status smallint NOT NULL CHECK (status BETWEEN 1 AND 5),
  -- Its last check-out ended without use, so turn_at is later than its last use tells.
  returned boolean NOT NULL DEFAULT false,
  fingerprint_sha256 bytea NOT NULL CHECK (length(fingerprint_sha256) = 32),
  CHECK (generations_reserved >= generation),
  CHECK (total_uses >= success_count + blocked_count AND success_count >= 0 AND blocked_count >= 0),
  PRIMARY KEY (organization_id, persona_id)
) WITH (fillfactor = 90);
CREATE UNIQUE INDEX personas_fingerprint ON personas (organization_id, fingerprint_sha256);
-- Picks of few pools, in turn.
CREATE INDEX personas_pool_turn ON personas (pool_id, turn_at) WHERE status = 2;
-- Picks of many pools, or of any.
CREATE INDEX personas_turn ON personas (organization_id, turn_at) WHERE status = 2;
-- The few that a pick with a cool-down would not find by their turn.
CREATE INDEX personas_returned ON personas (organization_id, turn_at) WHERE status = 2 AND returned;

-- Live check-outs, and ended ones for the moment until they are swept.
CREATE TABLE check_outs (
  organization_id uuid NOT NULL,
  holder text NOT NULL CHECK (length(holder) BETWEEN 1 AND 128),
  persona_id uuid NOT NULL,
  -- 1 exclusive: one holder, may save. 2 read-only: any number, cannot save.
  mode smallint NOT NULL CHECK (mode IN (1, 2)),
  lease_token bytea NOT NULL CHECK (length(lease_token) = 16),
  expires_at timestamptz NOT NULL,
  PRIMARY KEY (organization_id, holder),
  FOREIGN KEY (organization_id, persona_id) REFERENCES personas
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500);
-- The lease itself: no two rows may hold a persona exclusively, whatever any program believes.
CREATE UNIQUE INDEX check_outs_exclusive ON check_outs (organization_id, persona_id) WHERE mode = 1;
CREATE INDEX check_outs_read_only ON check_outs (organization_id, persona_id) WHERE mode = 2;
CREATE INDEX check_outs_expiry ON check_outs (expires_at);

-- The committed bundles that are kept, newest and the ones before it.
CREATE TABLE generations (
  organization_id uuid NOT NULL,
  persona_id uuid NOT NULL,
  generation integer NOT NULL CHECK (generation >= 1),
  committed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  -- 41 bytes for each part: its number (1 byte), the generation whose key it lies under (4), its size (4), its SHA-256
  -- (32); big-endian, by number.
  manifest bytea NOT NULL CHECK (length(manifest) % 41 = 0 AND length(manifest) > 0),
  PRIMARY KEY (organization_id, persona_id, generation)
);

-- Objects on the store that no kept generation refers to: a row is written before the object, and again when the last
-- generation with it is dropped.
--   waiting -> deleted by the commit of its save
--   waiting -> doomed, once collect_at has passed; its save can no longer commit
--   doomed  -> deleted, after its object
CREATE TABLE pending_objects (
  organization_id uuid NOT NULL,
  persona_id uuid NOT NULL,
  generation integer NOT NULL CHECK (generation >= 1),
  part smallint NOT NULL CHECK (part BETWEEN 1 AND 4),
  doomed boolean NOT NULL DEFAULT false,
  collect_at timestamptz NOT NULL,
  PRIMARY KEY (organization_id, persona_id, generation, part)
);
CREATE INDEX pending_objects_collect_at ON pending_objects (collect_at);

-- What was done to personas, by whom and why. Only ever appended to.
CREATE TABLE persona_events (
  event_id uuid PRIMARY KEY,
  organization_id uuid NOT NULL,
  persona_id uuid NOT NULL,
  occurred_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  -- 1 the status was set. 2 its check-outs were ended by force.
  kind smallint NOT NULL CHECK (kind IN (1, 2)),
  -- The API key's id.
  actor text NOT NULL,
  reason text NOT NULL CHECK (length(reason) BETWEEN 1 AND 256),
  -- Both are set for kind 1 only.
  from_status smallint CHECK (from_status BETWEEN 1 AND 5),
  to_status smallint CHECK (to_status BETWEEN 1 AND 5),
  -- For kind 2: how many check-outs ended.
  released integer NOT NULL DEFAULT 0,
  CHECK ((kind = 1) = (from_status IS NOT NULL AND to_status IS NOT NULL))
);
CREATE INDEX persona_events_persona ON persona_events (organization_id, persona_id, occurred_at);

CREATE TABLE requests (
  organization_id uuid NOT NULL,
  method text NOT NULL,
  request_id uuid NOT NULL,
  request_sha256 bytea NOT NULL,
  answer bytea NOT NULL DEFAULT '',
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (organization_id, method, request_id)
);
CREATE INDEX requests_created_at ON requests (created_at);
