"""check_events.py FOLDER METRICS: TensorBoard reads the event files in FOLDER as the rows of METRICS."""

import json
import math
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
expected = {}
with open(sys.argv[2]) as f:
    for row in map(json.loads, f):
        for name in ("ce_loss", "router_loss", "total_loss", "lr", "grad_norm", "round"):
            if row[name] is not None:
                expected.setdefault(f"{row['phase']}/{name}", []).append((row["step"], row[name]))
found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
speeds = {tag for tag in found if tag.endswith("/tokens_per_second")}
assert len(speeds) >= 2, found.keys()
assert found.keys() - speeds == expected.keys(), (found.keys(), expected.keys())
for tag, rows in expected.items():
    assert [step for step, _ in rows] == [step for step, _ in found[tag]], (tag, rows, found[tag])
    for (_, a), (_, b) in zip(rows, found[tag]):
        assert math.isclose(a, b, rel_tol=1e-6), (tag, a, b)
print(sum(map(len, expected.values())), "scalars")
