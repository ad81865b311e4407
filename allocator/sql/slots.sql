-- Slots and their history. All are bound to one organization.

-- name: insert_slots
-- Makes slots; one whose external id stands is passed over. $1 organization, $2 ids, $3 external ids or NULL,
-- $4 keywords, $5 codes, $6 targets, $7 first days, $8 last days, $9 quotas, $10 settings, $11 active, $12 priorities,
-- $13 weights, $14 without exit, $15 persona needs, $16 digests. Index: work_slots_external_id.
INSERT INTO work_slots (slot_id, organization_id, external_id, keyword, code, target, start_date, end_date, daily_quota,
  settings, is_active, priority, weight, without_exit, persona_need, spec_sha256, class_id)
SELECT slot_id, $1, external_id, keyword, code, target, start_date, end_date, daily_quota, settings::json, is_active,
  priority, weight, without_exit, persona_need, spec_sha256,
  class_of($1, target, priority, without_exit, '', '', persona_need)
FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::date[], $8::date[], $9::integer[],
  $10::text[], $11::boolean[], $12::integer[], $13::integer[], $14::boolean[], $15::text[], $16::bytea[])
  AS u (slot_id, external_id, keyword, code, target, start_date, end_date, daily_quota, settings, is_active, priority,
    weight, without_exit, persona_need, spec_sha256)
ON CONFLICT (organization_id, external_id) WHERE external_id IS NOT NULL DO NOTHING;

-- name: slots_by_id
-- Slots with today's counters. $1 organization, $2 ids. Index: primary keys.
SELECT s.slot_id, s.external_id, s.keyword, s.code, s.target, s.start_date, s.end_date, s.daily_quota, s.settings,
  s.is_active, s.priority, s.weight, s.without_exit, s.persona_need, s.spec_sha256, s.version, s.created_at,
  s.updated_at, t.work_date, t.quota, t.allocated, t.succeeded, t.failed, t.blocked, t.expired, t.released
FROM work_slots s
LEFT JOIN daily_work_tracking t ON t.organization_id = $1 AND t.slot_id = s.slot_id AND t.work_date =
  (SELECT (now() AT TIME ZONE time_zone)::date FROM organizations WHERE organization_id = $1)
WHERE s.organization_id = $1 AND s.slot_id = ANY ($2::uuid[])
ORDER BY s.slot_id;

-- name: slots_by_external_id
-- $1 organization, $2 external ids. Index: work_slots_external_id.
SELECT slot_id, external_id FROM work_slots
WHERE organization_id = $1 AND external_id IS NOT NULL AND external_id = ANY ($2::text[]);

-- name: page_of_slots
-- $1 organization, $2 after this id or NULL, $3 target or NULL, $4 active or NULL, $5 what the keyword begins with,
-- $6 how many. Index: work_slots_organization.
SELECT slot_id FROM work_slots
WHERE organization_id = $1 AND ($2::uuid IS NULL OR slot_id > $2) AND ($3::text IS NULL OR target = $3)
  AND ($4::boolean IS NULL OR is_active = $4) AND starts_with(keyword, $5)
ORDER BY slot_id LIMIT $6;

-- name: lock_slot
-- Holds a slot until its update is committed. $1 organization, $2 slot. Index: primary key.
SELECT slot_id FROM work_slots WHERE organization_id = $1 AND slot_id = $2 FOR UPDATE;

-- name: update_slot
-- $1 organization, $2 slot, $3 keyword, $4 code, $5 target, $6 first day, $7 last day, $8 quota, $9 settings,
-- $10 active, $11 priority, $12 weight, $13 without exit, $14 persona need. Index: primary key.
UPDATE work_slots SET keyword = $3, code = $4, target = $5, start_date = $6, end_date = $7, daily_quota = $8,
  settings = $9, is_active = $10, priority = $11, weight = $12, without_exit = $13, persona_need = $14,
  class_id = class_of($1, $5, $11, $13, '', '', $14),
  version = version + 1, updated_at = now()
WHERE organization_id = $1 AND slot_id = $2;

-- name: follow_slots
-- Makes today's rows follow their slots. $1 organization, $2 slots. Index: primary keys.
SELECT track_slots($1, (now() AT TIME ZONE time_zone)::date, $2::uuid[]) FROM organizations WHERE organization_id = $1;

-- name: insert_change
-- $1 organization, $2 slot, $3 change id, $4 actor, $5 reason, $6 difference.
INSERT INTO work_slots_history (organization_id, slot_id, change_id, changed_at, actor, reason, difference)
VALUES ($1, $2, $3, clock_timestamp(), $4, $5, $6);

-- name: page_of_changes
-- Newest first. $1 organization, $2 slot, $3 before this time or NULL, $4 and id, $5 how many. Index: primary key.
SELECT change_id, changed_at, actor, reason, difference FROM work_slots_history
WHERE organization_id = $1 AND slot_id = $2 AND ($3::timestamptz IS NULL OR (changed_at, change_id) < ($3, $4::uuid))
ORDER BY changed_at DESC, change_id DESC LIMIT $5;
