// Attention by ordinary arithmetic, for F32 and for heads that attention_mma.cu does not take; dim is at most 256.
//
// A block takes 32 rows (of queries, or of keys) of one head against 32 of the others at a time, in shared memory as f32, with
// 8 threads a row: thread `sub` of a row has the scores of columns sub, sub + 8, .. and dimensions sub, sub + 8, .. of the
// sums. No [T, T] matrix exists. All sums have one owner and a fixed order.
// Blocks of 256 threads with 3 * 32 * (dim | 1) floats of shared memory. Grid: for each sequence ceil(rows / 32) * heads
// blocks, rows and heads of the queries or of the keys.

const u32 ROWS = 32, SUBS = 8, THREADS = ROWS * SUBS, WIDEST = 256;

// Odd: a column of shared memory lies in 32 banks.
DEVICE u64 pitch(const Geometry& g) { return g.dim | 1; }

// Rows `row .. row + count` (at most 32) of one head into shared memory, zeros below them.
template <class T> DEVICE void take(float* to, const T* x, u64 row, u64 count, u64 head, u64 heads, const Geometry& g) {
    u32 dim = (u32)g.dim;
    for (u32 i = threadIdx.x; i < ROWS * dim; i += THREADS) {
        u32 r = i / dim, d = i % dim;
        to[r * pitch(g) + d] = r < count ? to_f32(x[((row + r) * heads + head) * dim + d]) : 0.0f;
    }
}

// s[i] = ⟨row, rows[sub + 8 i]⟩
DEVICE void products(float (&s)[4], const float* row, const float* rows, const Geometry& g) {
    const float* from = rows + threadIdx.x % SUBS * pitch(g);
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = 0.0f;
    for (u32 d = 0; d < (u32)g.dim; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] = fmaf(row[d], from[i * SUBS * pitch(g) + d], s[i]);
}

// Dimensions sub, sub + 8, .. of a row of sums.
struct Sum {
    float v[WIDEST / SUBS];

    DEVICE void scale(float by) {
#pragma unroll
        for (u32 j = 0; j < WIDEST / SUBS; j++) v[j] *= by;
    }

    // += Σ over the 32 rows of weight · row; the threads of a row hold four of the weights each.
    DEVICE void add(const float (&weights)[4], const float* rows, const Geometry& g) {
        u32 sub = threadIdx.x % SUBS, first = threadIdx.x % 32 / SUBS * SUBS;
#pragma unroll
        for (int i = 0; i < 4; i++)
            for (u32 s = 0; s < SUBS; s++) {
                float w = __shfl_sync(FULL_WARP, weights[i], (int)(first + s));
                const float* row = rows + (i * SUBS + s) * pitch(g);
#pragma unroll
                for (u32 j = 0; j < WIDEST / SUBS; j++)
                    if (sub + j * SUBS < (u32)g.dim) v[j] = fmaf(w, row[sub + j * SUBS], v[j]);
            }
    }

    template <class T> DEVICE void put(T* to, const Geometry& g) const {
        u32 sub = threadIdx.x % SUBS;
#pragma unroll
        for (u32 j = 0; j < WIDEST / SUBS; j++)
            if (sub + j * SUBS < (u32)g.dim) to[sub + j * SUBS] = from_f32<T>(v[j]);
    }
};

// Over the 8 threads of a row.
DEVICE float row_sum(float x) {
#pragma unroll
    for (int lane = SUBS / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_WARP, x, lane);
    return x;
}
DEVICE float row_max(float x) {
#pragma unroll
    for (int lane = SUBS / 2; lane > 0; lane /= 2) x = maximum(x, __shfl_xor_sync(FULL_WARP, x, lane));
    return x;
}

// Softmax of a row whose scores come in pieces.
struct Softmax {
    float highest = NEGATIVE_INFINITY, total = 0.0f;

