// A tile of a product by ordinary arithmetic, for F32, and for BF16 with rows that are not aligned to 16 bytes.
// tile_mma.cuh and tile_wgmma.cuh have the same interface on tensor cores.

#define TILE_KERNEL(name, parameters) KERNEL(Tile::THREADS, name, parameters)

// M x N sums in the registers of THREADS threads, 4 x 4 per thread.
struct Tile {
    static const int M = 64, N = 64, THREADS = 256, WIDE = 4, PACKS = 4;
    static const int DEPTH = 16, PITCH = 68;
    float sum[4][4];

    // Copies DEPTH x 64 elements of an operand to shared memory, from depth `at` on. `k_major`: its rows run along the
    // depth.
    template <bool k_major, class T> static DEVICE void fill(float (*to)[PITCH], const MatrixView<T>& view, u64 at) {
#pragma unroll
        for (u32 i = threadIdx.x; i < DEPTH * 64; i += THREADS) {
            u32 depth = k_major ? i % DEPTH : i / 64, side = k_major ? i / DEPTH : i % 64;
            u64 row = k_major ? side : at + depth, col = k_major ? at + depth : side;
            to[depth][side] = row < view.rows && col < view.cols ? to_f32(view.at[row * view.stride + col]) : 0.0f;
        }
    }

    // The sum over `count` pairs of operands, `operands(i)`, of op(a) · op(b): a is [M, depth], or stored as [depth, M]
    // if `a_transposed`; b is [depth, N], or stored as [N, depth] if `b_transposed`. Every thread of the block must
    // call it.
    template <class T, bool a_transposed, bool b_transposed, class F>
    DEVICE void multiply(u64 count, u64 depth, F operands) {
        SHARED(float, a, [DEPTH][PITCH]);
        SHARED(float, b, [DEPTH][PITCH]);
        u32 row = threadIdx.x / 16 * 4, col = threadIdx.x % 16 * 4;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] = 0.0f;
        for (u64 p = 0; p < count; p++) {
            Operands<T> pair = operands(p);
            for (u64 at = 0; at < depth; at += DEPTH) {
                __syncthreads();  // other threads may still read the previous step
                fill<!a_transposed>(a, pair.a, at);
                fill<b_transposed>(b, pair.b, at);
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
