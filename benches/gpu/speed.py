#!/usr/bin/env python3
"""Complete identification and training at full size, moewarden and transformers in turns: `speed.py WORK --binary moewarden --model
OLMoE-1B-7B --size 8x512 --what identify`. Appends one JSON line per run to WORK/speed.jsonl; `speed.py WORK --table` prints the table
of all runs.

Weights are random and made on the device. moewarden's identification is run twice, with few and with all micro-batches: the rate is
that of the difference, which is warmed up like the peer's measured steps. Training is the median step after two warm-up steps. The
peak is the memory of the whole GPU as nvidia-smi reports it, sampled 10 times a second, for both programs.

A run that does not fit into the GPU's memory is a result, not a failure: exit code 75 if nothing else went wrong.
"""
import argparse
import glob
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time

import floor

HERE = os.path.dirname(os.path.abspath(__file__))
PEER = os.path.join(HERE, "../peer/gpu.py")
# Number of measured micro-batches, by their rows and length.
BATCHES = {"8x512": 10, "16x2048": 4}
# Numbers of trained experts. The last is 6.25 % of all; before it 100 for Qwen3-30B-A3B, and 8 for Mixtral-8x7B, to fit on one
# H200.
TOP_K = {"OLMoE-1B-7B": [64], "Qwen3-30B-A3B": [100, 384], "Mixtral-8x7B": [8, 16]}
# Micro-batches of the shorter run of an identification.
FEW = 2
OUT_OF_MEMORY = 75
# What moewarden says if the memory is full, if it is full at the start, and if the forecast is far beyond that of the GPU or the host.
FULL = re.compile(r"memory is (already )?full|a rank needs .* of memory, but|of pinned host memory a rank")


class Memory:
    """Context manager that samples the peak memory in use on the GPU, in GB."""

    def __enter__(self):
        self.peak, self.open = None, True
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def sample(self):
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as smi:
                self.smi = smi
                for line in smi.stdout:
                    if not self.open:
                        break
                    if line.strip().isdigit():
                        self.peak = max(self.peak or 0, int(line) * 2**20 / 1e9)
                smi.terminate()
        except OSError:
            pass  # no nvidia-smi: no value

    def __exit__(self, *_):
        self.open = False
        if hasattr(self, "smi"):
            self.smi.terminate()
        self.thread.join(timeout=5)


def run(command, log, limit):
    """Returns (exit code, stdout, stderr, peak memory), with exit code 124 after a timeout, and appends everything to the log."""
    begin = time.time()
    with Memory() as memory:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            text = lambda b: b.decode(errors="replace") if isinstance(b, bytes) else b or ""
            code, out, err = 124, text(error.stdout), text(error.stderr)
        except OSError as error:
            code, out, err = 127, "", f"{command[0]}: {error}"
    with open(log, "a") as f:
        f.write(f"$ {' '.join(command)}\n{out}{err}exit {code} after {time.time() - begin:.0f} s\n\n")
    return code, out, err, memory.peak


