// Attention of BF16 on tensor cores, as in FlashAttention-2 (arXiv 2307.08691), for heads whose width is a multiple of 8.
//
// D, the compiled width, is at least dim; what lies between is zero. A block of 4 warps takes 64 rows (of queries, or of keys)
// of one head, a warp 16 of them, against pieces of the others in shared memory. Scores and sums stay in f32 registers;
// probabilities and dS are rounded to bf16 where they are factors. Powers of two: exp(x) = exp2(x log2 e).
// All sums have one owner and a fixed order. Blocks of 128 threads. Grid: for each sequence ceil(rows / 64) * heads blocks,
// rows and heads of the queries or of the keys.

const u32 ROWS = 64, THREADS = 128, PIECE = 64, HALF_PIECE = 32;
const float LOG2_E = 1.4426950408889634f;

// Rows of D bf16 in shared memory, 16-byte pieces permuted within each row: no bank is met twice.
template <int D> struct Rows {
    bf16* at;

    DEVICE bf16* piece(u32 row, u32 piece) const { return at + row * D + (piece ^ row % 8) * 8; }

    // `count` of N rows of one head from `row`, the rest zero; in the background.
    template <int N> DEVICE void take(const bf16* x, u64 row, u64 count, u64 head, u64 heads, u64 dim) const {
#pragma unroll
        for (u32 i = threadIdx.x; i < N * D / 8; i += THREADS) {
            u32 r = i / (D / 8), p = i % (D / 8);
            cp_async_16(piece(r, p), x + ((row + r) * heads + head) * dim + p * 8, r < count && p * 8 < dim);
        }
    }

    // The 16 x 16 factor a from row m and column k.
    DEVICE Fragment a(u32 m, u32 k) const {
        u32 matrix = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
        return ldmatrix_x4<false>(piece(m + r + matrix % 2 * 8, k / 8 + matrix / 2));
    }
    // The factor b whose columns are rows n .. n + 16, from column k.
    DEVICE Fragment b(u32 n, u32 k) const {
        u32 matrix = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
        return ldmatrix_x4<false>(piece(n + r + matrix / 2 * 8, k / 8 + matrix % 2));
    }
    // The factor b whose rows are rows k .. k + 16, from column n.
    DEVICE Fragment b_transposed(u32 k, u32 n) const {
        u32 matrix = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
        return ldmatrix_x4<true>(piece(k + r + matrix % 2 * 8, n / 8 + matrix / 2));
    }
};

