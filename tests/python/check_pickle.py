#!/usr/bin/env python3
"""Opens an `expert_gradients.pkl` with Python's own pickle and checks its form.

`python check_pickle.py FILE [EXPERT_SCORES_JSON]`, for a run that took the highest of the gradient method. The form: {round: {"experts": [(layer, expert), ...],
"gradients": {(layer, expert): float}}}, rounds from 1 without a gap, every expert once and with a gradient, in order of
falling gradient. With the run's expert_scores.json the two files must say the same.
"""

import json
import math
import pickle
import sys


class Plain(pickle.Unpickler):
    """Refuses every class and function: the file has to be made of built-in containers and numbers."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"the file names {module}.{name}")


def is_expert(x):
    return type(x) is tuple and len(x) == 2 and all(type(n) is int and n >= 0 for n in x)


def faults_of(data):
    if type(data) is not dict or list(data) != list(range(1, len(data) + 1)) or not data:
        yield f"rounds are {list(data) if isinstance(data, dict) else type(data)}, not 1, 2, ..."
        return
    for number, entry in data.items():
        if type(entry) is not dict or set(entry) != {"experts", "gradients"}:
            yield f"round {number}: keys are {list(entry)}"
            continue
        experts, gradients = entry["experts"], entry["gradients"]
        if type(experts) is not list or not all(map(is_expert, experts)) or len(set(experts)) != len(experts):
            yield f"round {number}: experts are no list of different (layer, expert)"
            continue
        if type(gradients) is not dict or not all(map(is_expert, gradients)):
            yield f"round {number}: gradients are not keyed by (layer, expert)"
            continue
        if not all(type(v) is float and math.isfinite(v) and v >= 0 for v in gradients.values()):
            yield f"round {number}: a gradient is no finite float from 0"
        lost = [x for x in experts if x not in gradients]
        if lost:
            yield f"round {number}: no gradient of {lost[:3]}"
        else:
            values = [gradients[x] for x in experts]
            if values != sorted(values, reverse=True):
                yield f"round {number}: experts are not in order of their gradients"


def against_scores(data, scores):
    rounds = scores["rounds"]
    if {str(n) for n in data} != set(rounds):
        yield f"rounds {list(data)} here, {list(rounds)} in the scores"
        return
    for number, entry in data.items():
        other = rounds[str(number)]
        if [list(x) for x in entry["experts"]] != other["selected"]:
            yield f"round {number}: the experts are not those selected"
        at = {layer: i for i, layer in enumerate(scores["layers"])}
        for (layer, expert), value in entry["gradients"].items():
            if other["scores"][at[layer]][expert] != value:
                yield f"round {number}: the gradient of ({layer}, {expert}) is not its score"
                break


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    with open(sys.argv[1], "rb") as f:
        data = Plain(f).load()
        rest = f.read()
    faults = list(faults_of(data))
    if rest:
        faults.append(f"{len(rest)} bytes after the end of the pickle")
    if len(sys.argv) == 3 and not faults:
        with open(sys.argv[2]) as f:
            faults += against_scores(data, json.load(f))
    for fault in faults:
        print(f"check_pickle: {fault}", file=sys.stderr)
    if faults:
        sys.exit(1)
    print(f"check_pickle: {len(data)} rounds, {sum(len(e['experts']) for e in data.values())} experts")


if __name__ == "__main__":
    main()
