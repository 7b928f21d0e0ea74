// A tile of a product of BF16 on the tensor cores of sm_90a: wgmma (wgmma.cuh), fed through three stages of shared memory
// (stages.cuh). Same interface as tile_simt.cuh.
//
// Operands are read as they are stored, whichever way the depth runs; the products take them in either way. Two warpgroups
// multiply 64 rows each; while one block waits for copies or reduces its sums, the multiprocessor's other block multiplies.

struct Stage {
    static const u32 DEPTH = 64, COUNT = 3;

    // In atoms as wgmma.cuh has them, one below the other along the rows; where the rows are of 128 numbers, their second
    // halves follow all first ones.
    template <bool along> static DEVICE u32 place(u32 row, u32 piece) {
        return along ? row * 64 + (piece ^ (row % 8)) * 8
                     : piece / 8 * (64 * DEPTH) + row * 64 + (piece % 8 ^ (row % 8)) * 8;
    }
};

// M x N sums in the registers of THREADS threads. Needs 97 KiB of dynamic shared memory.
struct Tile {
    static const int M = TILE, N = TILE, THREADS = TILE_THREADS, WIDE = 2, PACKS = 32;
    Sums sums;

    // The sum over `count` pairs of parts, `parts(i)`, of op(a) · op(b): a is [M, depth], or stored as [depth, M] if
    // `a_transposed`; b is [depth, N], or stored as [N, depth]. Every thread of the block must come here.
    template <class T, bool a_transposed, bool b_transposed, class F>
    DEVICE void multiply(u64 count, u64 depth, F parts) {
        DYNAMIC_SHARED(memory);
        const u32 HALF = 64 * Stage::DEPTH, DEEPER_A = a_transposed ? 16 * 64 : 16, DEEPER_B = b_transposed ? 16 : 16 * 64;
#pragma unroll
        for (int i = 0; i < 64; i++) sums[i] = 0.0f;

        Feeds<Stage, !a_transposed, b_transposed> feeds(whole_atoms(memory), count, depth);
        // Either way half a step of a is 64 rows of it, those of one warpgroup. By the shuffle the compiler knows that this is the
        // same in all lanes, as what describes a factor has to be.
        u32 warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
        const u64 a = factor(feeds.step_of_a(0) + warpgroup * HALF, HALF * sizeof(bf16), ATOM);
        const u64 b = factor(feeds.step_of_b(0), HALF * sizeof(bf16), ATOM);
        u32 steps = feeds.count * feeds.steps;
        for (u32 s = 0; s < Stage::COUNT - 1; s++) feeds.copy(s, parts);
        for (u32 step = 0, stage = 0; step < steps; step++) {
            copies_wait<Stage::COUNT - 2>();
            copies_show();  // each thread its own, hence before the barrier
            products_wait(sums);  // which also lets copies overwrite what they have read
            __syncthreads();  // this stage has arrived for all, and all are done with the one before
            products_begin(sums);
#pragma unroll
            for (u32 k = 0; k < Stage::DEPTH / 16; k++)
                product<!a_transposed, b_transposed>(sums, further(a, feeds.place_of(stage) + k * DEEPER_A),
                                                     further(b, feeds.place_of(stage) + k * DEEPER_B));
            products_end();
            feeds.copy((stage + Stage::COUNT - 1) % Stage::COUNT, parts);
            stage = stage + 1 == Stage::COUNT ? 0 : stage + 1;
        }
        products_wait(sums);
        copies_wait<0>();
    }

    static DEVICE u32 row(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8; }
    static DEVICE u32 col(int i) { return threadIdx.x % 4 * 2 + i / 2 * 8; }
    DEVICE Pack<2> pack(int i) const { return {{sums[i * 2], sums[i * 2 + 1]}}; }
};
