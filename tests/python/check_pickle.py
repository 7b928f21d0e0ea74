#!/usr/bin/env python3
"""Loads an `expert_gradients.pkl` with Python's pickle module and checks its content.

`python check_pickle.py FILE [EXPERT_SCORES_JSON]`, for a run that selected the experts with the highest scores of the gradient
method. Expected: {round: {"experts": [(layer, expert), ...], "gradients": {(layer, expert): float}}}, with rounds 1, 2, ... and
each expert once, with a gradient, in descending order of gradients. With the run's expert_scores.json, experts and gradients
of both files must be equal.
"""

import json
import math
import pickle
import sys


class RestrictedUnpickler(pickle.Unpickler):
    """Refuses classes and functions: the file may hold only built-in containers, strings and numbers."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"the file refers to {module}.{name}")


def is_expert(x):
    return type(x) is tuple and len(x) == 2 and all(type(n) is int and n >= 0 for n in x)


def errors_in(data):
    if type(data) is not dict or list(data) != list(range(1, len(data) + 1)) or not data:
        yield f"rounds are {list(data) if isinstance(data, dict) else type(data)}, not 1, 2, ..."
        return
    for number, entry in data.items():
        if type(entry) is not dict or set(entry) != {"experts", "gradients"}:
            yield f"round {number}: keys are {list(entry)}"
            continue
        experts, gradients = entry["experts"], entry["gradients"]
        if type(experts) is not list or not all(map(is_expert, experts)) or len(set(experts)) != len(experts):
            yield f"round {number}: experts are not a list of unique (layer, expert)"
            continue
        if type(gradients) is not dict or not all(map(is_expert, gradients)):
            yield f"round {number}: gradients are not keyed by (layer, expert)"
            continue
        if not all(type(v) is float and math.isfinite(v) and v >= 0 for v in gradients.values()):
            yield f"round {number}: a gradient is not a finite float >= 0"
        missing = [x for x in experts if x not in gradients]
        if missing:
            yield f"round {number}: no gradient of {missing[:3]}"
        else:
            values = [gradients[x] for x in experts]
            if values != sorted(values, reverse=True):
                yield f"round {number}: experts are not in descending order of gradients"


def compare_with_scores(data, scores):
    rounds = scores["rounds"]
    if {str(n) for n in data} != set(rounds):
        yield f"rounds {list(data)}, in expert_scores.json {list(rounds)}"
        return
    for number, entry in data.items():
        other = rounds[str(number)]
        if [list(x) for x in entry["experts"]] != other["selected"]:
            yield f"round {number}: the experts differ from those selected in expert_scores.json"
        at = {layer: i for i, layer in enumerate(scores["layers"])}
        for (layer, expert), value in entry["gradients"].items():
            if other["scores"][at[layer]][expert] != value:
                yield f"round {number}: the gradient of ({layer}, {expert}) is not its score"
                break


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    with open(sys.argv[1], "rb") as f:
        data = RestrictedUnpickler(f).load()
        rest = f.read()
    errors = list(errors_in(data))
    if rest:
        errors.append(f"{len(rest)} bytes after the end of the pickle")
    if len(sys.argv) == 3 and not errors:
        with open(sys.argv[2]) as f:
            errors += compare_with_scores(data, json.load(f))
    for error in errors:
        print(f"check_pickle: {error}", file=sys.stderr)
    if errors:
        sys.exit(1)
    print(f"check_pickle: {len(data)} rounds, {sum(len(e['experts']) for e in data.values())} experts")


if __name__ == "__main__":
    main()
