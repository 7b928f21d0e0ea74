// The pipeline that brings a tile's operands from global to shared memory: cp.async in chunks of 16 bytes, some steps
// ahead of the multiplication.
//
// A `Stage` describes the buffer of one step of both operands: COUNT buffers are used in turn, each with TILE x DEPTH
// elements of a and then COLUMNS x DEPTH of b. offset<k_major>(row, chunk) is where 8 consecutive elements go; offsets of
// rows that are a multiple of 16 apart differ by a constant. If an operand is `k_major`, its rows run along the depth and a
// step is [side][DEPTH]; else a step is [DEPTH][side].

#define TENSOR_CORES

const u32 TILE = 128, TILE_THREADS = 256;

// Stage::BLOCKS blocks per multiprocessor; of two, one computes while the other waits.
#define TILE_KERNEL(name, parameters) KERNEL_BLOCKS(TILE_THREADS, Stage::BLOCKS, name, parameters)

// Loads one operand step by step. Each thread copies a few chunks of a step, from rows ROWS_APART apart.
template <class Stage, bool k_major, u32 SIDE> struct OperandLoader {
    static const u32 CHUNKS = (k_major ? Stage::DEPTH : SIDE) / 8, ROWS_APART = TILE_THREADS / CHUNKS;
    static const u32 PER_THREAD = SIDE * Stage::DEPTH / 8 / TILE_THREADS;

    const bf16* from;
    u32 row_step, depth_step;  // elements; a row is shorter than 2^25
    u32 row, col, rows, cols, to;

    DEVICE void start(const MatrixView<bf16>& view) {
        u32 chunk = threadIdx.x % CHUNKS;
        row = threadIdx.x / CHUNKS;
        col = chunk * 8;
        rows = (u32)view.rows;
        cols = (u32)view.cols;
        from = view.at + row * view.stride + col;
        row_step = ROWS_APART * (u32)view.stride;
        depth_step = k_major ? Stage::DEPTH : Stage::DEPTH * (u32)view.stride;
        to = Stage::template offset<k_major>(row, chunk);
    }

    // Copies one step and advances along the depth.
    DEVICE void load(bf16* stage) {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++)
            cp_async_16(stage + to + Stage::template offset<k_major>(i * ROWS_APART, 0), from + i * row_step,
                        row + i * ROWS_APART < rows && col < cols);
        from += depth_step;
        (k_major ? col : row) += Stage::DEPTH;
    }
};

// Loads `count` pairs of operands, one after another, each in `steps` steps.
template <class Stage, bool k_major_a, bool k_major_b> struct Pipeline {
    static const u32 OPERAND = TILE * Stage::DEPTH, STAGE = (TILE + Stage::COLUMNS) * Stage::DEPTH;

    bf16* stages;
    u32 count, steps;
    OperandLoader<Stage, k_major_a, TILE> a;
    OperandLoader<Stage, k_major_b, Stage::COLUMNS> b;
    u32 next, left;  // the next pair; steps of the current one that are still to be copied

    DEVICE Pipeline(bf16* stages, u64 count, u64 depth)
        : stages(stages), count((u32)count), steps((u32)((depth + Stage::DEPTH - 1) / Stage::DEPTH)), next(0), left(0) {}

    // Elements from the first stage to this one.
    static DEVICE u32 offset_of(u32 stage) { return stage * STAGE; }
    DEVICE const bf16* a_of(u32 stage) const { return stages + offset_of(stage); }
    DEVICE const bf16* b_of(u32 stage) const { return stages + offset_of(stage) + OPERAND; }

    // Starts copying the next step into a stage. After the last step the group of copies is empty, so that groups keep
    // counting steps.
    template <class F> DEVICE void load(u32 stage, F operands) {
        if (left == 0 && next < count) {
            auto pair = operands(next++);
            a.start(pair.a);
            b.start(pair.b);
            left = steps;
        }
        if (left > 0) {
            a.load(stages + offset_of(stage));
            b.load(stages + offset_of(stage) + OPERAND);
            left--;
        }
        cp_async_commit_group();
    }
};
