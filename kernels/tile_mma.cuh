// A tile of a BF16 product on tensor cores by mma.sync.m16n8k16 (sm_80 and later), with a pipeline of three stages
// (pipeline.cuh) and ldmatrix (mma.cuh). Same interface as tile_simt.cuh.
//
// Operands are copied as they are stored, K-major or not; ldmatrix transposes them while it loads registers.

struct Stage {
    static const u32 DEPTH = 32, COUNT = 3, COLUMNS = TILE, BLOCKS = 2;

    // The 16-byte chunks of a row are swizzled, so that neither cp.async nor ldmatrix has bank conflicts.
    template <bool k_major> static DEVICE u32 offset(u32 row, u32 chunk) {
        return k_major ? row * 32 + (chunk ^ (row / 2 % 4)) * 8 : row * 128 + (chunk ^ (row % 8)) * 8;
    }
};

// M x N sums in the registers of THREADS threads: 8 warps, 2 down and 4 across, with 64 x 32 sums each.
// Needs 48 KiB of dynamic shared memory.
struct Tile {
    static const int M = TILE, N = TILE, THREADS = TILE_THREADS, WIDE = 2, PACKS = 32;
    float sum[4][4][4];

    // 16 x 16 elements of a from row m and depth k of a stage.
    template <bool k_major> static DEVICE Fragment fragment_a(const bf16* stage, u32 m, u32 k) {
        u32 lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
        u32 down = m + r + matrix % 2 * 8, deep = k + r + matrix / 2 * 8;
        return k_major ? ldmatrix_x4<false>(stage + Stage::offset<true>(down, k / 8 + matrix / 2))
                     : ldmatrix_x4<true>(stage + Stage::offset<false>(deep, m / 8 + matrix % 2));
    }

    // 16 x 16 elements of b from depth k and column n: r[0] and r[1] are the first 8 columns, r[2] and r[3] the others.
    template <bool k_major> static DEVICE Fragment fragment_b(const bf16* stage, u32 n, u32 k) {
        u32 lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
        u32 right = n + r + matrix / 2 * 8, deep = k + r + matrix % 2 * 8;
        return k_major ? ldmatrix_x4<false>(stage + Stage::offset<true>(right, k / 8 + matrix % 2))
                     : ldmatrix_x4<true>(stage + Stage::offset<false>(deep, n / 8 + matrix / 2));
    }

    // The sum over `count` pairs of operands, `operands(i)`, of op(a) · op(b): a is [M, depth], or stored as [depth, M]
    // if `a_transposed`; b is [depth, N], or stored as [N, depth] if `b_transposed`. Every thread of the block must
    // call it.
    template <class T, bool a_transposed, bool b_transposed, class F>
    DEVICE void multiply(u64 count, u64 depth, F operands) {
        DYNAMIC_SHARED(memory);
        u32 warp = threadIdx.x / 32, m = warp % 2 * 64, n = warp / 2 * 32;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[i][j][c] = 0.0f;

        Pipeline<Stage, !a_transposed, b_transposed> pipeline(reinterpret_cast<bf16*>(memory), count, depth);
        u32 steps = pipeline.count * pipeline.steps;
        for (u32 s = 0; s < Stage::COUNT - 1; s++) pipeline.load(s, operands);
        for (u32 step = 0, stage = 0; step < steps; step++) {
            cp_async_wait_group<Stage::COUNT - 2>();
            __syncthreads();  // the copies of all threads are visible, and all have finished with the previous stage
            pipeline.load((stage + Stage::COUNT - 1) % Stage::COUNT, operands);
            const bf16 *a = pipeline.a_of(stage), *b = pipeline.b_of(stage);
#pragma unroll
            for (u32 k = 0; k < Stage::DEPTH; k += 16) {
                Fragment x[4], y[2];
#pragma unroll
                for (int i = 0; i < 4; i++) x[i] = fragment_a<!a_transposed>(a, m + 16 * i, k);
#pragma unroll
                for (int j = 0; j < 2; j++) y[j] = fragment_b<b_transposed>(b, n + 16 * j, k);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) mma_m16n8k16(sum[i][j], x[i], y[j / 2].r[j % 2 * 2], y[j / 2].r[j % 2 * 2 + 1]);
            }
            stage = stage + 1 == Stage::COUNT ? 0 : stage + 1;
        }
        cp_async_wait_group<0>();
    }

    static DEVICE u32 row(int i) { return threadIdx.x / 32 % 2 * 64 + threadIdx.x % 32 / 4 + i / 8 * 16 + i % 2 * 8; }
    static DEVICE u32 col(int i) { return threadIdx.x / 64 * 32 + threadIdx.x % 4 * 2 + i / 2 % 4 * 8; }
    DEVICE Pack<2> pack(int i) const {
        const float* two = sum[i / 8][i / 2 % 4] + i % 2 * 2;
        return {{two[0], two[1]}};
    }
};
