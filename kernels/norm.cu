// RMS norm over groups of n columns, forward and backward. Memory-bound: the second pass over a group finds it in L1.
//
// A group of up to WARP_GROUP columns is reduced by a warp, with 8 groups per block; a longer group by a block. Grid:
// groups / 8 or groups blocks of 256 threads. Sums are f32: a thread's own columns in order, then the fixed tree of a
// warp or block.

#define WARP_GROUP 1024

// The group of this thread, and its index among the threads of the group.
struct Lanes {
    bool warp;
    u64 group;
    u32 lane, lanes;
};

DEVICE Lanes lanes_of(u64 n) {
    Lanes p;
    p.warp = n <= WARP_GROUP;
    p.group = p.warp ? (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32 : blockIdx.x;
    p.lane = p.warp ? threadIdx.x % 32 : threadIdx.x;
    p.lanes = p.warp ? 32 : blockDim.x;
    return p;
}

DEVICE float sum_at(const Lanes& p, float x) { return p.warp ? warp_sum(x) : block_sum(x); }

// y = w · x / sqrt(mean(x²) + eps)
template <class T, int W> DEVICE void forward(const T* x, const T* w, T* y, u64 n, float eps, const Lanes& p) {
    x += p.group * n;
    y += p.group * n;
    float squares = 0.0f;
    for (u64 c = p.lane * W; c < n; c += p.lanes * W) {
        Pack<W> a = load<W>(x + c);
#pragma unroll
        for (int j = 0; j < W; j++) squares += a.v[j] * a.v[j];
    }
    float r = 1.0f / sqrtf(sum_at(p, squares) / (float)n + eps);
    for (u64 c = p.lane * W; c < n; c += p.lanes * W) {
        Pack<W> a = load<W>(x + c), b = load<W>(w + c);
#pragma unroll
        for (int j = 0; j < W; j++) a.v[j] = b.v[j] * (a.v[j] * r);
        store<W>(y + c, a);
    }
}

// dx = r · (w·dy − x · r² · mean(w·dy·x)) with r = 1 / sqrt(mean(x²) + eps), which is also stored for dw if `rs` is
// given.
template <class T, int W>
DEVICE void backward(const T* dy, const T* x, const T* w, T* dx, float* rs, u64 n, float eps, const Lanes& p) {
    dy += p.group * n;
    x += p.group * n;
    dx += p.group * n;
    float squares = 0.0f, along = 0.0f;
    for (u64 c = p.lane * W; c < n; c += p.lanes * W) {
        Pack<W> a = load<W>(x + c), b = load<W>(w + c), g = load<W>(dy + c);
#pragma unroll
        for (int j = 0; j < W; j++) {
            squares += a.v[j] * a.v[j];
            along += g.v[j] * b.v[j] * a.v[j];
        }
    }
    float r = 1.0f / sqrtf(sum_at(p, squares) / (float)n + eps);
    along = sum_at(p, along) / (float)n * r * r;
    if (rs && p.lane == 0) rs[p.group] = r;
    for (u64 c = p.lane * W; c < n; c += p.lanes * W) {
        Pack<W> a = load<W>(x + c), b = load<W>(w + c), g = load<W>(dy + c);
#pragma unroll
        for (int j = 0; j < W; j++) a.v[j] = r * (g.v[j] * b.v[j] - along * a.v[j]);
        store<W>(dx + c, a);
    }
}

#define TYPED(T, name)                                                                              \
    KERNEL(256, rms_norm_##name, (const T* x, const T* w, T* y, u64 groups, u64 n, float eps)) {    \
        Lanes p = lanes_of(n);                                                                         \
        if (p.group >= groups) return; /* a whole warp */                                           \
        BY_WIDTH(T, n, forward, x, w, y, n, eps, p);                                                \
    }                                                                                               \
    KERNEL(256, rms_norm_backward_##name,                                                           \
           (const T* dy, const T* x, const T* w, T* dx, float* rs, u64 groups, u64 n, float eps)) { \
        Lanes p = lanes_of(n);                                                                         \
        if (p.group >= groups) return; /* a whole warp */                                           \
        BY_WIDTH(T, n, backward, dy, x, w, dx, rs, n, eps, p);                                      \
    }

TYPED(float, f32)
TYPED(bf16, bf16)
