// The storage of an agent engine over nightowls, with npm `pg`: agents, floors, events, runs, messages, scratchpads.
// Every call is one statement, or one short transaction, on any connection: it works through a pooler in transaction mode (port 6543).
// The role of the connection is a service: select nightowls.grant_service('app'), or service_role on Supabase.
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'

export type Json = null | boolean | number | string | Json[] | { [key: string]: Json }
export type Options = { org?: string } // left out: the default org
export type Actor = { type: string; id: string }
export type Fence = { container: string; fence: number }
type Args = Record<string, unknown>

// Positions, versions and fences are far below 2^53. Everything else is as pg has it.
const types: pg.CustomTypesConfig = {
  getTypeParser: (oid: number, format?: any) => (oid === pg.types.builtins.INT8 ? Number : pg.types.getTypeParser(oid, format)),
}

// select * from nightowls.<name>(<argument> => $1, …): arguments that are undefined are left out, objects go as JSON.
async function rows<T>(pool: pg.Pool, name: string, args: Args): Promise<T[]> {
  const given = Object.entries(args).filter(([, value]) => value !== undefined)
  const list = given.map(([key], i) => `${key} => $${i + 1}`).join(', ')
  const values = given.map(([, value]) => (typeof value === 'object' && value !== null && !(value instanceof Date) ? JSON.stringify(value) : value))
  const { rows } = await pool.query({ text: `select * from nightowls.${name}(${list})`, values, types })
  return rows
}

async function value<T>(pool: pg.Pool, name: string, args: Args): Promise<T> {
  const [row] = await rows<Record<string, T>>(pool, name, args)
  return row[name]
}

// A value that is to be JSON whatever it is: a text, a number and null too.
const json = (any: Json | undefined) => (any === undefined ? undefined : JSON.stringify(any))

// The SQLSTATE of what went wrong: NW001 somebody was quicker, NW003 the floor is lost, NW007 not found, …
export const codeOf = (error: unknown): string | undefined => (error instanceof pg.DatabaseError ? error.code : undefined)

// --- agents ------------------------------------------------------------------------------------------------------------------

export type AgentVersion = {
  version: number; is_head: boolean; content: Record<string, Json>; actor: Actor; restored_from: number | null; published_at: Date
}

// The next version; `version` says which it must be (NW001 otherwise). An actor of type agent is refused (NW004).
export function publishAgentVersion(pool: pg.Pool, slug: string, content: Record<string, Json>,
                                    { actor, version, org }: Options & { actor?: Actor; version?: number } = {}): Promise<number> {
  return value(pool, 'publish_agent_version', { slug, content, actor, version, org })
}

// Publishes an older version once more, as a new head.
export async function rollbackAgentVersion(pool: pg.Pool, slug: string, to_version: number,
                                           { actor, org }: Options & { actor?: Actor } = {}): Promise<{ version: number; restored_from: number }> {
  const [made] = await rows<{ version: number; restored_from: number }>(pool, 'rollback_agent_version', { slug, to_version, actor, org })
  return made
}

// Oldest first; none of an agent that does not exist.
export function listAgentVersions(pool: pg.Pool, slug: string, { org }: Options = {}): Promise<AgentVersion[]> {
  return rows(pool, 'list_agent_versions', { slug, org })
}

export async function getAgent(pool: pg.Pool, slug: string, { version, org }: Options & { version?: number } = {}) {
  const [agent] = await rows<{ slug: string; version: number; content: Record<string, Json> }>(pool, 'get_agent', { slug, version, org })
  return agent
}

