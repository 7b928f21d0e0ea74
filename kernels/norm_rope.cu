// RMS norm of each head of queries or keys and its rotation (rope.cu), forward and backward, with the sums of norm.cu in the same
// order, and values rounded to T where it would store them. Memory-bound: everything is read once and stays in registers. A warp
// has several heads, because it would spend more time on instructions than on memory if a head left most of its lanes idle.
//
// A head has 2 · half columns. Lane i of its half / W lanes, a power of two up to 16, holds W columns from i · W on in both
// halves, which are its pairs. Grid: at least heads · half / W threads, in blocks of 256.

// What a lane of a head reads.
template <class T> struct HeadLane {
    static const int W = Width<T>::value;
    u32 lanes, half;
    u64 at;      // of the left columns in the array of all heads; the right ones are half further on
    u32 column;  // of the left columns in the head
    bool there;  // threads behind the last head repeat it, so that whole warps can sum, and store nothing
    Pack<W> cosines, sines;

    DEVICE HeadLane(const u32* positions, const float* all_cosines, const float* all_sines, u32 heads, u32 heads_per_row, u32 half)
        : lanes(half / W), half(half) {
        u32 thread = blockIdx.x * blockDim.x + threadIdx.x, head = thread / lanes;
        there = head < heads;
        if (!there) head = heads - 1;
        column = thread % lanes * W;
        at = (u64)head * 2 * half + column;
        u64 angle = (u64)positions[head / heads_per_row] * half + column;
        cosines = load<W>(all_cosines + angle);
        sines = load<W>(all_sines + angle);
    }

    // Of the left and the right columns of all lanes. In norm.cu a lane has one of the two, and the other is the first that
    // is not zero to be added to it.
    DEVICE float sum(float left, float right) const {
        float x = left + right;
        for (u32 lane = lanes / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_WARP, x, lane);
        return x;
    }

    // Rotates both by the angles, or back with direction -1.
    DEVICE void rotate(Pack<W>& left, Pack<W>& right, float direction) const {
#pragma unroll
        for (int j = 0; j < W; j++) {
            float a = left.v[j], b = right.v[j], sine = direction * sines.v[j];
            left.v[j] = a * cosines.v[j] - b * sine;
            right.v[j] = b * cosines.v[j] + a * sine;
        }
    }
};

template <int W> DEVICE float squares_of(const Pack<W>& x) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < W; j++) sum += x.v[j] * x.v[j];
    return sum;
}

// y = rotated(w · x / sqrt(mean(x²) + eps))
template <class T> DEVICE void forward(const T* x, const T* w, T* y, float eps, const HeadLane<T>& lane) {
    const int W = Width<T>::value;
    Pack<W> left = load<W>(x + lane.at), right = load<W>(x + lane.at + lane.half);
    Pack<W> w_left = load<W>(w + lane.column), w_right = load<W>(w + lane.column + lane.half);
    float r = 1.0f / sqrtf(lane.sum(squares_of(left), squares_of(right)) / (float)(2 * lane.half) + eps);
#pragma unroll
    for (int j = 0; j < W; j++) {
        left.v[j] = rounded<T>(w_left.v[j] * (left.v[j] * r));
        right.v[j] = rounded<T>(w_right.v[j] * (right.v[j] * r));
    }
    lane.rotate(left, right, 1.0f);
    if (!lane.there) return;
    store<W>(y + lane.at, left);
    store<W>(y + lane.at + lane.half, right);
}

// dx = r · (w·g − x · r² · mean(w·g·x)), where g is dy rotated back, and r as in the forward.
template <class T> DEVICE void backward(const T* dy, const T* x, const T* w, T* dx, float eps, const HeadLane<T>& lane) {
    const int W = Width<T>::value;
    Pack<W> left = load<W>(x + lane.at), right = load<W>(x + lane.at + lane.half);
    Pack<W> g_left = load<W>(dy + lane.at), g_right = load<W>(dy + lane.at + lane.half);
    Pack<W> w_left = load<W>(w + lane.column), w_right = load<W>(w + lane.column + lane.half);
    lane.rotate(g_left, g_right, -1.0f);
    float along_left = 0.0f, along_right = 0.0f;
#pragma unroll
    for (int j = 0; j < W; j++) {
        g_left.v[j] = rounded<T>(g_left.v[j]);
        g_right.v[j] = rounded<T>(g_right.v[j]);
        along_left += g_left.v[j] * w_left.v[j] * left.v[j];
        along_right += g_right.v[j] * w_right.v[j] * right.v[j];
    }
    float n = (float)(2 * lane.half), r = 1.0f / sqrtf(lane.sum(squares_of(left), squares_of(right)) / n + eps);
    float along = lane.sum(along_left, along_right) / n * r * r;
#pragma unroll
    for (int j = 0; j < W; j++) {
        left.v[j] = r * (g_left.v[j] * w_left.v[j] - along * left.v[j]);
        right.v[j] = r * (g_right.v[j] * w_right.v[j] - along * right.v[j]);
    }
    if (!lane.there) return;
    store<W>(dx + lane.at, left);
    store<W>(dx + lane.at + lane.half, right);
}

#define TYPED(T, name)                                                                                                    \
    KERNEL(256, rms_norm_rope_##name, (const T* x, const T* w, T* y, float eps, const u32* positions, const float* cosines, \
                                       const float* sines, u32 heads, u32 heads_per_row, u32 half)) {                     \
        forward(x, w, y, eps, HeadLane<T>(positions, cosines, sines, heads, heads_per_row, half));                        \
    }                                                                                                                     \
    KERNEL(256, rms_norm_rope_backward_##name,                                                                            \
           (const T* dy, const T* x, const T* w, T* dx, float eps, const u32* positions, const float* cosines,            \
            const float* sines, u32 heads, u32 heads_per_row, u32 half)) {                                                \
        backward(dy, x, w, dx, eps, HeadLane<T>(positions, cosines, sines, heads, heads_per_row, half));                  \
    }

TYPED(float, f32)
TYPED(bf16, bf16)
