// A tile of a product of BF16 on tensor cores: mma.sync.m16n8k16 (sm_80 and later), fed by cp.async through three stages
// of shared memory and ldmatrix, see mma.cuh. Same interface as tile_simt.cuh.
//
// Operands are read as they are stored, whichever way the depth runs; ldmatrix transposes on the way into registers.
// 16-byte pieces of a row are permuted in shared memory such that neither cp.async nor ldmatrix meets a bank twice.

#ifdef __CUDA_ARCH__
// Two blocks must fit a multiprocessor's registers: one computes while the other waits.
#undef KERNEL
#define KERNEL(threads, name, parameters) extern "C" __global__ void __launch_bounds__(threads, 2) name parameters
#endif

// Part of a row-major matrix as it is stored; what lies beyond `rows` and `cols` counts as zero. Rows start aligned to 16
// bytes, and where they end is a multiple of 8.
template <class T> struct Part {
    const T* at;
    u64 stride, rows, cols;
};

template <class T> struct Parts {
    Part<T> a, b;
};

const int TILE = 128, TILE_DEPTH = 32, STAGES = 3;
// Elements of one operand in one stage.
const int STAGE = TILE * TILE_DEPTH;

// One operand's way from global to shared memory: 128 x 32 elements a step, two pieces of 16 bytes a thread.
// `along`: the depth runs along the rows, and the stage holds [128][32]; else it holds [32][128].
template <bool along> struct Feed {
    const bf16* from;
    u32 second, step, at;  // elements; a row is shorter than 2^26
    bool valid[2];
    u32 to[2];

    static DEVICE u32 place(u32 row, u32 piece) {
        return along ? row * 32 + (piece ^ (row / 2 % 4)) * 8 : row * 128 + (piece ^ (row % 8)) * 8;
    }

    DEVICE void start(const Part<bf16>& part) {
        const u32 pieces = along ? 4 : 16, apart = 256 / pieces;
        u32 row = threadIdx.x / pieces, piece = threadIdx.x % pieces;
        from = part.at + row * part.stride + piece * 8;
        second = apart * (u32)part.stride;
        step = along ? TILE_DEPTH : TILE_DEPTH * (u32)part.stride;
        at = along ? piece * 8 : row;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            valid[i] = along ? row + i * apart < part.rows : piece * 8 < part.cols;
            to[i] = place(row + i * apart, piece);
        }
    }

    // Copies one step and moves on.
    DEVICE void copy(bf16* stage, u32 depth) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            copy_16(stage + to[i], from + i * second, valid[i] && at + (along ? 0 : i * 16) < depth);
        from += step;
        at += TILE_DEPTH;
    }
};

// M x N sums in the registers of THREADS threads: 8 warps, 2 down and 4 along, each with 64 x 32 of them.
// Needs STAGES * 2 * STAGE * sizeof(bf16) = 48 KiB of dynamic shared memory.
struct Tile {
    static const int M = TILE, N = TILE, THREADS = 256, WIDE = 2;
    float sum[4][4][4];

    // 16 x 16 of a from row m and depth k of a stage.
    template <bool along> static DEVICE Fragment fragment_a(const bf16* stage, u32 m, u32 k) {
        u32 lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
        u32 down = m + r + matrix % 2 * 8, deep = k + r + matrix / 2 * 8;
        return along ? load_matrices<false>(stage + Feed<true>::place(down, k / 8 + matrix / 2))
                     : load_matrices<true>(stage + Feed<false>::place(deep, m / 8 + matrix % 2));
    }

    // 16 x 16 of b from depth k and column n: r[0] and r[1] for the first 8 columns, r[2] and r[3] for the others.
    template <bool along> static DEVICE Fragment fragment_b(const bf16* stage, u32 n, u32 k) {
        u32 lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
        u32 right = n + r + matrix / 2 * 8, deep = k + r + matrix % 2 * 8;
        return along ? load_matrices<false>(stage + Feed<true>::place(right, k / 8 + matrix % 2))
                     : load_matrices<true>(stage + Feed<false>::place(deep, n / 8 + matrix / 2));
    }

    // The sum over `count` pairs of parts, `parts(i)`, of op(a) · op(b): a is [M, depth], or stored as [depth, M] if
    // `a_transposed`; b is [depth, N], or stored as [N, depth]. Every thread of the block must come here.
    template <class T, bool a_transposed, bool b_transposed, class F>
    DEVICE void multiply(u64 count, u64 depth, F parts) {
        DYNAMIC_SHARED(memory);
        bf16* stages = reinterpret_cast<bf16*>(memory);
        u32 warp = threadIdx.x / 32, m = warp % 2 * 64, n = warp / 2 * 32;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[i][j][c] = 0.0f;

        Feed<!a_transposed> a;
        Feed<b_transposed> b;
        u32 steps_of_part = (u32)((depth + TILE_DEPTH - 1) / TILE_DEPTH), steps = (u32)count * steps_of_part;
        u32 part = 0, left = 0;  // steps of this part that are not yet fed
        auto feed = [&](u32 stage) {
            if (left == 0 && part < count) {
                Parts<T> next = parts(part++);
                a.start(next.a);
                b.start(next.b);
                left = steps_of_part;
            }
            if (left > 0) {
                a.copy(stages + stage * 2 * STAGE, (u32)depth);
                b.copy(stages + stage * 2 * STAGE + STAGE, (u32)depth);
                left--;
            }
            copies_end();  // an empty group at the end, so that the count of groups stays that of steps
        };
        for (u32 s = 0; s < STAGES - 1; s++) feed(s);
        for (u32 step = 0, stage = 0; step < steps; step++) {
            copies_wait<STAGES - 2>();
            __syncthreads();  // this stage has arrived for all, and all are done with the one before
            feed((stage + STAGES - 1) % STAGES);
            const bf16 *from_a = stages + stage * 2 * STAGE, *from_b = from_a + STAGE;
#pragma unroll
            for (u32 k = 0; k < TILE_DEPTH; k += 16) {
                Fragment x[4], y[2];
#pragma unroll
                for (int i = 0; i < 4; i++) x[i] = fragment_a<!a_transposed>(from_a, m + 16 * i, k);
#pragma unroll
                for (int j = 0; j < 2; j++) y[j] = fragment_b<b_transposed>(from_b, n + 16 * j, k);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) multiply_add(sum[i][j], x[i], y[j / 2].r[j % 2 * 2], y[j / 2].r[j % 2 * 2 + 1]);
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        copies_wait<0>();
    }

    // f(row, col, WIDE neighbouring sums) for all sums of this thread.
    template <class F> DEVICE void each(F f) const {
        u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        u64 row = warp % 2 * 64 + lane / 4, col = warp / 2 * 32 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    Pack<2> x = {{sum[i][j][half * 2], sum[i][j][half * 2 + 1]}};
                    f(row + i * 16 + half * 8, col + j * 8, x);
                }
    }
};
