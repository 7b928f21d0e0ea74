// How wgmma reads its operands from shared memory, and how it distributes the accumulators.
//
// An operand consists of swizzle atoms of 1 KiB: 8 lines of 128 bytes; line i has its 16-byte chunk p at position p ^
// i, and atoms are aligned to their size. A line is 64 elements along the depth of one row ("K-major"), or 64 rows'
// elements at one depth ("MN-major"). See the PTX manual, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"
// and "Matrix Descriptor".

// Columns of a tile: 256 after wide_tile.cuh.
#ifndef TILE_COLUMNS
#define TILE_COLUMNS 128
#endif

// The accumulators of m64n128k16 or m64n256k16 over 128 threads: c[4 j + 2 h + i] is row 16 (warp % 4) + lane / 4 + 8 h,
// column 8 j + 2 (lane % 4) + i.
typedef float Accumulators[TILE_COLUMNS / 2];

const u32 SWIZZLE_ATOM = 1024;

// The descriptor of an operand that starts at `at`. `stride`: bytes from 8 lines to the next 8 (rows if K-major, depths
// if MN-major). `leading`: bytes from 64 rows to the next 64 if MN-major.
DEVICE u64 matrix_descriptor(const bf16* at, u32 leading, u32 stride) {
    const u64 swizzle_128_bytes = 1;
    return (u64)(shared_address(at) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | swizzle_128_bytes << 62;
}

// The descriptor of the operand that starts `elements` further on.
DEVICE u64 advance_descriptor(u64 descriptor, u32 elements) { return descriptor + elements * sizeof(bf16) / 16; }

// The first aligned atom in dynamic shared memory, which must have SWIZZLE_ATOM bytes to spare.
DEVICE bf16* align_to_atom(unsigned char* memory) {
    return reinterpret_cast<bf16*>(memory + (SWIZZLE_ATOM - shared_address(memory) % SWIZZLE_ATOM) % SWIZZLE_ATOM);
}
