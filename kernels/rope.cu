// Rotary embedding in the half-split layout, in place. Memory-bound: x is read and written once; the angles of a
// position are shared by its heads and stay in L1.

// Rotates the pairs (i, i + half) of every head by the angles of the row's position; `direction` is 1, or -1 for the
// transpose. x [T, heads · 2·half]; cos, sin [positions, half]. Grid: one block of up to 256 threads per row.
template <class T, int W>
DEVICE void rotate(T* x, const u32* positions, const float* cosines, const float* sines, u32 heads, u32 half,
                   float direction) {
    u64 row = blockIdx.x;
    x += row * heads * 2 * half;
    cosines += (u64)positions[row] * half;
    sines += (u64)positions[row] * half;
    for (u32 at = threadIdx.x * W; at < heads * half; at += blockDim.x * W) {
        u32 head = at / half, i = at % half;
        T* first = x + (u64)head * 2 * half + i;
        Pack<W> a = load<W>(first), b = load<W>(first + half), c = load<W>(cosines + i), s = load<W>(sines + i), left, right;
#pragma unroll
        for (int j = 0; j < W; j++) {
            float sine = direction * s.v[j];
            left.v[j] = a.v[j] * c.v[j] - b.v[j] * sine;
            right.v[j] = b.v[j] * c.v[j] + a.v[j] * sine;
        }
        store<W>(first, left);
        store<W>(first + half, right);
    }
}

#define TYPED(T, name)                                                                                  \
    KERNEL(256, rope_##name,                                                                            \
           (T * x, const u32* positions, const float* cosines, const float* sines, u32 heads, u32 half, \
            float direction)) {                                                                         \
        BY_WIDTH(T, half, rotate, x, positions, cosines, sines, heads, half, direction);                \
    }

TYPED(float, f32)
TYPED(bf16, bf16)
