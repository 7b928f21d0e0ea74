// Products of groups of rows with their groups' own weights, with the `Tile` of tile_simt.cuh or, for BF16, of
// tile_mma.cuh or tile_wgmma.cuh.
//
// Rows are sorted by group; `offsets` [groups + 1] stays on the GPU. A group has `stack` weights [outputs, inputs],
// whose outputs are side by side; `weights` [groups * stack] holds their addresses. Each output is one thread's sum in
// the order of the depth. R: rows of all groups together. Blocks have Tile::THREADS threads; M and N are the sides of a
// tile. Each weight is read once per band of 8 * M rows, and those reads meet in the L2 cache.

DEVICE u64 ceil_div(u64 n, u64 by) { return (n + by - 1) / by; }

// Stores W consecutive values at column `col` of a row whose tile is `width` wide.
template <int W, class T> DEVICE void store_pack(T* row, const Pack<W>& x, u64 col, u64 width) {
#ifdef TENSOR_CORES
    // Rows are aligned to 16 bytes, and no pair crosses their end.
    if (col < width) *reinterpret_cast<u32*>(row + col) = to_bf16x2(x.v[0], x.v[1]);
#else
#pragma unroll
    for (int i = 0; i < W; i++)
        if (col + i < width) row[col + i] = from_f32<T>(x.v[i]);
#endif
}

// y [R, stack * outputs] = x [R, inputs] · wᵀ. Grid: at least (R / M + groups) * stack * ceil(outputs / N) blocks.
template <class T>
DEVICE void linear(T* y, const T* x, const T* const* weights, const u32* offsets, u64 groups, u64 stack, u64 inputs,
                   u64 outputs) {
    u64 tiles = ceil_div(outputs, Tile::N);
    RowTile p = find_row_tile(offsets, groups, Tile::M, stack * tiles);
    if (p.rows == 0) return;
    u64 index = p.column / tiles, first = p.column % tiles * Tile::N, width = minimum(outputs - first, (u64)Tile::N);
    const T* w = weights[p.group * stack + index] + first * inputs;
    Tile tile;
    tile.multiply<T, false, true>(1, inputs, [&](u64) {
        return Operands<T>{{x + p.row * inputs, inputs, p.rows, inputs}, {w, inputs, width, inputs}};
    });
    T* to = y + p.row * stack * outputs + index * outputs + first;
    for_each_pack(tile, [&](u64 row, u64 col, const Pack<Tile::WIDE>& v) {
        if (row < p.rows) store_pack(to + row * stack * outputs, v, col, width);
    });
}

// dx [R, inputs] = dy [R, stack * outputs] · w, summed over the stack. Grid: at least (R / M + groups) * ceil(inputs /
// N) blocks.
template <class T>
DEVICE void backward_input(T* dx, const T* dy, const T* const* weights, const u32* offsets, u64 groups, u64 stack, u64 inputs,
                           u64 outputs) {
    RowTile p = find_row_tile(offsets, groups, Tile::M, ceil_div(inputs, Tile::N));
    if (p.rows == 0) return;
    u64 first = p.column * Tile::N, width = minimum(inputs - first, (u64)Tile::N);
    Tile tile;
    tile.multiply<T, false, false>(stack, outputs, [&](u64 index) {
        return Operands<T>{{dy + p.row * stack * outputs + index * outputs, stack * outputs, p.rows, outputs},
                           {weights[p.group * stack + index] + first, inputs, outputs, width}};
    });
    T* to = dx + p.row * inputs + first;
    for_each_pack(tile, [&](u64 row, u64 col, const Pack<Tile::WIDE>& v) {
        if (row < p.rows) store_pack(to + row * inputs, v, col, width);
    });
}

// to = a whole tile, with rows `stride` apart.
DEVICE void store_tile(float* to, const Tile& tile, u64 stride) {
    for_each_pack(tile, [&](u64 row, u64 col, const Pack<Tile::WIDE>& v) {
#pragma unroll
        for (int i = 0; i < Tile::WIDE; i++) to[row * stride + col + i] = v.v[i];
    });
}

// to += a whole tile, with rows `stride` apart. Several packs are loaded before any is stored, so that the loads
// overlap.
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

// dw += dyᵀ · x for some groups, or dw = dyᵀ · x with `overwrite`, 0 for a group without rows. `jobs` [n, 1 + stack]: a group, and
// the offset in dw of the gradient of each of its weights. Grid: n * stack * ceil(outputs / M) * ceil(inputs / N) blocks.
template <class T>
DEVICE void backward_weight(float* dw, const T* dy, const T* x, const u32* offsets, const u64* jobs, u64 stack, u64 inputs,
                            u64 outputs, bool overwrite) {
    u64 across = ceil_div(inputs, Tile::N), down = ceil_div(outputs, Tile::M);
    u64 matrix = blockIdx.x / (across * down), index = matrix % stack;
    const u64* job = jobs + matrix / stack * (1 + stack);
    u64 row = offsets[job[0]], rows = offsets[job[0] + 1] - row;
    if (rows == 0 && !overwrite) return;
    u64 m = blockIdx.x / across % down * Tile::M, n = blockIdx.x % across * Tile::N;
    u64 height = minimum(outputs - m, (u64)Tile::M), width = minimum(inputs - n, (u64)Tile::N);
    Tile tile;
    tile.multiply<T, true, false>(1, rows, [&](u64) {
        return Operands<T>{{dy + row * stack * outputs + index * outputs + m, stack * outputs, rows, height},
                           {x + row * inputs + n, inputs, rows, width}};
    });
    float* to = dw + job[1 + index] + m * inputs + n;
    if (height == Tile::M && width == Tile::N) {
        overwrite ? store_tile(to, tile, inputs) : add_tile(to, tile, inputs);
    } else {
        for_each_pack(tile, [&](u64 row, u64 col, const Pack<Tile::WIDE>& v) {
            if (row >= height) return;
            float* at = to + row * inputs + col;
#pragma unroll
            for (u32 i = 0; i < Tile::WIDE; i++)
                if (col + i < width) at[i] = overwrite ? v.v[i] : at[i] + v.v[i];
        });
    }
}

#define TYPED(T, name)                                                                                                   \
    TILE_KERNEL(grouped_linear_##name, (T * y, const T* x, const T* const* weights, const u32* offsets, u64 groups,      \
                                        u64 stack, u64 inputs, u64 outputs)) {                                           \
        linear(y, x, weights, offsets, groups, stack, inputs, outputs);                                                  \
    }                                                                                                                    \
    TILE_KERNEL(grouped_backward_input_##name, (T * dx, const T* dy, const T* const* weights, const u32* offsets,        \
                                                u64 groups, u64 stack, u64 inputs, u64 outputs)) {                       \
        backward_input(dx, dy, weights, offsets, groups, stack, inputs, outputs);                                        \
    }                                                                                                                    \
    TILE_KERNEL(grouped_backward_weight_##name, (float* dw, const T* dy, const T* x, const u32* offsets, const u64* jobs, \
                                                 u64 stack, u64 inputs, u64 outputs, int overwrite)) {                   \
        backward_weight(dw, dy, x, offsets, jobs, stack, inputs, outputs, overwrite != 0);                               \
    }

#ifndef TENSOR_CORES
TYPED(float, f32)
#endif
TYPED(bf16, bf16)
