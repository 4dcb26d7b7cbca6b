// The main functions over supabase-js, as a service, as members, as a user without membership and as nobody.
import assert from "node:assert/strict";
import { createClient } from "@supabase/supabase-js";
import { token } from "./token.mjs";

const url = process.env.SUPABASE_URL!;
const acme = "00000000-0000-4000-8000-00000000000a";
const beta = "00000000-0000-4000-8000-00000000000b";

type Args = Record<string, unknown>;
type Client = ReturnType<typeof as>;

// A client as an application has it: the project's key, and the token of who is signed in.
const as = (claims: Args, key?: string) =>
  createClient<any>(url, process.env.SUPABASE_ANON_KEY!, { accessToken: async () => token(claims, key) });
const user = (sub: string, more: Args = {}) => as({ role: "authenticated", sub, app_metadata: { org_id: acme }, ...more });

const service = createClient<any>(url, process.env.SUPABASE_SERVICE_ROLE_KEY!);
const anon = createClient<any>(url, process.env.SUPABASE_ANON_KEY!);
const ann = user("ann");

async function call(client: Client, schema: string, name: string, args: Args = {}): Promise<any> {
  const { data, error, status } = await client.schema(schema).rpc(name, args);
  assert.equal(error, null, `${schema}.${name} ${JSON.stringify(args)}: ${JSON.stringify(error)}`);
  assert.ok(status === 200 || status === 204, `${name}: ${status}`);
  return data;
}

async function refused(client: Client, name: string, args: Args, status: number, wanted: Args, schema = "nightowls") {
  const { data, error, status: found } = await client.schema(schema).rpc(name, args);
  assert.equal(data, null, `${schema}.${name} is not refused`);
  const looked: Args = Object.fromEntries(Object.keys(wanted).map((key) => [key, (error as any)[key]]));
  assert.deepEqual([looked, found], [wanted, status], `${schema}.${name}: ${JSON.stringify(error)}`);
}

