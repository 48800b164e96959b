-- Law: a message goes back to the list it came from, byte for byte, in the step that ends its lease.
--
-- For the holder (shutdown, reject) and for whoever finds a lease expired. An expired lease counts a delivery only if the
-- message was on the device or in preparation when its worker was last heard of: counting every redelivery would
-- dead-letter the neighbours of a poison message. A command that was stuck on its way (Redis or this process was frozen)
-- reclaims nothing: the owners of those leases have not had their chance to beat.
--
-- KEYS  unacked, unacked_index, leases, deliveries, then for each lease: its list, its bell, the suspects of its holder
-- ARGV  1 only expired ones (1|0)   2 Redis time in ms by which this should run   3 to the tail (1) or to the head (0)
--       4 remember that it was delivered (1|0)   5 ms that is remembered   6 ms a bell is kept   then the lease ids,
--       for the head: the one to be taken first comes last
-- Reply the lease ids that were given back
local HEAD = 6
local expired, tail, remember = ARGV[1] == '1', ARGV[3] == '1', ARGV[4] == '1'
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
if expired and now > tonumber(ARGV[2]) then return {} end

local done = {}
redis.call('ZREM', KEYS[3], '')  -- the first write: see fetch.lua
for k = HEAD + 1, #ARGV do
  local id, at = ARGV[k], 4 + 3 * (k - HEAD - 1)
  local due = redis.call('ZSCORE', KEYS[3], id)
  if due and (not expired or tonumber(due) <= now) then
    local kept = redis.call('HGET', KEYS[1], id)
    local pushed = true
    if kept then
      local wrapping = tonumber(string.match(id, '^[^|]*%.(%d+)|'))
      local message = string.sub(kept, 2, -(wrapping + 1))
      local push = redis.pcall(tail and 'LPUSH' or 'RPUSH', KEYS[at + 1], message)
      pushed = type(push) == 'number'  -- a key of another type in the way: the lease stays, and with it the message
      if pushed and remember then
        local suspects = expired and redis.call('GET', KEYS[at + 3]) or false
        local counts = suspects and string.find(suspects, '\n' .. id .. '\n', 1, true) and 1 or 0
        redis.call('HINCRBY', KEYS[4], redis.sha1hex(message), counts)
        redis.call('PEXPIRE', KEYS[4], ARGV[5])
      end
      if pushed and redis.pcall('EXISTS', KEYS[at + 2]) == 0 then
        redis.pcall('LPUSH', KEYS[at + 2], '1')
        redis.pcall('PEXPIRE', KEYS[at + 2], ARGV[6])
      end
    end
    if pushed then
      redis.call('HDEL', KEYS[1], id)
      redis.call('ZREM', KEYS[2], id)
      redis.call('ZREM', KEYS[3], id)
      done[#done + 1] = id
    end
  end
end
return done
