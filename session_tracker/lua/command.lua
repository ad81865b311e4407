-- Keeps the newest command of each session, by its number, and publishes all that were given.
-- KEYS: commands. ARGV: channel, head of the message, entries, life of the key in milliseconds. Entries are laid out as
-- in redis_packing.py; what stands is an entry without its id.
local entries = ARGV[3]
local place = 1
while place <= #entries do
  local begin = place
  local id, number, record
  id, number, record, place = struct.unpack('>I2c0dI4c0', entries, place)
  local stored = redis.call('HGET', KEYS[1], id)
  if not stored or struct.unpack('>d', stored) < number then
    redis.call('HSET', KEYS[1], id, string.sub(entries, begin + 2 + #id, place - 1))
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PUBLISH', ARGV[1], ARGV[2] .. entries)
