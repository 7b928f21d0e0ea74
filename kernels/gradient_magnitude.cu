// Reduces the gradient of a weight to one number without storing the gradient: a tile of dyᵀ · x is summed in registers
// over the group's rows, reduced there, and stored as one partial sum. dy and x are read as they are stored; no
// transpose is made. With the `Tile` of tile_simt.cuh, tile_mma.cuh or tile_wgmma.cuh. Sums have a fixed order: f32
// within a thread, f64 across threads.

// Σ of(value, row, col) over this thread's values of a tile.
template <class F> DEVICE float sum_of(const Tile& tile, F of) {
    float total = 0.0f;
    for_each_pack(tile, [&](u64 row, u64 col, const Pack<Tile::WIDE>& v) {
#pragma unroll
        for (u32 i = 0; i < Tile::WIDE; i++) total += of(v.v[i], row, col + i);
    });
    return total;
}

// partial[block] = the contribution of one tile to the moment of the gradient of one weight [outputs, inputs]. Rows are
// sorted by group, with `offsets` [groups + 1]; dy [R, stack * outputs], x [R, inputs]; `weights` [groups * stack] are
// addresses. `jobs` [n, 3]: a group, its moment (0: Σ |g|, 1: Σ g², 2: Σ |g · w|), the index of its score. Grid: n *
// stack * ceil(outputs / M) * ceil(inputs / N) blocks of Tile::THREADS threads.
template <class T>
DEVICE void magnitude(double* partial, const T* dy, const T* x, const T* const* weights, const u32* offsets, const u64* jobs,
                      u64 stack, u64 inputs, u64 outputs) {
    u64 across = (inputs + Tile::N - 1) / Tile::N, down = (outputs + Tile::M - 1) / Tile::M;
    u64 matrix = blockIdx.x / (across * down), index = matrix % stack;
    const u64* job = jobs + matrix / stack * 3;
    u64 row = offsets[job[0]], rows = offsets[job[0] + 1] - row;
    float total = 0.0f;
    if (rows > 0) {
        u64 m = blockIdx.x / across % down * Tile::M, n = blockIdx.x % across * Tile::N;
        u64 height = minimum(outputs - m, (u64)Tile::M), width = minimum(inputs - n, (u64)Tile::N);
        Tile tile;
        // Elements outside height and width are zero (or NaN, if an operand is not finite there), and add nothing to
        // any moment.
        tile.multiply<T, true, false>(1, rows, [&](u64) {
            return Operands<T>{{dy + row * stack * outputs + index * outputs + m, stack * outputs, rows, height},
                               {x + row * inputs + n, inputs, rows, width}};
        });
        const T* w = weights[job[0] * stack + index] + m * inputs + n;
        // One loop per moment instead of a branch inside the loop.
        if (job[1] == 0)
            total = sum_of(tile, [](float g, u64, u64) { return fabsf(g); });
        else if (job[1] == 1)
            total = sum_of(tile, [](float g, u64, u64) { return g * g; });
        else if (height == Tile::M && width == Tile::N)  // without conditions, so that the loads overlap
            total = sum_of(tile, [&](float g, u64 row, u64 col) { return fabsf(g * to_f32(w[row * inputs + col])); });
        else
            total = sum_of(tile, [&](float g, u64 row, u64 col) {
                return row < height && col < width ? fabsf(g * to_f32(w[row * inputs + col])) : 0.0f;
            });
    }
    double sum = block_sum((double)total);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

#define TYPED(T, name)                                                                                                \
    TILE_KERNEL(gradient_magnitude_##name, (double* partial, const T* dy, const T* x, const T* const* weights,        \
                                            const u32* offsets, const u64* jobs, u64 stack, u64 inputs, u64 outputs)) { \
        magnitude(partial, dy, x, weights, offsets, jobs, stack, inputs, outputs);                                    \
    }

#ifndef TENSOR_CORES
TYPED(float, f32)

// The same for part of a gradient in memory: partial[block] = the moment over elements block * 4096 .. (block + 1) *
// 4096 of n. Grid: ceil(n / 4096) blocks of 256 threads.
template <class T> DEVICE void magnitude_of(double* partial, const float* gradient, const T* w, u64 n, u64 moment) {
    float total = 0.0f;
    u64 end = minimum(n, ((u64)blockIdx.x + 1) * 4096);
    for (u64 i = (u64)blockIdx.x * 4096 + threadIdx.x; i < end; i += 256) {
        float g = gradient[i];
        if (moment == 1) g *= g;
        if (moment == 2) g *= to_f32(w[i]);
        total += fabsf(g);
    }
    double sum = block_sum((double)total);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
KERNEL(256, magnitude_of_f32, (double* partial, const float* gradient, const float* w, u64 n, u64 moment)) {
    magnitude_of(partial, gradient, w, n, moment);
}
KERNEL(256, magnitude_of_bf16, (double* partial, const float* gradient, const bf16* w, u64 n, u64 moment)) {
    magnitude_of(partial, gradient, w, n, moment);
}

// scores[index of job i] += the sum of its n partial sums. Grid: one block of 256 threads per job.
KERNEL(256, add_magnitudes, (double* scores, const double* partial, const u64* jobs, u64 n)) {
    double sum = 0.0;
    for (u64 i = threadIdx.x; i < n; i += 256) sum += partial[blockIdx.x * n + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) scores[jobs[blockIdx.x * 3 + 2]] += sum;
}
#endif
TYPED(bf16, bf16)
