"""Four at once. Each on its own aggregate, often enough that psycopg would begin to prepare; then all on one,
where every append must arrive by way of the retry loop."""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path.cwd() / "python"))

from sqlalchemy.orm import Session

from model import Event
from owls import append, change, history, in_org

org = os.environ["ORG_ID"]


def alone(worker):
    for turn in range(20):
        with in_org(org) as connection:
            append(connection, "worker", str(worker), "counted", {"turn": turn})


def together(worker):
    for turn in range(10):
        change(org, "counter", "c", lambda events: ("counted", {"worker": worker, "turn": turn, "before": len(events)}))


with ThreadPoolExecutor(4) as pool:
    list(pool.map(alone, range(4)))
    list(pool.map(together, range(4)))
with in_org(org) as connection:
    events = history(connection, "counter", "c")
    in_order = all(event.payload["before"] == number for number, event in enumerate(events))
    print(f"counted: {len(events)}, in order: {str(in_order).lower()}")

# A flush of several rows is one statement.
with in_org(org) as connection, Session(connection) as session:
    placed = [Event(aggregate_type="order", aggregate_id="43", event_type="order_placed", payload={"n": n}) for n in range(3)]
    session.add_all(placed)
    session.flush()
    print("flushed:", *[(event.payload["n"], event.version) for event in placed])
