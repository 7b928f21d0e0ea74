// A tile of a product by ordinary arithmetic, for F32, and for BF16 whose rows do not start aligned to 16 bytes.
// tile_mma.cuh and tile_wgmma.cuh have the same `Tile` on tensor cores; kernels are written over any of them.

// M x N sums in the registers of THREADS threads, each with 4 x 4 of them.
struct Tile {
    static const int M = 64, N = 64, THREADS = 256, WIDE = 4, PACKS = 4;
    static const int DEPTH = 16, PITCH = 68;
    float sum[4][4];

    // DEPTH x 64 values of a part into shared memory, from `at` along the depth. `along`: the depth runs along the rows.
    template <bool along, class T> static DEVICE void fill(float (*to)[PITCH], const Part<T>& part, u64 at) {
#pragma unroll
        for (u32 i = threadIdx.x; i < DEPTH * 64; i += THREADS) {
            u32 depth = along ? i % DEPTH : i / 64, side = along ? i / DEPTH : i % 64;
            u64 row = along ? side : at + depth, col = along ? at + depth : side;
            to[depth][side] = row < part.rows && col < part.cols ? to_f32(part.at[row * part.stride + col]) : 0.0f;
        }
    }

    // The sum over `count` pairs of parts, `parts(i)`, of op(a) · op(b): a is [M, depth], or stored as [depth, M] if
    // `a_transposed`; b is [depth, N], or stored as [N, depth]. Every thread of the block must come here.
    template <class T, bool a_transposed, bool b_transposed, class F>
    DEVICE void multiply(u64 count, u64 depth, F parts) {
        SHARED(float, a, [DEPTH][PITCH]);
        SHARED(float, b, [DEPTH][PITCH]);
        u32 row = threadIdx.x / 16 * 4, col = threadIdx.x % 16 * 4;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] = 0.0f;
        for (u64 p = 0; p < count; p++) {
            Parts<T> part = parts(p);
            for (u64 at = 0; at < depth; at += DEPTH) {
                __syncthreads();  // the last step may still be read
                fill<!a_transposed>(a, part.a, at);
                fill<b_transposed>(b, part.b, at);
                __syncthreads();
#pragma unroll
                for (int k = 0; k < DEPTH; k++) {
                    Pack<4> x = load<4>(&a[k][row]), y = load<4>(&b[k][col]);
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[i][j] = fmaf(x.v[i], y.v[j], sum[i][j]);
                }
            }
        }
    }

    static DEVICE u32 row(int i) { return threadIdx.x / 16 * 4 + i; }
    static DEVICE u32 col(int) { return threadIdx.x % 16 * 4; }
    DEVICE Pack<4> pack(int i) const { return {{sum[i][0], sum[i][1], sum[i][2], sum[i][3]}}; }
};
