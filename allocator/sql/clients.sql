-- Organizations, and the clients that speak for them.

-- name: meet_organization
-- $1 organization, $2 time zone. Index: primary key.
INSERT INTO organizations (organization_id, time_zone) VALUES ($1, $2)
ON CONFLICT (organization_id) DO UPDATE SET time_zone = excluded.time_zone
WHERE organizations.time_zone <> excluded.time_zone;

-- name: meet_client
-- Registers a machine and a process on it, or notes that they live. $1 organization, $2 client, $3 name or '' to keep
-- it, $4 address, $5 instance, $6 user folder. Index: primary keys.
WITH machine AS (
  INSERT INTO clients (organization_id, client_id, client_name, client_ip) VALUES ($1, $2, $3, $4)
  ON CONFLICT (organization_id, client_id) DO UPDATE
  SET client_name = CASE WHEN excluded.client_name = '' THEN clients.client_name ELSE excluded.client_name END,
    client_ip = excluded.client_ip, last_seen_at = statement_timestamp()
)
INSERT INTO client_instances (organization_id, client_id, instance_number, user_folder_number) VALUES ($1, $2, $5, $6)
ON CONFLICT (organization_id, client_id, instance_number) DO UPDATE
SET user_folder_number = excluded.user_folder_number, last_seen_at = statement_timestamp();

-- name: note_holders
-- Notes that instances live, since leases of theirs were renewed; rows are locked in key order, and those that others
-- note at this moment are passed over. $1 organization, $2 clients, $3 instances. Index: primary keys.
WITH holders AS (
  SELECT client_id, instance_number FROM unnest($2::text[], $3::integer[]) AS u (client_id, instance_number)
), machines AS MATERIALIZED (
  SELECT c.client_id FROM clients c
  WHERE c.organization_id = $1 AND c.client_id IN (SELECT client_id FROM holders)
  ORDER BY c.client_id FOR UPDATE SKIP LOCKED
), instances AS MATERIALIZED (
  SELECT i.client_id, i.instance_number FROM client_instances i JOIN holders h USING (client_id, instance_number)
  WHERE i.organization_id = $1
  ORDER BY i.client_id, i.instance_number FOR UPDATE OF i SKIP LOCKED
), noted AS (
  UPDATE clients c SET last_seen_at = statement_timestamp() FROM machines m
  WHERE c.organization_id = $1 AND c.client_id = m.client_id
)
UPDATE client_instances i SET last_seen_at = statement_timestamp() FROM instances n
WHERE i.organization_id = $1 AND i.client_id = n.client_id AND i.instance_number = n.instance_number;

-- name: heartbeat
-- The clock, and whether a client should drain. $1 organization, $2 client. Index: primary key.
SELECT statement_timestamp() AS server_time,
  coalesce((SELECT draining FROM clients WHERE organization_id = $1 AND client_id = $2), false) AS draining;

-- name: page_of_clients
-- $1 organization, $2 the id to begin after or NULL, $3 how many, $4 online or not, NULL for both, $5 one client or NULL
-- for all, $6 the seconds of silence after which a client is offline. Index: primary key; leases_holder for the leases.
SELECT c.client_id, c.client_name, c.client_ip, c.draining, c.first_seen_at, c.last_seen_at,
  c.last_seen_at > now() - $6::float8 * interval '1 second' AS online,
  (SELECT count(*) FROM leases l WHERE l.organization_id = $1 AND l.client_id = c.client_id AND l.expires_at > now())
    AS leases
FROM clients c
WHERE c.organization_id = $1 AND ($2::text IS NULL OR c.client_id > $2) AND ($5::text IS NULL OR c.client_id = $5)
  AND ($4::boolean IS NULL OR (c.last_seen_at > now() - $6::float8 * interval '1 second') = $4)
ORDER BY c.client_id LIMIT $3;

-- name: instances_of_clients
-- Up to 1000 of each client. $1 organization, $2 clients, $3 the seconds of silence after which an instance is offline.
-- Index: primary key; leases_holder for the leases.
SELECT u.client_id, i.instance_number, i.user_folder_number, i.last_seen_at,
  i.last_seen_at > now() - $3::float8 * interval '1 second' AS online,
  (SELECT count(*) FROM leases l WHERE l.organization_id = $1 AND l.client_id = u.client_id
    AND l.instance_number = i.instance_number AND l.expires_at > now()) AS leases
FROM unnest($2::text[]) AS u (client_id)
CROSS JOIN LATERAL (
  SELECT instance_number, user_folder_number, last_seen_at FROM client_instances
  WHERE organization_id = $1 AND client_id = u.client_id
  ORDER BY instance_number LIMIT 1000
) i
ORDER BY u.client_id, i.instance_number;

-- name: set_draining
-- $1 organization, $2 client, $3 whether it drains. Index: primary key.
UPDATE clients SET draining = $3 WHERE organization_id = $1 AND client_id = $2 RETURNING client_id;

-- name: forget_instance
-- One that said goodbye. $1 organization, $2 client, $3 instance. Index: primary key.
DELETE FROM client_instances WHERE organization_id = $1 AND client_id = $2 AND instance_number = $3;

-- name: silent_holders
-- Instances that hold leases and were silent for $1 seconds, but not for $2; at most $3. Over all organizations, as the
-- clock's work. Index: client_instances_last_seen_at, leases_holder.
SELECT i.organization_id, i.client_id, i.instance_number FROM client_instances i
WHERE i.last_seen_at < statement_timestamp() - $1::float8 * interval '1 second'
  AND i.last_seen_at > statement_timestamp() - $2::float8 * interval '1 second'
  AND EXISTS (SELECT FROM leases l WHERE l.organization_id = i.organization_id AND l.client_id = i.client_id
    AND l.instance_number = i.instance_number)
ORDER BY i.last_seen_at LIMIT $3;

-- name: forget_instances
-- Instances that were silent for $1 seconds and hold nothing; at most $2. Over all organizations, as the clock's work.
-- Index: client_instances_last_seen_at.
DELETE FROM client_instances
WHERE (organization_id, client_id, instance_number) IN (
  SELECT i.organization_id, i.client_id, i.instance_number FROM client_instances i
  WHERE i.last_seen_at < statement_timestamp() - $1::float8 * interval '1 second'
    AND NOT EXISTS (SELECT FROM leases l WHERE l.organization_id = i.organization_id AND l.client_id = i.client_id
      AND l.instance_number = i.instance_number)
  ORDER BY i.last_seen_at LIMIT $2 FOR UPDATE SKIP LOCKED);

-- name: forget_clients
-- Clients that were silent for $1 seconds and have no instance on record; at most $2. Over all organizations, as the
-- clock's work. Index: clients_last_seen_at.
DELETE FROM clients
WHERE (organization_id, client_id) IN (
  SELECT c.organization_id, c.client_id FROM clients c
  WHERE c.last_seen_at < statement_timestamp() - $1::float8 * interval '1 second'
    AND NOT EXISTS (SELECT FROM client_instances i
      WHERE i.organization_id = c.organization_id AND i.client_id = c.client_id)
  ORDER BY c.last_seen_at LIMIT $2 FOR UPDATE SKIP LOCKED);
