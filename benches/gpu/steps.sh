#!/usr/bin/env bash
# The steps of prove.sh: `bash benches/gpu/steps.sh NAME`, with its variables. Each exits with 69 where there is no GPU.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

# Fails with 69 and the reason where there is no GPU to work with.
gpu() {
    [[ $DEVICE == cpu ]] || "$BIN/cuda_ops" --open
}

# The tests of one file of tests/cuda with their comparisons on the GPU, one test at a time: they share one GPU.
on_gpu() {
    gpu && MOEWARDEN_TEST_GPU=0 "$BIN/cuda" --test-threads 1 "$1::"
}

step_versions() {
    uname -srm
    nvidia-smi || echo "no nvidia-smi"
    "$BIN/moewarden" --version
    "$PYTHON" "$here/versions.py"
    gpu
}

step_ops() { on_gpu ops; }
step_products() { on_gpu products; }
step_golden() { on_gpu golden; }
step_nccl() { on_gpu nccl; }

step_sanitizer() {
    gpu || return
    local tool sanitizer code=0
    PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
    if ! sanitizer=$(command -v compute-sanitizer); then
        echo "skipped: there is no compute-sanitizer (NVIDIA's CUDA toolkit has it)"
        return
    fi
    # Memory as it is: these tools want to see exact allocations, and what was never written.
    export MOEWARDEN_TEST_PLAIN_MEMORY=1
    for tool in memcheck racecheck initcheck; do
        echo "--- $tool"
        MOEWARDEN_TEST_GPU=0 timeout "$LIMIT" "$sanitizer" --tool "$tool" --error-exitcode 1 "$BIN/cuda" \
            --test-threads 1 agrees || code=$?
        MOEWARDEN_TEST_GPU=0 timeout "$LIMIT" "$sanitizer" --tool "$tool" --error-exitcode 1 "$BIN/cuda" \
            --test-threads 1 tensor_cores of_warpgroups || code=$?
    done
    return "$code"
}

# train CASE OUTPUT OPTIONS...: a golden case through the program.
train() {
    # A copy without links: the export refuses links that lead out of the model's folder.
    local case=$OUT/golden/$1 out=$2
    mkdir -p "$OUT/golden" "$(dirname "$out")"
    [[ -d $case ]] || cp -rL "$root/tests/golden/$1" "$case"
    shift 2
    timeout "$LIMIT" "$BIN/moewarden" train --model-name "$case/model" --dataset-path "$case/data.json" \
        --output-dir "$out" --overwrite --batch-size 2 --top-k-experts 4 --num-rounds 1 --save-steps 0 --save-rounds none \
        --expert-lr 1e-3 --threads 1 "$@" >"$out.log" 2>&1 && return
    local code=$?
    tail -n 20 "$out.log"
    return "$code"
}

# The same steps by one rank, by two on one GPU, by one over NCCL, and on the CPU: of experts, then of experts and routers. (A
# step of the router phase alone has another size with another number of ranks.)
step_lockstep() {
    gpu || return
    local at=$OUT/lockstep f32=() host=() nccl=() case phase other model code=0
    if [[ $DEVICE == cuda ]]; then
        f32=(--precision f32) host=(--transport host) nccl=(--transport nccl)
    fi
    for case in olmoe qwen2_moe; do
        phase=--skip-router-training
        [[ $case == qwen2_moe ]] && phase=--use-router-consistency-loss
        train "$case" "$at/$case-cpu" --device cpu "$phase" --grad-accum 2 || return
        train "$case" "$at/$case-one" --device "$DEVICE" "${f32[@]}" "$phase" --grad-accum 2 || return
        train "$case" "$at/$case-two" --device "$DEVICE" "${f32[@]}" "${host[@]}" "$phase" --ranks 2 --grad-accum 1 || return
        train "$case" "$at/$case-nccl" --device "$DEVICE" "${f32[@]}" "${nccl[@]}" "$phase" --grad-accum 2 || return
        if [[ $DEVICE == cuda ]] && ! grep -q 'by NCCL' "$at/$case-nccl.log"; then
            echo "NCCL was not used: $at/$case-nccl.log"
            return 1
        fi
        model=$root/tests/golden/$case/model
        for other in one two nccl; do
            echo "--- $case: cpu and $other"
            "$PYTHON" "$here/compare.py" close "$at/$case-cpu" "$at/$case-$other" --model "$model" || code=1
        done
        echo "--- $case: one and two"
        "$PYTHON" "$here/compare.py" close "$at/$case-one" "$at/$case-two" --model "$model" || code=1
    done
    return "$code"
}

# Two runs of the same command, in the precision that is the default.
step_repeat() {
    gpu || return
    local at=$OUT/repeat case i code=0
    for case in olmoe_bf16 qwen3_moe mixtral; do
        for i in 1 2; do
            train "$case" "$at/$case-$i" --device "$DEVICE" || return
        done
        echo "--- $case"
        "$PYTHON" "$here/compare.py" same "$at/$case-1" "$at/$case-2" || code=1
    done
    return "$code"
}

step_bench() {
    gpu || return
    timeout "$LIMIT" "$BIN/cuda_ops" --markdown | tee "$OUT/cuda_ops.md"
}

# speed MODEL [SIZE]
speed() {
    local options=(--binary "$BIN/moewarden" --model "$1" --python "$PYTHON" --limit "$LIMIT" --device "$DEVICE")
    [[ $DEVICE == cpu ]] && options+=(--tiny)
    "$PYTHON" "$here/speed.py" "$OUT/speed" "${options[@]}" ${2:+--size "$2"}
}

case $1 in
    versions) step_versions ;;
    ops) step_ops ;;
    products) step_products ;;
    golden) step_golden ;;
    nccl) step_nccl ;;
    sanitizer) step_sanitizer ;;
    lockstep) step_lockstep ;;
    repeat) step_repeat ;;
    bench) step_bench ;;
    speed:*)
        IFS=: read -r _ model size <<<"$1"
        speed "$model" "${size:-}"
        ;;
    *)
        echo "there is no step $1" >&2
        exit 2
        ;;
esac
