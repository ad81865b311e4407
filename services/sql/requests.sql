-- The table `requests` of each service's schema (found by search_path):
--   CREATE TABLE requests (
--     organization_id uuid NOT NULL, method text NOT NULL, request_id uuid NOT NULL,
--     request_sha256 bytea NOT NULL, answer bytea NOT NULL DEFAULT '', created_at timestamptz NOT NULL DEFAULT now(),
--     PRIMARY KEY (organization_id, method, request_id));
--   CREATE INDEX requests_created_at ON requests (created_at);

-- name: claim_request
-- Claims an id; no row when it is taken. $1 organization, $2 method, $3 request id, $4 digest. Index: primary key.
INSERT INTO requests (organization_id, method, request_id, request_sha256)
VALUES ($1, $2, $3, $4)
ON CONFLICT (organization_id, method, request_id) DO NOTHING
RETURNING request_id;

-- name: find_request
-- $1 organization, $2 method, $3 request id. Index: primary key.
SELECT request_sha256, answer FROM requests
WHERE organization_id = $1 AND method = $2 AND request_id = $3;

-- name: record_answer
-- $1 organization, $2 method, $3 request id, $4 the serialized answer. Index: primary key.
UPDATE requests SET answer = $4
WHERE organization_id = $1 AND method = $2 AND request_id = $3;

-- name: forget_requests
-- A bounded bite, so that it never holds many rows. Index: requests_created_at.
DELETE FROM requests WHERE ctid = ANY (ARRAY(
  SELECT ctid FROM requests WHERE created_at < now() - interval '24 hours' ORDER BY created_at LIMIT 10000));
