// Blocks over ragged groups of rows: consecutive rows of one matrix form a group (the rows of an expert, the tokens of
// a sequence), and only the GPU knows the offsets. The host launches enough blocks for any distribution; each block
// finds its tile from the offsets.

// Rows `row .. row + rows` of the whole matrix, all in `group`, and a column tile. With `rows` 0 the block has no work.
struct RowTile {
    u64 group, row, rows, column;
};

// Row tiles in a band. Blocks that run at the same time share its rows and columns in the cache.
const u64 BAND = 8;

// The tile of block `blockIdx.x` if each group has ceil(rows / height) row tiles of `columns` column tiles each. Tiles
// are numbered down the rows of a band first, then across its columns. Every thread of the block must call it; all get
// the same result.
DEVICE RowTile find_row_tile(const u32* offsets, u64 groups, u32 height, u64 columns) {
    u64 id = blockIdx.x, lane = threadIdx.x % 32;
    for (u64 first = 0; first < groups; first += 32) {
        u64 group = first + lane;
        u32 start = group < groups ? offsets[group] : 0;
        u32 rows = group < groups ? offsets[group + 1] - start : 0;
        u64 tiles = (u64)((rows + height - 1) / height) * columns, end = tiles;
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            u64 before = __shfl_up_sync(FULL_WARP, end, step);
            if (lane >= step) end += before;
        }
        u32 reached = __ballot_sync(FULL_WARP, end > id);
        if (reached == 0) {
            id -= __shfl_sync(FULL_WARP, end, 31);
            continue;
        }
        int mine = __ffs((int)reached) - 1;
        id -= __shfl_sync(FULL_WARP, end - tiles, mine);
        start = __shfl_sync(FULL_WARP, start, mine);
        rows = __shfl_sync(FULL_WARP, rows, mine);
        u64 band = id / (BAND * columns), in_band = id % (BAND * columns);
        u64 height_of_band = minimum(BAND, (u64)((rows + height - 1) / height) - band * BAND);
        u64 at = (band * BAND + in_band % height_of_band) * height;
        return {first + (u64)mine, start + at, minimum((u64)height, rows - at), in_band / height_of_band};
    }
    return {0, 0, 0, 0};
}
