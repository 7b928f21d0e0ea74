#!/usr/bin/env python3
"""Model of the cost of a step on N nodes of 8 GPUs: communication against computation. Prints the tables of docs/scaling.md. Nothing
here is measured; each assumption is a constant below.
"""

GPUS = 8  # per node
PEAK = 790e12  # FLOP/s of dense bf16 products, as observed on H200 GPUs
SHARE = 0.5  # share of the roofline that the kernels reach: a goal, not a measurement
NVLINK = 0.8 * 450e9  # bytes/s a GPU and direction within a node (H200, NVLink 4), at 80 % of the nominal rate
FABRIC = 0.8 * 50e9  # bytes/s a GPU and direction between nodes (one 400 Gb/s port a GPU), at 80 %
LATENCY = 20e-6  # seconds per node-level hop of a collective operation
BUCKET = 32 << 20  # bytes of f32 gradient
TOKENS = 8 * 512  # per micro-batch: 8 examples of 512 tokens

# name: layers, width, expert width, experts, roofline seconds of a micro-batch of 4,096 tokens (identification, training of
# 6.25 % of the experts with recomputation), all parameters
MODELS = {
    "OLMoE-1B-7B": (16, 2048, 1024, 64, 36.3e-3, 41.2e-3, 6.92e9),
    "Qwen3-30B-A3B": (48, 2048, 768, 128, 96.2e-3, 112e-3, 30.53e9),
    "Mixtral-8x7B": (32, 4096, 14336, 8, 391e-3, 417e-3, 46.70e9),
}
EXPERTS = 0.0625  # share of the experts that is trained
NODES = [1, 2, 4, 8, 16, 32, 64]


def move(bytes_, nodes):
    """Seconds to reduce-scatter or all-gather `bytes_`: within each node first, then between nodes over one ring per GPU of
    a node."""
    within = bytes_ * (GPUS - 1) / GPUS / NVLINK
    between = bytes_ / GPUS * (nodes - 1) / nodes / FABRIC
    return within + between + LATENCY * nodes.bit_length()


def training(name, nodes):
    """(seconds of computation, seconds of exposed communication, bytes sent per GPU, bytes of training state per GPU)"""
    layers, width, expert_width, experts, _, floor, _ = MODELS[name]
    work = floor / SHARE
    trained = EXPERTS * layers * experts * 3 * width * expert_width
    gradient, weights = 4 * trained, 2 * trained
    # Buckets are sent while lower layers compute: the backward pass is two thirds of a step, and the last bucket is always exposed.
    hidden = max(0.0, 2 / 3 * work)
    last = move(min(BUCKET, gradient), nodes)
    reduce = max(last, move(gradient, nodes) - hidden)
    gather = move(weights, nodes)
    small = 4 * LATENCY * (nodes * GPUS).bit_length()  # token counts, loss, gradient norm, stop flag
    sent = (gradient + weights) * (1 - 1 / (nodes * GPUS))
    state = 4 * trained + 16 * trained / (nodes * GPUS)
    return work, reduce + gather + small, sent, state


def main():
    print("Identification, a whole run over M micro-batches: each GPU sends its L·E doubles and M losses once.\n")
    print("| model | L·E doubles | seconds per micro-batch | communication at 64 nodes |")
    print("|---|---|---|---|")
    for name, (layers, _, _, experts, floor, _, _) in MODELS.items():
        seconds = move(8 * layers * experts, 64)
        print(f"| {name} | {8 * layers * experts / 1e3:.0f} kB | {floor / SHARE:.3f} | {1e3 * seconds:.2f} ms |")
    print(f"\nTraining {100 * EXPERTS:.2f} % of the experts, 4,096 tokens per GPU and step:\n")
    print("| model | trained | sent per GPU and step | " + " | ".join(f"{n} × 8" for n in NODES) + " |")
    print("|---|---|---|" + "---|" * len(NODES))
    for name in MODELS:
        layers, width, expert_width, experts, *_ = MODELS[name]
        trained = EXPERTS * layers * experts * 3 * width * expert_width
        cells = []
        for nodes in NODES:
            work, wait, sent, _ = training(name, nodes)
            cells.append(f"{100 * work / (work + wait):.0f} %")
        print(f"| {name} | {trained / 1e9:.2f} G | {sent / 1e9:.1f} GB | " + " | ".join(cells) + " |")
    print("\nTraining state per GPU (the gradient is whole; its sum, master weights and moments are sharded):\n")
    print("| model | 1 GPU | " + " | ".join(f"{n} × 8" for n in NODES[:4]) + " | 64 × 8 |")
    print("|---|---|" + "---|" * 5)
    for name in MODELS:
        layers, width, expert_width, experts, *_ = MODELS[name]
        trained = EXPERTS * layers * experts * 3 * width * expert_width
        cells = [f"{training(name, nodes)[3] / 1e9:.1f} GB" for nodes in NODES[:4] + [64]]
        print(f"| {name} | {16 * trained / 1e9:.1f} GB | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
