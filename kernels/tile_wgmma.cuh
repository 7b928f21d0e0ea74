// A tile of a BF16 product on the tensor cores of sm_90a by wgmma (wgmma.cuh), with a pipeline of three stages
// (pipeline.cuh). Same interface as tile_simt.cuh.
//
// Operands are copied as they are stored, K-major or not; wgmma reads both layouts. Two warpgroups multiply 64 rows
// each. While one block waits for copies or reduces its sums, the multiprocessor's other block multiplies.

struct Stage {
    static const u32 DEPTH = 64, COUNT = 3;

    // Swizzle atoms (wgmma_layout.cuh), one below the other along the rows. Rows of 128 elements are split: all second
    // halves follow all first halves.
    template <bool k_major> static DEVICE u32 offset(u32 row, u32 chunk) {
        return k_major ? row * 64 + (chunk ^ (row % 8)) * 8
                       : chunk / 8 * (64 * DEPTH) + row * 64 + (chunk % 8 ^ (row % 8)) * 8;
    }
};

// M x N sums in the registers of THREADS threads. Needs 97 KiB of dynamic shared memory.
struct Tile {
    static const int M = TILE, N = TILE, THREADS = TILE_THREADS, WIDE = 2, PACKS = 32;
    Accumulators sums;

    // The sum over `count` pairs of operands, `operands(i)`, of op(a) · op(b): a is [M, depth], or stored as [depth, M]
    // if `a_transposed`; b is [depth, N], or stored as [N, depth] if `b_transposed`. Every thread of the block must
    // call it.
    template <class T, bool a_transposed, bool b_transposed, class F>
    DEVICE void multiply(u64 count, u64 depth, F operands) {
        DYNAMIC_SHARED(memory);
        const u32 HALF = 64 * Stage::DEPTH, K_STEP_A = a_transposed ? 16 * 64 : 16, K_STEP_B = b_transposed ? 16 : 16 * 64;
#pragma unroll
        for (int i = 0; i < 64; i++) sums[i] = 0.0f;

        Pipeline<Stage, !a_transposed, b_transposed> pipeline(align_to_atom(memory), count, depth);
        // In both layouts half of a stage of a is 64 of its rows, those of one warpgroup. The shuffle tells the
        // compiler that the value is the same in all lanes, as a descriptor must be.
        u32 warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
        const u64 a = matrix_descriptor(pipeline.a_of(0) + warpgroup * HALF, HALF * sizeof(bf16), SWIZZLE_ATOM);
        const u64 b = matrix_descriptor(pipeline.b_of(0), HALF * sizeof(bf16), SWIZZLE_ATOM);
        u32 steps = pipeline.count * pipeline.steps;
        for (u32 s = 0; s < Stage::COUNT - 1; s++) pipeline.load(s, operands);
        for (u32 step = 0, stage = 0; step < steps; step++) {
            cp_async_wait_group<Stage::COUNT - 2>();
            fence_async_proxy();  // before the barrier: each thread fences its own copies
            wgmma_wait_all(sums);  // then copies may overwrite the stage that these wgmma read
            __syncthreads();  // the copies of all threads are visible, and all have finished with the previous stage
            wgmma_fence(sums);
#pragma unroll
            for (u32 k = 0; k < Stage::DEPTH / 16; k++)
                wgmma<!a_transposed, b_transposed>(sums, advance_descriptor(a, pipeline.offset_of(stage) + k * K_STEP_A),
                                                   advance_descriptor(b, pipeline.offset_of(stage) + k * K_STEP_B));
            wgmma_commit_group();
            pipeline.load((stage + Stage::COUNT - 1) % Stage::COUNT, operands);
            stage = stage + 1 == Stage::COUNT ? 0 : stage + 1;
        }
        wgmma_wait_all(sums);
        cp_async_wait_group<0>();
    }

    static DEVICE u32 row(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8; }
    static DEVICE u32 col(int i) { return threadIdx.x % 4 * 2 + i / 2 * 8; }
    DEVICE Pack<2> pack(int i) const { return {{sums[i * 2], sums[i * 2 + 1]}}; }
};
