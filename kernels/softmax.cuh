// The two numbers of a row from which its softmax follows: the largest logit, and Σ e^(logit − highest).

// The largest of a row's logits, and Σ e^(logit − highest), by a block; `row` aligned to 8 elements. Each
// thread keeps a running maximum and sum of its own logits (the "online" softmax), which are then reduced in a fixed tree, in f64.
DEVICE void softmax_of_block(const float* row, u64 classes, float& all, double& total) {
    const int W = 8;
    float highest = NEGATIVE_INFINITY, sum = 0.0f;
    for (u64 c = threadIdx.x * W; c < classes; c += blockDim.x * W) {
        Pack<W> l = load_first<W>(row + c, classes - c);
        float h = highest;
#pragma unroll
        for (int j = 0; j < W; j++) h = c + j < classes ? maximum(h, l.v[j]) : h;
        if (h > highest) {
            sum *= expf(highest - h);  // 0 the first time: e^-∞
            highest = h;
        }
#pragma unroll
        for (int j = 0; j < W; j++) sum += c + j < classes ? expf(l.v[j] - highest) : 0.0f;
    }
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
