// The two numbers of a row from which its softmax follows: the largest logit, and Σ e^(logit − highest).

// A thread's running maximum and sum of its logits (the "online" softmax).
struct RunningSoftmax {
    float highest, sum;

    // Adds the first `count` of W logits, all of them if `whole`.
    template <bool whole, int W> DEVICE void add(const Pack<W>& l, int count) {
        float h = highest;
#pragma unroll
        for (int j = 0; j < W; j++) h = whole || j < count ? maximum(h, l.v[j]) : h;
        if (h > highest) {
            sum *= expf(highest - h);  // 0 the first time: e^-∞
            highest = h;
        }
#pragma unroll
        for (int j = 0; j < W; j++) sum += whole || j < count ? expf(l.v[j] - highest) : 0.0f;
    }
};

// The largest of a row's logits, and Σ e^(logit − highest), by a block; `row` aligned to 8 elements. Those of the threads are
// reduced in a fixed tree, in f64.
DEVICE void softmax_of_block(const float* row, u64 classes, float& all, double& total) {
    const int W = 8;
    RunningSoftmax own = {NEGATIVE_INFINITY, 0.0f};
    // Whole packs without masks: the kernel spends as much time on instructions as on memory.
    u64 c = threadIdx.x * W;
    for (; c + W <= classes; c += blockDim.x * W) own.add<true>(load<W>(row + c), W);
    if (c < classes) own.add<false>(load_first<W>(row + c, classes - c), (int)(classes - c));
    float highest = own.highest, sum = own.sum;
    all = block_max(highest);
    // A thread without logits contributes its sum, 0, as it is: -∞ − -∞ would be NaN.
    total = block_sum(highest == NEGATIVE_INFINITY ? (double)sum : (double)sum * (double)expf(highest - all));
}

// The largest logit of a row, and Σ e^(logit − highest), by one warp.
DEVICE void softmax_of_warp(const float* row, u64 cols, float& highest, float& total) {
    highest = NEGATIVE_INFINITY;
    for (u64 c = threadIdx.x % 32; c < cols; c += 32) highest = maximum(highest, row[c]);
    highest = warp_max(highest);
    float sum = 0.0f;
    for (u64 c = threadIdx.x % 32; c < cols; c += 32) sum += expf(row[c] - highest);
    total = warp_sum(sum);
}
