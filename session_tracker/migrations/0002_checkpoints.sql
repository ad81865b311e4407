-- Where important sessions stood when they were last saved: what a tracker that lost its memory begins with. A row is
-- updated in place while its session runs, and deleted with its result.
--
-- Half of each page is kept free, and no column that changes is indexed: so updates stay on their page (HOT), and neither
-- the table nor its index grows with their number.
CREATE TABLE session_checkpoints (
  organization_id uuid NOT NULL,
  session_id text NOT NULL CHECK (length(session_id) BETWEEN 1 AND 128),
  -- The session whole but for its counters, as JSON: written when it changes, which is seldom. With the token of its
  -- lease, which is renewed again after a restart. Empty: another tracker deleted the row with the session's result.
  described text NOT NULL,
  -- numeric, since the contract's number reaches 2^64 - 1.
  sequence numeric(20, 0) NOT NULL CHECK (sequence >= 0),
  -- bigint, since the contract's numbers reach 4,294,967,295.
  current_page bigint NOT NULL CHECK (current_page BETWEEN 0 AND 4294967295),
  total_pages bigint NOT NULL CHECK (total_pages BETWEEN 0 AND 4294967295),
  products_found bigint NOT NULL CHECK (products_found BETWEEN 0 AND 4294967295),
  errors_count bigint NOT NULL CHECK (errors_count BETWEEN 0 AND 4294967295),
  -- By the tracker's clock.
  reported_at timestamptz NOT NULL,
  -- By this database's clock.
  saved_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (organization_id, session_id)
) WITH (fillfactor = 50);

CREATE INDEX crawling_results_of_client
  ON crawling_results (organization_id, client_id, completed_at DESC, session_id DESC) WHERE client_id <> '';
