-- The operations of clients, pools and sweepers on a job, as `oversight.py` says them, and create.
--
-- ARGV[1] is a MessagePack map: op, now (false: this server's clock), and what the operation takes.

local operations = {}

-- ------------------------------------------------------------------ the beginning

-- A job is created by one request or several, of which the first removes what an attempt at it has
-- left. Nobody sees the rows before the last one writes the job's own.
function operations.create()
  local existing = get_job()
  if existing then
    local queued = {}
    for _, token in ipairs(request.is_last and call('ZRANGE', Q, 0, -1) or {}) do
      if token ~= '' then
        add_invocation(queued, token, get(T, token))
      end
    end
    return {0, queued}
  end
  local job = request.row
  if request.is_first then
    call('UNLINK', unpack(KEYS))
    place_work(job)
    for _, key in ipairs({E, V, P, L, N}) do
      call('HSET', key, '', '')
    end
    call('RPUSH', X, '')
    call('ZADD', G, '+inf', '')
    call('SADD', D, '')
    for _, key in ipairs({E, V, P, L, N, X, G, D}) do
      call('PEXPIRE', key, math.floor(job.lease_s * 1000))
    end
  end
  for _, program in ipairs(request.programs) do
    call('HSET', P, program[1], program[2])
  end
  local arrivals = {}
  for _, output in ipairs(request.sources) do
    record(job, output, arrivals)
  end
  for _, arrival in ipairs(arrivals) do
    arrive(job, arrival[1], arrival[2])
  end
  local minted = mint_entries(job, request.entries)
  if request.is_last then
    job.sweep_at = now + job.silence_s
    job.renew_at = now + job.lease_s / 4
    if job.n_requested == 0 and not job.is_open then
      job.status = DONE
    end
    put_job(job)
  end
  return {1, minted}
end

-- ------------------------------------------------------------------ faults

function operations.release()
  local job, released = get_job(), {}
  if not job or job.status ~= RUNNING then
    return released
  end
  local running = call('ZRANGE', S, 0, -1)
  table.sort(running)
  for _, token in ipairs(running) do
    local row = token ~= '' and get(T, token)
    if row and row.holder == request.holder then
      row.running = false
      row.n_deaths = row.n_deaths + 1
      row.cause = request.cause
      row.stamped_at = now
      row.n_invokes = row.n_invokes + 1
      job.n_deaths = job.n_deaths + 1
      put_queued(token, row)
      add_invocation(released, token, row)
    end
  end
  if #released > 0 then
    put_job(job)
  end
  return released
end

function operations.expired()
  local job = get_job()
  if not job then
    return {{}, 0}
  end
  local found = {}
  if job.status == RUNNING then
    found = sweep_tokens(job, REINVOKE_MAX)
  end
  return {found, put_job(job)}
end

function operations.queued()
  local job, found, invoke = get_job(), {}, {}
  for _, token in ipairs(job and job.status == RUNNING and call('ZRANGE', Q, 0, -1) or {}) do
    if token ~= '' then
      found[#found + 1] = {get(T, token), token}
    end
  end
  table.sort(found, function(a, b)
    local first, second = a[1].stamped_at, b[1].stamped_at
    return first < second or (first == second and a[2] < b[2])
  end)
  for _, item in ipairs(found) do
    add_invocation(invoke, item[2], item[1])
  end
  return invoke
end

function operations.running()
  local found = {}
  local running = call('ZRANGE', S, 0, -1)
  table.sort(running)
  for _, token in ipairs(running) do
    local row = token ~= '' and get(T, token)
    if row then
      local part = row.is_piece and call('HGET', A, row.strand)
      found[#found + 1] = {token, row.strand, part, row.n_starts}
    end
  end
  return found
end

function operations.duplicate()
  local found = {}
  for _, token in ipairs(request.tokens) do
    local row = get(T, token)
    if row and row.running and row.n_starts == 1 then
      row.running = false
      row.stamped_at = now
      put_queued(token, row)
      add_invocation(found, token, row)
    end
  end
  return found
end

local function lose(job)
  local lost = {}
  for _, exports in ipairs({job.lost, request.exports}) do
    for _, export in ipairs(exports) do
      lost[export] = true
    end
  end
  job.lost = {}
  for export in pairs(lost) do
    job.lost[#job.lost + 1] = export
  end
  table.sort(job.lost)
  job.version = job.version + 1
  clear_work()
  put_job(job)
  announce(job)
end

function operations.report_lost()
  local job, row = get_job(), get(T, request.token)
  if not job or not row or not row.running or row.attempt ~= request.attempt then
    return 0
  end
  lose(job)
  return 1
end

function operations.mark_lost()
  local job = get_job()
  if job and (job.status == RUNNING or job.status == DONE) then
    job.status = RUNNING
    lose(job)
  end
  return 1
end

function operations.recorded()
  local found = {}
  for _, export in ipairs(ids_of(E)) do
    if is_complete(export) then
      found[#found + 1] = export
    end
  end
  return found
end

local function keep_survivors(job)
  local survivors = {}
  for _, survivor in ipairs(request.survivors) do
    survivors[survivor[1]] = survivor[2]
  end
  for _, export in ipairs(ids_of(E)) do
    local row, n_consumers = get(E, export), survivors[export] or 0
    if n_consumers > 0 and row.n_left == 0 then
      row.n_consumers = n_consumers
      put(E, export, row)
    else
      discard(job, export, row)
    end
  end
end

function operations.relaunch()
  local job = get_job()
  if not job or job.status ~= RUNNING or job.generation >= request.generation then
    return {}
  end
  for _, survivor in ipairs(request.survivors) do
    if not is_complete(survivor[1]) then
      return {} -- a failover has taken back what the client had seen
    end
  end
  job.generation = request.generation
  job.lost = {}
  job.version = job.version + 1
  job.n_requested = request.n_requested
  job.has_done = #request.done > 0
  call('UNLINK', D)
  call('SADD', D, '')
  call('PEXPIRE', D, math.floor(job.lease_s * 1000))
  for _, strand in ipairs(request.done) do
    call('SADD', D, strand)
  end
  clear_work()
  place_work(job)
  keep_survivors(job)
  for _, waiting in ipairs(request.waiting) do
    local strand, n_missing, inputs = unpack(waiting)
    put(W, strand, static_strand(strand, n_missing, inputs, job.priority))
  end
  local minted = mint_entries(job, request.entries)
  if job.n_requested == 0 then
    job.status = DONE
  end
  put_job(job)
  announce(job)
  return minted
end

-- ------------------------------------------------------------------ clients

local function count(key)
  return math.max(0, call('ZCARD', key) - 1)
end

local function view()
  local job = get_job()
  if not job then
    return false
  end
  return {
    job.version, job.status, call('HGET', P, 'error'), job.n_tasks, job.n_strands,
    job.n_tasks_done, job.n_commits, job.n_starts, count(Q), count(S), job.n_retries,
    job.n_deaths, job.lost, job.generation, job.news_version,
  }
end

local function results()
  local requested = {}
  for _, export in ipairs(ids_of(E)) do
    local row = get(E, export)
    if row.requested and row.n_left == 0 then
      requested[#requested + 1] = export
    end
  end
  return locate(requested)
end

operations.view = view
operations.results = results

function operations.collect()
  local job = get_job()
  if job then
    -- A write, so that the client can wait until this state is durable.
    call('PEXPIRE', J, math.floor(job.lease_s * 1000))
  end
  return {results(), call('LRANGE', X, 1, -1)}
end

function operations.cancel()
  local job = get_job()
  if not job or job.status ~= RUNNING then
    return 0
  end
  end_job(job, CANCELLED, false)
  return 1
end

function operations.forget()
  local version = string.sub(J, 1, -2)
  call('UNLINK', unpack(KEYS))
  call('PUBLISH', version .. 'end', 0)
  return 1
end

return operations[request.op]()
