// Cross-entropy of rows of logits. Memory-bound: logits are read twice, and their gradient is written once. All rows of a
// chunk are in work at once, so the second time a row comes from L2 only if the whole chunk fits into it (it does not with
// large vocabularies: 1,024 rows of 151,936 classes are 622 MB).

// scale · (softmax − one-hot) of W logits from column c on.
template <int W>
DEVICE Pack<W> logit_gradient(Pack<W> l, u32 c, u32 target, float highest, float inverse, float scale) {
    u32 hit = target - c;  // the target's place among them, if it is below W
#pragma unroll
    for (int j = 0; j < W; j++) {
        float p = expf(l.v[j] - highest) * inverse;
        l.v[j] = scale * (p - (hit == (u32)j ? 1.0f : 0.0f));
    }
    return l;
}

// losses[row] = log Σ e^logit − logit[target]; with `grad`, grad[row] = scale · (softmax − one-hot). Rows are `stride`
// apart, a multiple of 8, in both. Grid: one block of 512 threads per row.
template <class T> DEVICE void cross_entropy(const float* logits, const u32* targets, double* losses, T* grad, u64 classes,
                                             u64 stride, float scale) {
    const int W = 8;
    logits += blockIdx.x * stride;
    u32 target = targets[blockIdx.x];
    float all, wanted = threadIdx.x == 0 ? logits[target] : 0.0f;  // read beside the others, not behind their sum
    double total;
    softmax_of_block(logits, classes, all, total);
    if (threadIdx.x == 0) losses[blockIdx.x] = (double)all + log(total) - (double)wanted;
    if (!grad) return;
    grad += blockIdx.x * stride;
    float inverse = (float)(1.0 / total);
    u64 c = threadIdx.x * W;
    for (; c + W <= classes; c += blockDim.x * W) {
        store<W>(grad + c, logit_gradient(load<W>(logits + c), (u32)c, target, all, inverse, scale));
    }
    if (c < classes) {
        Pack<W> l = logit_gradient(load_first<W>(logits + c, classes - c), (u32)c, target, all, inverse, scale);
#pragma unroll
        for (int j = 0; j < W; j++) l.v[j] = c + j < classes ? l.v[j] : 0.0f;
        store<W>(grad + c, l);
    }
}

#define TYPED(T, name)                                                                                              \
    KERNEL(512, cross_entropy_##name, (const float* logits, const u32* targets, double* losses, T* grad, u64 classes, \
                                       u64 stride, float scale)) {                                                  \
        cross_entropy(logits, targets, losses, grad, classes, stride, scale);                                       \
    }

TYPED(float, f32)
TYPED(bf16, bf16)

// greedy[row] = whether the target is the first class with the highest logit. Grid: one block of 512 threads per row. Class
// numbers below 2^24 are exact in f32.
KERNEL(512, greedy, (const float* logits, const u32* targets, u32* greedy, u64 classes, u64 stride)) {
    logits += blockIdx.x * stride;
    float highest = NEGATIVE_INFINITY, best = -16777216.0f;
    for (u64 c = threadIdx.x; c < classes; c += blockDim.x) {
        float l = logits[c];
        if (l > highest) highest = l, best = -(float)c;
    }
    float all = block_max(highest);
    float first = block_max(highest == all ? best : -16777216.0f);
    if (threadIdx.x == 0) greedy[blockIdx.x] = -first == (float)targets[blockIdx.x] ? 1 : 0;
}
