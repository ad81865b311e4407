-- Slots and their history. All are bound to one organization.

-- name: insert_slots
-- Makes slots and answers with the ids of those it made; one whose external id stands is passed over. $1 organization,
-- $2 ids, $3 external ids or NULL, $4 keywords, $5 codes, $6 targets, $7 first days, $8 last days, $9 quotas,
-- $10 settings, $11 active, $12 priorities, $13 weights, $14 without exit, $15 persona needs, $16 pacings,
-- $17 exit regions, $18 exit providers, $19 digests. Index: work_slots_external_id.
WITH given AS MATERIALIZED (
  SELECT * FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::date[], $8::date[], $9::integer[],
    $10::text[], $11::boolean[], $12::integer[], $13::integer[], $14::boolean[], $15::text[], $16::smallint[],
    $17::text[], $18::text[], $19::bytea[])
    AS u (slot_id, external_id, keyword, code, target, start_date, end_date, daily_quota, settings, is_active, priority,
      weight, without_exit, persona_need, pacing, exit_region, exit_provider, spec_sha256)
), classes AS MATERIALIZED (
  -- Once for slots that are alike, since an import has thousands of them.
  SELECT d.*, class_of($1, d.target, d.priority, d.without_exit, d.exit_region, d.exit_provider, d.persona_need) AS class_id
  FROM (SELECT DISTINCT target, priority, without_exit, exit_region, exit_provider, persona_need FROM given) d
)
INSERT INTO work_slots (slot_id, organization_id, external_id, keyword, code, target, start_date, end_date, daily_quota,
  settings, is_active, priority, weight, without_exit, persona_need, pacing, exit_region, exit_provider, spec_sha256,
  class_id)
SELECT g.slot_id, $1, g.external_id, g.keyword, g.code, g.target, g.start_date, g.end_date, g.daily_quota,
  g.settings::json, g.is_active, g.priority, g.weight, g.without_exit, g.persona_need, g.pacing, g.exit_region,
  g.exit_provider, g.spec_sha256, c.class_id
FROM given g JOIN classes c
  ON c.target = g.target AND c.priority = g.priority AND c.without_exit = g.without_exit
    AND c.exit_region = g.exit_region AND c.exit_provider = g.exit_provider
    AND c.persona_need IS NOT DISTINCT FROM g.persona_need
-- In one order, so that two imports of the same rows do not wait for each other.
ORDER BY g.external_id
ON CONFLICT (organization_id, external_id) WHERE external_id IS NOT NULL DO NOTHING
RETURNING slot_id;

-- name: slots_by_id
-- Slots with today's counters, once something was allocated. $1 organization, $2 ids. Index: primary key;
-- daily_work_tracking_slot.
SELECT s.slot_id, s.external_id, s.keyword, s.code, s.target, s.start_date, s.end_date, s.daily_quota, s.settings,
  s.is_active, s.priority, s.weight, s.without_exit, s.persona_need, s.pacing, s.exit_region, s.exit_provider,
  s.spec_sha256, s.version, s.created_at, s.updated_at, t.work_date, t.quota, t.allocated, t.succeeded, t.failed, t.blocked, t.expired, t.released
FROM work_slots s
LEFT JOIN LATERAL (
  -- OFFSET 0: one look-up for each slot, also before the tables were first analyzed.
  SELECT * FROM daily_work_tracking d
  WHERE d.organization_id = $1 AND d.slot_id = s.slot_id AND d.allocated > 0 AND d.work_date =
    (SELECT (now() AT TIME ZONE time_zone)::date FROM organizations WHERE organization_id = $1)
  OFFSET 0) t ON true
WHERE s.organization_id = $1 AND s.slot_id = ANY ($2::uuid[])
ORDER BY s.slot_id;

-- name: slots_by_external_id
-- $1 organization, $2 external ids. Index: work_slots_external_id.
SELECT s.slot_id, s.external_id FROM unnest($2::text[]) AS e (external_id)
CROSS JOIN LATERAL (SELECT w.slot_id, w.external_id FROM work_slots w
  WHERE w.organization_id = $1 AND w.external_id = e.external_id OFFSET 0) s;

-- name: page_of_slots
-- $1 organization, $2 after this id or NULL, $3 how many, $4 target or '', $5 active or NULL, $6 what the keyword begins
-- with. Index: work_slots_organization.
SELECT slot_id FROM work_slots
WHERE organization_id = $1 AND ($2::uuid IS NULL OR slot_id > $2) AND ($4::text = '' OR target = $4)
  AND ($5::boolean IS NULL OR is_active = $5) AND starts_with(keyword, $6)
