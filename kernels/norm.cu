// RMS norm over groups of n columns, forward and backward, also with the sum before or behind it. Memory-bound:
// the second pass over a group finds it in L1.
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

// y = w · x / sqrt(mean(x²) + eps). With `added`, x += added first, rounded to T.
template <class T, int W> DEVICE void forward(T* x, const T* added, const T* w, T* y, u64 n, float eps, const Lanes& p) {
    x += p.group * n;
    added += p.group * (added ? n : 0);
    y += p.group * n;
    auto load_x = [&](u64 c) {
        Pack<W> a = load<W>(x + c);
        if (!added) return a;
        Pack<W> b = load<W>(added + c);
#pragma unroll
        for (int j = 0; j < W; j++) a.v[j] = rounded<T>(a.v[j] + b.v[j]);
        return a;
    };
    float squares = 0.0f;
    for (u64 c = p.lane * W; c < n; c += p.lanes * W) {
        Pack<W> a = load_x(c);
#pragma unroll
        for (int j = 0; j < W; j++) squares += a.v[j] * a.v[j];
    }
    float r = 1.0f / sqrtf(sum_at(p, squares) / (float)n + eps);
    for (u64 c = p.lane * W; c < n; c += p.lanes * W) {
        Pack<W> a = load_x(c), b = load<W>(w + c);
        if (added) store<W>(x + c, a);  // the thread's own columns, which it has read for the last time
#pragma unroll
        for (int j = 0; j < W; j++) a.v[j] = b.v[j] * (a.v[j] * r);
        store<W>(y + c, a);
    }
}

// dx = r · (w·dy − x · r² · mean(w·dy·x)) with r = 1 / sqrt(mean(x²) + eps), which is also stored for dw if `rs` is
// given. With `add`, dx += that, rounded to T first.
template <class T, int W>
DEVICE void backward(const T* dy, const T* x, const T* w, T* dx, float* rs, u64 n, float eps, bool add, const Lanes& p) {
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
        if (add) {
            Pack<W> sum = load<W>(dx + c);
#pragma unroll
            for (int j = 0; j < W; j++) a.v[j] = __fadd_rn(sum.v[j], rounded<T>(a.v[j]));
        }
        store<W>(dx + c, a);
    }
}

#define TYPED(T, name)                                                                                                 \
    KERNEL(256, rms_norm_##name, (const T* x, const T* w, T* y, u64 groups, u64 n, float eps)) {                       \
        Lanes p = lanes_of(n);                                                                                         \
        if (p.group >= groups) return; /* a whole warp */                                                              \
        BY_WIDTH(T, n, forward, const_cast<T*>(x), (const T*)nullptr, w, y, n, eps, p);                                \
    }                                                                                                                  \
    KERNEL(256, add_rms_norm_##name, (T * x, const T* added, const T* w, T* y, u64 groups, u64 n, float eps)) {        \
        Lanes p = lanes_of(n);                                                                                         \
        if (p.group >= groups) return; /* a whole warp */                                                              \
        BY_WIDTH(T, n, forward, x, added, w, y, n, eps, p);                                                            \
    }                                                                                                                  \
    KERNEL(256, rms_norm_backward_##name,                                                                              \
           (const T* dy, const T* x, const T* w, T* dx, float* rs, u64 groups, u64 n, float eps)) {                    \
        Lanes p = lanes_of(n);                                                                                         \
        if (p.group >= groups) return; /* a whole warp */                                                              \
        BY_WIDTH(T, n, backward, dy, x, w, dx, rs, n, eps, false, p);                                                  \
    }                                                                                                                  \
    KERNEL(256, add_rms_norm_backward_##name,                                                                          \
           (const T* dy, const T* x, const T* w, T* dx, float* rs, u64 groups, u64 n, float eps)) {                    \
        Lanes p = lanes_of(n);                                                                                         \
        if (p.group >= groups) return; /* a whole warp */                                                              \
        BY_WIDTH(T, n, backward, dy, x, w, dx, rs, n, eps, true, p);                                                   \
    }

TYPED(float, f32)
TYPED(bf16, bf16)
