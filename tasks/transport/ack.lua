-- Law: an acknowledgement touches the delivery it is for and no other.
--
-- Everything of a delivery is kept under its own lease id, so a worker that was thought dead and acknowledges late finds
-- nothing, whoever runs the message by then. Acknowledging twice is acknowledging once: a flush that failed is repeated.
--
-- KEYS  unacked, unacked_index, leases, deliveries
-- ARGV  for each message: lease id, SHA-1 of the message if its deliveries are counted or ''
-- Reply the number of leases that were still held
local held = 0
for k = 1, #ARGV, 2 do
  local id, counted = ARGV[k], ARGV[k + 1]
  if redis.call('ZREM', KEYS[3], id) == 1 then
    held = held + 1
    redis.call('HDEL', KEYS[1], id)
    redis.call('ZREM', KEYS[2], id)
    if counted ~= '' then redis.call('HDEL', KEYS[4], counted) end
  end
end
return held
