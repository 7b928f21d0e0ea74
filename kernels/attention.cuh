// What all forms of attention share: causal, within sequences of different lengths, grouped queries, an optional window.
//
// q, y and their gradients are [T, heads * dim]; k, v and theirs [keys, key_heads * dim]. Sequence s owns query rows
// queries[s] .. queries[s + 1] and key rows keys[s] .. keys[s + 1]; its queries are the last positions of its keys. A query at
// position p sees key j where j <= p and p - j < window.

struct Geometry {
    const u32 *queries, *keys;
    u64 sequences, heads, key_heads, dim, window;

    DEVICE float scale() const { return 1.0f / sqrtf((float)dim); }
    DEVICE u64 key_head(u64 head) const { return head / (heads / key_heads); }
};

// One sequence: its first rows and how many keys come before the first query.
struct Sequence {
    u64 query, key, queries, keys, before;
    DEVICE Sequence(const Geometry& g, u64 s)
        : query(g.queries[s]), key(g.keys[s]), queries(g.queries[s + 1] - query), keys(g.keys[s + 1] - key),
          before(keys - queries) {}
};

DEVICE bool sees(u64 position, u64 key, u64 window) { return key <= position && position - key < window; }

// The keys that rows `row .. row + rows` of a sequence see.
struct Span {
    u64 first, end;
    DEVICE Span(const Sequence& s, u64 row, u64 rows, u64 window) {
        u64 position = s.before + row;
        first = position >= window ? position - window + 1 : 0;
        end = position + rows;
    }
};

// The queries of a sequence whose positions see one of its keys `key .. key + rows`.
struct Seeing {
    u64 first, end;
    DEVICE Seeing(const Sequence& s, u64 key, u64 rows, u64 window) {
        u64 past = key + rows - 1 + minimum(window, s.keys);
        first = key > s.before ? key - s.before : 0;
        end = past > s.before ? minimum(s.queries, past - s.before) : 0;
    }
};

#define GEOMETRY const u32 *queries, const u32 *keys, u64 sequences, u64 heads, u64 key_heads, u64 dim, u64 window