ORDER BY slot_id LIMIT $3;

-- name: page_of_slots_by_code
-- As page_of_slots, only of the code $7. Index: work_slots_code.
SELECT slot_id FROM work_slots
WHERE organization_id = $1 AND code <> '' AND code = $7 AND ($2::uuid IS NULL OR slot_id > $2)
  AND ($4::text = '' OR target = $4) AND ($5::boolean IS NULL OR is_active = $5) AND starts_with(keyword, $6)
ORDER BY slot_id LIMIT $3;

-- name: page_of_slots_by_external_id
-- As page_of_slots, only the slot of the external id $7 and, unless '', the code $8. Index: work_slots_external_id.
SELECT slot_id FROM work_slots
WHERE organization_id = $1 AND external_id = $7 AND ($8::text = '' OR code = $8) AND ($2::uuid IS NULL OR slot_id > $2)
  AND ($4::text = '' OR target = $4) AND ($5::boolean IS NULL OR is_active = $5) AND starts_with(keyword, $6)
ORDER BY slot_id LIMIT $3;

-- name: lock_slot
-- Holds a slot until its update is committed. $1 organization, $2 slot. Index: primary key.
SELECT slot_id FROM work_slots WHERE organization_id = $1 AND slot_id = $2 FOR UPDATE;

-- name: update_slot
-- $1 organization, $2 slot, $3 keyword, $4 code, $5 target, $6 first day, $7 last day, $8 quota, $9 settings,
-- $10 active, $11 priority, $12 weight, $13 without exit, $14 persona need, $15 pacing, $16 exit region,
-- $17 exit provider. Index: primary key.
UPDATE work_slots SET keyword = $3, code = $4, target = $5, start_date = $6, end_date = $7, daily_quota = $8,
  settings = $9, is_active = $10, priority = $11, weight = $12, without_exit = $13, persona_need = $14, pacing = $15,
  exit_region = $16, exit_provider = $17, class_id = class_of($1, $5, $11, $13, $16, $17, $14),
  version = version + 1, updated_at = now()
WHERE organization_id = $1 AND slot_id = $2;

-- name: hold_days
-- Holds the days from today on until the slots in hand are committed: whoever makes a day's rows meanwhile waits, and
-- then sees the slots. Answers with each day and whether its rows stand, or are being made. $1 organization.
-- Index: primary keys.
SELECT d.work_date, d.complete OR d.tracked_to IS NOT NULL AS begun
FROM organizations o JOIN tracked_days d USING (organization_id)
WHERE o.organization_id = $1 AND d.work_date >= (now() AT TIME ZONE o.time_zone)::date
ORDER BY d.work_date
FOR SHARE OF d;

-- name: note_days
-- Puts today and tomorrow on record, so that they can be held before anybody makes their rows. $1 organization.
INSERT INTO tracked_days (organization_id, work_date)
SELECT o.organization_id, (now() AT TIME ZONE o.time_zone)::date + n FROM organizations o, generate_series(0, 1) n
WHERE o.organization_id = $1
ORDER BY 2
ON CONFLICT (organization_id, work_date) DO NOTHING;

-- name: follow_slots
-- Makes the rows of days and slots, or makes them follow. $1 organization, $2 days, $3 slots. Index: primary keys;
-- daily_work_tracking_slot.
SELECT track_slots($1, day, $3::uuid[]) FROM unnest($2::date[]) AS day;

-- name: insert_change
-- $1 organization, $2 slot, $3 change id, $4 actor, $5 reason, $6 difference.
INSERT INTO work_slots_history (organization_id, slot_id, change_id, changed_at, actor, reason, difference)
VALUES ($1, $2, $3, clock_timestamp(), $4, $5, $6);

-- name: page_of_changes
-- Newest first. $1 organization, $2 slot, $3 before this time or NULL, $4 and id, $5 how many. Index: primary key.
SELECT change_id, changed_at, actor, reason, difference FROM work_slots_history
WHERE organization_id = $1 AND slot_id = $2 AND ($3::timestamptz IS NULL OR (changed_at, change_id) < ($3, $4::uuid))
ORDER BY changed_at DESC, change_id DESC LIMIT $5;
