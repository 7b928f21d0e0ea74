// BF16 attention on tensor cores, after FlashAttention-2 (arXiv 2307.08691), for head widths that are multiples of 8.
//
// D, the compiled width, is at least dim; the columns between are zero. A block of 4 warps owns 64 rows (of queries, or
// of keys) of one head, 16 per warp, and iterates over tiles of the other side in shared memory. Scores and sums stay
// in f32 registers; probabilities and dS are rounded to bf16 before they are multiplied. exp(x) is computed as exp2(x
// log2 e). Each sum is made by one thread in a fixed order. Blocks of 128 threads. Grid: per sequence ceil(rows / 64) *
// heads blocks, with the rows and heads of the queries or of the keys.

const u32 ROWS = 64, THREADS = 128, TILE_KEYS = 64, HALF_TILE = 32;
const float LOG2_E = 1.4426950408889634f;

// Rows of D bf16 in shared memory. The 16-byte chunks of a row are swizzled, so that there are no bank conflicts.
template <int D> struct SharedRows {
    bf16* at;

    DEVICE bf16* chunk(u32 row, u32 chunk) const { return at + row * D + (chunk ^ row % 8) * 8; }
    // Its shared address: 32 bits, where a pointer takes twice the instructions.
    DEVICE u32 address(u32 row, u32 chunk) const { return shared_address(at) + row * (D * 2) + (chunk ^ row % 8) * 16; }

    // Starts copying N rows of one head from `row`; rows from `count` on become zero.
    template <int N> DEVICE void load_rows(const bf16* x, u64 row, u64 count, u64 head, u64 heads, u64 dim) const {
        // A thread copies the same chunk of every LINES-th row: a multiple of 8, so that its place in the row stays.
        const u32 LINES = THREADS / (D / 8);
        u32 r = threadIdx.x / (D / 8), p = threadIdx.x % (D / 8), valid = p * 8 < (u32)dim ? (u32)minimum(count, (u64)N) : 0;
        const bf16* from = x + ((row + r) * heads + head) * dim + p * 8;
        u32 below = LINES * (u32)(heads * dim);
        bf16* to = chunk(r, p);
#pragma unroll
        for (u32 i = 0; i < N / LINES; i++) cp_async_16(to + i * LINES * D, from + i * below, r + i * LINES < valid);
    }

    // The 16 x 16 operand a from row m and column k.
    DEVICE Fragment a(u32 m, u32 k) const {
        u32 matrix = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
        return ldmatrix_x4<false>(address(m + r + matrix % 2 * 8, k / 8 + matrix / 2));
    }
    // The operand b with rows n .. n + 16 as its columns, from column k.
    DEVICE Fragment b(u32 n, u32 k) const {
        u32 matrix = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
        return ldmatrix_x4<false>(address(n + r + matrix / 2 * 8, k / 8 + matrix % 2));
    }
    // The operand b with rows k .. k + 16 as its rows, from column n.
    DEVICE Fragment b_transposed(u32 k, u32 n) const {
        u32 matrix = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
        return ldmatrix_x4<true>(address(k + r + matrix % 2 * 8, n / 8 + matrix / 2));
    }
};