// Calls back with the slug of each agent that has changed since. A pooled client cannot LISTEN, so this reads the log every
// `everyMs`: it misses nothing, at a cost that does not grow with the log. Subscribe before you fill the cache.
// Returns a function that ends it and waits for the last call.
export async function subscribeInvalidations(pool: pg.Pool, callback: (slug: string) => void,
                                             { org, everyMs = 1_000, onError = () => {} }: Options & { everyMs?: number; onError?: (error: unknown) => void } = {}) {
  // The newest event's position, once nothing can appear below it any more: that is when read_events gives it out.
  const end = async (): Promise<number | undefined> => {
    const text = `select position from nightowls.read_events(max_events => 1, org => $1,
                    after => coalesce((select position - 1 from nightowls.recent_events(max_events => 1, org => $1)), 0))`
    const { rows } = await pool.query({ text, values: [org ?? null], types })
    return rows[0]?.position
  }
  // Where an append is open just now, from the beginning: a call too many does no harm.
  let after = (await end()) ?? 0
  const look = async () => {
    const safe = await end()
    const events = await rows<LogEvent>(pool, 'read_events', { after, max_events: 1_000, filter: { aggregate_types: ['agent'] }, org })
    for (const slug of new Set(events.map((event) => event.aggregate_id))) callback(slug)
    const last = events.at(-1)?.position ?? after
    after = events.length < 1_000 ? Math.max(last, safe ?? 0) : last
  }
  const stop = new AbortController()
  const done = (async () => {
    while (!stop.signal.aborted) {
      await look().catch(onError)
      await sleep(everyMs, undefined, { signal: stop.signal }).catch(() => {})
    }
  })()
  return async () => {
    stop.abort()
    await done
  }
}

// --- floors ------------------------------------------------------------------------------------------------------------------

export type Floor = Fence & { holder: string; signal: AbortSignal }
type Answer = { granted: boolean; ticket: number; fence: number; retry_in_ms: number }

// One holder of a container at a time, in the order in which they asked. A holder that is silent for maxHoldMs loses the floor.
export function createPostgresFloor(pool: pg.Pool, { org, maxHoldMs = 180_000, pollMs = 250 }: Options & { maxHoldMs?: number; pollMs?: number } = {}) {
  // A retry with the same requestId keeps its place. The signal ends the waiting, and nobody waits for who has left.
  async function acquire(container: string, holder: string, { requestId, signal }: { requestId?: string; signal?: AbortSignal } = {}): Promise<Fence & { holder: string }> {
    for (;;) {
      const [answer] = await rows<Answer>(pool, 'request_floor', {
        container, holder, max_hold_ms: maxHoldMs, poll_ms: pollMs, request_id: requestId, org,
      })
      if (answer.granted && !signal?.aborted) return { container, holder, fence: answer.fence }
      if (signal?.aborted) {
        await rows(pool, 'leave_floor', { container, holder, ticket: answer.ticket, org })
        throw signal.reason
      }
      await sleep(answer.retry_in_ms, undefined, { signal }).catch(() => {})
    }
  }
  const heartbeat = ({ container, holder, fence }: Fence & { holder: string }): Promise<boolean> =>
    value(pool, 'heartbeat_floor', { container, holder, fence, org })
  const release = ({ container, holder, fence }: Fence & { holder: string }): Promise<boolean> =>
    value(pool, 'release_floor', { container, holder, fence, org })

  // Runs work while the floor is held. Its signal says that the floor is lost; whatever it writes names the fence, which is what
  // keeps a late write out (NW003).
  async function withFloor<T>(container: string, holder: string, work: (floor: Floor) => Promise<T>,
                              options: { requestId?: string; signal?: AbortSignal } = {}): Promise<T> {
    const held = await acquire(container, holder, options)
    const lost = new AbortController()
    const timer = setInterval(() => {
      heartbeat(held).then((still) => { if (!still) lost.abort(new Error(`floor "${container}" is lost`)) }, () => { /* the next one tells */ })
    }, maxHoldMs / 5)
    try {
      return await work({ ...held, signal: lost.signal })
    } finally {
      clearInterval(timer)
      await release(held).catch(() => { /* it falls to the next when its time is over */ })
    }
  }
  return { acquire, heartbeat, release, withFloor }
}

// --- events, runs, messages, scratchpads -------------------------------------------------------------------------------------

export type NewEvent = { event_type: string; payload?: Json; metadata?: Json; event_id?: string }
export type LogEvent = {
  position: number; aggregate_type: string; aggregate_id: string; version: number
  event_type: string; payload: any; metadata: any; event_id: string | null; created_at: Date
}
export type RunStatus = 'queued' | 'running' | 'suspended' | 'completed' | 'failed' | 'cancelled'
export type Message = {
  seq: number; message_id: string; role: string; author_type: string; author_id: string; run_id: string | null
  content: any; metadata: any; created_at: Date
}

