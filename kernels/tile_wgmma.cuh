// A tile of a BF16 product on the tensor cores of sm_90a by wgmma (wgmma.cuh), with a pipeline of several stages
// (pipeline.cuh). Same interface as tile_simt.cuh.
//
// Operands are copied as they are stored, K-major or not; wgmma reads both layouts. Two warpgroups multiply 64 rows
// each. Of 128 columns two blocks fit a multiprocessor: while one waits for copies or reduces its sums, the other
// multiplies. Of 256 only one fits, but a tile has a third more FLOP for each byte loaded, and the wgmma of one step go on
// while the block waits for the copies of the next: a fourth stage, which is neither read nor written then, makes room.

struct Stage {
    static const bool WIDE = TILE_COLUMNS == 256;
    static const u32 DEPTH = 64, COUNT = WIDE ? 4 : 3, COLUMNS = TILE_COLUMNS, BLOCKS = WIDE ? 1 : 2;
    // Steps that are copied ahead, and groups of wgmma in flight beyond the barrier.
    static const u32 AHEAD = 2, IN_FLIGHT = COUNT - 1 - AHEAD;

    // Swizzle atoms (wgmma_layout.cuh), one below the other along the rows. Rows of more than 64 elements are split: the second
    // 64 elements of all rows follow all first ones, and so on.
    template <bool k_major> static DEVICE u32 offset(u32 row, u32 chunk) {
        return k_major ? row * 64 + (chunk ^ (row % 8)) * 8
                       : chunk / 8 * (64 * DEPTH) + row * 64 + (chunk % 8 ^ (row % 8)) * 8;
    }
};

// M x N sums in the registers of THREADS threads. Needs 97 KiB of dynamic shared memory, 193 KiB if wide.
struct Tile {
    static const int M = TILE, N = Stage::COLUMNS, THREADS = TILE_THREADS, WIDE = 2, PACKS = N / 4;
    Accumulators sums;

    // The sum over `count` pairs of operands, `operands(i)`, of op(a) · op(b): a is [M, depth], or stored as [depth, M]
    // if `a_transposed`; b is [depth, N], or stored as [N, depth] if `b_transposed`. Every thread of the block must
    // call it.
    template <class T, bool a_transposed, bool b_transposed, class F>
    DEVICE void multiply(u64 count, u64 depth, F operands) {
        DYNAMIC_SHARED(memory);
        const u32 HALF = 64 * Stage::DEPTH, K_STEP_A = a_transposed ? 16 * 64 : 16, K_STEP_B = b_transposed ? 16 : 16 * 64;
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[i] = 0.0f;

        Pipeline<Stage, !a_transposed, b_transposed> pipeline(align_to_atom(memory), count, depth);
        // In both layouts half of a stage of a is 64 of its rows, those of one warpgroup. The shuffle tells the
        // compiler that the value is the same in all lanes, as a descriptor must be.
        u32 warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
        const u64 a = matrix_descriptor(pipeline.a_of(0) + warpgroup * HALF, HALF * sizeof(bf16), SWIZZLE_ATOM);
        const u64 b = matrix_descriptor(pipeline.b_of(0), HALF * sizeof(bf16), SWIZZLE_ATOM);
        u32 steps = pipeline.count * pipeline.steps;
        for (u32 s = 0; s < Stage::AHEAD; s++) pipeline.load(s, operands);
        for (u32 step = 0, stage = 0; step < steps; step++) {
            cp_async_wait_group<Stage::AHEAD - 1>();
            fence_async_proxy();  // before the barrier: each thread fences its own copies
            if (Stage::IN_FLIGHT == 0) wgmma_wait_group<0>(sums);
            // The copies of all threads are visible, and no wgmma reads the stage that is copied to next.
            __syncthreads();
            wgmma_fence(sums);
#pragma unroll
            for (u32 k = 0; k < Stage::DEPTH / 16; k++)
                wgmma<!a_transposed, b_transposed>(sums, advance_descriptor(a, pipeline.offset_of(stage) + k * K_STEP_A),
                                                   advance_descriptor(b, pipeline.offset_of(stage) + k * K_STEP_B));
            wgmma_commit_group();
            pipeline.load((stage + Stage::AHEAD) % Stage::COUNT, operands);
            if (Stage::IN_FLIGHT > 0) wgmma_wait_group<Stage::IN_FLIGHT>(sums);
            stage = stage + 1 == Stage::COUNT ? 0 : stage + 1;
        }
        wgmma_wait_group<0>(sums);
        cp_async_wait_group<0>();
    }

    static DEVICE u32 row(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8; }
    static DEVICE u32 col(int i) { return threadIdx.x % 4 * 2 + i / 2 * 8; }
    DEVICE Pack<2> pack(int i) const { return {{sums[i * 2], sums[i * 2 + 1]}}; }
};
