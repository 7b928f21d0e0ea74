// Gathers and writes rows by index, adds rows back, and the gradient of an embedding. Memory-bound: every row is moved once.

// Copies a row of `bytes` bytes, an even number, by the threads of a block.
DEVICE void copy_row(unsigned char* y, const unsigned char* x, u64 bytes) {
    if (bytes % 16 == 0) {
        const Quad* from = (const Quad*)x;
        Quad* to = (Quad*)y;
        for (u64 i = threadIdx.x; i < bytes / 16; i += blockDim.x) to[i] = from[i];
    } else {
        const u16* from = (const u16*)x;
        u16* to = (u16*)y;
        for (u64 i = threadIdx.x; i < bytes / 2; i += blockDim.x) to[i] = from[i];
    }
}

// y[i] = x[index[i] / divide] for rows of `bytes` bytes. Grid: one block of up to 256 threads per i.
KERNEL(256, gather_rows, (const unsigned char* x, const u32* index, u32 divide, unsigned char* y, u64 bytes)) {
    copy_row(y + blockIdx.x * bytes, x + (u64)(index[blockIdx.x] / divide) * bytes, bytes);
}

// x[index[i]] = y[i] for distinct rows of `bytes` bytes. Grid: one block of up to 256 threads per i.
KERNEL(256, write_rows, (unsigned char* x, const u32* index, const unsigned char* y, u64 bytes)) {
    copy_row(x + (u64)index[blockIdx.x] * bytes, y + blockIdx.x * bytes, bytes);
}

// x[index[i]] += y[i] for distinct rows. Grid: one block of up to 256 threads per i.
template <class T, int W> DEVICE void add_rows(T* x, const u32* index, const T* y, u64 cols) {
    x += (u64)index[blockIdx.x] * cols;
    y += blockIdx.x * cols;
    for (u64 c = threadIdx.x * W; c < cols; c += blockDim.x * W) {
        Pack<W> a = load<W>(x + c), b = load<W>(y + c);
#pragma unroll
        for (int j = 0; j < W; j++) a.v[j] += b.v[j];
        store<W>(x + c, a);
    }
}

// dw[id] += Σ dy[t] over the tokens t with that id, in order. `order` holds the tokens, stably sorted by id; the tokens
// of one id are order[starts[s]..starts[s + 1]]. dw may start at any element. Grid: one block per s.
template <class T> DEVICE void embedding_backward(const T* dy, const u32* ids, const u32* order, const u32* starts, float* dw,
                                                  u64 cols) {
    u32 first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    dw += (u64)ids[order[first]] * cols;
    for (u64 c = threadIdx.x; c < cols; c += blockDim.x) {
        float sum = dw[c];
        for (u32 i = first; i < end; i++) sum += to_f32(dy[(u64)order[i] * cols + c]);
        dw[c] = sum;
    }
}

#define TYPED(T, name)                                                                                                \
    KERNEL(256, add_rows_##name, (T * x, const u32* index, const T* y, u64 cols)) {                                   \
        BY_WIDTH(T, cols, add_rows, x, index, y, cols);                                                               \
    }                                                                                                                 \
    KERNEL(256, embedding_backward_##name,                                                                            \
           (const T* dy, const u32* ids, const u32* order, const u32* starts, float* dw, u64 cols)) {                 \
        embedding_backward(dy, ids, order, starts, dw, cols);                                                         \
    }

TYPED(float, f32)
TYPED(bf16, bf16)

// x [rows, cols] at the given columns = value. Grid: one block of any size per row.
template <class T> DEVICE void fill_columns(T* x, const u32* columns, u64 count, u64 cols, float value) {
    x += blockIdx.x * cols;
    for (u64 j = threadIdx.x; j < count; j += blockDim.x) x[columns[j]] = from_f32<T>(value);
}

KERNEL(256, fill_columns_f32, (float* x, const u32* columns, u64 count, u64 cols, float value)) {
    fill_columns(x, columns, count, cols, value);
}
KERNEL(256, fill_columns_bf16, (bf16* x, const u32* columns, u64 count, u64 cols, float value)) {
    fill_columns(x, columns, count, cols, value);
}
