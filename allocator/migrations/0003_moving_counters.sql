-- Counters that move all day leave their old versions behind, which another transaction may keep from being removed for
-- hours. A unique index visits every one of them at every update that leaves its page; a plain one does not. And the
-- more room a page has, the fewer updates leave it, each of which adds an entry to every index.
ALTER TABLE daily_work_tracking DROP CONSTRAINT daily_work_tracking_pkey;
CREATE INDEX daily_work_tracking_slot ON daily_work_tracking (organization_id, work_date, slot_id);
-- Few rows, each of which is updated several times a second.
ALTER TABLE exits SET (fillfactor = 10);

-- What the rows of one day say of slots; one outside its dates is not active.
CREATE FUNCTION days_of_slots(organization uuid, day date, slots uuid[])
RETURNS TABLE (slot_id uuid, quota integer, class_id integer, active boolean, paced_from double precision,
  paced_seconds double precision)
LANGUAGE sql STABLE AS $$
  SELECT s.slot_id, s.daily_quota, s.class_id, s.is_active AND day BETWEEN s.start_date AND s.end_date,
    CASE WHEN s.pacing = 2 THEN extract(epoch FROM day::timestamp AT TIME ZONE o.time_zone) END,
    CASE WHEN s.pacing = 2 THEN extract(epoch FROM (day + 1)::timestamp AT TIME ZONE o.time_zone)
      - extract(epoch FROM day::timestamp AT TIME ZONE o.time_zone) END
  FROM organizations o JOIN work_slots s USING (organization_id)
  WHERE o.organization_id = organization AND s.slot_id = ANY (slots)
$$;

-- Makes the rows of one day for slots, or makes them follow their slots; the only place where rows are made. A quota
-- never falls below the units that count against it. A slot outside its dates gets no row; one that stands is closed.
-- No constraint keeps a slot from having two rows of a day, the locks on the slots do: each statement sees what was
-- committed before the locks of the one before it were granted. No nested loops: on a day that nothing is known of yet, they
-- look cheap, and compare each slot with all others.
CREATE OR REPLACE FUNCTION track_slots(organization uuid, day date, slots uuid[]) RETURNS void
LANGUAGE sql VOLATILE SET enable_nestloop = off AS $$
  SELECT FROM work_slots s WHERE s.organization_id = organization AND s.slot_id = ANY (slots)
  ORDER BY s.slot_id FOR NO KEY UPDATE;

  SELECT FROM daily_work_tracking t
  WHERE t.organization_id = organization AND t.work_date = day AND t.slot_id = ANY (slots)
  ORDER BY t.slot_id FOR UPDATE;

  UPDATE daily_work_tracking t
  SET quota = greatest(least(n.quota + t.reopened, 1000000), t.allocated - t.expired - t.released, 1),
    class_id = n.class_id, active = n.active, paced_from = n.paced_from, paced_seconds = n.paced_seconds
  FROM days_of_slots(organization, day, slots) n
  WHERE t.organization_id = organization AND t.work_date = day AND t.slot_id = n.slot_id AND t.slot_id = ANY (slots)
    AND (t.quota, t.class_id, t.active, t.paced_from, t.paced_seconds) IS DISTINCT FROM
      (greatest(least(n.quota + t.reopened, 1000000), t.allocated - t.expired - t.released, 1), n.class_id, n.active,
        n.paced_from, n.paced_seconds);

  INSERT INTO daily_work_tracking (organization_id, work_date, slot_id, quota, class_id, active, paced_from,
    paced_seconds)
  SELECT organization, day, n.slot_id, n.quota, n.class_id, n.active, n.paced_from, n.paced_seconds
  FROM days_of_slots(organization, day, slots) n
  WHERE n.active AND NOT EXISTS (
    -- OFFSET 0: one look-up for each slot, whatever is known of the table.
    SELECT FROM daily_work_tracking d
    WHERE d.organization_id = organization AND d.work_date = day AND d.slot_id = n.slot_id OFFSET 0)
  ORDER BY n.slot_id
$$;

DROP FUNCTION exits_now(uuid);
-- What decides whether an exit can be used: `room` uses more, if it is enabled. A window that has ended counts
-- no more.
CREATE FUNCTION exits_now(organization uuid)
RETURNS TABLE (exit_id uuid, region text, enabled boolean, cap_mode smallint, cap integer, use_count integer, room integer,
  window_ends_at timestamptz)
LANGUAGE sql STABLE AS $$
  SELECT e.exit_id, e.region, e.enabled, e.cap_mode, e.cap, u.use_count, e.cap - u.use_count, e.window_ends_at
  FROM exits e
  CROSS JOIN LATERAL (SELECT CASE WHEN e.cap_mode = 3 AND e.window_ends_at <= now() THEN 0 ELSE e.use_count END
    AS use_count) u
  WHERE e.organization_id = organization
$$;
