-- How exits stand with targets. Rows are locked by exit and target, after the rows of exits.

-- name: recover_exits
-- Ends the rows of exits that served their target well after their cool-down. $1 organization, $2 exits, $3 targets.
-- Index: primary key.
WITH well AS MATERIALIZED (
  SELECT h.exit_id, h.target
  FROM unnest($2::uuid[], $3::text[]) AS u (exit_id, target)
  JOIN exit_health h ON h.organization_id = $1 AND h.exit_id = u.exit_id AND h.target = u.target
  WHERE h.cooling_until <= statement_timestamp()
  ORDER BY h.exit_id, h.target
  FOR UPDATE OF h
)
DELETE FROM exit_health h USING well w
WHERE h.organization_id = $1 AND h.exit_id = w.exit_id AND h.target = w.target;

-- name: cool_exits
-- Lets exits cool down for targets: the signal's base, doubled with every further fault in a row, up to a limit, and at
-- least as long as the target asked for. A fault reported during a cool-down comes of a run that went out before it: it
-- does not count again, but may move the end. An exit of a late result may be gone. $1 organization, $2 exits,
-- $3 targets, $4 signals, $5 seconds that the target asked for or 0: by exit and target, each pair once. $6 to $8 the
-- bases of rate_limited, blocked and transport, $9 the limit, in seconds. Index: primary key; exits_exit_id.
INSERT INTO exit_health AS h (organization_id, exit_id, target, signal, faults, cooling_until)
SELECT $1, u.exit_id, u.target, u.signal, 1, statement_timestamp() + interval '1 second' * greatest(u.asked,
  least($9::float8, CASE u.signal WHEN 1 THEN $6::float8 WHEN 2 THEN $7::float8 ELSE $8::float8 END))
FROM unnest($2::uuid[], $3::text[], $4::smallint[], $5::float8[])
  WITH ORDINALITY AS u (exit_id, target, signal, asked, place)
WHERE EXISTS (SELECT FROM exits e WHERE e.organization_id = $1 AND e.exit_id = u.exit_id)
ORDER BY u.place
ON CONFLICT (organization_id, exit_id, target) DO UPDATE
SET signal = excluded.signal, reported_at = statement_timestamp(),
  faults = h.faults + (h.cooling_until <= statement_timestamp())::integer,
  cooling_until = greatest(h.cooling_until, excluded.cooling_until, statement_timestamp() + least($9::float8,
    CASE excluded.signal WHEN 1 THEN $6::float8 WHEN 2 THEN $7::float8 ELSE $8::float8 END
      * power(2, least(h.faults - 1 + (h.cooling_until <= statement_timestamp())::integer, 30)))
    * interval '1 second');

-- name: page_of_health
-- By exit and target. $1 organization, $2 exit or NULL, $3 target or NULL, $4 after this exit or NULL, $5 and target,
-- $6 how many. Index: primary key.
SELECT exit_id, target, signal, faults, cooling_until, reported_at FROM exit_health
WHERE organization_id = $1 AND ($2::uuid IS NULL OR exit_id = $2) AND ($3::text IS NULL OR target = $3)
  AND ($4::uuid IS NULL OR (exit_id, target) > ($4, $5::text))
ORDER BY exit_id, target LIMIT $6;

-- name: clear_health
-- Ends cool-downs of one exit. $1 organization, $2 exit, $3 target or NULL for all. Index: primary key.
WITH chosen AS MATERIALIZED (
  SELECT target FROM exit_health
  WHERE organization_id = $1 AND exit_id = $2 AND ($3::text IS NULL OR target = $3)
  ORDER BY target FOR UPDATE
)
DELETE FROM exit_health h USING chosen c
WHERE h.organization_id = $1 AND h.exit_id = $2 AND h.target = c.target;

-- name: exit_stands
-- $1 organization, $2 exit. Index: exits_exit_id.
SELECT EXISTS (SELECT FROM exits WHERE organization_id = $1 AND exit_id = $2);

-- name: forget_health
-- Rows whose cool-down ended a day ago say nothing any more. Of all organizations: few rows.
DELETE FROM exit_health WHERE cooling_until < now() - interval '1 day';

-- name: count_cooling
-- Of all organizations, for the gauges: few rows.
SELECT signal, count(*) AS exits FROM exit_health WHERE cooling_until > now() GROUP BY signal;
