-- Law: a queued chunk has a message, or was issued a moment ago; one that has neither is missing again. Where there are
-- too many messages to look at, a moment is long.
--
-- KEYS  1 queued (zset: chunk → ms when it was issued)   2 the list of the chunks of its model
--       3 unacked (the transport's hash: lease → message; a lease's id ends in "|" and the name of its list)
-- ARGV  1 ms a message may take from there to the list   2 what the ids of its messages begin with
--       3 messages to look at, at most   4 ms, if there are more
local open = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
if #open == 0 then return end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local STEP = 500
local found, grace = {}, tonumber(ARGV[1])
-- The header of its own id: those of its root and its parent, whom a worker names when it sends, end in "_id".
local id = '"id":%s*"' .. string.gsub(ARGV[2], '%p', '%%%0') .. '(%d+)%-'
local function look(message)
  local chunk = message and string.match(message, id)
  if chunk then found[tonumber(chunk)] = true end
end

local waiting = redis.call('LLEN', KEYS[2])
if waiting + redis.call('HLEN', KEYS[3]) > tonumber(ARGV[3]) then
  grace = math.max(grace, tonumber(ARGV[4]))
else
  for first = 0, waiting - 1, STEP do
    for _, message in ipairs(redis.call('LRANGE', KEYS[2], first, first + STEP - 1)) do look(message) end
  end
  local tail = '|' .. KEYS[2]
  for _, lease in ipairs(redis.call('HKEYS', KEYS[3])) do
    if string.sub(lease, -#tail) == tail then look(redis.call('HGET', KEYS[3], lease)) end
  end
end

for i = 1, #open, 2 do
  if not found[tonumber(open[i])] and now - tonumber(open[i + 1]) >= grace then
    redis.call('ZREM', KEYS[1], open[i])
  end
end