// 1. A service: by a wrapper in public, which needs no .schema(), and by the function itself.
const calls: [name: string, args: Args][] = [];
for (const schema of ["public", "nightowls"]) {
  const id = `${schema}-1`;
  const rpc = (name: string, args: Args = {}) => {
    if (schema === "nightowls") calls.push([name, args]);
    return call(service, schema, name, args);
  };

  const first = await rpc("append_event", {
    aggregate_type: "order", aggregate_id: id, event_type: "placed", payload: { total: "19.90" }, expected_version: 0,
  });
  assert.equal(first.version, 1);
  const batch = await rpc("append_events", {
    aggregate_type: "order", aggregate_id: id, events: [{ event_type: "paid" }, { event_type: "sent" }], expected_version: 1,
  });
  assert.deepEqual(batch.map((event: any) => event.version), [2, 3]);
  const many = await rpc("append_many", { appends: [{ aggregate_type: "cart", aggregate_id: id, events: [{ event_type: "made" }] }] });
  assert.deepEqual(many.map((event: any) => [event.aggregate_type, event.version]), [["cart", 1]]);
  const history = await rpc("read_aggregate", { aggregate_type: "order", aggregate_id: id });
  assert.deepEqual(history.map((event: any) => event.event_type), ["placed", "paid", "sent"]);
  const read = await rpc("read_events", { after: first.position, max_events: 2, filter: { aggregate_types: ["order"] } });
  assert.deepEqual(read.map((event: any) => event.version), [2, 3]);

  assert.equal(await rpc("publish_agent_version", { slug: id, content: { instructions: "one", modelId: "small" } }), 1);
  assert.equal(await rpc("publish_agent_version", { slug: id, content: { instructions: "two" }, version: 2 }), 2);
  assert.deepEqual(await rpc("rollback_agent_version", { slug: id, to_version: 1 }), [{ version: 3, restored_from: 1 }]);
  const versions = await rpc("list_agent_versions", { slug: id });
  assert.deepEqual(versions.map((row: any) => [row.version, row.is_head]), [[1, false], [2, false], [3, true]]);
  assert.equal((await rpc("get_agent", { slug: id }))[0].content.model_id, "small");

  assert.equal(await rpc("create_thread", { thread_id: id, title: "A refund" }), id);
  assert.equal(await rpc("start_run", { run_id: id, thread_id: id, agent: id, input: { ask: "refund" } }), id);
  await rpc("set_run_status", { run_id: id, status: "running" });
  assert.equal(await rpc("save_run_snapshot", { run_id: id, snapshot: { step: 3 } }), 1);
  await rpc("set_run_status", { run_id: id, status: "suspended", patch: { metadata: { waits_for: "ann" } } });
  assert.deepEqual((await rpc("load_run_snapshot", { run_id: id }))[0].snapshot, { step: 3 });
  const events = await rpc("list_run_events", { run_id: id });
  assert.deepEqual(events.map((event: any) => event.event_type), ["run_queued", "run_running", "run_suspended"]);

  assert.equal(await rpc("append_message", { thread_id: id, content: { text: "hello", password: "hunter2" }, author: { type: "user", id: "ann" } }), 1);
  assert.equal(await rpc("append_message", { thread_id: id, content: { text: "yes?" }, role: "assistant", author: { type: "agent", id: "sage" }, run_id: id }), 2);
  const messages = await rpc("list_messages", { thread_id: id, max_messages: 1 });
  assert.deepEqual(messages.map((row: any) => [row.seq, row.content.password]), [[1, "hunter2"]]);

  assert.equal(await rpc("scratchpad_put", { scope: id, key: "plan", value: ["ask", "pay"], expected_version: 0 }), 1);
  assert.deepEqual((await rpc("scratchpad_get", { scope: id, key: "plan" }))[0].value, ["ask", "pay"]);
  assert.equal((await rpc("scratchpad_list", { scope: id })).length, 1);
  assert.equal(await rpc("scratchpad_delete", { scope: id, key: "plan" }), true);

  const floor = await rpc("request_floor", { container: id, holder: "worker-1", request_id: "r1" });
  assert.equal(floor.granted, true);
  const guard = { container: id, fence: floor.fence };
  const guarded = await rpc("append_event", { aggregate_type: "conversation", aggregate_id: id, event_type: "said", ...guard });
  assert.equal(guarded.version, 1);
  assert.equal(await rpc("heartbeat_floor", { container: id, holder: "worker-1", fence: floor.fence }), true);
  assert.equal(await rpc("release_floor", { container: id, holder: "worker-1", fence: floor.fence }), true);

  const sent = await rpc("send", { queue: "jobs", message: { to: id }, dedup_key: id });
  const [message] = await rpc("read", { queue: "jobs", vt: 30, qty: 1 });
  assert.deepEqual([message.msg_id, message.message], [sent, { to: id }]);
  assert.equal(await rpc("ack", { queue: "jobs", msg_id: sent, receipt: message.receipt }), true);

  const followup = await rpc("create_followup", { thread_id: id, due_at: new Date().toISOString(), payload: { ask: "still there?" } });
  const [due] = await rpc("claim_followups", { qty: 5 });
  assert.equal(due.followup_id, followup);
  assert.equal(await rpc("finish_followup", { followup_id: followup, receipt: due.receipt }), true);
}
console.log("service: ok");

// 2. Errors arrive whole, with a status that says whose fault it is.
await refused(service, "append_event", { aggregate_type: "order", aggregate_id: "public-1", event_type: "paid", expected_version: 1 }, 400, {
  code: "NW001", message: 'aggregate order "public-1" is at version 3, not 1', details: "Expected version 1, actual version 3.",
  hint: "Read the aggregate again, decide again, then retry.",
}, "public");
await refused(service, "send", { queue: "jbos", message: 1 }, 400, {
  code: "NW007", message: 'queue "jbos" does not exist', details: null, hint: 'Did you mean "jobs"?',
});
await refused(service, "set_run_status", { run_id: "public-1", status: "completed" }, 400,
  { code: "NW005", message: 'run "public-1" is suspended and cannot become completed' });
