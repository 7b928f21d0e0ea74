#!/usr/bin/env python3
"""The steps of prove.py: `steps.py NAME`, in the environment that prove.py sets. What it prints is the step's log; a line in
PROVE_WORK/notes/NAME gets into the summary. Exit codes: 0 passed, 75 out of memory, 77 skipped; anything else: failed."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
WORK, BIN, DEVICE, PYTHON = (os.environ[f"PROVE_{name}"] for name in ("WORK", "BIN", "DEVICE", "PYTHON"))
PEER = os.environ["PROVE_PEER"] == "1"
END = time.monotonic() + float(os.environ["PROVE_SECONDS"])
OUT_OF_MEMORY, SKIPPED = 75, 77
# Mixtral-8x7B's weights alone have 93 GB.
LARGE_MODEL, LARGE_MEMORY = "Mixtral-8x7B", 100e9
# Seconds of one test that is run again alone.
ALONE = 60


def left():
    return END - time.monotonic()


def note(text):
    print(text, flush=True)
    with open(f"{WORK}/notes/{sys.argv[1]}", "a") as f:
        f.write(text + "\n")


def run(command, seconds, log=None, **env):
    """The exit code of a program, 124 after `seconds`. Its output goes to this step's log, or to the file `log`."""
    print("$", *command, flush=True)
    out = open(log, "wb") if log else None
    try:
        return subprocess.run(command, env=os.environ | env, stdout=out, stderr=out, timeout=max(1, seconds), check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return 124
    except OSError as error:
        print(f"{command[0]}: {error}", flush=True)
        return 127
    finally:
        if out:
            out.close()


# --- tests --------------------------------------------------------------------------------------------------------------------

ON_GPU = {"MOEWARDEN_TEST_GPU": "0"}


def tests(pattern):
    """The tests of tests/cuda whose name contains one of the patterns, on the GPU, one at a time. If one fails, each is run again in
    a process of its own: after one illegal address all later calls of a process fail, too."""
    command = [f"{BIN}/cuda", "--test-threads", "1"]
    patterns = pattern.split(",")
    code = run([*command, *patterns], left() * 0.6, **ON_GPU)
    if code == 0:
        return 0
    note("a test did not end" if code == 124 else f"together: exit {code}")
    listed = subprocess.run([*command, "--list", *patterns], capture_output=True, text=True, env=os.environ | ON_GPU, check=False)
    names = [line.removesuffix(": test") for line in listed.stdout.splitlines() if line.endswith(": test")]
    bad, passed = [], 0
    for name in names:
        if left() < 2:
            note(f"no time to run {len(names) - passed - len(bad)} tests alone, from {name} on")
            break
        code = run([*command, "--exact", name], min(ALONE, left() / 2), **ON_GPU)
        if code == 0:
            passed += 1
        else:
            bad.append(name + (" (did not end)" if code == 124 else ""))
    note(f"alone, {passed} of {len(names)} tests passed" + "".join(f"; failed: {name}" for name in bad))
    return 1


def sanitizer(tool):
    path = os.environ.get("PATH", "") + f":{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    program = shutil.which("compute-sanitizer", path=path)
    if not program:
        note("there is no compute-sanitizer (NVIDIA's CUDA toolkit has it)")
        return SKIPPED
    # Memory as it is: these tools need exact allocations, and memory that was never written.
    env = ON_GPU | {"MOEWARDEN_TEST_PLAIN_MEMORY": "1"}
    code = 0
    for pattern in ("bf16_agrees", "of_warpgroups", "attention_on_tensor_cores"):
        if left() < 10:
            note(f"no time for {pattern}")
            return code
        log = f"{WORK}/logs/{tool}-{pattern}.log"
        this = run([program, "--tool", tool, "--error-exitcode", "99", f"{BIN}/cuda", "--test-threads", "1", pattern],
                   left() - 2, log, **env)
        with open(log, errors="replace") as f:
            said = f.read()
        if "Device not supported" in said or "device is not supported" in said.lower():
            note("compute-sanitizer does not support this machine")
            return SKIPPED
        if this == 124:
            note(f"{pattern}: not over in time")
        elif this != 0:
            note(f"{pattern}: exit {this}; {len(re.findall('========= (?:Invalid|Race|Uninit|Error)', said))} messages")
            code = 1
    return code


# --- the program on golden cases ------------------------------------------------------------------------------------------------


def train(case, out, *options):
    """`moewarden train` of a golden case, with the output folder `out`."""
    # A copy without links: the export refuses links that lead out of the model's folder.
    source = f"{WORK}/golden/{case}"
    if not os.path.isdir(source):
        shutil.copytree(f"{ROOT}/tests/golden/{case}", source)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    log = f"{WORK}/logs/{os.path.relpath(out, WORK).replace('/', '-')}.log"
    code = run([f"{BIN}/moewarden", "train", "--model-name", f"{source}/model", "--dataset-path", f"{source}/data.json",
                "--output-dir", out, "--overwrite", "--batch-size", "2", "--top-k-experts", "4", "--num-rounds", "1",
                "--save-steps", "0", "--save-rounds", "none", "--expert-lr", "1e-3", "--threads", "1", *options], left(), log)
    with open(log, errors="replace") as f:
        said = f.read()
    if code != 0:
        note(f"{os.path.basename(out)}: exit {code}: {last_line(said)}")
    return code == 0, said


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def compare(how, *arguments):
    return run([sys.executable, f"{HERE}/compare.py", how, *arguments], left()) == 0


def lockstep():
    """The same steps by one rank, by two on one GPU (that hold all experts, or divide them), by one over NCCL, and on the CPU: of
    experts, then of experts and routers.
    (A step of the router phase alone has another size with another number of ranks.)"""
    cuda = DEVICE == "cuda"
    device = ["--device", DEVICE, *(["--precision", "f32"] if cuda else [])]
    good = True
    for case, phase in (("olmoe", "--skip-router-training"), ("qwen2_moe", "--use-router-consistency-loss")):
        at = f"{WORK}/lockstep/{case}"
        runs = {
            "cpu": ["--device", "cpu", "--grad-accum", "2"],
            "one": [*device, "--grad-accum", "2"],
            "two": [*device, *(["--transport", "host"] if cuda else []), "--ranks", "2", "--grad-accum", "1"],
            "nccl": [*device, *(["--transport", "nccl"] if cuda else []), "--grad-accum", "2"],
        }
        if cuda:
            runs["divided"] = [*runs["two"], "--shard-frozen"]
        ran = {name: train(case, f"{at}-{name}", phase, *options) for name, options in runs.items()}
        if cuda and ran["nccl"][0] and "by NCCL" not in ran["nccl"][1]:
            note(f"{case}: NCCL was not used")
            good = False
        if cuda and not (ran["divided"][0] and ran["two"][0] and compare("same", f"{at}-two", f"{at}-divided")):
            note(f"{case}: two and divided do not have the same bits")
            good = False
        for first, second in (("cpu", "one"), ("cpu", "two"), ("cpu", "nccl"), ("one", "two")):
            if not (ran[first][0] and ran[second][0]):
                good = False
            elif not compare("close", f"{at}-{first}", f"{at}-{second}", "--model", f"{ROOT}/tests/golden/{case}/model"):
                note(f"{case}: {first} and {second} differ")
                good = False
    return 0 if good else 1


def repeat():
    """Two runs of one command, in the precision that is the default: the same bits."""
    good = True
    for case in ("olmoe_bf16", "qwen3_moe", "mixtral"):
        outs = [f"{WORK}/repeat/{case}-{i}" for i in (1, 2)]
        if not all([train(case, out, "--device", DEVICE)[0] for out in outs]):
            good = False
        elif not compare("same", *outs):
            note(f"{case}: the two runs differ")
            good = False
    return 0 if good else 1


# --- speed ----------------------------------------------------------------------------------------------------------------------


def versions():
    print(" ".join(platform.uname()), platform.libc_ver(), flush=True)
    run(["nvidia-smi"], 20)
    run(["nvidia-smi", "-q", "-d", "CLOCK,POWER,ECC,MEMORY"], 20)
    run([f"{BIN}/moewarden", "--version"], 20)
    return run([PYTHON, f"{HERE}/versions.py"], 40)


def ceilings():
    path = f"{WORK}/ceilings.json"
    code = run([f"{BIN}/cuda_ops", "--ceilings", path], left())
    if code == 0:
        with open(path) as f:
            found = json.load(f)
        note(f"{found['flops'] / 1e12:.0f} TFLOP/s, {found['bytes'] / 1e12:.2f} TB/s, to the GPU {found['to_gpu'] / 1e9:.1f} GB/s, "
             f"from it {found['from_gpu'] / 1e9:.1f} GB/s")
    return code


def bench(model, size, *options):
    title = f"{model}, {size.replace('x', ' x ')} tokens"
    log = f"{WORK}/logs/{sys.argv[1].replace(':', '-')}.md"
    code = run([f"{BIN}/cuda_ops", "--markdown", *options, title, *(["wgmma"] if options else [])], left(), log)
    with open(log, errors="replace") as f:
        said = f.read()
    print(said)
    # What was measured before a failure counts.
    with open(f"{WORK}/cuda_ops.md", "a") as f:
        f.write(f"\n## {sys.argv[1]} (exit {code})\n\n{said}")
    if "gave up: " in said and "memory is full" in said:
        return OUT_OF_MEMORY
    for line in said.splitlines():
        if line.startswith("The form chosen"):
            note(line.rstrip(":"))
    return code


def speed(what, model, size):
    if model == LARGE_MODEL and os.path.exists(f"{WORK}/ceilings.json"):
        with open(f"{WORK}/ceilings.json") as f:
            memory = json.load(f)["memory"]
        if memory < LARGE_MEMORY:
            note(f"{model} does not fit into {memory / 1e9:.0f} GB")
            return SKIPPED
    tiny, peer = ["--tiny"] if DEVICE == "cpu" else [], [] if PEER else ["--no-peer"]
    return run([sys.executable, f"{HERE}/speed.py", WORK, "--binary", f"{BIN}/moewarden", "--model", model, "--size", size, "--what", what,
                "--python", PYTHON, "--device", DEVICE, "--seconds", f"{left() - 1:.0f}", *tiny, *peer], left())


def main():
    name, *rest = sys.argv[1].split(":", 1)
    rest = rest[0] if rest else ""
    if os.path.exists(f"{WORK}/notes/{sys.argv[1]}"):
        os.remove(f"{WORK}/notes/{sys.argv[1]}")  # of an earlier call
    plain = {"versions": versions, "ceilings": ceilings, "lockstep": lockstep, "repeat": repeat}
    if name == "open":
        return run([f"{BIN}/cuda_ops", "--open"], left())
    if name in plain:
        return plain[name]()
    if name in ("ops", "products", "golden", "nccl"):
        return tests(f"{name}::")
    if name == "tests":
        return tests(rest)
    if name in ("memcheck", "racecheck", "initcheck"):
        return sanitizer(name)
    if name == "bench":
        return bench(*rest.split(":"))
    if name == "define":
        define, model, size = rest.split(":")
        return bench(model, size, "--define", define)
    if name == "offload" and DEVICE == "cpu":
        note("all experts are in the host's memory")
        return SKIPPED
    if name in ("identify", "train", "recomputed", "profile", "offload"):
        return speed(name, *rest.split(":"))
    print(f"there is no step {sys.argv[1]}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
