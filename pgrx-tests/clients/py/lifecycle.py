"""The life cycle of messages as a program that was written for pgmq has it, with its client as it comes."""

import os
from datetime import datetime, timedelta, timezone

from pgmq import PGMQueue

queue = PGMQueue(conn_string=os.environ["DATABASE_URL"], init_extension=False)
name = "py_jobs"


def ids(messages):
    return [m.msg_id for m in messages]


queue.validate_queue_name(name)
queue.create_queue(name)
queue.create_queue(name)
queue.create_queue("py_unlogged", unlogged=True)
queue.create_partitioned_queue("py_parts", 10000, 100000)
assert name in [q.queue_name for q in queue.list_queues()]

# Sending, in every form.
first = queue.send(name, {"hello": "world"})
later = queue.send(name, {"n": 1}, delay=3600)
at = queue.send(name, {"n": 2}, tz=datetime.now(timezone.utc) + timedelta(hours=1))
told = queue.send(name, {"n": 3}, headers={"trace": "t"})
batch = queue.send_batch(name, [{"n": 4}, {"n": 5}])
batch += queue.send_batch(name, [{"n": 6}], headers=[{"trace": "u"}])
assert len({first, later, at, told, *batch}) == 7

# Reading: in order, one's own for a while.
message = queue.read(name, vt=30)
assert (message.msg_id, message.read_ct, message.message) == (first, 1, {"hello": "world"})
assert message.vt > datetime.now(timezone.utc) + timedelta(seconds=20)
rest = queue.read_batch(name, vt=30, batch_size=10)
assert ids(rest) == [told, *batch], rest
assert rest[0].headers == {"trace": "t"}
assert queue.read(name) is None
assert queue.read_with_poll(name, qty=5, max_poll_seconds=1, poll_interval_ms=50) in (None, [])

# The visibility timeout, to the second and to the moment.
assert queue.set_vt(name, first, 0).msg_id == first
assert queue.read(name, vt=30).read_ct == 2
moment = datetime.now(timezone.utc).replace(microsecond=123456) + timedelta(minutes=5)
assert queue.set_vt(name, first, moment).vt == moment

# Metrics.
metrics = queue.metrics(name)
assert (metrics.queue_length, metrics.queue_visible_length) == (7, 0), metrics
assert metrics.total_messages == 7
assert name in [m.queue_name for m in queue.metrics_all()]

# Archive, delete, pop, purge.
assert queue.archive(name, first) is True
assert queue.archive(name, first) is False
assert sorted(queue.archive_batch(name, batch[:2])) == batch[:2]
assert queue.delete(name, told) is True
assert queue.delete_batch(name, [batch[2], 999999]) == [batch[2]]
popped = queue.send(name, {"n": 7})
message = queue.pop(name)
message = message[0] if isinstance(message, list) else message
assert (message.msg_id, message.message) == (popped, {"n": 7})
assert queue.purge(name) == 2
assert queue.metrics(name).queue_length == 0

# Groups.
for n in range(3):
    queue.send(name, {"n": n}, headers={"x-pgmq-group": "g"})
head = queue.read_grouped(name, vt=30, qty=10)
assert [m.message["n"] for m in head] == [0]
queue.delete(name, head[0].msg_id)
assert [m.message["n"] for m in queue.read_grouped_rr(name, vt=30, qty=10)] == [1]
queue.create_fifo_index(name)

# Topics.
queue.bind_topic("logs.*", name)
queue.bind_topic("logs.#", "py_parts")
assert len(queue.list_topic_bindings()) == 2
assert [r.queue_name for r in queue.test_routing("logs.a.b")] == ["py_parts"]
assert queue.send_topic("logs.error", {"bad": True}) == 2
assert len(queue.send_batch_topic("logs.a.b", [{"n": 1}, {"n": 2}])) == 2
assert queue.unbind_topic("logs.*", name) is True
assert queue.unbind_topic("logs.*", name) is False

# Notifications are switched on and off.
queue.enable_notify(name, 100)
assert [t.queue_name for t in queue.list_notify_throttles()] == [name]
queue.update_notify(name, 50)
queue.disable_notify(name)

# All or nothing, in the client's transaction.
with queue.pool.connection() as connection:
    try:
        with connection.transaction():
            queue.send(name, {"lost": True}, conn=connection)
            raise KeyError
    except KeyError:
        pass
assert all("lost" not in m.message for m in queue.read_batch(name, vt=1, batch_size=100))

for q in [name, "py_unlogged", "py_parts"]:
    assert queue.drop_queue(q) is True
assert queue.drop_queue(name) is False
queue.close()
print("done")
