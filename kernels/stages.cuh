// The way of a tile's operands from global to shared memory: by cp.async, 16 bytes a piece, some steps ahead of the products.
//
// A `Stage` is where one step of both operands lies: COUNT stages take turns, each holds TILE x DEPTH elements of a, then as
// many of b. place<along>(row, piece) is where 8 neighbours go; places of rows that are a multiple of 16 apart differ by a
// constant. `along`: the depth runs along the rows, and a step is [TILE][DEPTH]; else it is [DEPTH][TILE].

#ifdef __CUDA_ARCH__
// Two blocks must fit a multiprocessor's registers: one computes while the other waits.
#undef KERNEL
#define KERNEL(threads, name, parameters) extern "C" __global__ void __launch_bounds__(threads, 2) name parameters
#endif

const u32 TILE = 128, TILE_THREADS = 256;

// One operand's way. Each thread copies a few pieces of a step, below each other.
template <class Stage, bool along> struct Feed {
    static const u32 PIECES = (along ? Stage::DEPTH : TILE) / 8, APART = TILE_THREADS / PIECES;
    static const u32 EACH = TILE * Stage::DEPTH / 8 / TILE_THREADS;

    const bf16* from;
    u32 below, step;  // elements; a row is shorter than 2^25
    u32 row, col, rows, cols, to;

    DEVICE void start(const Part<bf16>& part) {
        u32 piece = threadIdx.x % PIECES;
        row = threadIdx.x / PIECES;
        col = piece * 8;
        rows = (u32)part.rows;
        cols = (u32)part.cols;
        from = part.at + row * part.stride + col;
        below = APART * (u32)part.stride;
        step = along ? Stage::DEPTH : Stage::DEPTH * (u32)part.stride;
        to = Stage::template place<along>(row, piece);
    }

    // Copies one step and moves on.
    DEVICE void copy(bf16* stage) {
#pragma unroll
        for (u32 i = 0; i < EACH; i++)
            copy_16(stage + to + Stage::template place<along>(i * APART, 0), from + i * below,
                    row + i * APART < rows && col < cols);
        from += step;
        (along ? col : row) += Stage::DEPTH;
    }
};

// The way of `count` pairs of parts, one after another, each in `steps` steps.
template <class Stage, bool a_along, bool b_along> struct Feeds {
    static const u32 OPERAND = TILE * Stage::DEPTH, STEP = 2 * OPERAND;

    bf16* stages;
    u32 count, steps;
    Feed<Stage, a_along> a;
    Feed<Stage, b_along> b;
    u32 part, left;  // the next part; steps of the one before that are not yet copied

    DEVICE Feeds(bf16* stages, u64 count, u64 depth)
        : stages(stages), count((u32)count), steps((u32)((depth + Stage::DEPTH - 1) / Stage::DEPTH)), part(0), left(0) {}

    // Elements from the first stage to this one.
    static DEVICE u32 place_of(u32 stage) { return stage * STEP; }
    DEVICE const bf16* step_of_a(u32 stage) const { return stages + place_of(stage); }
    DEVICE const bf16* step_of_b(u32 stage) const { return stages + place_of(stage) + OPERAND; }

    // Copies the next step into a stage. Where none is left the group of copies is empty, so that groups count steps.
    template <class F> DEVICE void copy(u32 stage, F parts) {
        if (left == 0 && part < count) {
            auto next = parts(part++);
            a.start(next.a);
            b.start(next.b);
            left = steps;
        }
        if (left > 0) {
            a.copy(stages + place_of(stage));
            b.copy(stages + place_of(stage) + OPERAND);
            left--;
        }
        copies_end();
    }
};
