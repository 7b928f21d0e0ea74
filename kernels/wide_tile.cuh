// Before wgmma_layout.cuh: tiles of 128 x 256 instead of 128 x 128.
#define TILE_COLUMNS 256
