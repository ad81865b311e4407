-- Statements on the schema "identity", named in full since they also run on other services' connections.

-- name: find_key
-- Who a key names; no row when it is unknown, revoked or expired. $1 SHA-256 of the key. Index: api_keys_key_sha256_key.
SELECT k.key_id, k.organization_id, k.role, o.time_zone
FROM identity.api_keys k JOIN identity.organizations o USING (organization_id)
WHERE k.key_sha256 = $1 AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now());

-- name: find_time_zone
-- $1 organization. Index: primary key.
SELECT time_zone FROM identity.organizations WHERE organization_id = $1;

-- name: ensure_organization
-- The organization of that name, made when there is none. $1 fresh id, $2 name, $3 time zone, or NULL to keep it.
INSERT INTO identity.organizations (organization_id, name, time_zone)
VALUES ($1, $2, coalesce($3, 'UTC'))
ON CONFLICT (name) DO UPDATE SET time_zone = coalesce($3, organizations.time_zone)
RETURNING organization_id, name, time_zone;

-- name: is_time_zone
-- $1 a name.
SELECT EXISTS (SELECT FROM pg_timezone_names WHERE name = $1);

-- name: insert_key
-- $1 id, $2 SHA-256, $3 organization, $4 role, $5 name, $6 expiry or NULL.
INSERT INTO identity.api_keys (key_id, key_sha256, organization_id, role, name, expires_at)
VALUES ($1, $2, $3, $4, $5, $6);

-- name: list_keys
-- All keys with their organization, newest first.
SELECT k.key_id, o.name AS organization, k.role, k.name, k.created_at, k.expires_at, k.revoked_at
FROM identity.api_keys k JOIN identity.organizations o USING (organization_id)
ORDER BY k.created_at DESC, k.key_id;

-- name: revoke_key
-- $1 id. No row when there is no such key. Index: primary key.
UPDATE identity.api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE key_id = $1 RETURNING key_id;
