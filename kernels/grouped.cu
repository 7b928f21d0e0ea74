// Products of groups of rows with their groups' own weights, over `Tile` of tile_simt.cuh or, for BF16, of tile_mma.cuh or
// tile_wgmma.cuh.
//
// Rows are sorted by group; `offsets` [groups + 1] stays on the GPU. A group has `stack` weights [outputs, inputs] whose outputs lie
// side by side: `weights` [groups * stack] are their addresses. Each output is one thread's sum in the order of the depth.
// Blocks of Tile::THREADS threads; grids below. R: all rows. Beyond what a product must do, weights are read once for each
// band of 8 * Tile::M rows, and these meet in the L2 cache.

DEVICE u64 tiles_of(u64 n, u64 tile) { return (n + tile - 1) / tile; }

// W neighbours at column `col` of a row's tile that is `width` wide.
template <int W, class T> DEVICE void put(T* row, const Pack<W>& x, u64 col, u64 width) {
#ifdef TENSOR_CORES
    // Rows are aligned to 16 bytes, and no pair lies across their end.
    if (col < width) *reinterpret_cast<u32*>(row + col) = rounded_pair(x.v[0], x.v[1]);
#else
#pragma unroll
    for (int i = 0; i < W; i++)
        if (col + i < width) row[col + i] = from_f32<T>(x.v[i]);
#endif
}

// y [R, stack * outputs] = x [R, inputs] · wᵀ. Grid: (R / M + groups) * stack * ceil(outputs / N) blocks, or more.
template <class T>
DEVICE void linear(T* y, const T* x, const T* const* weights, const u32* offsets, u64 groups, u64 stack, u64 inputs, u64 outputs) {
    u64 tiles = tiles_of(outputs, Tile::N);
    Place p = find_place(offsets, groups, Tile::M, stack * tiles);
    if (p.rows == 0) return;
    u64 index = p.column / tiles, first = p.column % tiles * Tile::N, width = least(outputs - first, (u64)Tile::N);
    const T* w = weights[p.group * stack + index] + first * inputs;
    Tile tile;
    tile.multiply<T, false, true>(
        1, inputs, [&](u64) { return Parts<T>{{x + p.row * inputs, inputs, p.rows, inputs}, {w, inputs, width, inputs}}; });
    T* to = y + p.row * stack * outputs + index * outputs + first;
    each(tile, [&](u64 row, u64 col, const Pack<Tile::WIDE>& v) {
        if (row < p.rows) put(to + row * stack * outputs, v, col, width);
    });
}

// dx [R, inputs] = dy [R, stack * outputs] · w, summed over the stack. Grid: (R / M + groups) * ceil(inputs / N) blocks, or more.
template <class T>
DEVICE void backward_input(T* dx, const T* dy, const T* const* weights, const u32* offsets, u64 groups, u64 stack, u64 inputs,
                           u64 outputs) {
    Place p = find_place(offsets, groups, Tile::M, tiles_of(inputs, Tile::N));
    if (p.rows == 0) return;
    u64 first = p.column * Tile::N, width = least(inputs - first, (u64)Tile::N);
    Tile tile;
    tile.multiply<T, false, false>(stack, outputs, [&](u64 index) {
        return Parts<T>{{dy + p.row * stack * outputs + index * outputs, stack * outputs, p.rows, outputs},
                        {weights[p.group * stack + index] + first, inputs, outputs, width}};
    });
    T* to = dx + p.row * inputs + first;
    each(tile, [&](u64 row, u64 col, const Pack<Tile::WIDE>& v) {
        if (row < p.rows) put(to + row * inputs, v, col, width);
    });
}

// to += a whole tile, in rows `stride` apart. Several are read before any is written, so that they come together.
DEVICE void add_tile(float* to, const Tile& tile, u64 stride) {
    const int AT_ONCE = Tile::PACKS < 8 ? Tile::PACKS : 8;
#pragma unroll
    for (int first = 0; first < Tile::PACKS; first += AT_ONCE) {
        float sum[AT_ONCE][Tile::WIDE];
#pragma unroll
        for (int p = 0; p < AT_ONCE; p++)
#pragma unroll
            for (int i = 0; i < Tile::WIDE; i++)
                sum[p][i] = to[tile.row(first + p) * stride + tile.col(first + p) + i] + tile.pack(first + p).v[i];
#pragma unroll
        for (int p = 0; p < AT_ONCE; p++)
#pragma unroll
            for (int i = 0; i < Tile::WIDE; i++)
                to[tile.row(first + p) * stride + tile.col(first + p) + i] = sum[p][i];
    }
}

// dw += dyᵀ · x for some groups. `jobs` [n, 1 + stack]: a group and where the gradient of each of its weights begins in dw.
// Grid: n * stack * ceil(outputs / M) * ceil(inputs / N) blocks.
template <class T>
DEVICE void backward_weight(float* dw, const T* dy, const T* x, const u32* offsets, const u64* jobs, u64 stack, u64 inputs,
                            u64 outputs) {
    u64 across = tiles_of(inputs, Tile::N), down = tiles_of(outputs, Tile::M);
    u64 matrix = blockIdx.x / (across * down), index = matrix % stack;
    const u64* job = jobs + matrix / stack * (1 + stack);
    u64 row = offsets[job[0]], rows = offsets[job[0] + 1] - row;
    if (rows == 0) return;
    u64 m = blockIdx.x / across % down * Tile::M, n = blockIdx.x % across * Tile::N;
    u64 height = least(outputs - m, (u64)Tile::M), width = least(inputs - n, (u64)Tile::N);
    Tile tile;
    tile.multiply<T, true, false>(1, rows, [&](u64) {
        return Parts<T>{{dy + row * stack * outputs + index * outputs + m, stack * outputs, rows, height},
                        {x + row * inputs + n, inputs, rows, width}};
    });
    float* to = dw + job[1 + index] + m * inputs + n;
    if (height == Tile::M && width == Tile::N) {
        add_tile(to, tile, inputs);
    } else {
        each(tile, [&](u64 row, u64 col, const Pack<Tile::WIDE>& v) {
            if (row >= height) return;
#pragma unroll
            for (u32 i = 0; i < Tile::WIDE; i++)
                if (col + i < width) to[row * inputs + col + i] += v.v[i];
        });
    }
}

#define TYPED(T, name)                                                                                              \
    KERNEL(Tile::THREADS, grouped_linear_##name,                                                                    \
           (T * y, const T* x, const T* const* weights, const u32* offsets, u64 groups, u64 stack, u64 inputs, u64 outputs)) { \
        linear(y, x, weights, offsets, groups, stack, inputs, outputs);                                                     \
    }                                                                                                               \
    KERNEL(Tile::THREADS, grouped_backward_input_##name,                                                            \
           (T * dx, const T* dy, const T* const* weights, const u32* offsets, u64 groups, u64 stack, u64 inputs, u64 outputs)) { \
        backward_input(dx, dy, weights, offsets, groups, stack, inputs, outputs);                                           \
    }                                                                                                               \
    KERNEL(Tile::THREADS, grouped_backward_weight_##name,                                                           \
           (float* dw, const T* dy, const T* x, const u32* offsets, const u64* jobs, u64 stack, u64 inputs, u64 outputs)) { \
        backward_weight(dw, dy, x, offsets, jobs, stack, inputs, outputs);                                                  \
    }

#ifndef TENSOR_CORES
TYPED(float, f32)
#endif
TYPED(bf16, bf16)
