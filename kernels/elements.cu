// Elementwise operations: sums, clamps, conversions of the number format, random values. Memory-bound: each element is
// read and written once.

// Calls at<T, W>(.., i) over n elements that start at aligned addresses: a thread takes 16 bytes of T; the last one
// takes the tail, element by element. Grid: at least n / Width<T> threads, in blocks of 256.
#define EACH(T, n, at, ...)                                       \
    do {                                                          \
        const int W = Width<T>::value;                            \
        u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * W; \
        if (i + W <= n) {                                         \
            at<T, W>(__VA_ARGS__, i);                             \
        } else {                                                  \
            for (; i < n; i++) at<T, 1>(__VA_ARGS__, i);          \
        }                                                         \
    } while (0)

// x += y
template <class T, int W> DEVICE void add_at(T* x, const T* y, u64 i) {
    Pack<W> a = load<W>(x + i), b = load<W>(y + i);
#pragma unroll
    for (int j = 0; j < W; j++) a.v[j] += b.v[j];
    store<W>(x + i, a);
}

// x clamped to [-limit, limit]; NaN stays.
template <class T, int W> DEVICE void clamp_at(T* x, float limit, u64 i) {
    Pack<W> a = load<W>(x + i);
#pragma unroll
    for (int j = 0; j < W; j++) a.v[j] = a.v[j] > limit ? limit : a.v[j] < -limit ? -limit : a.v[j];
    store<W>(x + i, a);
}

// dy where |y| < limit, else 0
template <class T, int W> DEVICE void clamp_backward_at(T* dy, const T* y, float limit, u64 i) {
    Pack<W> g = load<W>(dy + i), a = load<W>(y + i);
#pragma unroll
    for (int j = 0; j < W; j++) g.v[j] = fabsf(a.v[j]) < limit ? g.v[j] : 0.0f;
    store<W>(dy + i, g);
}

#define TYPED(T, name)                                                                         \
    KERNEL(256, add_##name, (T * x, const T* y, u64 n)) { EACH(T, n, add_at, x, y); }          \
    KERNEL(256, clamp_##name, (T * x, u64 n, float limit)) { EACH(T, n, clamp_at, x, limit); } \
    KERNEL(256, clamp_backward_##name, (T * dy, const T* y, u64 n, float limit)) {             \
        EACH(T, n, clamp_backward_at, dy, y, limit);                                           \
    }

TYPED(float, f32)
TYPED(bf16, bf16)

// Sets every row of y to x. Grid: one block of any size per row.
template <class T> DEVICE void repeat_row(const T* x, T* y, u64 cols) {
    y += blockIdx.x * cols;
    for (u64 c = threadIdx.x; c < cols; c += blockDim.x) y[c] = x[c];
}

KERNEL(256, repeat_row_f32, (const float* x, float* y, u64 cols)) { repeat_row(x, y, cols); }
KERNEL(256, repeat_row_bf16, (const bf16* x, bf16* y, u64 cols)) { repeat_row(x, y, cols); }

// --- conversions of the number format --------------------------------------------------------------------------------

// IEEE half precision. Parameters may be stored in it; activations never are.
struct f16 {
    u16 bits;
};

// The exponent is rebiased by a multiplication with 2^112, which is exact, also for subnormals.
DEVICE float to_f32(f16 x) {
    u32 magnitude = (u32)(x.bits & 0x7fff) << 13;
    u32 finite = (u32)__float_as_int(__int_as_float((int)magnitude) * __int_as_float((127 + 112) << 23));
    u32 bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : finite;
    return __int_as_float((int)(bits | (u32)(x.bits & 0x8000) << 16));
}

// Rounds to nearest even. Below 2^-14 the result is subnormal: adding 0.5 aligns its bits with the unit 2^-24.
template <> DEVICE f16 from_f32<f16>(float x) {
    u32 bits = (u32)__float_as_int(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    f16 y;
    if (size > 0x7f800000) {
        y.bits = (u16)(sign | 0x7e00);
    } else if (size >= 0x47800000) {  // 2^16 and above
        y.bits = (u16)(sign | 0x7c00);
    } else if (size < 0x38800000) {
        float shifted = __fadd_rn(__int_as_float((int)size), 0.5f);
        y.bits = (u16)(sign | ((u32)__float_as_int(shifted) - 0x3f000000));
    } else {
        u32 rebiased = size - (112u << 23);
        y.bits = (u16)(sign | ((rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13));
    }
    return y;
}

// `from` and `to` may start at any element. Grid: at least n / 8 threads, in blocks of 256.
template <class A, class B> DEVICE void cast(const A* from, B* to, u64 n) {
    u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    bool aligned = ((u64)from | (u64)to) % 16 == 0;
    if (aligned && i + 8 <= n) {
        store<8>(to + i, load<8>(from + i));
    } else {
        for (u64 end = minimum(i + 8, n); i < end; i++) to[i] = from_f32<B>(to_f32(from[i]));
    }
}

#define CAST(A, B, name) \
    KERNEL(256, cast_##name, (const A* from, B* to, u64 n)) { cast(from, to, n); }

CAST(float, bf16, f32_bf16)
CAST(float, f16, f32_f16)
CAST(bf16, float, bf16_f32)
CAST(bf16, f16, bf16_f16)
CAST(f16, float, f16_f32)
CAST(f16, bf16, f16_bf16)

// y[row] = [high | low]: x[row] as the sum of two BF16 numbers, up to 2^-17 of it. What is not finite is all in `high`.
// x [n / cols, cols], y [n / cols, 2 cols]. Grid: at least n threads, in blocks of 256.
KERNEL(256, split_f32, (const float* x, bf16* y, u64 cols, u64 n)) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    bf16 high = from_f32<bf16>(x[i]);
    float rest = x[i] - to_f32(high);
    y += i / cols * 2 * cols + i % cols;
    y[0] = high;
    y[cols] = from_f32<bf16>(fabsf(rest) < -NEGATIVE_INFINITY ? rest : 0.0f);
}

// --- random values ---------------------------------------------------------------------------------------------------

// Number `place` of the SplitMix64 sequence with this seed.
DEVICE u64 random_bits(u64 seed, u64 place) {
    u64 z = seed + (place + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Uniform around 0, one of 2^24 values `step` apart; each depends only on the seed and its index. 24 bits are exact in
// f32, so only the product and the conversion to T round.
template <class T, int W> DEVICE void random_at(T* to, u64 seed, float step, u64 i) {
    Pack<W> x;
#pragma unroll
    for (int j = 0; j < W; j++) x.v[j] = (float)((int)(random_bits(seed, i + j) >> 40) - (1 << 23)) * step;
    store<W>(to + i, x);
}

#define RANDOM(T, name) \
    KERNEL(256, random_##name, (T * to, u64 n, u64 seed, float step)) { EACH(T, n, random_at, to, seed, step); }

RANDOM(float, f32)
RANDOM(bf16, bf16)
RANDOM(f16, f16)
