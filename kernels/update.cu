// Parameter updates, and the sums that decide whether they may happen. Memory-bound: AdamW reads 16 and writes 12 bytes
// per element, and 2 or 4 more for the parameter; a sum of squares reads 4.

// The scalars of one step.
struct AdamwStep {
    float grad_scale, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, bias_correction2_sqrt, eps;

    // PyTorch's AdamW with the same roundings as on the CPU: the _rn functions keep the compiler from fusing a product
    // with a sum.
    DEVICE void apply(float& w, float& m, float& v, float g) const {
        g = __fmul_rn(g, grad_scale);
        m = __fadd_rn(m, __fmul_rn(__fsub_rn(g, m), one_minus_beta1));
        v = __fadd_rn(__fmul_rn(v, beta2), __fmul_rn(one_minus_beta2, __fmul_rn(g, g)));
        float step = __fdiv_rn(m, __fadd_rn(__fdiv_rn(__fsqrt_rn(v), bias_correction2_sqrt), eps));
        w = __fsub_rn(__fmul_rn(w, decay), __fmul_rn(step_size, step));
    }

    // Elements i .. i + W; returns the new weights.
    template <int W> DEVICE Pack<W> apply_at(float* master, float* m, float* v, const float* grad, u64 i) const {
        Pack<W> w = load<W>(master + i), a = load<W>(m + i), b = load<W>(v + i), g = load<W>(grad + i);
#pragma unroll
        for (int j = 0; j < W; j++) apply(w.v[j], a.v[j], b.v[j], g.v[j]);
        store<W>(master + i, w);
        store<W>(m + i, a);
        store<W>(v + i, b);
        return w;
    }
};

// The arrays may start at any element. Grid: at least n / 4 threads, in blocks of 256.
KERNEL(256, adamw,
       (float* master, float* m, float* v, const float* grad, u64 n, float grad_scale, float one_minus_beta1, float beta2,
        float one_minus_beta2, float decay, float step_size, float bias_correction2_sqrt, float eps)) {
    const AdamwStep step = {grad_scale, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, bias_correction2_sqrt, eps};
    u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    bool aligned = ((u64)master | (u64)m | (u64)v | (u64)grad) % 16 == 0;
    if (aligned && i + 4 <= n) {
        step.apply_at<4>(master, m, v, grad, i);
    } else {
        for (u64 end = minimum(i + 4, n); i < end; i++) step.apply_at<1>(master, m, v, grad, i);
    }
}

// The n parts of an array. A part has some blocks of its own: jobs[3 i], the number of blocks before part i; jobs[3 i + 1],
// its first element; jobs[3 i + 2], its elements; at last jobs[3 n], the number of all blocks.

// The part of this block: the last one that begins at or before it (parts without elements have no block).
DEVICE u64 part_of_block(const u64* jobs, u64 n) {
    u64 low = 0, high = n;  // it is in low .. high
    while (low + 1 < high) {
        u64 middle = (low + high) / 2;
        (jobs[3 * middle] <= blockIdx.x ? low : high) = middle;
    }
    return low;
}

// AdamW on n parts that are the master weights of one parameter each, and the parameters: weights[i] = part i of master, rounded
// to nearest even. Grid: jobs[3 n] blocks of 256 threads, one for each 2048 elements of a part.
template <class T>
DEVICE void adamw_weights(float* master, float* m, float* v, const float* grad, T* const* weights, const u64* jobs, u64 n,
                          const AdamwStep& step) {
    u64 part = part_of_block(jobs, n);
    const u64* job = jobs + 3 * part;
    u64 at = job[1], i = ((blockIdx.x - job[0]) * blockDim.x + threadIdx.x) * 8, elements = job[2];
    T* weight = weights[part];
    master += at;
    m += at;
    v += at;
    grad += at;
    bool aligned = ((u64)master | (u64)m | (u64)v | (u64)grad | (u64)weight) % 16 == 0;
    if (aligned && i + 8 <= elements) {
        store<8>(weight + i, step.apply_at<8>(master, m, v, grad, i));
    } else {
        for (u64 end = minimum(i + 8, elements); i < end; i++) store<1>(weight + i, step.apply_at<1>(master, m, v, grad, i));
    }
}

#define TYPED(T, name)                                                                                               \
    KERNEL(256, adamw_weights_##name, (float* master, float* m, float* v, const float* grad, T* const* weights,      \
                                       const u64* jobs, u64 n, float grad_scale, float one_minus_beta1, float beta2, \
                                       float one_minus_beta2, float decay, float step_size,                          \
                                       float bias_correction2_sqrt, float eps)) {                                    \
        const AdamwStep step = {grad_scale, one_minus_beta1, beta2, one_minus_beta2, decay, step_size,               \
                                bias_correction2_sqrt, eps};                                                         \
        adamw_weights(master, m, v, grad, weights, jobs, n, step);                                                   \
    }

TYPED(float, f32)
TYPED(bf16, bf16)

// The sums of squares of n parts of x, in two launches.

// partial[block] = Σ x² over the block's share of its part, in f64: the square of a finite f32 does not overflow there, so
// the sum is finite exactly if every element is. Grid: jobs[3 n] blocks of 256 threads.
KERNEL(256, sums_of_squares, (const float* x, const u64* jobs, double* partial, u64 n)) {
    const u64* job = jobs + 3 * part_of_block(jobs, n);
    u64 block = blockIdx.x - job[0], blocks = job[3] - job[0];
    x += job[1];
    double sum = 0.0;
    for (u64 i = block * blockDim.x + threadIdx.x; i < job[2]; i += blocks * blockDim.x) {
        sum += (double)x[i] * (double)x[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// out[part] = Σ of the part's partial sums. Grid: one block of 512 threads per part.
KERNEL(512, totals_of_parts, (const double* partial, const u64* jobs, double* out)) {
    const u64* job = jobs + 3 * (u64)blockIdx.x;
    double sum = 0.0;
    for (u64 i = job[0] + threadIdx.x; i < job[3]; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// out = Σ values. Grid: one block of 512 threads.
KERNEL(512, total, (const double* values, double* out, u64 n)) {
    double sum = 0.0;
    for (u64 i = threadIdx.x; i < n; i += blockDim.x) sum += values[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = sum;
}
