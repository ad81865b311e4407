-- The chain of what operators did. All are bound to one organization but where it says otherwise.

-- name: lock_audit_head
-- The digest that the next entry follows, under a lock that lasts to the end of the transaction. $1 organization,
-- $2 the digest before the first. Index: primary key.
INSERT INTO audit_heads AS h (organization_id, entry_sha256) VALUES ($1, $2)
ON CONFLICT (organization_id) DO UPDATE SET entry_sha256 = h.entry_sha256
RETURNING entry_sha256;

-- name: next_audit_time
-- When the next entry is: now, but after the last one even if the clock was set back, since entries are read by time.
-- $1 organization, whose head is locked. Index: primary key.
SELECT greatest(clock_timestamp(), (SELECT at + interval '1 microsecond' FROM audit_log WHERE organization_id = $1
  ORDER BY at DESC, entry_id DESC LIMIT 1));

-- name: append_audit_entry
-- Adds an entry whose head is locked. $1 organization, $2 at, $3 id, $4 actor, $5 action, $6 resource, $7 reason,
-- $8 payload digest, $9 digest before, $10 digest. Index: primary keys.
WITH entry AS (
  INSERT INTO audit_log (organization_id, at, entry_id, actor, action, resource, reason, payload_sha256,
    previous_sha256, entry_sha256)
  VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
)
UPDATE audit_heads SET entry_sha256 = $10 WHERE organization_id = $1;

-- name: page_of_audit_entries
-- The newest first. $1 organization, $2 and $3 time and id to begin before, or NULL, $4 how many, $5 one action or NULL
-- for all. Index: primary key.
SELECT entry_id, at, actor, action, resource, reason, payload_sha256, previous_sha256, entry_sha256
FROM audit_log
WHERE organization_id = $1 AND ($2::timestamptz IS NULL OR (at, entry_id) < ($2, $3::uuid))
  AND ($5::text IS NULL OR action = $5)
ORDER BY at DESC, entry_id DESC LIMIT $4;

-- name: audit_entries_after
-- The oldest first. $1 organization, $2 and $3 time and id to begin after, or NULL, $4 how many. Index: primary key.
SELECT entry_id, at, actor, action, resource, reason, payload_sha256, previous_sha256, entry_sha256
FROM audit_log
WHERE organization_id = $1 AND ($2::timestamptz IS NULL OR (at, entry_id) > ($2, $3::uuid))
ORDER BY at, entry_id LIMIT $4;

-- name: audit_head
-- The digest of the last entry. $1 organization. Index: primary key.
SELECT entry_sha256 FROM audit_heads WHERE organization_id = $1;

-- name: audited_organizations
-- Whose chains there are, by heads and by entries: a head that was removed must not hide its entries.
SELECT organization_id FROM audit_heads
UNION SELECT o.organization_id FROM organizations o
  WHERE EXISTS (SELECT FROM audit_log a WHERE a.organization_id = o.organization_id);
