// KL divergence of softmax distributions: of rows of logits from the rows of a base model. Memory-bound: both rows are
// read twice (of a large vocabulary from memory: see cross_entropy.cu), and the gradient is written once.

// One class of KL(p0 ‖ p), where p0 = e^log_base.
DEVICE double kl_term(float p0, double log_base, double log_p) {
    return p0 > 0.0f ? (double)p0 * (log_base - log_p) : 0.0;
}

// Rounding may make a divergence of 0 negative; NaN stays NaN.
DEVICE double not_negative(double kl) { return kl < 0.0 ? 0.0 : kl; }

// kl[row] = Σ p0 (ln p0 − ln p), p0 and p the softmax of the rows of `base` and of `logits`; same[row] = 1 if both have the
// same first largest logit; with `grad`, grad[row] = scale · (p − p0). Rows are `stride` apart, a multiple of 8, in all.
// Grid: one block of 512 threads per row.
template <class T> DEVICE void linear_kl(const float* logits, const float* base, double* kl, double* same, T* grad, u64 classes,
                                         u64 stride, float scale) {
    const int W = 8;
    logits += blockIdx.x * stride;
    base += blockIdx.x * stride;
    float highest, highest0;
    double total, total0;
    softmax_of_block(logits, classes, highest, total);
    softmax_of_block(base, classes, highest0, total0);
    double log_total = log(total), log_total0 = log(total0);
    float inverse = (float)(1.0 / total), inverse0 = (float)(1.0 / total0);
    if (grad) grad += blockIdx.x * stride;
    double sum = 0.0;
    // The first class with the largest logit, negated, for a maximum: exact in f32 up to 2^24 classes.
    float first = NEGATIVE_INFINITY, first0 = NEGATIVE_INFINITY;
    for (u64 c = threadIdx.x * W; c < classes; c += blockDim.x * W) {
        Pack<W> l = load_first<W>(logits + c, classes - c), b = load_first<W>(base + c, classes - c);
#pragma unroll
        for (int j = 0; j < W; j++) {
            if (c + j >= classes) {
                l.v[j] = 0.0f;
                continue;
            }
            float at = l.v[j] - highest, at0 = b.v[j] - highest0;
            float p = expf(at) * inverse, p0 = expf(at0) * inverse0;
            sum += kl_term(p0, (double)at0 - log_total0, (double)at - log_total);
            if (at == 0.0f) first = maximum(first, -(float)(c + j));
            if (at0 == 0.0f) first0 = maximum(first0, -(float)(c + j));
            l.v[j] = scale * (p - p0);
        }
        if (grad) store<W>(grad + c, l);
    }
    sum = block_sum(sum);
    first = block_max(first);
    first0 = block_max(first0);
    if (threadIdx.x == 0) {
        kl[blockIdx.x] = not_negative(sum);
        same[blockIdx.x] = first == first0 ? 1.0 : 0.0;
    }
}

#define TYPED(T, name)                                                                                                   \
    KERNEL(512, linear_kl_##name, (const float* logits, const float* base, double* kl, double* same, T* grad, u64 classes, \
                                   u64 stride, float scale)) {                                                           \
        linear_kl(logits, base, kl, same, grad, classes, stride, scale);                                                 \
    }

TYPED(float, f32)
TYPED(bf16, bf16)

// kl[row] = KL(softmax(base) ‖ softmax(logits)) of router logits. Grid: one warp per row, 4 per block.
KERNEL(128, softmax_kl, (const float* logits, const float* base, double* kl, u64 rows, u64 cols)) {
    u64 row = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    logits += row * cols;
    base += row * cols;
    float highest, highest0, total, total0;
    softmax_of_warp(logits, cols, highest, total);
    softmax_of_warp(base, cols, highest0, total0);
    double log_total = log((double)total), log_total0 = log((double)total0), sum = 0.0;
    for (u64 c = threadIdx.x % 32; c < cols; c += 32) {
        float at = logits[c] - highest, at0 = base[c] - highest0;
        sum += kl_term(expf(at0) / total0, (double)at0 - log_total0, (double)at - log_total);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) kl[row] = not_negative(sum);
}

// dlogits[row] += scale · (softmax(logits) − softmax(base)). Grid: one warp per row, 4 per block.
KERNEL(128, softmax_kl_backward, (const float* base, const float* logits, float* dlogits, u64 rows, u64 cols, float scale)) {
    u64 row = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    logits += row * cols;
    base += row * cols;
    dlogits += row * cols;
    float highest, highest0, total, total0;
    softmax_of_warp(logits, cols, highest, total);
    softmax_of_warp(base, cols, highest0, total0);
    for (u64 c = threadIdx.x % 32; c < cols; c += 32) {
        dlogits[c] += scale * (expf(logits[c] - highest) / total - expf(base[c] - highest0) / total0);
    }
}
