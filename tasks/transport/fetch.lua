-- Law: a message is in its list or leased, at every instant; never in neither, never decided by a client.
--
-- Takes up to ARGV[1] messages from the lists and leases them in one step. In this order, because a script that fails
-- half-way keeps what it has done so far:
--   1. read only (EXISTS, LLEN, LRANGE): nothing that can fail here has changed anything;
--   2. a write that changes nothing: a Redis over its maxmemory, read-only or unable to save refuses it, and with it the
--      script. (Out of memory does not refuse a ZREM, and never stops a script after its first write: consuming goes on,
--      which is what frees the memory.)
--   3. the leases; 4. the pop; 5. the bells, whose failure may not hide the reply.
-- A message is never parsed here and never re-encoded (cjson turns [] into {} and rounds big numbers): it is wrapped as
-- text in kombu's own format, [message, exchange, routing_key], with the anonymous exchange and its very queue, so that
-- stock tools put it back where it came from. Clients find the malformed ones, holding the lease, and bury them.
-- Strict between priorities, by quota between the lists of one priority; time is Redis' own.
--
-- KEYS  unacked, unacked_index, leases, deliveries, then for each list: the list, its bell; by priority, highest first
-- ARGV  1 most messages   2 where the rotation between lists starts   3 most bytes (the first message always fits)
--       4 lease in ms     5 prefix of the lease ids   6 largest message that is sent to a client   7 lists per priority
--       8 fair (1) or in order of the lists (0)   9 ms a bell is kept
--       then for each priority: most messages of it;   then for each list: its name, the tail of its wrapping, leased (1|0)
-- Reply flat: number of the list (from 1), message (false if too large to send), deliveries counted (-1: never delivered)
local HEAD = 9
local limit, start, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local largest, width, fair = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8] == '1'
local total = (#KEYS - 4) / 2
local priorities = total / width

local look = {}
for i = 1, total do look[i] = KEYS[3 + 2 * i] end
local any = 0
for i = 1, total, 4000 do any = any + redis.call('EXISTS', unpack(look, i, math.min(i + 3999, total))) end
if any == 0 then return {} end

local reply, taken, bytes, full = {}, 0, 0, false
local touched, known = {}, nil
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local deadline, score = string.format('%.0f', now + tonumber(ARGV[4])), time[1]
local unacked, index, leases = {}, {}, {}

local function take(i, message)
  local at = HEAD + priorities + 3 * (i - 1)
  local name, tail, count = ARGV[at + 1], ARGV[at + 2], -1
  taken, bytes = taken + 1, bytes + #message
  if ARGV[at + 3] == '1' then
    local id = ARGV[5] .. taken .. '.' .. #tail .. '|' .. name
    if known == nil then known = redis.call('HLEN', KEYS[4]) > 0 end
    if known then count = tonumber(redis.call('HGET', KEYS[4], redis.sha1hex(message)) or -1) end
    unacked[#unacked + 1], unacked[#unacked + 2] = id, '[' .. message .. tail
    index[#index + 1], index[#index + 2] = score, id
    leases[#leases + 1], leases[#leases + 2] = deadline, id
  end
  reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = i, #message <= largest and message, count
end

for priority = 1, priorities do
  local room = math.min(limit - taken, tonumber(ARGV[HEAD + priority]))
  local waiting = {}
  if room > 0 and not full then
    for step = 0, width - 1 do
      local i = (priority - 1) * width + (fair and (start + step) % width or step) + 1
      local length = redis.pcall('LLEN', look[i])  -- a key of another type is nobody's queue
      if type(length) == 'number' and length > 0 then
        waiting[#waiting + 1] = {i = i, length = length, off = 0}
        touched[#touched + 1] = waiting[#waiting]
      end
    end
  end
  while room > 0 and #waiting > 0 and not full do
    local share = fair and math.max(1, math.floor(room / #waiting)) or room
    local more = {}
    for _, list in ipairs(waiting) do
      local want = math.min(share, room, list.length - list.off)
      while want > 0 and not full do
        local chunk = redis.call('LRANGE', look[list.i], -(list.off + math.min(want, 16)), -(list.off + 1))
        for k = #chunk, 1, -1 do
          if taken > 0 and bytes + #chunk[k] > most_bytes then full = true break end
          take(list.i, chunk[k])
          list.off, want, room = list.off + 1, want - 1, room - 1
        end
      end
      if list.off < list.length then more[#more + 1] = list end
    end
    waiting = more
  end
end
if taken == 0 then return {} end

redis.call('ZREM', KEYS[3], '')
if #unacked > 0 then
  redis.call('HSET', KEYS[1], unpack(unacked))
  redis.call('ZADD', KEYS[2], unpack(index))
  redis.call('ZADD', KEYS[3], unpack(leases))
end
for _, list in ipairs(touched) do
  if list.off > 0 then redis.call('LTRIM', look[list.i], 0, -(list.off + 1)) end
end
-- An emptied list takes its bell along; one with messages left wakes the next consumer.
for _, list in ipairs(touched) do
  local bell = KEYS[4 + 2 * list.i]
  if list.off == list.length then
    redis.pcall('DEL', bell)
  elseif redis.pcall('EXISTS', bell) == 0 then
    redis.pcall('LPUSH', bell, '1')
    redis.pcall('PEXPIRE', bell, ARGV[9])
  end
end
return reply
