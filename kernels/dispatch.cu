// Sorts routed rows by expert, and moves rows to the experts and back.

// --- the stable counting sort of the slots (t, k), numbered t·K + k, by expert ---------------------------------------
//
// 1. count: the slots of each chunk of 256 per expert;
// 2. scan_chunks: an exclusive prefix sum of these counts over the chunks, for each expert;
// 3. scan_experts: an exclusive prefix sum of the experts' totals gives the offsets;
// 4. place: a slot's row is its expert's offset + the slots of earlier chunks + the earlier slots of its own chunk.
// All in integers, so the result does not depend on the order of execution. Latency-bound: a few hundred kB at most.

#define CHUNK 256

// counts [E, chunks]. Grid: one block of CHUNK threads per chunk; dynamic shared memory: 4·E bytes.
KERNEL(CHUNK, dispatch_count, (const u32* ids, u32* counts, u64 slots, u32 experts)) {
    DYNAMIC_SHARED(bytes);
    u32* count = (u32*)bytes;
    for (u32 e = threadIdx.x; e < experts; e += CHUNK) count[e] = 0;
    __syncthreads();
    u64 slot = (u64)blockIdx.x * CHUNK + threadIdx.x;
    if (slot < slots) atomicAdd(&count[ids[slot]], 1u);
    __syncthreads();
    for (u32 e = threadIdx.x; e < experts; e += CHUNK) counts[(u64)e * gridDim.x + blockIdx.x] = count[e];
}

// The sum of the lower lanes' values; `total`: the sum of all lanes' values.
DEVICE u32 warp_prefix(u32 x, u32& total) {
    u32 lane = threadIdx.x % 32, sum = x;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        u32 below = __shfl_up_sync(FULL_WARP, sum, step);
        if (lane >= step) sum += below;
    }
    total = __shfl_sync(FULL_WARP, sum, 31);
    return sum - x;
}

// Exclusive prefix sum in place by one warp; returns the total.
DEVICE u32 scan(u32* values, u32 n) {
    u32 before = 0;
    for (u32 start = 0; start < n; start += 32) {
        u32 i = start + threadIdx.x % 32, total;
        u32 sum = warp_prefix(i < n ? values[i] : 0, total);
        if (i < n) values[i] = before + sum;
        before += total;
    }
    return before;
}

// counts [E, chunks] in place; totals [E]. Grid: one warp per expert.
KERNEL(32, dispatch_scan_chunks, (u32* counts, u32* totals, u32 chunks)) {
    u32 total = scan(counts + (u64)blockIdx.x * chunks, chunks);
    if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// offsets [E + 1]: the totals on entry, the offsets on return. Grid: one warp.
KERNEL(32, dispatch_scan_experts, (u32* offsets, u32 experts)) {
    u32 total = scan(offsets, experts);
    if (threadIdx.x == 0) offsets[experts] = total;
}

// row_of [slots], slot_of [rows]. Grid: one block of CHUNK threads per chunk.
KERNEL(CHUNK, dispatch_place, (const u32* ids, const u32* counts, const u32* offsets, u32* row_of, u32* slot_of, u64 slots)) {
    SHARED(u32, chunk, [CHUNK]);
    u64 slot = (u64)blockIdx.x * CHUNK + threadIdx.x;
    u32 id = slot < slots ? ids[slot] : 0xffffffffu;
    chunk[threadIdx.x] = id;
    __syncthreads();
    if (slot >= slots) return;
    u32 rank = 0;
    for (u32 i = 0; i < threadIdx.x; i++) rank += chunk[i] == id;
    u32 row = offsets[id] + counts[(u64)id * gridDim.x + blockIdx.x] + rank;
    row_of[slot] = row;
    slot_of[row] = (u32)slot;
}

// --- rows ------------------------------------------------------------------------------------------------------------
//
// Memory-bound: every row is read once. Grid: one block of up to 256 threads per row of the result.

// y[t] = Σ_k x[row_of[t·K + k]], k ascending, summed in f32.
template <class T, int W> DEVICE void combine(const T* x, const u32* row_of, T* y, u32 top_k, u64 cols) {
    row_of += (u64)blockIdx.x * top_k;
    y += blockIdx.x * cols;
    for (u64 c = threadIdx.x * W; c < cols; c += blockDim.x * W) {
        Pack<W> sum = {};
        for (u32 k = 0; k < top_k; k++) {
            Pack<W> a = load<W>(x + (u64)row_of[k] * cols + c);
#pragma unroll
            for (int j = 0; j < W; j++) sum.v[j] += a.v[j];
        }
        store<W>(y + c, sum);
    }
}

// y[t] = Σ_k x[row_of[t·K + k]] + σ(gate[t]) · shared[t] + residual[t], without the second term if `shared` is null. Each product
// and sum is rounded to T, as separate passes would store them.
template <class T, int W>
DEVICE void combine_onto(const T* x, const u32* row_of, const T* shared, const T* gate, const T* residual, T* y, u32 top_k,
                         u64 cols) {
    row_of += (u64)blockIdx.x * top_k;
    shared += blockIdx.x * (shared ? cols : 0);
    residual += blockIdx.x * cols;
    y += blockIdx.x * cols;
    float s = shared ? sigmoid(to_f32(gate[blockIdx.x])) : 0.0f;
    for (u64 c = threadIdx.x * W; c < cols; c += blockDim.x * W) {
        Pack<W> sum = {}, b = load<W>(residual + c);
        for (u32 k = 0; k < top_k; k++) {
            Pack<W> a = load<W>(x + (u64)row_of[k] * cols + c);
#pragma unroll
            for (int j = 0; j < W; j++) sum.v[j] += a.v[j];
        }
        if (shared) {
            Pack<W> a = load<W>(shared + c);
#pragma unroll
            for (int j = 0; j < W; j++) sum.v[j] = __fadd_rn(rounded<T>(sum.v[j]), rounded<T>(__fmul_rn(a.v[j], s)));
        }
#pragma unroll
        for (int j = 0; j < W; j++) sum.v[j] = rounded<T>(sum.v[j]) + b.v[j];
        store<W>(y + c, sum);
    }
}

#define TYPED(T, name)                                                                                               \
    KERNEL(256, combine_rows_onto_##name, (const T* x, const u32* row_of, const T* shared, const T* gate,            \
                                           const T* residual, T* y, u32 top_k, u64 cols)) {                          \
        BY_WIDTH(T, cols, combine_onto, x, row_of, shared, gate, residual, y, top_k, cols);                          \
    }                                                                                                                \
    KERNEL(256, combine_rows_##name, (const T* x, const u32* row_of, T* y, u32 top_k, u64 cols)) {                   \
        BY_WIDTH(T, cols, combine, x, row_of, y, top_k, cols);                                                       \
    }

TYPED(float, f32)
TYPED(bf16, bf16)