    // Masks and scales four scores of keys `key + sub`, .., turns them into exp(score - highest), and returns the factor of
    // everything summed before.
    DEVICE float add(float (&s)[4], u64 position, u64 key, const Geometry& g) {
        float next = highest;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bool seen = sees(position, key + threadIdx.x % SUBS + i * SUBS, g.window);
            s[i] = seen ? s[i] * g.scale() : NEGATIVE_INFINITY;
            next = maximum(next, s[i]);
        }
        next = row_max(next);
        // Nothing seen yet: any finite number will do.
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

template <class T> DEVICE void forward(T* y, const T* q, const T* k, const T* v, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    float *queries = reinterpret_cast<float*>(memory), *keys = queries + ROWS * pitch(g), *values = keys + ROWS * pitch(g);
    RowTile p = find_row_tile(g.queries, g.sequences, ROWS, g.heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 head = p.column, row = threadIdx.x / SUBS, position = s.before + p.row - s.query + row;
    Span span(s, p.row - s.query, p.rows, g.window);
    take(queries, q, p.row, p.rows, head, g.heads, g);
    Softmax softmax;
    Sum sum = {};
    for (u64 key = span.first; key < span.end; key += ROWS) {
        u64 count = minimum((u64)ROWS, span.end - key);
        __syncthreads();  // the last piece may still be read
        take(keys, k, s.key + key, count, g.key_head(head), g.key_heads, g);
        take(values, v, s.key + key, count, g.key_head(head), g.key_heads, g);
        __syncthreads();
        float weights[4];
        products(weights, queries + row * pitch(g), keys, g);
        sum.scale(softmax.add(weights, position, key, g));
        sum.add(weights, values, g);
    }
    if (row >= p.rows) return;
    sum.scale(1.0f / softmax.total);
    sum.put(y + ((p.row + row) * g.heads + head) * g.dim, g);
}

// dq, and for each query and head what the probabilities of its row are normalised by (log Σ exp) and ⟨dy, y⟩: [T, heads].
// With P the probabilities and δ = ⟨dy, y⟩: dS = P ∘ (dy · vᵀ − δ) / sqrt(dim), dq = dS · k (arXiv 2205.14135, appendix B).
template <class T>
DEVICE void backward_queries(T* dq, float* normaliser, float* delta, const T* dy, const T* q, const T* k, const T* v,
                             const T* y, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    float *queries = reinterpret_cast<float*>(memory), *dys = queries + ROWS * pitch(g), *keys = dys + ROWS * pitch(g);
    RowTile p = find_row_tile(g.queries, g.sequences, ROWS, g.heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 head = p.column, row = threadIdx.x / SUBS, position = s.before + p.row - s.query + row;
    Span span(s, p.row - s.query, p.rows, g.window);
    take(queries, q, p.row, p.rows, head, g.heads, g);
    take(dys, dy, p.row, p.rows, head, g.heads, g);
    const float *own_q = queries + row * pitch(g), *own_dy = dys + row * pitch(g);

    Softmax softmax;
    for (u64 key = span.first; key < span.end; key += ROWS) {
        __syncthreads();
        take(keys, k, s.key + key, minimum((u64)ROWS, span.end - key), g.key_head(head), g.key_heads, g);
        __syncthreads();
        float weights[4];
        products(weights, own_q, keys, g);
        softmax.add(weights, position, key, g);
    }
    float log_total = softmax.highest + logf(softmax.total), dot = 0.0f;
    u64 at = (p.row + row) * g.heads + head;
    if (row < p.rows)
        for (u32 d = threadIdx.x % SUBS; d < (u32)g.dim; d += SUBS) dot = fmaf(own_dy[d], to_f32(y[at * g.dim + d]), dot);
    dot = row_sum(dot);

    Sum sum = {};
    for (u64 key = span.first; key < span.end; key += ROWS) {
        u64 count = minimum((u64)ROWS, span.end - key);
        float ds[4], scores[4];
        __syncthreads();
        take(keys, v, s.key + key, count, g.key_head(head), g.key_heads, g);
        __syncthreads();
        products(ds, own_dy, keys, g);
        __syncthreads();
        take(keys, k, s.key + key, count, g.key_head(head), g.key_heads, g);
        __syncthreads();
        products(scores, own_q, keys, g);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bool seen = sees(position, key + threadIdx.x % SUBS + i * SUBS, g.window);
            ds[i] = seen ? expf(scores[i] * g.scale() - log_total) * (ds[i] - dot) * g.scale() : 0.0f;
        }
        sum.add(ds, keys, g);
    }
    if (row >= p.rows) return;
    sum.put(dq + at * g.dim, g);
    if (threadIdx.x % SUBS == 0) {
        normaliser[at] = log_total;
        delta[at] = dot;
    }
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
    u64 group = g.heads / g.key_heads, row = threadIdx.x / SUBS, key = p.row - s.key + row;
    take(keys, k, p.row, p.rows, p.column, g.key_heads, g);
    take(values, v, p.row, p.rows, p.column, g.key_heads, g);
    const float *own_k = keys + row * pitch(g), *own_v = values + row * pitch(g);

    Seeing seeing(s, p.row - s.key, p.rows, g.window);
    Sum sum_k = {}, sum_v = {};
    for (u64 head = p.column * group; head < (p.column + 1) * group; head++)
        for (u64 query = seeing.first; query < seeing.end; query += ROWS) {
            u64 count = minimum((u64)ROWS, seeing.end - query);
            float weights[4], ds[4];
            __syncthreads();
            take(others, dy, s.query + query, count, head, g.heads, g);
            __syncthreads();
            products(ds, own_v, others, g);
            __syncthreads();
            take(others, q, s.query + query, count, head, g.heads, g);
            __syncthreads();
            products(weights, own_k, others, g);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u64 other = query + threadIdx.x % SUBS + i * SUBS, at = (s.query + other) * g.heads + head;
                bool seen = other < seeing.end && sees(s.before + other, key, g.window);
                weights[i] = seen ? expf(weights[i] * g.scale() - normaliser[at]) : 0.0f;
                ds[i] = seen ? weights[i] * (ds[i] - delta[at]) * g.scale() : 0.0f;
            }
            sum_k.add(ds, others, g);
            __syncthreads();
            take(others, dy, s.query + query, count, head, g.heads, g);
            __syncthreads();
            sum_v.add(weights, others, g);
        }
    if (row >= p.rows) return;
    u64 at = ((p.row + row) * g.key_heads + p.column) * g.dim;
    sum_k.put(dk + at, g);
    sum_v.put(dv + at, g);
}

#define TYPED(T, name)                                                                                                 \
    KERNEL(THREADS, attention_##name, (T * y, const T* q, const T* k, const T* v, GEOMETRY)) {                         \
        forward(y, q, k, v, {queries, keys, sequences, heads, key_heads, dim, window});                                \
    }                                                                                                                  \
    KERNEL(THREADS, attention_backward_queries_##name,                                                                 \
           (T * dq, float* normaliser, float* delta, const T* dy, const T* q, const T* k, const T* v, const T* y,      \
            GEOMETRY)) {                                                                                               \
        backward_queries(dq, normaliser, delta, dy, q, k, v, y,                                                        \
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
