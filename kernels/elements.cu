// Element by element: sums, clamps, casts. All are bound by memory: they read and write each element once.

// x += y. Grid: any number of blocks of 256 threads that together have n / W threads or more.
template <class T, int W> DEVICE void add_at(T* x, const T* y, u64 i) {
    Pack<W> a = load<W>(x + i), b = load<W>(y + i);
#pragma unroll
    for (int j = 0; j < W; j++) a.v[j] += b.v[j];
    store<W>(x + i, a);
}

// y = the clamped value strictly inside its limits ? y : 0, see clamp_backward.
template <class T, int W> DEVICE void clamp_at(T* x, float limit, u64 i) {
    Pack<W> a = load<W>(x + i);
#pragma unroll
    // Comparisons that leave NaN as it is.
    for (int j = 0; j < W; j++) a.v[j] = a.v[j] > limit ? limit : a.v[j] < -limit ? -limit : a.v[j];
    store<W>(x + i, a);
}

template <class T, int W> DEVICE void clamp_backward_at(T* dy, const T* y, float limit, u64 i) {
    Pack<W> g = load<W>(dy + i), a = load<W>(y + i);
#pragma unroll
    for (int j = 0; j < W; j++) g.v[j] = fabsf(a.v[j]) < limit ? g.v[j] : 0.0f;
    store<W>(dy + i, g);
}

// Runs `at<T, W>(.., i)` over n elements from aligned starts: a thread takes 16 bytes, the last threads the tail one by one.
#define EACH(T, n, at, ...)                                              \
    do {                                                                 \
        const int W = Width<T>::value;                                   \
        u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * W;        \
        if (i + W <= n) {                                                \
            at<T, W>(__VA_ARGS__, i);                                    \
        } else {                                                         \
            for (; i < n; i++) at<T, 1>(__VA_ARGS__, i);                 \
        }                                                                \
    } while (0)

#define TYPED(T, name)                                                                             \
    KERNEL(256, add_##name, (T * x, const T* y, u64 n)) { EACH(T, n, add_at, x, y); }              \
    KERNEL(256, clamp_##name, (T * x, u64 n, float limit)) { EACH(T, n, clamp_at, x, limit); }     \
    KERNEL(256, clamp_backward_##name, (T * dy, const T* y, u64 n, float limit)) {                 \
        EACH(T, n, clamp_backward_at, dy, y, limit);                                               \
    }

TYPED(float, f32)
TYPED(bf16, bf16)
