#!/usr/bin/env python3
"""Complete identification and training at full size, moewarden and transformers in turns: `speed.py OUT --binary moewarden --model
OLMoE-1B-7B`. Appends one JSON line per run to OUT/speed.jsonl; `speed.py OUT --table` prints the table of all runs.

Weights are random and made on the device. moewarden's identification is timed in the second round of a training run (metrics.jsonl;
warmed up, like the peer's measured steps), its memory in a separate `identify`; training is the median step after two warm-up steps.
The peak is the memory of the whole GPU as nvidia-smi reports it, sampled 10 times a second, for both programs.
"""

import argparse
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PEER = os.path.join(HERE, "../peer/gpu.py")
# Number of measured micro-batches, by their rows and length.
BATCHES = {"8x512": 10, "16x2048": 4}
# Numbers of trained experts. The last is 6.25 % of all; before it 100 for Qwen3-30B-A3B, and 8 for Mixtral-8x7B, to fit on one
# H200.
TOP_K = {"OLMoE-1B-7B": [64], "Qwen3-30B-A3B": [100, 384], "Mixtral-8x7B": [8, 16]}
# Lower bound of a step in seconds: a roofline of 790 TFLOP/s and 4.3 TB/s (an H200 in practice), the larger of the two terms for
# every operation, no layer recomputed; training 6.25 % of the experts.
FLOOR = {
    ("OLMoE-1B-7B", "identify"): {"8x512": 36.3e-3, "16x2048": 0.304},
    ("Qwen3-30B-A3B", "identify"): {"8x512": 96.2e-3, "16x2048": 0.839},
    ("Mixtral-8x7B", "identify"): {"8x512": 0.391, "16x2048": 3.188},
    ("OLMoE-1B-7B", "train"): {"8x512": 28.5e-3, "16x2048": 0.241},
    ("Qwen3-30B-A3B", "train"): {"8x512": 78.5e-3, "16x2048": 0.698},
    ("Mixtral-8x7B", "train"): {"8x512": 0.282, "16x2048": 2.311},
}


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
        self.a, self.folder = a, f"{a.out}/scene-{a.model}"
        batches = [x for size, n in a.batches.items() for x in ("--batch", f"{size}:{n}")]
        tiny = ["--tiny"] if a.tiny else []
        subprocess.run([sys.executable, f"{HERE}/scene.py", self.folder, "--model", a.model, *batches, *tiny], check=True)

    def log(self, result):
        print(json.dumps(result), flush=True)
        with open(f"{self.a.out}/speed.jsonl", "a") as f:
            f.write(json.dumps(result) + "\n")

    def command(self, task, size, top_k, rounds):
        a, out = self.a, f"{self.folder}/out-{task}"
        shutil.rmtree(out, ignore_errors=True)
        rows, length = size.split("x")
        command = [a.binary, task, "--model-name", self.folder, "--init", "random", "--device", a.device,
                   "--dataset-path", f"{self.folder}/{size}.json", "--output-dir", out, "--batch-size", rows,
                   "--max-length", length, "--max-samples", "1000000", "--top-k-experts", str(top_k)]
        if task == "train":
            command += ["--num-rounds", str(rounds), "--skip-router-training", "--save-steps", "0"]
        return command, out

    def profile(self, task, size, top_k):
        """Writes the GPU time by operation to a file, for the first round (without warm-up)."""
        a = self.a
        command, _ = self.command(task, size, top_k, 1)
        code, out, err, _ = run(command + ["--profile"], f"{self.folder}/profile.log", a.limit)
        _, found, profile = (out + err).partition("where the GPU's time went")
        if found:
            with open(f"{a.out}/profile-{a.model}-{size}-{task}.txt", "w") as f:
                f.write(found + profile)
        return code or int(not found)

    def ours(self, task, size, top_k, recompute="auto"):
        a = self.a
        command, out = self.command(task, size, top_k, 2)
        command += ["--recompute", recompute]
        code, _, err, peak = run(command + ["--quiet"], f"{self.folder}/moewarden.log", a.limit)
        result = {"program": "moewarden", "model": a.model, "size": size, "task": task, "top_k": top_k, "exit": code, "peak_gb": peak}
        if recompute == "always":
            result["recompute"] = True
        if code != 0:
            said = err.strip().splitlines()
            self.log(result | {"message": said[-1] if said else ""})
            return code
        rows = metrics(out)
        found = [r for r in rows if r["phase"] == "identify" and r["round"] == max(x["round"] for x in rows)]
        rate = sum(r["tokens"] for r in found) / sum(r["seconds"] for r in found)
        if task == "identify":
            self.log(result | {"cold_tokens_per_second": rate})
            return code
        self.log(result | {"task": "identify", "peak_gb": None, "tokens_per_second": rate})
        steps = [r for r in rows if r["phase"] == "expert"][2:] or rows[-1:]
        self.log(result | {"tokens_per_second": statistics.median(r["tokens"] / r["seconds"] for r in steps)})
        return code

    def peer(self, task, size, top_k):
        a, scores = self.a, f"{self.folder}/out-train/expert_scores.json"
        rows, length = size.split("x")
        steps = "6" if int(length) < 2048 else "3"
        command = [a.python, PEER, "--model", a.model, "--task", task, "--rows", rows, "--length", length, "--steps", steps]
        if task == "train" and os.path.exists(scores):
            command += ["--selected", scores]  # the experts that we trained
        if a.tiny:
            command += ["--tiny", "--warmup", "1", "--steps", "1"]
        if a.device == "cpu":
            command += ["--device", "cpu"]
        code, out, err, peak = run(command, f"{self.folder}/peer.log", a.limit)
        result = {"program": "transformers", "model": a.model, "size": size, "task": task, "top_k": top_k, "exit": code, "peak_gb": peak}
        if code == 0:
            found = json.loads(out.strip().splitlines()[-1])
            keep = ("oom", "tokens_per_second", "recompute", "versions", "message")
            result |= {k: found[k] for k in keep if k in found} | {"torch_peak_gib": found.get("peak_gib")}
        else:
            said = err.strip().splitlines()
            result["message"] = said[-1] if said else ""
        self.log(result)
        return code


