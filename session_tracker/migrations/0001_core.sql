-- The one row that stays of a session. Rows are inserted once and never updated.
CREATE TABLE crawling_results (
  organization_id uuid NOT NULL,
  session_id text NOT NULL CHECK (length(session_id) BETWEEN 1 AND 128),
  -- How the session ended; each of these is final, and leads nowhere else.
  --   completed: done. failed: could not be done. stopped: ended from outside.
  status text NOT NULL CHECK (status IN ('completed', 'failed', 'stopped')),
  stage text NOT NULL DEFAULT '' CHECK (length(stage) <= 64),
  -- bigint, since the contract's numbers reach 4,294,967,295.
  total_pages bigint NOT NULL CHECK (total_pages BETWEEN 0 AND 4294967295),
  products_found bigint NOT NULL CHECK (products_found BETWEEN 0 AND 4294967295),
  errors_count bigint NOT NULL CHECK (errors_count BETWEEN 0 AND 4294967295),
  -- By the worker's clock or the tracker's.
  started_at timestamptz NOT NULL,
  -- By this database's clock, when the row was committed.
  completed_at timestamptz NOT NULL DEFAULT now(),
  -- 0 when the worker's clock runs ahead of the database's.
  execution_time_seconds double precision NOT NULL CHECK (execution_time_seconds >= 0),
  -- Redacted before it comes here.
  config_snapshot jsonb,
  slot_id text NOT NULL DEFAULT '' CHECK (length(slot_id) <= 128),
  client_id text NOT NULL DEFAULT '' CHECK (length(client_id) <= 128),
  message text NOT NULL DEFAULT '' CHECK (length(message) <= 1024),
  PRIMARY KEY (organization_id, session_id)
);
CREATE INDEX crawling_results_newest ON crawling_results (organization_id, completed_at DESC, session_id DESC);
CREATE INDEX crawling_results_of_slot ON crawling_results (organization_id, slot_id, completed_at DESC, session_id DESC)
  WHERE slot_id <> '';
