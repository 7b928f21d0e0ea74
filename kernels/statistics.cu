// The sums over tokens in the router objective, in f64 and a fixed order, and their backwards. All read f32 router
// logits once: memory-bound, and small.

#define ROWS 64

// partial[b, c] = Σ over the rows of chunk b of x[row, c], or of softmax(x[row])[c]. Grid: one block of 256 threads per
// chunk of ROWS rows.
KERNEL(256, sum_rows, (const float* x, double* partial, u64 rows, u64 cols, int softmax)) {
    SHARED(float, highest, [ROWS]);
    SHARED(float, inverse, [ROWS]);
    u64 first = (u64)blockIdx.x * ROWS;
    u32 count = (u32)minimum((u64)ROWS, rows - first);
    x += first * cols;
    if (softmax) {
        for (u32 i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
            float h, s;
            softmax_of_warp(x + i * cols, cols, h, s);
            if (threadIdx.x % 32 == 0) highest[i] = h, inverse[i] = 1.0f / s;
        }
        __syncthreads();
    }
    for (u64 c = threadIdx.x; c < cols; c += blockDim.x) {
        double sum = 0.0;
        for (u32 i = 0; i < count; i++) {
            float value = x[i * cols + c];
            sum += (double)(softmax ? expf(value - highest[i]) * inverse[i] : value);
        }
        partial[blockIdx.x * cols + c] = sum;
    }
}

// out[c] = Σ_p partial[p, c], p ascending. Grid: at least cols threads, in blocks of 256.
KERNEL(256, sum_partials, (const double* partial, double* out, u64 parts, u64 cols)) {
    u64 c = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    double sum = 0.0;
    for (u64 p = 0; p < parts; p++) sum += partial[p * cols + c];
    out[c] = sum;
}

// dlogits[row] += p · (dy − Σ p·dy), p = softmax(logits[row]). Grid: one warp per row, 4 per block.
KERNEL(128, softmax_sum_backward, (const float* dy, const float* logits, float* dlogits, u64 rows, u64 cols)) {
    u64 row = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    logits += row * cols;
    dlogits += row * cols;
    float highest, total, along = 0.0f;
    softmax_of_warp(logits, cols, highest, total);
    float inverse = 1.0f / total;
    for (u64 c = threadIdx.x % 32; c < cols; c += 32) along += expf(logits[c] - highest) * inverse * dy[c];
    along = warp_sum(along);
    for (u64 c = threadIdx.x % 32; c < cols; c += 32) {
        dlogits[c] += expf(logits[c] - highest) * inverse * (dy[c] - along);
    }
}

// Adds dy to every row. Grid: one block of up to 256 threads per row.
template <class T> DEVICE void add_to_rows(const float* dy, T* dx, u64 cols) {
    dx += blockIdx.x * cols;
    for (u64 c = threadIdx.x; c < cols; c += blockDim.x) dx[c] = from_f32<T>(to_f32(dx[c]) + dy[c]);
}

KERNEL(256, segment_sum_backward_f32, (const float* dy, float* dx, u64 cols)) { add_to_rows(dy, dx, cols); }
KERNEL(256, segment_sum_backward_bf16, (const float* dy, bf16* dx, u64 cols)) { add_to_rows(dy, dx, cols); }
