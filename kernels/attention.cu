// Attention by ordinary arithmetic, for F32 and for heads that attention_mma.cu does not support; dim is at most 256.
//
// A block owns 32 rows (of queries, or of keys) of one head and iterates over tiles of 32 rows of the other side, all
// in shared memory as f32, with 8 threads per row. Thread `lane` of a row has the scores of columns lane, lane + 8, ..
// and dimensions lane, lane + 8, .. of the sums. No [T, T] matrix is stored. Each sum is made by one thread in a fixed
// order. Blocks of 256 threads with 3 * 32 * (dim | 1) floats of shared memory. Grid: per sequence ceil(rows / 32) *
// heads blocks, with the rows and heads of the queries or of the keys.

const u32 ROWS = 32, LANES = 8, THREADS = ROWS * LANES, MAX_DIM = 256;

// Odd, so that a column of shared memory uses all 32 banks.
DEVICE u64 pitch(const Geometry& g) { return g.dim | 1; }

// Copies rows `row .. row + count` (at most 32) of one head to shared memory, and zeros below them.
template <class T> DEVICE void load_rows(float* to, const T* x, u64 row, u64 count, u64 head, u64 heads, const Geometry& g) {
    u32 dim = (u32)g.dim;
    for (u32 i = threadIdx.x; i < ROWS * dim; i += THREADS) {
        u32 r = i / dim, d = i % dim;
        to[r * pitch(g) + d] = r < count ? to_f32(x[((row + r) * heads + head) * dim + d]) : 0.0f;
    }
}

// s[i] = ⟨row, rows[lane + 8 i]⟩
DEVICE void scores_of(float (&s)[4], const float* row, const float* rows, const Geometry& g) {
    const float* from = rows + threadIdx.x % LANES * pitch(g);
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = 0.0f;
    for (u32 d = 0; d < (u32)g.dim; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] = fmaf(row[d], from[i * LANES * pitch(g) + d], s[i]);
}

// Dimensions lane, lane + 8, .. of a row of sums.
struct RowSum {
    float v[MAX_DIM / LANES];

    DEVICE void scale(float by) {
#pragma unroll
        for (u32 j = 0; j < MAX_DIM / LANES; j++) v[j] *= by;
    }

    // += Σ over the 32 rows of weight · row. Each of the 8 threads of a row has four of the weights.
    DEVICE void add(const float (&weights)[4], const float* rows, const Geometry& g) {
        u32 lane = threadIdx.x % LANES, first = threadIdx.x % 32 / LANES * LANES;
#pragma unroll
        for (int i = 0; i < 4; i++)
            for (u32 s = 0; s < LANES; s++) {
                float w = __shfl_sync(FULL_WARP, weights[i], (int)(first + s));
                const float* row = rows + (i * LANES + s) * pitch(g);
#pragma unroll
                for (u32 j = 0; j < MAX_DIM / LANES; j++)
                    if (lane + j * LANES < (u32)g.dim) v[j] = fmaf(w, row[lane + j * LANES], v[j]);
            }
    }

    template <class T> DEVICE void store(T* to, const Geometry& g) const {
        u32 lane = threadIdx.x % LANES;
#pragma unroll
        for (u32 j = 0; j < MAX_DIM / LANES; j++)
            if (lane + j * LANES < (u32)g.dim) to[lane + j * LANES] = from_f32<T>(v[j]);
    }
};

// Reductions over the 8 threads of a row.
DEVICE float row_sum(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_WARP, x, lane);
    return x;
}
DEVICE float row_max(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) x = maximum(x, __shfl_xor_sync(FULL_WARP, x, lane));
    return x;
}

// Online softmax of a row.
struct Softmax {
    float highest = NEGATIVE_INFINITY, total = 0.0f;