// The 16 x N accumulators of a warp: v[j][0..2] are row lane / 4, columns 8 j + 2 (lane % 4) and the next; v[j][2..4]
// are the same columns 8 rows below.
template <int N> struct WarpTile {
    float v[N / 8][4];

    DEVICE void clear() {
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) v[j][c] = 0.0f;
    }

    // = rows m .. m + 16 of x · (N rows of y)ᵀ
    template <int D> DEVICE void multiply(const SharedRows<D>& x, u32 m, const SharedRows<D>& y) {
        clear();
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            Fragment a = x.a(m, k);
#pragma unroll
            for (int n = 0; n < N; n += 16) {
                Fragment b = y.b(n, k);
                mma_m16n8k16(v[n / 8], a, b.r[0], b.r[1]);
                mma_m16n8k16(v[n / 8 + 1], a, b.r[2], b.r[3]);
            }
        }
    }

    // += weights [16, K] · (K rows of y)
    template <int K> DEVICE void add(const WarpTile<K>& weights, const SharedRows<N>& y) {
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            const float(&low)[4] = weights.v[k / 8], (&high)[4] = weights.v[k / 8 + 1];
            Fragment a = {{to_bf16x2(low[0], low[1]), to_bf16x2(low[2], low[3]), to_bf16x2(high[0], high[1]),
                           to_bf16x2(high[2], high[3])}};
#pragma unroll
            for (int n = 0; n < N; n += 16) {
                Fragment b = y.b_transposed(k, n);
                mma_m16n8k16(v[n / 8], a, b.r[0], b.r[1]);
                mma_m16n8k16(v[n / 8 + 1], a, b.r[2], b.r[3]);
            }
        }
    }

    // Stores this thread's rows, `row` times `first` and `row + 8` times `second`, if they are below `count`.
    DEVICE void store(bf16* x, u64 row, u64 count, u64 stride, u64 dim, float first, float second) const {
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            u64 col = j * 8 + threadIdx.x % 4 * 2;
            if (col >= dim) continue;
            if (row < count) *reinterpret_cast<u32*>(x + row * stride + col) = to_bf16x2(v[j][0] * first, v[j][1] * first);
            if (row + 8 < count)
                *reinterpret_cast<u32*>(x + (row + 8) * stride + col) = to_bf16x2(v[j][2] * second, v[j][3] * second);
        }
    }
};