await refused(service, "append_event", { aggregate_type: "order", aggregate_id: "x", event_type: "y", container: "public-1", fence: 1 }, 400, { code: "NW003" });
await refused(service, "publish_agent_version", { slug: "sage", content: {}, actor: { type: "agent", id: "sage" } }, 400, { code: "NW004" });
await refused(as({ role: "service_role", actor_type: "agent" }), "publish_agent_version", { slug: "sage", content: {} }, 400, { code: "NW004" });
await refused(service, "read_events", { max_events: 0 }, 400, { code: "22023" });
await refused(service, "append_event", { aggregate_type: "order".repeat(60), aggregate_id: "x", event_type: "y" }, 413, { code: "54000" });
await refused(service, "acquire_flor", {}, 404, { code: "PGRST202" });
await refused(as({ role: "service_role" }, "somebody else's key, also of thirty-two characters"), "version", {}, 401, { code: "PGRST301" });
console.log("errors: ok");

// 3. The org: the argument before the token's claim, that before the default.
const orgs = (client: Client, args: Args = {}) => call(client, "nightowls", "current_org", args);
assert.equal(await orgs(service), acme);
assert.equal(await orgs(service, { org: beta }), beta);
for (const claim of [{ org_id: beta }, { org_id: "org_beta" }, { app_metadata: { org_id: "org_beta" } }]) {
  assert.equal(await orgs(as({ role: "service_role", ...claim })), beta);
  assert.equal(await orgs(as({ role: "service_role", ...claim }), { org: acme }), acme);
}
assert.equal(await orgs(as({ role: "service_role", user_metadata: { org_id: beta } })), acme);
await refused(as({ role: "service_role", org_id: "org_nope" }), "current_org", {}, 400, { code: "NW010" });
await call(as({ role: "service_role", org_id: "org_beta" }), "public", "append_event", { aggregate_type: "order", aggregate_id: "b", event_type: "placed" });
assert.deepEqual(await call(service, "public", "read_aggregate", { aggregate_type: "order", aggregate_id: "b" }), []);
console.log("orgs: ok");

// 4. Members: what is theirs, without secrets; and nothing else.
const listed = await call(ann, "nightowls", "list_messages", { thread_id: "nightowls-1" });
assert.deepEqual(listed.map((row: any) => row.content), [{ text: "hello", password: "[redacted]" }, { text: "yes?" }]);
assert.equal(await call(ann, "nightowls", "append_message", { thread_id: "nightowls-1", content: { text: "thanks" } }), 3);
const { data: mine, error } = await ann.schema("nightowls").from("my_messages").select("seq, author_id").eq("org_id", acme)
  .eq("thread_id", "nightowls-1").order("seq");
assert.equal(error, null);
assert.deepEqual(mine!.map((row: any) => row.author_id), ["ann", "sage", "ann"]);
const run = await call(ann, "nightowls", "list_run_events", { run_id: "nightowls-1", max_wait: "0" });
assert.equal(run.length, 3);
const post = { thread_id: "nightowls-1", content: { text: "hm" } };
await refused(ann, "append_message", { ...post, author: { type: "user", id: "bob" } }, 403, { code: "42501" });
await refused(ann, "append_message", { ...post, role: "assistant" }, 403, { code: "42501" });
await refused(user("vic"), "append_message", post, 403, { code: "42501" });
await refused(ann, "list_messages", { thread_id: "b", org: beta }, 403, { code: "42501" });
await refused(user("ann", { app_metadata: { org_id: "org_beta" } }), "list_messages", { thread_id: "b" }, 403, { code: "42501" });

// What the service has called, called again by others: the members' three functions are all that a member gets through to.
const members = ["append_message", "list_messages", "list_run_events"];
let refusals = 0;
for (const [client, status] of [[ann, 403], [user("eve"), 403], [anon, 401]] as const) {
  for (const schema of ["public", "nightowls"]) {
    for (const [name, args] of calls) {
      if (client === ann && schema === "nightowls" && members.includes(name)) continue;
      await refused(client, name, args, status, { code: "42501" }, schema);
      refusals++;
    }
  }
}
assert.ok(refusals > 150, String(refusals));
for (const table of ["my_messages", "my_runs", "orgs"]) {
  const { data } = await user("eve").schema("nightowls").from(table).select();
  assert.deepEqual(data, [], table);
  assert.equal((await anon.schema("nightowls").from(table).select()).status, 401, table);
}
for (const table of ["events", "messages", "agent_versions"]) {
  assert.equal((await ann.schema("nightowls").from(table).select()).error?.code, "42501", table);
}
console.log("members: ok");
