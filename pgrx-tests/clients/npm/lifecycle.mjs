// The life cycle of messages as a program that was written for pgmq has it, with its client as it comes.
import assert from "node:assert/strict";
import { Pgmq } from "pgmq-js";

const url = new URL(process.env.DATABASE_URL);
const pgmq = await Pgmq.new(
  { host: url.hostname, port: Number(url.port), database: url.pathname.slice(1), user: url.username, password: "none", ssl: false },
  { skipExtensionCreation: true },
);
const name = "js_jobs";

await pgmq.queue.create(name);
await pgmq.queue.create(name);
await pgmq.queue.createUnlogged("js_unlogged");
const queues = await pgmq.queue.list();
assert.deepEqual(queues.map((queue) => queue.name).sort(), [name, "js_unlogged"]);
assert.ok(Math.abs(queues[0].createdAt.valueOf() - Date.now()) < 3600_000);

// Whatever can be sent; undefined arrives as null.
for (const body of [1, 0.5, "text", true, ["a"], { a: 1 }, new Date(), null, undefined]) {
  const id = await pgmq.msg.send(name, body);
  const message = await pgmq.msg.pop(name);
  assert.equal(message.msgId, id);
  assert.equal(message.readCount, 0);
  assert.deepEqual(message.message, JSON.parse(JSON.stringify(body) ?? "null"));
}
assert.equal(await pgmq.msg.pop(name), undefined);

const ids = await pgmq.msg.sendBatch(name, ["one", "two", "three", "four"]);
const one = await pgmq.msg.read(name, 30);
assert.deepEqual([one.msgId, one.readCount, one.message], [ids[0], 1, "one"]);
assert.ok(one.vt.valueOf() > Date.now() + 20_000);
const rest = await pgmq.msg.readBatch(name, 30, 10);
assert.deepEqual(rest.map((message) => message.message), ["two", "three", "four"]);
assert.equal(await pgmq.msg.read(name), undefined);
await assert.rejects(pgmq.msg.read(name, 1.5));

assert.equal(await pgmq.msg.archive(name, ids[0]), true);
assert.equal(await pgmq.msg.archive(name, ids[0]), false);
assert.deepEqual(await pgmq.msg.archiveBatch(name, [ids[1], 999999]), [ids[1]]);
assert.equal(await pgmq.msg.delete(name, ids[2]), true);
assert.deepEqual(await pgmq.msg.deleteBatch(name, [ids[3], 999999]), [ids[3]]);

await pgmq.msg.send(name, "later", 3600);
assert.equal(await pgmq.msg.read(name), undefined);
const metrics = await pgmq.queue.getMetrics(name);
assert.deepEqual([metrics.queueName, metrics.queueLength, metrics.totalMessages], [name, 1, 3]);
assert.equal((await pgmq.queue.getAllMetrics()).length, 2);
await pgmq.queue.detachArchive(name);
await pgmq.queue.purge(name);
assert.equal((await pgmq.queue.getMetrics(name)).queueLength, 0);
await assert.rejects(pgmq.msg.send("nowhere", 1));
await pgmq.queue.drop(name);
await pgmq.queue.drop("js_unlogged");
await pgmq.close();
console.log("done");
