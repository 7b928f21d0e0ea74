// What all tiles have in common: the view of an operand in memory, and the iteration over the results.
//
// A `Tile` (tile_simt.cuh, tile_mma.cuh, tile_wgmma.cuh) is an M x N tile of a product in the registers of THREADS
// threads. Each thread holds PACKS packs of WIDE consecutive results: pack(i) is in row(i) of the tile and starts at
// column col(i). TILE_KERNEL declares a kernel that uses the tile.

// A row-major matrix, or part of one. Elements outside `rows` and `cols` count as zero. On tensor cores rows start
// aligned to 16 bytes, and `cols` is a multiple of 8.
template <class T> struct MatrixView {
    const T* at;
    u64 stride, rows, cols;
};

template <class T> struct Operands {
    MatrixView<T> a, b;
};

// Calls f(row, col, WIDE consecutive results) for all packs of this thread.
template <class Tile, class F> DEVICE void for_each_pack(const Tile& tile, F f) {
#pragma unroll
    for (int i = 0; i < Tile::PACKS; i++) f(tile.row(i), tile.col(i), tile.pack(i));
}
