CREATE TABLE organizations (
  organization_id uuid PRIMARY KEY,
  name text NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 128),
  -- An IANA name; the organization's days begin there.
  time_zone text NOT NULL DEFAULT 'UTC',
  created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_keys (
  key_id uuid PRIMARY KEY,
  -- SHA-256 of a key of 256 random bits: such a key needs no slow hash, since it cannot be guessed.
  key_sha256 bytea NOT NULL UNIQUE CHECK (length(key_sha256) = 32),
  organization_id uuid NOT NULL REFERENCES organizations,
  -- 1 worker, 2 operator, 3 admin, 4 service (another service of the suite; acts for any organization).
  role smallint NOT NULL CHECK (role BETWEEN 1 AND 4),
  name text NOT NULL DEFAULT '' CHECK (length(name) <= 128),
  created_at timestamptz NOT NULL DEFAULT now(),
  expires_at timestamptz,
  revoked_at timestamptz
);
CREATE INDEX api_keys_organization ON api_keys (organization_id);
