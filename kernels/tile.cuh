// What all tiles share: the operands, as they are stored, and the way through the sums.
//
// A `Tile` (tile_simt.cuh, tile_mma.cuh, tile_wgmma.cuh) is M x N sums of a product in the registers of THREADS threads. Each
// thread has PACKS times WIDE neighbouring sums: pack(i), in row(i) of the tile from column col(i) on.

// Part of a row-major matrix as it is stored; what lies beyond `rows` and `cols` counts as zero. On tensor cores rows start
// aligned to 16 bytes, and where they end is a multiple of 8.
template <class T> struct Part {
    const T* at;
    u64 stride, rows, cols;
};

template <class T> struct Parts {
    Part<T> a, b;
};

// f(row, col, WIDE neighbouring sums) for all sums of this thread.
template <class Tile, class F> DEVICE void each(const Tile& tile, F f) {
#pragma unroll
    for (int i = 0; i < Tile::PACKS; i++) f(tile.row(i), tile.col(i), tile.pack(i));
}
