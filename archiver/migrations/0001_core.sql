CREATE TABLE policies (
  -- Also the table's name in queries.
  name text PRIMARY KEY CHECK (name ~ '^[a-z][a-z0-9_]{0,62}$'),
  -- A database, by its name in the service's configuration.
  source text NOT NULL,
  schema_name text NOT NULL,
  table_name text NOT NULL,
  -- How long a partition is: 'day', 'week' (from Monday) or 'month'.
  interval text NOT NULL CHECK (interval IN ('day', 'week', 'month')),
  ahead integer NOT NULL CHECK (ahead BETWEEN 3 AND 120),
  -- 0: for ever.
  hot_retention_days integer NOT NULL CHECK (hot_retention_days BETWEEN 0 AND 36500),
  -- 0: for ever.
  cold_retention_days integer NOT NULL CHECK (cold_retention_days BETWEEN 0 AND 36500),
  legal_hold boolean NOT NULL,
  -- Empty: none.
  key_column text NOT NULL,
  organization_column text NOT NULL,
  -- What the table is partitioned by, found out at the put.
  partition_column text NOT NULL,
  -- The etag; grows with every put and is never used twice, even after a deletion.
  version bigint NOT NULL,
  updated_at timestamptz NOT NULL DEFAULT now(),
  -- Two policies of one table would archive it under each other's feet.
  CONSTRAINT policies_table UNIQUE (source, schema_name, table_name)
);
CREATE SEQUENCE policy_versions;

-- Default policies that were offered once; one that an operator deletes does not come back.
CREATE TABLE seeded_policies (
  name text PRIMARY KEY,
  seeded_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE runs (
  run_id uuid PRIMARY KEY,
  job text NOT NULL CHECK (job IN ('archive', 'partitions')),
  -- 1 running   -> 2, 3 (3 also by the next run, when this one's process is gone)
  -- 2 succeeded -> (end)
  -- 3 failed    -> (end)
  state smallint NOT NULL DEFAULT 1 CHECK (state BETWEEN 1 AND 3),
  -- An API key's id, or 'schedule'.
  actor text NOT NULL,
  started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  ended_at timestamptz,
  partitions integer NOT NULL DEFAULT 0 CHECK (partitions >= 0),
  rows bigint NOT NULL DEFAULT 0 CHECK (rows >= 0),
  bytes bigint NOT NULL DEFAULT 0 CHECK (bytes >= 0),
  message text NOT NULL DEFAULT '',
  CHECK ((state = 1) = (ended_at IS NULL))
);
CREATE INDEX runs_job ON runs (job, run_id);
CREATE INDEX runs_running ON runs (run_id) WHERE state = 1;

CREATE TABLE archives (
  archive_id uuid PRIMARY KEY,
  policy text NOT NULL,
  source text NOT NULL,
  schema_name text NOT NULL,
  partition text NOT NULL,
  from_date date NOT NULL,
  to_date date NOT NULL CHECK (to_date > from_date),
  -- 1 selected  -> 2
  -- 2 copied    -> 3, 1 (the file is not what was copied)
  -- 3 verified  -> 4
  -- 4 published -> 5, 1 (rows changed since the copy)
  -- 5 detached  -> 6
  -- 6 dropped   -> (end)
  step smallint NOT NULL DEFAULT 1 CHECK (step BETWEEN 1 AND 6),
  run_id uuid NOT NULL,
  rows bigint NOT NULL DEFAULT 0 CHECK (rows >= 0),
  bytes bigint NOT NULL DEFAULT 0 CHECK (bytes >= 0),
  -- Why the last attempt failed.
  message text NOT NULL DEFAULT '',
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
-- A partition is on its way once at most; made again for late rows, it goes the way again.
CREATE UNIQUE INDEX archives_open ON archives (source, schema_name, partition) WHERE step < 6;
CREATE INDEX archives_policy ON archives (policy, from_date);

CREATE TABLE cold_files (
  key text PRIMARY KEY,
  archive_id uuid NOT NULL REFERENCES archives,
  policy text NOT NULL,
  -- A file holds the rows of one organization; NULL: rows that name none, which no query sees.
  organization_id uuid,
  from_date date NOT NULL,
  to_date date NOT NULL,
  rows bigint NOT NULL CHECK (rows > 0),
  size_bytes bigint NOT NULL CHECK (size_bytes > 0),
  sha256 bytea NOT NULL CHECK (length(sha256) = 32),
  -- [[name, kind], …] in the order of the table.
  columns jsonb NOT NULL,
  -- What PostgreSQL said of the rows in the snapshot they were copied from; see fingerprints.py.
  fingerprint jsonb NOT NULL,
  -- NULL until the archive is published. A published file is what a query reads once the partition is detached.
  published_at timestamptz
);
CREATE INDEX cold_files_archive ON cold_files (archive_id);
CREATE INDEX cold_files_policy ON cold_files (policy, organization_id, from_date);

-- The number of the newest manifest of a policy and of the newest that was written to the object store.
CREATE TABLE manifests (
  policy text PRIMARY KEY,
  number bigint NOT NULL CHECK (number > 0),
  written_number bigint NOT NULL DEFAULT 0 CHECK (written_number <= number)
);
