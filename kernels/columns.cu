// Column sums, for the gradients of biases and of norm weights: partial sums over fixed sets of rows, then their sum in
// a fixed order. Memory-bound: the inputs are read once.

// partial[p, c] = Σ over the rows of part p of dy[row, c], or of dy[row, c] · x[row, c] · r[row] if x is given. A block
// of 256 threads has `lanes` parts of `chunk` rows each. The parts of a block take its rows in turn, so that its
// threads read adjacent rows; the threads of a part take W columns each at a time. Grid: ceil(rows / (lanes · chunk))
// blocks.
template <class T, int W>
DEVICE void partial_sums(const T* dy, const T* x, const float* r, float* partial, u64 rows, u64 cols, u32 lanes, u32 chunk) {
    u32 threads = blockDim.x / lanes, lane = threadIdx.x / threads;
    if (lane >= lanes) return;
    u64 first = (u64)blockIdx.x * lanes * chunk + lane;
    partial += ((u64)blockIdx.x * lanes + lane) * cols;
    for (u64 c = threadIdx.x % threads * W; c < cols; c += threads * W) {
        Pack<W> sum = {};
        for (u32 i = 0; i < chunk; i++) {
            u64 row = first + (u64)i * lanes;
            if (row >= rows) break;
            Pack<W> g = load<W>(dy + row * cols + c);
            if (x) {
                Pack<W> a = load<W>(x + row * cols + c);
                float scale = r[row];
#pragma unroll
                for (int j = 0; j < W; j++) sum.v[j] += g.v[j] * (a.v[j] * scale);
            } else {
#pragma unroll
                for (int j = 0; j < W; j++) sum.v[j] += g.v[j];
            }
        }
        store<W>(partial + c, sum);
    }
}

#define TYPED(T, name)                                                                                            \
    KERNEL(256, column_sums_##name,                                                                               \
           (const T* dy, const T* x, const float* r, float* partial, u64 rows, u64 cols, u32 lanes, u32 chunk)) { \
        BY_WIDTH(T, cols, partial_sums, dy, x, r, partial, rows, cols, lanes, chunk);                             \
    }

TYPED(float, f32)
TYPED(bf16, bf16)

// into[c] += Σ_p partial[p, c]. Grid: ceil(cols / 32) blocks of 256 threads; a warp sums every eighth part.
KERNEL(256, add_partials, (float* into, const float* partial, u64 parts, u64 cols)) {
    SHARED(float, sums, [8][32]);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 c = (u64)blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (c < cols) {
        for (u64 p = warp; p < parts; p += 8) sum += partial[p * cols + c];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < cols) {
        for (int w = 1; w < 8; w++) sum += sums[w][lane];
        into[c] += sum;
    }
}
