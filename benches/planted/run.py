#!/usr/bin/env python3
"""Measures moewarden on planted models: `python benches/planted/run.py --out FOLDER`. README.md describes the bench."""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import cells  # noqa: E402
import document  # noqa: E402
from program import Program  # noqa: E402

KINDS = ("clean", "overlap", "split", "spread", "decoy", "mirror", "none", "distributed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of results and scratch files")
    parser.add_argument("--models", type=Path, help="folder of the models (default: OUT/models); missing ones are made")
    parser.add_argument("--no-make", action="store_true", help="skip models that do not exist")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--shapes", nargs="+", default=["olmoe", "qwen3_moe"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--thorough", nargs="+", default=["clean"], help="kinds with all ways to train")
    parser.add_argument("--rates", nargs="+", default=["1e-4", "3e-4", "1e-3", "2e-4"])
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/moewarden")
    parser.add_argument("--commit", help="of the sources of --binary (default: the last one here that changed src)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no measurement after this time")
    parser.add_argument("--no-train", action="store_true", help="identify and ablate only")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--document", type=Path, default=ROOT / "docs/truth.md")
    return parser.parse_args()


def models(args: argparse.Namespace) -> tuple[list[cells.Model], list[str]]:
    """The models, made where they are missing, failed plantings among them, and the names of those that are missing still."""
    folder = args.models or args.out / "models"
    if not args.no_make:
        make = ["--out", folder, "--kinds", *args.kinds, "--shapes", *args.shapes, "--seeds", *map(str, args.seeds)]
        subprocess.run([sys.executable, ROOT / "tests/planted/make.py", *make], check=True)
    names = [f"{k}-{shape}-{seed}" for shape in args.shapes for k in args.kinds for seed in args.seeds]
    made = [n for n in names if (folder / n / "truth.json").exists()]
    return [cells.Model(folder / n) for n in made], [n for n in names if n not in made]


def main() -> None:
    args = arguments()
    program = Program(args.binary.resolve(), args.out.resolve())
    found, missing = models(args)
    program.deadline = time.monotonic() + 60 * args.minutes
    tasks = []
    planted = [m for m in found if m.truth["accepted"]]
    for model in planted:
        tasks += [(model, *cell) for cell in cells.first_cells(program, model)]
    # What matters most is measured first, on all models.
    for rate in [] if args.no_train else args.rates:
        for model in planted:
            thorough = model.truth["kind"] in args.thorough
            tasks += [(model, *cell) for cell in cells.training_cells(program, model, rate, thorough)]
        tasks += [(model, *cell) for model in planted if rate == args.rates[0] for cell in cells.slow_cells(program, model)]
    if args.no_train:
        tasks += [(model, *cell) for model in planted for cell in cells.slow_cells(program, model)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda t: (t[0].name, t[1], program.cell(t[0].name, t[1], t[2])), tasks))
    collected: dict[str, dict[str, dict]] = {m.name: {} for m in planted}
    for model_name, cell, result in results:
        if result is not None:
            collected[model_name][cell] = result
    version = subprocess.run([program.binary, "--version"], capture_output=True, text=True).stdout.strip()
    last = ["git", "-C", ROOT, "log", "-1", "--format=%h", "--", "src"]
    commit = args.commit or subprocess.run(last, capture_output=True, text=True).stdout.strip()
    data = {
        "program": f"{version}, commit {commit}",
        "models": {m.name: m.truth for m in found},
        "cells": collected,
        "notes": program.notes,
        "missing": missing,
    }
    rounded = json.loads(json.dumps(data), parse_float=lambda number: round(float(number), 5))
    args.results.write_text(json.dumps(rounded, separators=(",", ":"), sort_keys=True) + "\n")
    args.document.write_text(document.document(data))
    for name, note in sorted(program.notes.items()):
        print(f"skipped: {name}: {note}")


if __name__ == "__main__":
    main()
