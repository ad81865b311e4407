-- Removes what is left of ended sessions when its time has come: first the record, later the counters, which until then
-- keep a late write from bringing the session back.
-- KEYS: ends, counters, records, commands. ARGV: the most to remove. Returns how many there were.
local now = redis.call('TIME')[1]
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, member in ipairs(due) do
  local id = string.sub(member, 2)
  if string.byte(member) == 99 then
    redis.call('HDEL', KEYS[2], id)
  else
    redis.call('HDEL', KEYS[3], id)
    redis.call('HDEL', KEYS[4], id)
  end
  redis.call('ZREM', KEYS[1], member)
end
return #due
