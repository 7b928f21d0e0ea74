#!/usr/bin/env python3
"""Everything that only a GPU can show, in one call: `python3 benches/gpu/prove.py OUT`. README.md describes the steps.

It is made for a GPU that is available for a short time: all steps together end before --deadline, the most important come
first, and OUT holds four files that are complete after every step: summary.md, cuda_ops.md, speed.jsonl and logs.tgz. A later
call with the same --work goes on with the steps that have no result yet. The Python that runs this script must have torch and
transformers, whose packages also bring NVIDIA's libraries.

Exit codes: 0 if all steps passed; 1 if one failed; 69 if the GPU cannot be used; 3 if nothing failed, but a step was not
reached, was cut off by the deadline, or did not fit into the GPU's memory.
"""

import argparse
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
ARCHIVE = os.path.join(ROOT, "target/gpu-proof.tar.xz")
SHORT, LONG = "8x512", "16x2048"
OLMOE, QWEN, MIXTRAL = "OLMoE-1B-7B", "Qwen3-30B-A3B", "Mixtral-8x7B"
# In the order of their worth: the name; the time limit in seconds; and the time below which it is not begun, an estimate.
STEPS = [
    ("versions", 60, 5),
    ("ceilings", 60, 5),
    ("products", 150, 20),
    ("ops", 150, 20),
    ("golden", 120, 20),
    ("nccl", 60, 10),
    (f"bench:{OLMOE}:{SHORT}", 90, 30),
    ("repeat", 90, 15),
    ("lockstep", 120, 20),
    (f"identify:{OLMOE}:{SHORT}", 180, 60),
    (f"identify:{QWEN}:{SHORT}", 240, 90),
    (f"bench:{QWEN}:{SHORT}", 120, 40),
    (f"profile:{OLMOE}:{SHORT}", 60, 20),
    (f"offload:{OLMOE}:{SHORT}", 150, 60),
    (f"identify:{OLMOE}:{LONG}", 180, 60),
    (f"profile:{QWEN}:{SHORT}", 90, 30),
    (f"identify:{QWEN}:{LONG}", 240, 90),
    (f"train:{OLMOE}:{SHORT}", 180, 60),
    (f"train:{QWEN}:{SHORT}", 240, 90),
    (f"define:NO_ASYNC_FENCE:{OLMOE}:{SHORT}", 90, 30),
    ("memcheck", 150, 60),
    (f"identify:{MIXTRAL}:{SHORT}", 240, 120),
    (f"bench:{MIXTRAL}:{SHORT}", 120, 40),
    (f"profile:{MIXTRAL}:{SHORT}", 120, 60),
    (f"train:{OLMOE}:{LONG}", 180, 60),
    (f"bench:{OLMOE}:{LONG}", 120, 40),
    (f"bench:{QWEN}:{LONG}", 150, 60),
    (f"train:{QWEN}:{LONG}", 240, 90),
    (f"recomputed:{OLMOE}:{SHORT}", 120, 40),
    (f"recomputed:{QWEN}:{SHORT}", 180, 60),
    (f"identify:{MIXTRAL}:{LONG}", 240, 120),
    (f"train:{MIXTRAL}:{SHORT}", 240, 120),
    (f"bench:{MIXTRAL}:{LONG}", 180, 60),
    ("racecheck", 150, 60),
    ("initcheck", 150, 60),
]
# A step without a line above, such as one test: `tests:ops::ties`.
LIMIT, LEAST = 120, 5
# What a step's exit code says; any other is a failure. steps.py has the same numbers.
RESULTS = {0: "passed", 75: "out of memory", 77: "skipped"}
INCOMPLETE = ("out of memory", "not reached", "cut off by the deadline")
UNUSABLE = "not run: the GPU cannot be used"
# Seconds that are kept for the last summary (at most a tenth of all), and between SIGTERM and SIGKILL.
RESERVE, GRACE = 10, 3


class Stopped(Exception):
    """SIGTERM or SIGINT."""


def libraries(python):
    """Folders of NVIDIA's libraries in Python's packages; none without that Python."""
    code = "import json, site, sys; print(json.dumps([*site.getsitepackages(), site.getusersitepackages(), *sys.path]))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30, check=True).stdout
        folders = json.loads(found)
    except (OSError, ValueError, subprocess.SubprocessError):
        folders = []
    return list(dict.fromkeys(d for p in folders if p for d in sorted(glob.glob(f"{p}/nvidia/*/lib"))))


def written(path, text):
    """Writes a file so that it is always complete."""
    with open(f"{path}.part", "w") as f:
        f.write(text)
    os.replace(f"{path}.part", path)