def metrics(folder):
    with open(f"{folder}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


class Scene:
    def __init__(self, a):
        self.a, self.folder, self.end = a, f"{a.work}/scene-{a.model}", time.monotonic() + a.seconds
        self.rows, self.length = map(int, a.size.split("x"))
        tiny = ["--tiny"] if a.tiny else []
        subprocess.run([sys.executable, f"{HERE}/scene.py", self.folder, "--model", a.model, "--batch", f"{a.size}:{FEW + a.batches}",
                        *tiny], check=True)
        self.ceilings = None
        if os.path.exists(f"{a.work}/ceilings.json"):
            with open(f"{a.work}/ceilings.json") as f:
                self.ceilings = json.load(f)
        os.makedirs(f"{a.work}/profiles", exist_ok=True)

    def run(self, command, log):
        return run(command, f"{self.a.work}/logs/{log}-{self.a.model}-{self.a.size}.log", max(1, self.end - time.monotonic()))

    def log(self, result):
        """Adds a result to the list, and returns its code: 0, 75 if the memory was full, else 1."""
        if self.ceilings:
            result |= {"gpu": self.ceilings["gpu"], "ceilings": self.ceilings}
        print(json.dumps(result), flush=True)
        with open(f"{self.a.work}/speed.jsonl", "a") as f:
            f.write(json.dumps(result) + "\n")
        return 0 if result["exit"] == 0 else OUT_OF_MEMORY if result.get("oom") else 1

    def command(self, task, top_k, micro_batches):
        a, out = self.a, f"{self.folder}/out-{task}"
        shutil.rmtree(out, ignore_errors=True)
        command = [a.binary, task, "--model-name", self.folder, "--init", "random", "--device", a.device,
                   "--dataset-path", f"{self.folder}/{a.size}.json", "--output-dir", out, "--batch-size", str(self.rows),
                   "--max-length", str(self.length), "--max-samples", str(self.rows * micro_batches),
                   "--top-k-experts", str(top_k)]
        if task == "train":
            command += ["--num-rounds", "1", "--skip-router-training", "--save-steps", "0"]
        return command, out

    def result(self, program, task, top_k, code, peak, message):
        a = self.a
        result = {"program": program, "model": a.model, "size": a.size, "task": task, "top_k": top_k, "exit": code, "peak_gb": peak}
        if code != 0:
            said = [line.strip() for line in message.splitlines() if line.strip()]
            result |= {"message": said[-1] if said else "", "oom": bool(FULL.search(message))}
        return result

    def profile(self):
        """Writes the GPU time of an identification by operation to a file."""
        a = self.a
        command, _ = self.command("identify", a.top_k[0], FEW)
        code, out, err, _ = self.run(command + ["--profile"], "profile")
        _, found, profile = (out + err).partition("where the GPU's time went")
        if found:
            with open(f"{a.work}/profiles/profile-{a.model}-{a.size}.txt", "w") as f:
                f.write(found + profile)
        return code if code == 0 and found else OUT_OF_MEMORY if FULL.search(err) else 1

    def identify(self, recompute="auto", offload=None):
        """The rate of all micro-batches but the first few."""
        found, peak = [], None
        place = ["--offload", offload] if offload else []
        for micro_batches in (FEW, FEW + self.a.batches):
            command, out = self.command("identify", self.a.top_k[0], micro_batches)
            code, _, err, peak = self.run(command + ["--quiet", "--recompute", recompute, *place], "moewarden")
            result = self.result("moewarden", " ".join(["identify", *place]), "", code, peak, err) | {"recompute": recompute == "always"}
            if code != 0:
                return self.log(result)
            rows = metrics(out)
            found.append((sum(r["tokens"] for r in rows), sum(r["seconds"] for r in rows)))
        tokens, seconds = (y - x for x, y in zip(*found))
        result |= {"tokens_per_second": tokens / seconds} if seconds > 0 else {"exit": 1, "message": f"times of {found}"}
        return self.log(result | {"cold_tokens_per_second": found[0][0] / found[0][1]})

    def offload(self):
        """Experts on the GPU, then in the host's memory: the rates of both, and the same scores."""
        scores = []
        for place in ("none", "host"):
            code = self.identify(offload=place)
            if code != 0:
                return code
            with open(f"{self.folder}/out-identify/expert_scores.json") as f:
                scores.append(json.load(f)["rounds"])
        print("the scores are the same" if scores[0] == scores[1] else "the scores differ", flush=True)
        return 0 if scores[0] == scores[1] else 1

    def train(self, top_k, recompute="auto"):
        command, out = self.command("train", top_k, FEW + self.a.batches)
        code, _, err, peak = self.run(command + ["--quiet", "--recompute", recompute], "moewarden")
        result = self.result("moewarden", "train", top_k, code, peak, err) | {"recompute": recompute == "always"}
        if code == 0:
            rows = [r for r in metrics(out) if r["phase"] == "expert"]
            result["tokens_per_second"] = statistics.median(r["tokens"] / r["seconds"] for r in rows[FEW:] or rows[-1:])
        return self.log(result)

    def peer(self, task, top_k):
        a, scores = self.a, f"{self.folder}/out-train/expert_scores.json"
        steps = "4" if self.length < 2048 else "3"
        command = [a.python, PEER, "--model", a.model, "--task", task, "--rows", str(self.rows), "--length", str(self.length),
                   "--steps", steps]
        if task == "train" and os.path.exists(scores):
            command += ["--selected", scores]  # the experts that we trained
        if a.tiny:
            command += ["--tiny", "--warmup", "1", "--steps", "1"]
        if a.device == "cpu":
            command += ["--device", "cpu"]
        code, out, err, peak = self.run(command, "peer")
        result = self.result("transformers", task, top_k if task == "train" else "", code, peak, err)
        if code == 0:
            found = json.loads(out.strip().splitlines()[-1])
            keep = ("oom", "tokens_per_second", "recompute", "versions", "message")
            result |= {k: found[k] for k in keep if k in found} | {"torch_peak_gib": found.get("peak_gib")}
        return self.log(result)


def measure(a):
    scene, codes = Scene(a), []
    if a.what == "profile":
        return scene.profile()
    if a.what == "offload":
        return scene.offload()
    if a.what == "recomputed":  # the least memory
        return max(scene.identify("always"), scene.train(a.top_k[0], "always"))
    for top_k in a.top_k[:1] if a.what == "identify" else a.top_k:
        codes.append(scene.identify() if a.what == "identify" else scene.train(top_k))
        if not a.no_peer:
            codes.append(scene.peer(a.what, top_k))
    return 1 if 1 in codes else max(codes)


def table(a):
    runs = []
    if os.path.exists(f"{a.work}/speed.jsonl"):
        with open(f"{a.work}/speed.jsonl") as f:
            runs = [json.loads(line) for line in f]
    print("| GPU | model | tokens | task | trained | moewarden, tokens/s | peer | ratio | peak GB, ours | peer's | of the floor |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")

    # The peer is compared with our run without recomputation, even where the peer had to recompute. Cards are never mixed.
    def key(r):
        least = r["program"] == "moewarden" and r.get("recompute", False)
        return r.get("gpu", "none"), r["model"], r["size"], r["task"], r["top_k"], least

    shapes = floor.shapes()
    for kind in dict.fromkeys(map(key, runs)):
        gpu, model, size, task, top_k, least = kind
        mine = [r for r in runs if key(r) == kind]
        cells, rates = {}, {}
        for program in ("moewarden", "transformers"):
            all_ = [r for r in mine if r["program"] == program]
            speeds = [r["tokens_per_second"] for r in all_ if "tokens_per_second" in r]
            peaks = [r["peak_gb"] for r in all_ if r.get("peak_gb")]
            bad = [r for r in all_ if r["exit"] != 0 or r.get("oom")]
            rates[program] = statistics.median(speeds) if speeds else None
            missing = "out of memory" if any(r.get("oom") for r in bad) else f"exit {bad[0]['exit']}" if bad else "–"
            again = ", layers recomputed" if any(r.get("recompute") for r in all_) else ""
            cells[program] = (f"{rates[program]:.0f}{again}" if speeds else missing, f"{max(peaks):.1f}" if peaks else "–")
        ours, peer = rates["moewarden"], rates["transformers"]
        ratio = f"{ours / peer:.2f}" if ours and peer else "–"
        rows, length = map(int, size.split("x"))
        ceilings = next((r["ceilings"] for r in reversed(mine) if r.get("ceilings")), None)
        share = "–"
        if ours and ceilings and not least:
            bound = floor.seconds(shapes[model], rows, length, ceilings, top_k if task == "train" else None)
            share = f"{100 * ours * bound / (rows * length):.0f} %"
        print(f"| {gpu} | {model} | {size} | {task} | {top_k} | {cells['moewarden'][0]} | {cells['transformers'][0]} | {ratio} | "
              f"{cells['moewarden'][1]} | {cells['transformers'][1]} | {share} |")
    for profile in sorted(glob.glob(f"{a.work}/profiles/profile-*.txt")):
        with open(profile) as f:
            head = "".join(f.readlines()[:13]).rstrip()
        print(f"\n{os.path.basename(profile)}:\n\n```\n{head}\n```")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", help="scenes, logs and results")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--binary", default="moewarden")
    parser.add_argument("--model", choices=list(TOP_K))
    parser.add_argument("--python", default=sys.executable, help="has torch and transformers")
    parser.add_argument("--size", choices=list(BATCHES), default="8x512")
    parser.add_argument("--what", choices=["identify", "train", "recomputed", "profile", "offload"], default="identify")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of all programs together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy models of the same families, to test this script")
    a = parser.parse_args()
    if a.table:
        return table(a)
    if not a.model:
        parser.error("--model or --table")
    a.batches, a.top_k = BATCHES[a.size], TOP_K[a.model]
    if a.tiny:
        a.size, a.batches, a.top_k = "2x40", 4, [2]
    os.makedirs(f"{a.work}/logs", exist_ok=True)
    return measure(a)


if __name__ == "__main__":
    sys.exit(main())
