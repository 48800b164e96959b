-- Law: a queued chunk has a message, or was issued a moment ago; one that has neither is missing again.
--
-- KEYS  1 queued (zset: chunk → ms when it was issued)   2 the list of the chunks of its model
--       3 unacked (the transport's hash: lease → message; a lease's id ends in "|" and the name of its list)
-- ARGV  1 ms a message may take from there to the list   2 what the ids of its messages begin with
-- Reply how many chunks have no message yet
local open = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
if #open == 0 then return 0 end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local messages = redis.call('LRANGE', KEYS[2], 0, -1)
local tail = '|' .. KEYS[2]
for _, lease in ipairs(redis.call('HKEYS', KEYS[3])) do
  if string.sub(lease, -#tail) == tail then messages[#messages + 1] = redis.call('HGET', KEYS[3], lease) end
end
local text = table.concat(messages, '\n')

local young = 0
for i = 1, #open, 2 do
  if not string.find(text, ARGV[2] .. string.format('%06d', open[i]) .. '-', 1, true) then
    if now - tonumber(open[i + 1]) < tonumber(ARGV[1]) then
      young = young + 1
    else
      redis.call('ZREM', KEYS[1], open[i])
    end
  end
end
return young