    // Masks and scales the four scores of keys `key + lane`, `key + lane + 8`, .., and replaces them by exp(score -
    // highest). Everything summed before must be multiplied by the returned factor.
    DEVICE float add(float (&s)[4], u64 position, u64 key, const Geometry& g) {
        float next = highest;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bool seen = is_visible(position, key + threadIdx.x % LANES + i * LANES, g.window);
            s[i] = seen ? s[i] * g.scale() : NEGATIVE_INFINITY;
            next = maximum(next, s[i]);
        }
        next = row_max(next);
        // Nothing is visible yet: any finite number will do.
        float base = next == NEGATIVE_INFINITY ? 0.0f : next, factor = expf(highest - base), sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[i] = expf(s[i] - base);
            sum += s[i];
        }
        total = total * factor + row_sum(sum);
        highest = next;
        return factor;
    }
};

// y, and per query and head the log Σ exp that normalises the row of probabilities: [T, heads].
template <class T>
DEVICE void forward(T* y, float* normaliser, const T* q, const T* k, const T* v, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    float *queries = reinterpret_cast<float*>(memory), *keys = queries + ROWS * pitch(g), *values = keys + ROWS * pitch(g);
    RowTile p = find_row_tile(g.queries, g.sequences, ROWS, g.heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 head = p.column, row = threadIdx.x / LANES, position = s.before + p.row - s.query + row;
    KeyRange range(s, p.row - s.query, p.rows, g.window);
    load_rows(queries, q, p.row, p.rows, head, g.heads, g);
    Softmax softmax;
    RowSum sum = {};
    for (u64 key = range.first; key < range.end; key += ROWS) {
        u64 count = minimum((u64)ROWS, range.end - key);
        __syncthreads();  // other threads may still read the previous tile
        load_rows(keys, k, s.key + key, count, g.key_head(head), g.key_heads, g);
        load_rows(values, v, s.key + key, count, g.key_head(head), g.key_heads, g);
        __syncthreads();
        float weights[4];
        scores_of(weights, queries + row * pitch(g), keys, g);
        sum.scale(softmax.add(weights, position, key, g));
        sum.add(weights, values, g);
    }
    if (row >= p.rows) return;
    u64 at = (p.row + row) * g.heads + head;
    sum.scale(1.0f / softmax.total);
    sum.store(y + at * g.dim, g);
    if (threadIdx.x % LANES == 0) normaliser[at] = softmax.highest + logf(softmax.total);
}

// dq, and per query and head δ = ⟨dy, y⟩: [T, heads]. With P the probabilities: dS = P ∘ (dy · vᵀ − δ) / sqrt(dim), dq = dS · k (arXiv 2205.14135, appendix B).
template <class T>
DEVICE void backward_queries(T* dq, float* delta, const float* normaliser, const T* dy, const T* q, const T* k, const T* v,
                             const T* y, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    float *queries = reinterpret_cast<float*>(memory), *dys = queries + ROWS * pitch(g), *keys = dys + ROWS * pitch(g);
    RowTile p = find_row_tile(g.queries, g.sequences, ROWS, g.heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 head = p.column, row = threadIdx.x / LANES, position = s.before + p.row - s.query + row;
    KeyRange range(s, p.row - s.query, p.rows, g.window);
    load_rows(queries, q, p.row, p.rows, head, g.heads, g);
    load_rows(dys, dy, p.row, p.rows, head, g.heads, g);
    const float *query_row = queries + row * pitch(g), *dy_row = dys + row * pitch(g);

    u64 at = (p.row + row) * g.heads + head;
    float log_total = row < p.rows ? normaliser[at] : 0.0f, dot = 0.0f;
    __syncthreads();  // dy of all threads is visible
    if (row < p.rows)
        for (u32 d = threadIdx.x % LANES; d < (u32)g.dim; d += LANES) dot = fmaf(dy_row[d], to_f32(y[at * g.dim + d]), dot);
    dot = row_sum(dot);

    RowSum sum = {};
    for (u64 key = range.first; key < range.end; key += ROWS) {
        u64 count = minimum((u64)ROWS, range.end - key);
        float ds[4], scores[4];
        __syncthreads();
        load_rows(keys, v, s.key + key, count, g.key_head(head), g.key_heads, g);
        __syncthreads();
        scores_of(ds, dy_row, keys, g);
        __syncthreads();
        load_rows(keys, k, s.key + key, count, g.key_head(head), g.key_heads, g);
        __syncthreads();
        scores_of(scores, query_row, keys, g);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bool seen = is_visible(position, key + threadIdx.x % LANES + i * LANES, g.window);
            ds[i] = seen ? expf(scores[i] * g.scale() - log_total) * (ds[i] - dot) * g.scale() : 0.0f;
        }
        sum.add(ds, keys, g);
    }
    if (row >= p.rows) return;
    sum.store(dq + at * g.dim, g);
    if (threadIdx.x % LANES == 0) delta[at] = dot;
}

// dk = dSᵀ · q and dv = Pᵀ · dy, over all query heads of the key head.
template <class T>
DEVICE void backward_keys(T* dk, T* dv, const float* normaliser, const float* delta, const T* dy, const T* q, const T* k,
                          const T* v, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    float *keys = reinterpret_cast<float*>(memory), *values = keys + ROWS * pitch(g), *others = values + ROWS * pitch(g);
    RowTile p = find_row_tile(g.keys, g.sequences, ROWS, g.key_heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 group = g.heads / g.key_heads, row = threadIdx.x / LANES, key = p.row - s.key + row;
    load_rows(keys, k, p.row, p.rows, p.column, g.key_heads, g);
    load_rows(values, v, p.row, p.rows, p.column, g.key_heads, g);
    const float *key_row = keys + row * pitch(g), *value_row = values + row * pitch(g);

    QueryRange range(s, p.row - s.key, p.rows, g.window);
    RowSum sum_k = {}, sum_v = {};
    for (u64 head = p.column * group; head < (p.column + 1) * group; head++)
        for (u64 query = range.first; query < range.end; query += ROWS) {
            u64 count = minimum((u64)ROWS, range.end - query);
            float weights[4], ds[4];
            __syncthreads();
            load_rows(others, dy, s.query + query, count, head, g.heads, g);
            __syncthreads();
            scores_of(ds, value_row, others, g);
            __syncthreads();
            load_rows(others, q, s.query + query, count, head, g.heads, g);
            __syncthreads();
            scores_of(weights, key_row, others, g);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u64 other = query + threadIdx.x % LANES + i * LANES, at = (s.query + other) * g.heads + head;
                bool seen = other < range.end && is_visible(s.before + other, key, g.window);
                weights[i] = seen ? expf(weights[i] * g.scale() - normaliser[at]) : 0.0f;
                ds[i] = seen ? weights[i] * (ds[i] - delta[at]) * g.scale() : 0.0f;
            }
            sum_k.add(ds, others, g);
            __syncthreads();
            load_rows(others, dy, s.query + query, count, head, g.heads, g);
            __syncthreads();
            sum_v.add(weights, others, g);
        }
    if (row >= p.rows) return;
    u64 at = ((p.row + row) * g.key_heads + p.column) * g.dim;
    sum_k.store(dk + at, g);
    sum_v.store(dv + at, g);
}

#define TYPED(T, name)                                                                                                 \
    KERNEL(THREADS, attention_##name, (T * y, float* normaliser, const T* q, const T* k, const T* v, GEOMETRY)) {      \
        forward(y, normaliser, q, k, v, {queries, keys, sequences, heads, key_heads, dim, window});                                \
    }                                                                                                                  \
    KERNEL(THREADS, attention_backward_queries_##name,                                                                 \
           (T * dq, float* delta, const float* normaliser, const T* dy, const T* q, const T* k, const T* v,            \
            const T* y, GEOMETRY)) {                                                                                   \
        backward_queries(dq, delta, normaliser, dy, q, k, v, y,                                                        \
                         {queries, keys, sequences, heads, key_heads, dim, window});                                   \
    }                                                                                                                  \
    KERNEL(THREADS, attention_backward_keys_##name,                                                                    \
           (T * dk, T* dv, const float* normaliser, const float* delta, const T* dy, const T* q, const T* k,           \
            const T* v, GEOMETRY)) {                                                                                   \
        backward_keys(dk, dv, normaliser, delta, dy, q, k, v,                                                          \
                      {queries, keys, sequences, heads, key_heads, dim, window});                                      \
    }

TYPED(float, f32)
TYPED(bf16, bf16)