export function createStorage(pool: pg.Pool, { org }: Options = {}) {
  const all = <T>(name: string, args: Args) => rows<T>(pool, name, { ...args, org })
  const one = <T>(name: string, args: Args) => value<T>(pool, name, { ...args, org })

  const events = {
    // All or nothing; 0: the aggregate must not exist; n: it must be at version n (NW001).
    append: (aggregate_type: string, aggregate_id: string, list: NewEvent[], { expectedVersion, ...floor }: { expectedVersion?: number } & Partial<Fence> = {}) =>
      all<{ position: number; version: number }>('append_events', {
        aggregate_type, aggregate_id, events: list, expected_version: expectedVersion, container: floor.container, fence: floor.fence,
      }),
    of: (aggregate_type: string, aggregate_id: string, from_version?: number) =>
      all<LogEvent>('read_aggregate', { aggregate_type, aggregate_id, from_version }),
    // In order and without gaps: go on after the last position.
    after: (after: number, max_events?: number, filter?: { aggregate_types?: string[]; event_types?: string[] }) =>
      all<LogEvent>('read_events', { after, max_events, filter }),
  }

  const runs = {
    start: (run: { id?: string; threadId?: string; agent?: string; input?: Json; runner?: string }) =>
      one<string>('start_run', { run_id: run.id, thread_id: run.threadId, agent: run.agent, input: json(run.input), runner: run.runner }),
    // The version of the run's event. What is not a legal change is refused (NW005).
    setStatus: (run_id: string, status: RunStatus, patch: { output?: Json; error?: Json; runner?: string; metadata?: Json } = {}, floor: Partial<Fence> = {}) =>
      one<number>('set_run_status', { run_id, status, patch, container: floor.container, fence: floor.fence }),
    // What another process needs to go on, and the word that it may: both or neither.
    async suspend(run_id: string, snapshot: Json, patch: { metadata?: Json } = {}): Promise<void> {
      const client = await pool.connect()
      try {
        await client.query('begin')
        await client.query('select nightowls.save_run_snapshot(run_id => $1, snapshot => $2, org => $3)', [run_id, json(snapshot), org ?? null])
        await client.query(`select nightowls.set_run_status(run_id => $1, status => 'suspended', patch => $2, org => $3)`, [run_id, json(patch as Json), org ?? null])
        await client.query('commit')
      } catch (error) {
        await client.query('rollback').catch(() => {})
        throw error
      } finally {
        client.release()
      }
    },
    async resume(run_id: string, runner?: string): Promise<any> {
      await one('set_run_status', { run_id, status: 'running', patch: { runner: runner ?? null } })
      const [saved] = await all<{ snapshot: any }>('load_run_snapshot', { run_id })
      return saved?.snapshot
    },
    // waitMs holds a connection for so long; a message may come before.
    events: (run_id: string, after = 0, { max, waitMs }: { max?: number; waitMs?: number } = {}) =>
      all<LogEvent>('list_run_events', { run_id, after, max_events: max, max_wait: waitMs === undefined ? undefined : `${waitMs} ms` }),
  }

  const messages = {
    createThread: (thread: { id?: string; resourceId?: string; title?: string; metadata?: Record<string, Json> }) =>
      one<string>('create_thread', { thread_id: thread.id, resource_id: thread.resourceId, title: thread.title, metadata: thread.metadata }),
    // Its number in the thread. An id of yours makes a retry harmless.
    append: (thread_id: string, content: Json, more: { role?: string; author?: Actor; runId?: string; id?: string } = {}) =>
      one<number>('append_message', { thread_id, content: json(content), role: more.role, author: more.author, run_id: more.runId, message_id: more.id }),
    list: (thread_id: string, { after, before, max }: { after?: number; before?: number; max?: number } = {}) =>
      all<Message>('list_messages', { thread_id, after, before, max_messages: max }),
  }

  const scratchpad = {
    // Its version. expectedVersion 0: the key must not be there (NW001).
    put: (scope: string, key: string, any: Json, expectedVersion?: number) =>
      one<number>('scratchpad_put', { scope, key, value: json(any), expected_version: expectedVersion }),
    async get(scope: string, key: string): Promise<{ value: any; version: number } | undefined> {
      const [entry] = await all<{ value: any; version: number }>('scratchpad_get', { scope, key })
      return entry
    },
    list: (scope: string, after?: string) => all<{ key: string; value: any; version: number }>('scratchpad_list', { scope, after }),
    delete: (scope: string, key: string, expectedVersion?: number) =>
      one<boolean>('scratchpad_delete', { scope, key, expected_version: expectedVersion }),
  }

  return { events, runs, messages, scratchpad }
}