// Reductions over the 4 threads of a row.
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}
DEVICE float row_max(float x) {
    x = maximum(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return maximum(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

// Which keys near `key` the queries near `position` see, by differences, which fit into 32 bits.
struct Visible {
    int ahead, window;
    DEVICE Visible(u64 position, u64 key, u64 window)
        : ahead((int)position - (int)key), window((int)minimum(window, (u64)0x7fffffff)) {}
    // Whether the query at position + query sees the key at key + other.
    DEVICE bool operator()(int query, int other) const { return (u32)(ahead + query - other) < (u32)window; }
};

// Online softmax of two rows, in powers of two.
struct Softmax {
    float highest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, total[2] = {0.0f, 0.0f};

    // Masks and scales the scores of the keys from `key` on, and replaces them by exp2(score - highest). Everything
    // summed before must be multiplied by `factor`. `position`: that of the first row.
    template <int N> DEVICE void add(WarpTile<N>& s, float (&factor)[2], u64 position, u64 key, float scale, u64 window) {
        float next[2] = {highest[0], highest[1]};
        Visible visible(position, key + threadIdx.x % 4 * 2, window);
        // Only at the diagonal and at the window's edge: where the warp's lowest row does not see the last key, or its
        // highest one not the first.
        int lowest = (int)position - (int)(threadIdx.x % 32 / 4) - (int)key;
        if (lowest < N - 1 || lowest + 15 >= visible.window) {
#pragma unroll
            for (int j = 0; j < N / 8; j++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    if (!visible(c / 2 * 8, j * 8 + c % 2)) s.v[j][c] = NEGATIVE_INFINITY;
        }
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                s.v[j][c] *= scale;
                next[c / 2] = maximum(next[c / 2], s.v[j][c]);
            }
        float base[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            next[i] = row_max(next[i]);
            base[i] = next[i] == NEGATIVE_INFINITY ? 0.0f : next[i];  // nothing is visible yet: any finite number will do
            factor[i] = exp2f(highest[i] - base[i]);
            highest[i] = next[i];
        }
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                s.v[j][c] = exp2f(s.v[j][c] - base[c / 2]);
                sum[c / 2] += s.v[j][c];
            }
#pragma unroll
        for (int i = 0; i < 2; i++) total[i] = total[i] * factor[i] + row_sum(sum[i]);
    }
};

// y, and per query and head the log2 Σ exp that normalises the row of probabilities: f32 [T, heads].
template <int D>
DEVICE void forward(bf16* y, float* normaliser, const bf16* q, const bf16* k, const bf16* v, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    SharedRows<D> queries = {reinterpret_cast<bf16*>(memory)}, keys = {queries.at + ROWS * D}, values = {keys.at + TILE_KEYS * D};
    RowTile p = find_row_tile(g.queries, g.sequences, ROWS, g.heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 head = p.column, key_head = g.key_head(head);
    u32 own = threadIdx.x / 32 * 16, row = own + threadIdx.x % 32 / 4;
    KeyRange range(s, p.row - s.query, p.rows, g.window);
    auto load_rows = [&](const SharedRows<D>& to, const bf16* x, u64 key) {
        if (key < range.end) to.template load_rows<TILE_KEYS>(x, s.key + key, range.end - key, key_head, g.key_heads, g.dim);
        cp_async_commit_group();
    };
    queries.template load_rows<ROWS>(q, p.row, p.rows, head, g.heads, g.dim);
    load_rows(keys, k, range.first);
    Softmax softmax;
    WarpTile<D> sum;
    sum.clear();
    for (u64 key = range.first; key < range.end; key += TILE_KEYS) {
        load_rows(values, v, key);
        cp_async_wait_group<1>();
        __syncthreads();  // the keys of all threads are visible
        WarpTile<TILE_KEYS> weights;
        weights.multiply(queries, own, keys);
        __syncthreads();  // all threads have read them
        load_rows(keys, k, key + TILE_KEYS);
        float factor[2];
        softmax.add(weights, factor, s.before + p.row - s.query + row, key, g.scale() * LOG2_E, g.window);
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) sum.v[j][c] *= factor[c / 2];
        cp_async_wait_group<1>();
        __syncthreads();  // the values of all threads are visible
        sum.add(weights, values);
        __syncthreads();  // all threads have read them
    }
    cp_async_wait_group<0>();
    if (threadIdx.x % 4 == 0)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (row + i * 8 < p.rows)
                normaliser[(p.row + row + i * 8) * g.heads + head] = softmax.highest[i] + log2f(softmax.total[i]);
    u64 stride = g.heads * g.dim;
    sum.store(y + p.row * stride + head * g.dim, row, p.rows, stride, g.dim, 1.0f / softmax.total[0], 1.0f / softmax.total[1]);
}

// dq, and per query and head δ = ⟨dy, y⟩: f32 [T, heads]. With P the probabilities:
// dS = P ∘ (dy · vᵀ − δ) / sqrt(dim), dq = dS · k (arXiv 2205.14135, appendix B).
template <int D>
DEVICE void backward_queries(bf16* dq, float* delta, const float* normaliser, const bf16* dy, const bf16* q, const bf16* k,
                             const bf16* v, const bf16* y, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    // Two buffers of keys and values: one is read while the other is copied to.
    SharedRows<D> queries = {reinterpret_cast<bf16*>(memory)}, dys = {queries.at + ROWS * D}, buffers = {dys.at + ROWS * D};
    auto keys_of = [&](u64 key) { return SharedRows<D>{buffers.at + key / HALF_TILE % 2 * (2 * HALF_TILE * D)}; };
    auto values_of = [&](u64 key) { return SharedRows<D>{keys_of(key).at + HALF_TILE * D}; };
    RowTile p = find_row_tile(g.queries, g.sequences, ROWS, g.heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 head = p.column, key_head = g.key_head(head);
    u32 own = threadIdx.x / 32 * 16, row = own + threadIdx.x % 32 / 4;
    u64 position = s.before + p.row - s.query + row;
    float scale = g.scale() * LOG2_E;
    KeyRange range(s, p.row - s.query, p.rows, g.window);
    auto load_rows = [&](const SharedRows<D>& to, const bf16* x, u64 key) {
        if (key < range.end) to.template load_rows<HALF_TILE>(x, s.key + key, range.end - key, key_head, g.key_heads, g.dim);
    };
    queries.template load_rows<ROWS>(q, p.row, p.rows, head, g.heads, g.dim);
    dys.template load_rows<ROWS>(dy, p.row, p.rows, head, g.heads, g.dim);

    auto load_both = [&](u64 key) {
        load_rows(keys_of(key), k, key);
        load_rows(values_of(key), v, key);
        cp_async_commit_group();
    };
    load_both(range.first);
    float dot[2], log_total[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        bool valid = row + i * 8 < p.rows;
        u64 at = (p.row + row + i * 8) * g.heads + head;
        dot[i] = 0.0f;
        if (valid)
            for (u64 d = threadIdx.x % 4; d < g.dim; d += 4)
                dot[i] = fmaf(to_f32(dy[at * g.dim + d]), to_f32(y[at * g.dim + d]), dot[i]);
        dot[i] = row_sum(dot[i]);
        log_total[i] = valid ? normaliser[at] : 0.0f;
        if (valid && threadIdx.x % 4 == 0) delta[at] = dot[i];
    }

    WarpTile<D> sum;
    sum.clear();
    for (u64 key = range.first; key < range.end; key += HALF_TILE) {
        cp_async_wait_group<0>();
        __syncthreads();
        load_both(key + HALF_TILE);
        SharedRows<D> keys = keys_of(key);
        WarpTile<HALF_TILE> weights, ds;
        weights.multiply(queries, own, keys);
        ds.multiply(dys, own, values_of(key));
        Visible visible(position, key + threadIdx.x % 4 * 2, g.window);
#pragma unroll
        for (int j = 0; j < HALF_TILE / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                bool seen = visible(c / 2 * 8, j * 8 + c % 2);
                float w = exp2f(weights.v[j][c] * scale - log_total[c / 2]);
                ds.v[j][c] = seen ? w * (ds.v[j][c] - dot[c / 2]) : 0.0f;
            }
        __syncwarp();  // the whole warp takes part in the mma below
        sum.add(ds, keys);
    }
    cp_async_wait_group<0>();
    u64 stride = g.heads * g.dim;
    sum.store(dq + p.row * stride + head * g.dim, row, p.rows, stride, g.dim, g.scale(), g.scale());
}

// dk = dSᵀ · q and dv = Pᵀ · dy, over all query heads of the key head. Scores are computed transposed: a warp owns 16
// keys.
template <int D>
DEVICE void backward_keys(bf16* dk, bf16* dv, const float* normaliser, const float* delta, const bf16* dy, const bf16* q,
                          const bf16* k, const bf16* v, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    // Two buffers of queries and dy, and of what belongs to them: one is read while the other is filled.
    SHARED(float, log_totals, [2][HALF_TILE]);
    SHARED(float, dots, [2][HALF_TILE]);
    SharedRows<D> keys = {reinterpret_cast<bf16*>(memory)}, values = {keys.at + ROWS * D}, buffers = {values.at + ROWS * D};
    RowTile p = find_row_tile(g.keys, g.sequences, ROWS, g.key_heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 group = g.heads / g.key_heads;
    u32 own = threadIdx.x / 32 * 16, row = own + threadIdx.x % 32 / 4;
    u64 key = p.row - s.key + row;
    float scale = g.scale() * LOG2_E;
    QueryRange range(s, p.row - s.key, p.rows, g.window);
    keys.template load_rows<ROWS>(k, p.row, p.rows, p.column, g.key_heads, g.dim);
    values.template load_rows<ROWS>(v, p.row, p.rows, p.column, g.key_heads, g.dim);
    WarpTile<D> sum_k, sum_v;
    sum_k.clear();
    sum_v.clear();
    // Starts filling a buffer; this thread's numbers of the rows come with it, in registers until they are stored.
    float next_total = 0.0f, next_dot = 0.0f;
    auto load = [&](u32 buffer, u64 head, u64 query) {
        SharedRows<D> queries = {buffers.at + buffer * (2 * HALF_TILE * D)}, dys = {queries.at + HALF_TILE * D};
        u64 count = range.end - query;
        queries.template load_rows<HALF_TILE>(q, s.query + query, count, head, g.heads, g.dim);
        dys.template load_rows<HALF_TILE>(dy, s.query + query, count, head, g.heads, g.dim);
        if (threadIdx.x < HALF_TILE && threadIdx.x < count) {
            u64 at = (s.query + query + threadIdx.x) * g.heads + head;
            next_total = normaliser[at];
            next_dot = delta[at];
        }
    };
    auto put = [&](u32 buffer) {
        if (threadIdx.x < HALF_TILE) {
            log_totals[buffer][threadIdx.x] = next_total;
            dots[buffer][threadIdx.x] = next_dot;
        }
    };
    u32 buffer = 0;
    if (range.first < range.end) load(0, p.column * group, range.first);
    cp_async_commit_group();
    put(0);
    for (u64 head = p.column * group; head < (p.column + 1) * group; head++)
        for (u64 query = range.first; query < range.end; query += HALF_TILE) {
            u64 count = range.end - query;
            cp_async_wait_group<0>();
            __syncthreads();  // this buffer is complete, and all threads have read the other one
            bool more = query + HALF_TILE < range.end;
            if (more || head + 1 < (p.column + 1) * group)
                load(1 - buffer, more ? head : head + 1, more ? query + HALF_TILE : range.first);
            cp_async_commit_group();
            SharedRows<D> queries = {buffers.at + buffer * (2 * HALF_TILE * D)}, dys = {queries.at + HALF_TILE * D};
            const float *log_total = log_totals[buffer], *dot = dots[buffer];
            WarpTile<HALF_TILE> weights, ds;
            weights.multiply(keys, own, queries);
            ds.multiply(values, own, dys);
            Visible visible(s.before + query, key, g.window);
            u32 valid = (u32)minimum(count, (u64)HALF_TILE);
#pragma unroll
            for (int j = 0; j < HALF_TILE / 8; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    u32 other = j * 8 + threadIdx.x % 4 * 2 + c % 2;
                    bool seen = other < valid && visible((int)other, c / 2 * 8);
                    // Without a branch; values from `count` on are discarded.
                    float w = exp2f(weights.v[j][c] * scale - log_total[other]);
                    weights.v[j][c] = seen ? w : 0.0f;
                    ds.v[j][c] = seen ? w * (ds.v[j][c] - dot[other]) : 0.0f;
                }
            __syncwarp();  // the whole warp takes part in the mma below
            sum_v.add(weights, dys);
            sum_k.add(ds, queries);
            buffer = 1 - buffer;
            put(buffer);
        }
    cp_async_wait_group<0>();  // of keys and values that no query sees, too
    u64 stride = g.key_heads * g.dim, at = p.row * stride + p.column * g.dim;
    sum_k.store(dk + at, row, p.rows, stride, g.dim, g.scale(), g.scale());
    sum_v.store(dv + at, row, p.rows, stride, g.dim, 1.0f, 1.0f);
}

#define WIDTH(D)                                                                                                      \
    KERNEL(THREADS, attention_##D, (bf16 * y, float* normaliser, const bf16* q, const bf16* k, const bf16* v, GEOMETRY)) { \
        forward<D>(y, normaliser, q, k, v, {queries, keys, sequences, heads, key_heads, dim, window});                            \
    }                                                                                                                 \
    KERNEL(THREADS, attention_backward_queries_##D,                                                                   \
           (bf16 * dq, float* delta, const float* normaliser, const bf16* dy, const bf16* q, const bf16* k,           \
            const bf16* v, const bf16* y, GEOMETRY)) {                                                                \
        backward_queries<D>(dq, delta, normaliser, dy, q, k, v, y,                                                    \
                            {queries, keys, sequences, heads, key_heads, dim, window});                               \
    }                                                                                                                 \
    KERNEL(THREADS, attention_backward_keys_##D,                                                                      \
           (bf16 * dk, bf16 * dv, const float* normaliser, const float* delta, const bf16* dy, const bf16* q,         \
            const bf16* k, const bf16* v, GEOMETRY)) {                                                                \
        backward_keys<D>(dk, dv, normaliser, delta, dy, q, k, v,                                                      \
                         {queries, keys, sequences, heads, key_heads, dim, window});                                  \
    }

WIDTH(64)
WIDTH(128)
