#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: `bash benches/gpu/prove.sh OUT_FOLDER`. README.md says what is in it.
#
# BIN=FOLDER     binaries of pack.sh; without it they are built here, which needs cargo
# STEPS="a b"    only these steps, in this order
# LIMIT=300      seconds of a step; of one program where a step runs several at full size
# PYTHON=python3 has torch and transformers, whose pip wheels also bring NVIDIA's libraries
# DEVICE=cpu     without a GPU: tries out the steps that run `moewarden` (lockstep, repeat, speed), in toy sizes
#
# It takes the first GPU that CUDA_VISIBLE_DEVICES shows.
set -uo pipefail

if (($# == 0)); then
    echo "usage: bash benches/gpu/prove.sh OUT_FOLDER" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
export PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} LIMIT=${LIMIT:-300}
export CARGO_MANIFEST_DIR=$root # where tests that were built elsewhere find their cases
models=(OLMoE-1B-7B Qwen3-30B-A3B Mixtral-8x7B)

mkdir -p "$1"
OUT=$(cd "$1" && pwd)
if [[ -z ${BIN:-} ]]; then
    BIN=$OUT/bin
    if ! bash "$here/pack.sh" "$BIN" >"$OUT/build.log" 2>&1; then
        echo "the build failed: $OUT/build.log" >&2
        exit 1
    fi
fi
BIN=$(cd "$BIN" && pwd) || exit 2
export OUT BIN
visible=${CUDA_VISIBLE_DEVICES:-0}
export CUDA_VISIBLE_DEVICES=${visible%%,*}
# Where pip put NVIDIA's libraries.
wheels=$("$PYTHON" -c 'import glob, site; print(":".join(d for p in site.getsitepackages() for d in sorted(glob.glob(p + "/nvidia/*/lib"))))' 2>/dev/null)
export LD_LIBRARY_PATH=$wheels${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

steps=(versions products ops golden nccl lockstep repeat bench)
for model in "${models[@]}"; do
    steps+=("speed:$model:8x512" "speed:$model:16x2048")
done
steps+=(sanitizer) # may take long
[[ -n ${STEPS:-} ]] && read -ra steps <<<"$STEPS"

rows=() failed=0 without_gpu=0
for step in "${steps[@]}"; do
    log=$OUT/${step//:/-}.log
    limit=$LIMIT
    # These run several programs, each with the limit of its own.
    [[ $step == speed:* || $step == sanitizer || $step == lockstep || $step == repeat ]] && limit=$((8 * LIMIT))
    start=$SECONDS
    timeout --kill-after=10 "$limit" bash "$here/steps.sh" "$step" >"$log" 2>&1
    code=$?
    case $code in
        0) said=passed ;;
        69) said="no GPU" without_gpu=$((without_gpu + 1)) ;;
        124 | 137) said="over its limit of $limit s" ;;
        *) said=failed ;;
    esac
    if ((code == 0)) && grep -q '^skipped: there is no' "$log"; then
        said=skipped
    fi
    ((code != 0)) && failed=$((failed + 1))
    rows+=("| $step | $said | $code | $((SECONDS - start)) | $(basename "$log") |")
    echo "$step: $said (exit $code, $((SECONDS - start)) s)"
done

{
    echo "# $(date -u +%F): $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU")"
    echo
    echo "| step | result | exit | seconds | log |"
    echo "|---|---|---|---|---|"
    printf '%s\n' "${rows[@]}"
    echo
    "$PYTHON" "$here/speed.py" "$OUT/speed" --table
} >"$OUT/summary.md"
echo
cat "$OUT/summary.md"
if ((failed == 0)); then
    exit 0
elif ((failed == without_gpu)); then
    echo "for want of a GPU (exit 69): $failed of ${#steps[@]} steps"
    exit 69
fi
exit 1