// 16 x N sums of a warp. Of piece j, v[j][0..2] are row lane / 4, columns 8 j + 2 (lane % 4) and the next; v[j][2..4] those 8
// rows below.
template <int N> struct Sums {
    float v[N / 8][4];

    DEVICE void clear() {
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) v[j][c] = 0.0f;
    }

    // = rows m .. m + 16 of x · (N rows of y)ᵀ
    template <int D> DEVICE void products(const Rows<D>& x, u32 m, const Rows<D>& y) {
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
    template <int K> DEVICE void add(const Sums<K>& weights, const Rows<N>& y) {
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

    // Rows `row` and `row + 8` times their factors to x, where they are below `count`; `row` is this thread's.
    DEVICE void put(bf16* x, u64 row, u64 count, u64 stride, u64 dim, float first, float second) const {
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

// Over the 4 threads of a row.
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}
DEVICE float row_max(float x) {
    x = maximum(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return maximum(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

// Softmax of two rows whose scores come in pieces, in powers of two.
struct Softmax {
    float highest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, total[2] = {0.0f, 0.0f};

    // Masks and scales scores of the keys from `key`, turns them into exp2(score - highest), and sets the factors of
    // everything summed before. `position`: of the first row.
    template <int N> DEVICE void add(Sums<N>& s, float (&factor)[2], u64 position, u64 key, float scale, u64 window) {
        float next[2] = {highest[0], highest[1]};
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                bool seen = sees(position + c / 2 * 8, key + j * 8 + threadIdx.x % 4 * 2 + c % 2, window);
                s.v[j][c] = seen ? s.v[j][c] * scale : NEGATIVE_INFINITY;
                next[c / 2] = maximum(next[c / 2], s.v[j][c]);
            }
        float base[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            next[i] = row_max(next[i]);
            base[i] = next[i] == NEGATIVE_INFINITY ? 0.0f : next[i];  // nothing seen yet: any finite number will do
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

template <int D> DEVICE void forward(bf16* y, const bf16* q, const bf16* k, const bf16* v, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    Rows<D> queries = {reinterpret_cast<bf16*>(memory)}, keys = {queries.at + ROWS * D}, values = {keys.at + PIECE * D};
    RowTile p = find_row_tile(g.queries, g.sequences, ROWS, g.heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 head = p.column, key_head = g.key_head(head);
    u32 own = threadIdx.x / 32 * 16, row = own + threadIdx.x % 32 / 4;
    Span span(s, p.row - s.query, p.rows, g.window);
    auto take = [&](const Rows<D>& to, const bf16* x, u64 key) {
        if (key < span.end) to.template take<PIECE>(x, s.key + key, span.end - key, key_head, g.key_heads, g.dim);
        cp_async_commit_group();
    };
    queries.template take<ROWS>(q, p.row, p.rows, head, g.heads, g.dim);
    take(keys, k, span.first);
    Softmax softmax;
    Sums<D> sum;
    sum.clear();
    for (u64 key = span.first; key < span.end; key += PIECE) {
        take(values, v, key);
        cp_async_wait_group<1>();
        __syncthreads();  // the keys have arrived for all
        Sums<PIECE> weights;
        weights.products(queries, own, keys);
        __syncthreads();  // all are done with them
        take(keys, k, key + PIECE);
        float factor[2];
        softmax.add(weights, factor, s.before + p.row - s.query + row, key, g.scale() * LOG2_E, g.window);
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) sum.v[j][c] *= factor[c / 2];
        cp_async_wait_group<1>();
        __syncthreads();  // the values have arrived for all
        sum.add(weights, values);
        __syncthreads();  // all are done with them
    }
    cp_async_wait_group<0>();
    u64 stride = g.heads * g.dim;
    sum.put(y + p.row * stride + head * g.dim, row, p.rows, stride, g.dim, 1.0f / softmax.total[0], 1.0f / softmax.total[1]);
}

// dq, and for each query and head what normalises its row of probabilities (log2 Σ exp) and δ = ⟨dy, y⟩: f32 [T, heads].
// dS = P ∘ (dy · vᵀ − δ) / sqrt(dim), dq = dS · k (arXiv 2205.14135, appendix B).
template <int D>
DEVICE void backward_queries(bf16* dq, float* normaliser, float* delta, const bf16* dy, const bf16* q, const bf16* k,
                             const bf16* v, const bf16* y, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    Rows<D> queries = {reinterpret_cast<bf16*>(memory)}, dys = {queries.at + ROWS * D}, keys = {dys.at + ROWS * D},
            values = {keys.at + HALF_PIECE * D};
    RowTile p = find_row_tile(g.queries, g.sequences, ROWS, g.heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 head = p.column, key_head = g.key_head(head);
    u32 own = threadIdx.x / 32 * 16, row = own + threadIdx.x % 32 / 4;
    u64 position = s.before + p.row - s.query + row;
    float scale = g.scale() * LOG2_E;
    Span span(s, p.row - s.query, p.rows, g.window);
    auto take = [&](const Rows<D>& to, const bf16* x, u64 key) {
        to.template take<HALF_PIECE>(x, s.key + key, span.end - key, key_head, g.key_heads, g.dim);
    };
    queries.template take<ROWS>(q, p.row, p.rows, head, g.heads, g.dim);
    dys.template take<ROWS>(dy, p.row, p.rows, head, g.heads, g.dim);

    float dot[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u64 at = ((p.row + row + i * 8) * g.heads + head) * g.dim;
        dot[i] = 0.0f;
        if (row + i * 8 < p.rows)
            for (u64 d = threadIdx.x % 4; d < g.dim; d += 4) dot[i] = fmaf(to_f32(dy[at + d]), to_f32(y[at + d]), dot[i]);
        dot[i] = row_sum(dot[i]);
    }
    Softmax softmax;
    for (u64 key = span.first; key < span.end; key += HALF_PIECE) {
        take(keys, k, key);
        cp_async_commit_group();
        cp_async_wait_group<0>();
        __syncthreads();
        Sums<HALF_PIECE> weights;
        weights.products(queries, own, keys);
        float factor[2];
        softmax.add(weights, factor, position, key, scale, g.window);
        __syncthreads();
    }
    float log_total[2] = {softmax.highest[0] + log2f(softmax.total[0]), softmax.highest[1] + log2f(softmax.total[1])};
    if (threadIdx.x % 4 == 0)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (row + i * 8 < p.rows) {
                u64 at = (p.row + row + i * 8) * g.heads + head;
                normaliser[at] = log_total[i];
                delta[at] = dot[i];
            }

    Sums<D> sum;
    sum.clear();
    for (u64 key = span.first; key < span.end; key += HALF_PIECE) {
        take(keys, k, key);
        take(values, v, key);
        cp_async_commit_group();
        cp_async_wait_group<0>();
        __syncthreads();
        Sums<HALF_PIECE> weights, ds;
        weights.products(queries, own, keys);
        ds.products(dys, own, values);
#pragma unroll
        for (int j = 0; j < HALF_PIECE / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                bool seen = sees(position + c / 2 * 8, key + j * 8 + threadIdx.x % 4 * 2 + c % 2, g.window);
                float w = exp2f(weights.v[j][c] * scale - log_total[c / 2]);
                ds.v[j][c] = seen ? w * (ds.v[j][c] - dot[c / 2]) : 0.0f;
            }
        __syncwarp();  // the product below is the whole warp's
        sum.add(ds, keys);
        __syncthreads();
    }
    u64 stride = g.heads * g.dim;
    sum.put(dq + p.row * stride + head * g.dim, row, p.rows, stride, g.dim, g.scale(), g.scale());
}

// dk = dSᵀ · q and dv = Pᵀ · dy, over all query heads of the key head. Scores are made transposed: a warp has 16 keys.
template <int D>
DEVICE void backward_keys(bf16* dk, bf16* dv, const float* normaliser, const float* delta, const bf16* dy, const bf16* q,
                          const bf16* k, const bf16* v, const Geometry& g) {
    DYNAMIC_SHARED(memory);
    SHARED(float, log_total, [HALF_PIECE]);
    SHARED(float, dot, [HALF_PIECE]);
    Rows<D> keys = {reinterpret_cast<bf16*>(memory)}, values = {keys.at + ROWS * D}, queries = {values.at + ROWS * D},
            dys = {queries.at + HALF_PIECE * D};
    RowTile p = find_row_tile(g.keys, g.sequences, ROWS, g.key_heads);
    if (p.rows == 0) return;
    Sequence s(g, p.group);
    u64 group = g.heads / g.key_heads;
    u32 own = threadIdx.x / 32 * 16, row = own + threadIdx.x % 32 / 4;
    u64 key = p.row - s.key + row;
    float scale = g.scale() * LOG2_E;
    Seeing seeing(s, p.row - s.key, p.rows, g.window);
    keys.template take<ROWS>(k, p.row, p.rows, p.column, g.key_heads, g.dim);
    values.template take<ROWS>(v, p.row, p.rows, p.column, g.key_heads, g.dim);
    Sums<D> sum_k, sum_v;
    sum_k.clear();
    sum_v.clear();
    for (u64 head = p.column * group; head < (p.column + 1) * group; head++)
        for (u64 query = seeing.first; query < seeing.end; query += HALF_PIECE) {
            u64 count = seeing.end - query;
            queries.template take<HALF_PIECE>(q, s.query + query, count, head, g.heads, g.dim);
            dys.template take<HALF_PIECE>(dy, s.query + query, count, head, g.heads, g.dim);
            cp_async_commit_group();
            if (threadIdx.x < HALF_PIECE && threadIdx.x < count) {
                u64 at = (s.query + query + threadIdx.x) * g.heads + head;
                log_total[threadIdx.x] = normaliser[at];
                dot[threadIdx.x] = delta[at];
            }
            cp_async_wait_group<0>();
            __syncthreads();
            Sums<HALF_PIECE> weights, ds;
            weights.products(keys, own, queries);
            ds.products(values, own, dys);
#pragma unroll
            for (int j = 0; j < HALF_PIECE / 8; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    u32 other = j * 8 + threadIdx.x % 4 * 2 + c % 2;
                    bool seen = other < count && sees(s.before + query + other, key + c / 2 * 8, g.window);
                    // Without a branch; what lies behind `count` is thrown away.
                    float w = exp2f(weights.v[j][c] * scale - log_total[other]);
                    weights.v[j][c] = seen ? w : 0.0f;
                    ds.v[j][c] = seen ? w * (ds.v[j][c] - dot[other]) : 0.0f;
                }
            __syncwarp();  // the products below are the whole warp's
            sum_v.add(weights, dys);
            sum_k.add(ds, queries);
            __syncthreads();
        }
    cp_async_commit_group();  // keys and values that no query sees
    cp_async_wait_group<0>();
    u64 stride = g.key_heads * g.dim, at = p.row * stride + p.column * g.dim;
    sum_k.put(dk + at, row, p.rows, stride, g.dim, g.scale(), g.scale());
    sum_v.put(dv + at, row, p.rows, stride, g.dim, 1.0f, 1.0f);
}

#define WIDTH(D)                                                                                                      \
    KERNEL(THREADS, attention_##D, (bf16 * y, const bf16* q, const bf16* k, const bf16* v, GEOMETRY)) {               \
        forward<D>(y, q, k, v, {queries, keys, sequences, heads, key_heads, dim, window});                            \
    }                                                                                                                 \
    KERNEL(THREADS, attention_backward_queries_##D,                                                                   \
           (bf16 * dq, float* normaliser, float* delta, const bf16* dy, const bf16* q, const bf16* k, const bf16* v,  \
            const bf16* y, GEOMETRY)) {                                                                               \
        backward_queries<D>(dq, normaliser, delta, dy, q, k, v, y,                                                    \
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
