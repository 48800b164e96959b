-- Law: a lease is renewed while it exists and never brought back: whoever lost it hears so.
--
-- kombu's index gets the time too, so that the sweep of a stock worker or Flower on the same database, which goes by its
-- own visibility timeout, leaves alone what is being worked on. Names expired leases of anybody, unless this command was
-- stuck on its way: after a freeze or an outage the living must have the time to beat first.
--
-- KEYS  leases, unacked_index
-- ARGV  1 lease in ms   2 Redis time in ms by which this should run, or 0   3 most expired leases to name
--       then the lease ids held
-- Reply Redis time in ms, 1 if on time, number of lost leases, those, then the expired ones
local HEAD = 3
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local by = tonumber(ARGV[2])
local lost, leases, index = {}, {}, {}
if #ARGV > HEAD then
  local ids = {}
  for k = HEAD + 1, #ARGV do ids[#ids + 1] = ARGV[k] end
  local scores = redis.call('ZMSCORE', KEYS[1], unpack(ids))
  for k, id in ipairs(ids) do
    if scores[k] then
      leases[#leases + 1], leases[#leases + 2] = string.format('%.0f', now + tonumber(ARGV[1])), id
      index[#index + 1], index[#index + 2] = time[1], id
    else
      lost[#lost + 1] = id
    end
  end
  redis.call('ZREM', KEYS[1], '')  -- the first write: see fetch.lua
  if #leases > 0 then
    redis.call('ZADD', KEYS[1], 'XX', unpack(leases))
    redis.call('ZADD', KEYS[2], 'XX', unpack(index))
  end
end
local reply = {string.format('%.0f', now), by > 0 and now <= by and 1 or 0, #lost}
for _, id in ipairs(lost) do reply[#reply + 1] = id end
if reply[2] == 1 then
  local expired = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now), 'LIMIT', 0, ARGV[3])
  for _, id in ipairs(expired) do reply[#reply + 1] = id end
end
return reply
