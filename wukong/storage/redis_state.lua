-- The operations of executors on a running job, as `state.py` says them.
--
-- ARGV[1] is a MessagePack map: op, now (false: this server's clock), and what the operation takes.
-- Replies begin with GRANTED, REFUSED or APPLIED.

-- What the commit that spent a token minted, and nobody has started.
local function unstarted(spent)
  local receipt, found = get(R, spent), {}
  for _, token in ipairs(receipt and receipt.minted or {}) do
    local row = get(T, token)
    if row and not row.running then
      add_invocation(found, token, row)
    end
  end
  return found
end

local function refuse(reason, invoke)
  return {REFUSED, reason, invoke or {}}
end

local function grant(job, token, row)
  local program = call('HGET', P, row.base)
  if not program then
    error('strand ' .. row.base .. ' has no program')
  end
  return {
    GRANTED, token, row.attempt, row.strand, row.base, program,
    row.is_piece and call('HGET', A, row.strand), locate(row.inputs),
    row.n_starts, row.n_deaths, row.cause, row.priority, job.is_open and 1 or 0,
  }
end

-- ------------------------------------------------------------------ operations

local operations = {}

function operations.start()
  local job, token = get_job(), request.token
  if not job then
    return refuse(UNKNOWN_JOB)
  end
  if job.status ~= RUNNING then
    return refuse(OVER)
  end
  local row = get(T, token)
  if not row then
    return refuse(SPENT, unstarted(token))
  end
  if not (row.running and row.attempt == request.attempt) then
    local was_queued = not row.running
    if row.running then
      if now - row.stamped_at < job.silence_s then
        return refuse(HELD)
      end
      count_death(job, row)
    end
    confirm(row)
    row.running = true
    row.attempt = request.attempt
    row.holder = request.holder
    row.stamped_at = now
    row.n_starts = row.n_starts + 1
    job.n_starts = job.n_starts + 1
    if row.n_starts > 1 then
      job.n_retries = job.n_retries + 1
    end
    put_running(token, row, was_queued)
    put_job(job)
  end
  return grant(job, token, row)
end

function operations.renew()
  local job, row = get_job(), get(T, request.token)
  if not row then
    return {REFUSED, job and job.status == RUNNING and SPENT or OVER}
  end
  if not row.running or row.attempt ~= request.attempt then
    return {REFUSED, HELD}
  end
  confirm(row)
  row.stamped_at = now
  put_running(request.token, row, false)
  local is_renewed = 0
  if now >= job.renew_at then
    is_renewed = put_job(job)
  end
  return {APPLIED, is_renewed}
end

function operations.absorb()
  local row, feed = get(T, request.token), request.feed
  if not row or not row.running or row.attempt ~= request.attempt then
    return refuse(SPENT)
  end
  local job = get_job()
  local waiting = get_waiting(job, feed)
  -- A strand that was done in an earlier generation waits for nothing.
  local is_done = job.has_done and call('SISMEMBER', D, feed[1]) == 1
  if not waiting or waiting.n_missing ~= request.n_held or is_done then
    return refuse(HELD)
  end
  local program = call('HGET', P, waiting.base)
  if not program then
    error('strand ' .. waiting.base .. ' has no program')
  end
  local recorded = {}
  for _, export in ipairs(waiting.inputs) do
    local found = get(E, export)
    if found and found.n_entries > 0 then
      recorded[#recorded + 1] = export
    end
  end
  local part = waiting.is_piece and call('HGET', A, feed[1])
  return {APPLIED, waiting.base, program, part, locate(recorded)}
end

-- ------------------------------------------------------------------ commit

-- Answers a commit whose token is spent: its own attempt gets the receipt again.
local function repeat_receipt(job)
  local invoke, receipt = unstarted(request.token), get(R, request.token)
  if not receipt or receipt.attempt ~= request.attempt then
    return refuse(SPENT, invoke)
  end
  local row = receipt.become ~= '' and get(T, receipt.become)
  local granted = false
  if row and row.running and row.attempt == request.become then
    granted = grant(job, receipt.become, row)
  end
  return {APPLIED, granted, invoke, {}, 0, 0}
end

-- A strand that this work has absorbed was dropped meanwhile: the rest of it is done again.
local function requeue(row)
  local invoke = {}
  row.running = false
  row.stamped_at = now
  put_queued(request.token, row)
  add_invocation(invoke, request.token, row)
  return refuse(HELD, invoke)
end

-- Leaves word for the client of an open job; payloads stay where they are.
local function leave_note(job, wanted)
  if #wanted == 0 and not request.trace then
    return
  end
  local recorded = {}
  for _, output in ipairs(wanted) do
    local entries = {}
    for i, made in ipairs(output[2]) do
      local entry = load(made[1])
      entry[3] = false
      entries[i] = pack(entry)
    end
    recorded[#recorded + 1] = output[1]
    recorded[#recorded + 1] = table.concat(entries)
  end
  local name = string.format('%09d.%s', job.n_commits, request.attempt)
  put(N, name, {recorded = recorded, trace = request.trace})
  if #wanted > 0 then
    job.news_version = job.version
  end
end

-- In an open job, a program goes with the last strand or piece that is run by it.
local function count_programs(row)
  local more = {}
  local function add(base, n)
    more[base] = (more[base] or 0) + n
  end
  for _, spawn in ipairs(request.spawns) do
    add(spawn[2], 1)
  end
  add(row.base, -1)
  for _, strand in ipairs(request.absorbed) do
    add(get(W, strand).base, -1)
  end
  for base, n in pairs(more) do
    if n ~= 0 and call('HEXISTS', P, base) == 1 and call('HINCRBY', L, base, n) < 0 then
      call('HDEL', P, base)
      call('HDEL', L, base)
    end
  end
end

-- What an absorbed strand has read in its executor's memory will never be recorded.
local function forget_unwritten(strand)
  local waiting = get(W, strand)
  for _, export in ipairs(waiting and waiting.inputs or {}) do
    local row = get(E, export)
    if row and row.n_entries == 0 then
      call('HDEL', E, export)
      call('HDEL', V, export)
    end
  end
end

-- Makes tokens of the strands that miss nothing; the committer becomes one of them.
local function mint(job, ready)
  local granted, invoke, minted, become = false, {}, {}, 0
  if #ready == 0 then
    return granted, invoke
  end
  if request.become then
    -- Most bytes first; of equals the first one, so that all stores choose alike.
    become = 1
    for i = 2, #ready do
      if ready[i][3] > ready[become][3] then
        become = i
      end
    end
  end
  for i, found in ipairs(ready) do
    local token = request.attempt .. '.' .. (i - 1)
    minted[i] = token
    local row = new_token(found[1], found[2], request.token)
    if i == become then
      row.running = true
      row.attempt = request.become
      row.holder = request.holder
      row.n_starts = 1
      job.n_starts = job.n_starts + 1
      put_running(token, row, false)
      granted = grant(job, token, row)
    else
      put_queued(token, row)
      add_invocation(invoke, token, row)
    end
  end
  put(R, request.token, {
    attempt = request.attempt,
    minted = minted,
    become = minted[become] or '',
    n_unstarted = #minted,
  })
  return granted, invoke
end

-- Records what the work has made and read. Returns the strands that miss nothing now.
local function apply(job, token)
  local arrivals, ready, wanted = {}, {}, {}
  -- First of all: a server without memory refuses a script at its first row, or not at all.
  for _, output in ipairs(request.outputs) do
    if record(job, output, arrivals) then
      wanted[#wanted + 1] = output
    end
  end
  if job.is_open then
    leave_note(job, wanted)
    count_programs(token)
  end
  -- Retained first: an input that pieces go on reading must not pass through zero consumers.
  for _, more in ipairs(request.retained) do
    count_consumers(job, more[1], more[2])
  end
  for _, export in ipairs(request.consumed) do
    count_consumers(job, export, -1)
  end
  for _, strand in ipairs(request.absorbed) do
    if job.is_open then
      forget_unwritten(strand)
    end
    call('HDEL', W, strand)
    call('HDEL', A, strand)
  end
  for _, arrival in ipairs(arrivals) do
    local feed = arrival[1]
    local waiting = arrive(job, feed, arrival[2])
    if waiting then
      ready[#ready + 1] = {feed[1], waiting, feed[3]}
    end
  end
  for _, spawn in ipairs(request.spawns) do
    local strand, base, part, inputs, n_missing, n_deaths, held = unpack(spawn)
    local row = {
      base = base,
      is_piece = true,
      n_missing = n_missing,
      inputs = inputs,
      n_deaths = n_deaths,
      priority = token.priority,
    }
    call('HSET', A, strand, part)
    if n_missing > 0 then
      put(W, strand, row)
    else
      ready[#ready + 1] = {strand, row, held}
    end
  end
  job.n_strands = job.n_strands + #request.spawns
  return ready
end

local function spend(job, row)
  confirm(row)
  call('HDEL', T, request.token)
  call('ZREM', row.running and S or Q, request.token)
  if row.is_piece then
    call('HDEL', A, row.strand)
  end
  if request.trace and not job.is_open then
    call('RPUSH', X, request.trace)
  end
end

local function garbage_of(job)
  if job.n_garbage == 0 then
    return {}
  end
  for _, blob in ipairs(request.collected) do
    call('ZREM', G, blob)
  end
  local garbage = call('ZRANGE', G, 0, GARBAGE_MAX - 1)
  if garbage[#garbage] == '' then
    garbage[#garbage] = nil
  end
  return garbage
end

function operations.commit()
  local job = get_job()
  if not job then
    return refuse(UNKNOWN_JOB)
  end
  if job.status ~= RUNNING then
    return refuse(OVER)
  end
  local row = get(T, request.token)
  if not row then
    return repeat_receipt(job)
  end
  if job.is_open then
    for _, strand in ipairs(request.absorbed) do
      if call('HEXISTS', W, strand) == 0 then
        return requeue(row)
      end
    end
  end
  job.n_commits = job.n_commits + 1
  job.version = job.version + 1
  job.n_tasks_done = job.n_tasks_done + request.n_tasks
  if request.failed then
    spend(job, row)
    end_job(job, FAILED, request.failed)
    return {APPLIED, false, {}, {}, 1, 0}
  end
  local ready = apply(job, row)
  spend(job, row)
  local granted, invoke = mint(job, ready)
  local garbage = garbage_of(job)
  if job.n_requested == 0 and not job.is_open then
    job.status = DONE
    -- In a later generation, pieces that only feed finished strands may be left.
    clear_work()
    granted, invoke = false, {}
  end
  if now >= job.sweep_at then
    for _, item in ipairs(sweep_tokens(job, 4)) do
      invoke[#invoke + 1] = item
    end
  end
  local is_renewed = put_job(job)
  announce(job)
  local is_over = job.status ~= RUNNING and 1 or 0
  return {APPLIED, granted, invoke, garbage, is_over, is_renewed}
end

return operations[request.op]()