class Proof:
    def __init__(self, a):
        self.a, self.begin = a, time.monotonic()
        self.out, self.work = os.path.abspath(a.out), os.path.abspath(a.work)
        for folder in (self.out, f"{self.work}/logs", f"{self.work}/notes"):
            os.makedirs(folder, exist_ok=True)
        self.rows = {}  # step -> its result, of this call and of earlier ones
        if os.path.exists(f"{self.work}/rows.json"):
            with open(f"{self.work}/rows.json") as f:
                self.rows = json.load(f)
        self.unusable = None  # why the GPU cannot be used
        self.child = None
        self.env = dict(os.environ)

    def left(self):
        return self.a.deadline - (time.monotonic() - self.begin) - min(RESERVE, 0.1 * self.a.deadline)

    def prepare(self):
        """Unpacks the programs, and sets the environment of all steps. Returns what is wrong, if anything."""
        bin_ = self.a.bin and os.path.abspath(self.a.bin)
        if not bin_:
            bin_ = f"{self.work}/bin"
            if not os.path.exists(self.a.archive):
                return f"there is no {self.a.archive}: make it by `bash benches/gpu/pack.sh`, or name a folder by --bin"
            if not os.path.exists(f"{bin_}/moewarden"):
                with tarfile.open(self.a.archive) as archive:
                    archive.extractall(bin_, filter="data")
        missing = [n for n in ("moewarden", "cuda", "cuda_ops") if not os.access(f"{bin_}/{n}", os.X_OK)]
        if missing:
            return f"{bin_} lacks {', '.join(missing)}: make it by `bash benches/gpu/pack.sh`"
        env = self.env
        visible = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        folders = libraries(self.a.python) + [p for p in [env.get("LD_LIBRARY_PATH")] if p]
        env |= {
            "PROVE_WORK": self.work, "PROVE_BIN": bin_, "PROVE_DEVICE": self.a.device, "PROVE_PYTHON": self.a.python,
            "PROVE_PEER": "0" if self.a.no_peer else "1",
            "CUDA_VISIBLE_DEVICES": visible,  # one GPU
            "LD_LIBRARY_PATH": ":".join(folders),
            "CARGO_MANIFEST_DIR": ROOT,  # where tests that were built elsewhere find their cases
            "XDG_CACHE_HOME": f"{self.work}/cache",  # one cache of kernels for all programs
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        }
        return None

    def run(self, name, limit):
        """Runs a step in a process group of its own. Returns (exit code, or None after a timeout; seconds)."""
        begin = time.monotonic()
        env = self.env | {"PROVE_SECONDS": f"{max(1.0, limit - 2):.0f}"}
        with open(self.log(name), "wb") as log:
            command = [sys.executable, f"{HERE}/steps.py", name]
            self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                          start_new_session=True)
            try:
                code = self.child.wait(timeout=max(0.1, limit))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                self.end_child()
        return code, time.monotonic() - begin

    def end_child(self):
        """Ends what is left of the step's process group."""
        child, self.child = self.child, None
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(child.pid, number)
            except (ProcessLookupError, PermissionError):
                break
            try:
                child.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                continue
            if number == signal.SIGTERM:
                time.sleep(0.1)  # the leader has ended; others of the group may still write
        child.wait()

    def log(self, name):
        return f"{self.work}/logs/{re.sub('[^A-Za-z0-9_.-]+', '-', name)}.log"

    def open_gpu(self):
        """Opens the GPU once, which also compiles the kernels: a missing GPU is told apart from a step that fails."""
        if self.a.device != "cuda":
            return
        code, _ = self.run("open", min(120, self.left()))
        if code == 0:
            return
        with open(self.log("open"), errors="replace") as f:
            said = " ".join(line.strip() for line in f if line.strip() and not line.startswith("$ "))
        cause = {None: "opening it did not end in time", 69: ""}.get(code, f"exit code {code}")
        self.unusable = ": ".join(p for p in [cause, said[-1000:]] if p) or "no message"

    def result(self, name, limit, least):
        if self.unusable and name != "versions":
            return {"result": UNUSABLE}
        if self.left() < min(least, self.a.limit or least):
            return {"result": "not reached"}
        self.rows[name] = {"result": "running"}
        self.publish()  # if this call is killed, the summary says where
        limit = min(limit, self.a.limit or limit)
        share = min(limit, self.left())
        code, seconds = self.run(name, share)
        if code is None:
            said = "cut off by the deadline" if share < limit else f"failed: not over after {limit:.0f} s"
        else:
            said = RESULTS.get(code, f"failed (exit {code})")
        return {"result": said, "seconds": round(seconds, 1)}

    def publish(self):
        """Writes the four files."""
        written(f"{self.work}/rows.json", json.dumps(self.rows))
        written(f"{self.out}/summary.md", self.summary())
        for name in ("cuda_ops.md", "speed.jsonl"):
            if os.path.exists(f"{self.work}/{name}"):
                with open(f"{self.work}/{name}", errors="replace") as f:
                    written(f"{self.out}/{name}", f.read())
        with tempfile.NamedTemporaryFile(dir=self.out, suffix=".part", delete=False) as f:
            with tarfile.open(fileobj=f, mode="w:gz", compresslevel=6) as archive:
                for folder in ("logs", "notes", "profiles"):
                    if os.path.isdir(f"{self.work}/{folder}"):
                        archive.add(f"{self.work}/{folder}", folder)
        os.chmod(f.name, 0o644)  # a temporary file is private
        os.replace(f.name, f"{self.out}/logs.tgz")

    def summary(self):
        table = subprocess.run([sys.executable, f"{HERE}/speed.py", self.work, "--table"], capture_output=True, text=True,
                               timeout=60, check=False)
        lines = [f"# {self.gpu()}, {time.strftime('%Y-%m-%d')}", ""]
        if self.unusable:
            lines += [f"The GPU cannot be used: {self.unusable}", ""]
        lines += ["| step | result | seconds | notes |", "|---|---|---|---|"]
        for name, row in self.rows.items():
            notes = []
            if os.path.exists(f"{self.work}/notes/{name}"):
                with open(f"{self.work}/notes/{name}", errors="replace") as f:
                    notes = [line.strip().replace("|", "/") for line in f]
            lines.append(f"| {name} | {row['result']} | {row.get('seconds', '')} | {'; '.join(notes)} |")
        return "\n".join([*lines, "", table.stdout + table.stderr])

    def gpu(self):
        if os.path.exists(f"{self.work}/ceilings.json"):
            with open(f"{self.work}/ceilings.json") as f:
                return json.load(f)["gpu"]
        return "No usable GPU" if self.unusable else "CPU" if self.a.device == "cpu" else "GPU"

    def steps(self):
        known = {name: (limit, least) for name, limit, least in STEPS}
        names = self.a.steps.split() if self.a.steps else [n for n in known if not self.finished(n)]
        return [(name, *known.get(name, (LIMIT, LEAST))) for name in names]

    def finished(self, name):
        said = self.rows.get(name, {}).get("result", "not reached")
        return said not in ("running", "not reached", "cut off by the deadline", UNUSABLE)

    def all(self):
        steps = self.steps()
        self.open_gpu()
        results = []
        for name, limit, least in steps:
            row = self.result(name, limit, least)
            if row["result"] not in ("not reached", UNUSABLE) or not self.finished(name):
                self.rows[name] = row  # else the earlier result stays
            results.append(row["result"])
            print(f"{name}: {row['result']}", flush=True)
            self.publish()
        if any(r.startswith(("failed", "stopped")) for r in results):
            return 1
        if self.unusable:
            print(f"the GPU cannot be used: {self.unusable}")
            return 69
        return 3 if any(r in INCOMPLETE for r in results) else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="the folder of the four files")
    parser.add_argument("--deadline", type=float, default=570, metavar="SECONDS", help="of the whole call (default: %(default)s)")
    parser.add_argument("--steps", help="only these steps, in this order, whether they have a result or not")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="a lower limit for every step")
    parser.add_argument("--archive", default=ARCHIVE, help="made by pack.sh (default: target/gpu-proof.tar.xz)")
    parser.add_argument("--bin", metavar="FOLDER", help="unpacked programs, instead of the archive")
    parser.add_argument("--work", default=os.path.join(tempfile.gettempdir(), "moewarden-prove"),
                        help="logs, models and results; kept for later calls (default: %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="has torch and transformers (default: the one that runs this)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: tries out the steps that run "
                        "`moewarden` without a GPU, in toy sizes")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--fresh", action="store_true", help="forget earlier calls with the same --work")
    a = parser.parse_args()
    if a.fresh:
        shutil.rmtree(a.work, ignore_errors=True)
    proof = Proof(a)
    if wrong := proof.prepare():
        print(wrong, file=sys.stderr)
        return 2

    def stop(*_):
        raise Stopped

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        code = proof.all()
    except Stopped:
        for row in proof.rows.values():
            if row["result"] == "running":
                row["result"] = "stopped by a signal"
        proof.publish()
        code = 1
    with open(f"{proof.out}/summary.md") as f:
        print(f"\n{f.read()}")
    return code


if __name__ == "__main__":
    sys.exit(main())
