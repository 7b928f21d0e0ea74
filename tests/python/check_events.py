"""check_events.py FOLDER METRICS: TensorBoard reads the event files in FOLDER as the rows of METRICS."""

import json
import math
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "histograms": 0})
events.Reload()
expected, histograms = {}, {}
with open(sys.argv[2]) as f:
    for row in map(json.loads, f):
        for name in ("ce_loss", "router_loss", "total_loss", "lr", "grad_norm", "round"):
            if row[name] is not None:
                expected.setdefault(f"{row['phase']}/{name}", []).append((row["step"], row[name]))
        load = row.get("expert_load", {"layers": []})
        for i, layer in enumerate(load["layers"]):
            for name in ("busiest", "idle", "cv"):
                tag = f"{row['phase']}_experts/layer_{layer:02}_{name}"
                expected.setdefault(tag, []).append((row["step"], load[name][i]))
        load = row.get("phase_load", {"layers": []})
        for layer, counts in zip(load["layers"], load.get("counts", [])):
            histograms.setdefault(f"{row['phase']}_experts/layer_{layer:02}_tokens", []).append((row["step"], counts))
found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
speeds = {tag for tag in found if tag.endswith("/tokens_per_second")}
assert len(speeds) >= 2, found.keys()
assert found.keys() - speeds == expected.keys(), (found.keys(), expected.keys())
for tag, rows in expected.items():
    assert [step for step, _ in rows] == [step for step, _ in found[tag]], (tag, rows, found[tag])
    for (_, a), (_, b) in zip(rows, found[tag]):
        assert math.isclose(a, b, rel_tol=1e-6), (tag, a, b)
assert len(histograms) >= 4 and set(events.Tags()["histograms"]) == histograms.keys(), (events.Tags(), histograms)
for tag, rows in histograms.items():
    assert [step for step, _ in rows] == [e.step for e in events.Histograms(tag)], tag
    for (_, counts), event in zip(rows, events.Histograms(tag)):
        found = event.histogram_value
        assert (found.min, found.max, found.num) == (min(counts), max(counts), len(counts)), (tag, counts, found)
        assert (found.sum, found.sum_squares) == (sum(counts), sum(c * c for c in counts)), (tag, counts, found)
        low = float("-inf")
        for limit, number in zip(found.bucket_limit, found.bucket):
            assert number == sum(low <= c < limit for c in counts), (tag, counts, found)
            low = limit
        assert low > max(counts), (tag, counts, found)
print(sum(map(len, expected.values())), "scalars")