def measure(a):
    scene, codes = Scene(a), []
    for size in a.batches:
        for i, top_k in enumerate(a.top_k):
            for _ in range(a.rounds):
                codes.append(scene.ours("train", size, top_k))
                if codes[-1] == 69:
                    return 69  # no GPU: no other run would succeed
                if not a.no_peer:
                    codes.append(scene.peer("train", size, top_k))
                if i == 0:
                    codes.append(scene.ours("identify", size, top_k))
                    if not a.no_peer:
                        codes.append(scene.peer("identify", size, top_k))
        # Least memory: all layers recomputed.
        codes += [scene.ours(task, size, a.top_k[0], "always") for task in ("identify", "train")]
        if a.device == "cuda":
            codes += [scene.profile(task, size, a.top_k[0]) for task in ("identify", "train")]
    return max(codes)


def table(a):
    runs = []
    if os.path.exists(f"{a.out}/speed.jsonl"):
        with open(f"{a.out}/speed.jsonl") as f:
            runs = [json.loads(line) for line in f]
    print("| model | tokens | task | trained | moewarden, tokens/s | peer | ratio | peak GB, ours | peer's | of the floor |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    # The peer is compared with our run without recomputation, even where the peer had to recompute.
    def key(r):
        least = r["program"] == "moewarden" and r.get("recompute", False)
        return r["model"], r["size"], r["task"], r["top_k"] if r["task"] == "train" else "", least

    for kind in dict.fromkeys(map(key, runs)):
        model, size, task, top_k, least = kind
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
        tokens = tokens_of(size)
        fits = task == "identify" or top_k == TOP_K[model][-1]  # the floor of training is for 6.25 % of the experts
        floor = FLOOR.get((model, task), {}).get(size) if fits and not least else None
        share = f"{100 * ours * floor / tokens:.0f} %" if ours and floor else "–"
        print(f"| {model} | {size} | {task} | {top_k} | {cells['moewarden'][0]} | {cells['transformers'][0]} | {ratio} | "
              f"{cells['moewarden'][1]} | {cells['transformers'][1]} | {share} |")
    for profile in sorted(glob.glob(f"{a.out}/profile-*.txt")):
        with open(profile) as f:
            head = "".join(f.readlines()[:13]).rstrip()
        print(f"\n{os.path.basename(profile)}:\n\n```\n{head}\n```")


def tokens_of(size):
    rows, length = map(int, size.split("x"))
    return rows * length


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--binary", default="moewarden")
    parser.add_argument("--model", choices=list(TOP_K))
    parser.add_argument("--python", default=sys.executable, help="has torch and transformers")
    parser.add_argument("--size", choices=list(BATCHES), help="measure only this size")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of all programs, in turns")
    parser.add_argument("--limit", type=float, default=300, help="time limit of one program in seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy models of the same families, to test this script")
    a = parser.parse_args()
    if a.table:
        return table(a)
    if not a.model:
        parser.error("--model or --table")
    a.batches, a.top_k = ({"2x40": 4}, [2]) if a.tiny else (BATCHES, TOP_K[a.model])
    if a.size and not a.tiny:
        a.batches = {a.size: BATCHES[a.size]}
    os.makedirs(a.out, exist_ok=True)
    sys.exit(measure(a))


if __name__ == "__main__":
    main()
