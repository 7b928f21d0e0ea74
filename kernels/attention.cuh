// What all forms of attention have in common: causal within sequences of different lengths, grouped queries, an
// optional window.
//
// q, y and their gradients are [T, heads * dim]; k, v and theirs [keys, key_heads * dim]. Sequence s has query rows
// queries[s] .. queries[s + 1] and key rows keys[s] .. keys[s + 1]; its queries are the last positions of its keys. A
// query at position p sees key j where j <= p and p - j < window.

struct Geometry {
    const u32 *queries, *keys;
    u64 sequences, heads, key_heads, dim, window;

    DEVICE float scale() const { return 1.0f / sqrtf((float)dim); }
    DEVICE u64 key_head(u64 head) const { return head / (heads / key_heads); }
};

// One sequence: its first rows, and the number of keys before the first query.
struct Sequence {
    u64 query, key, queries, keys, before;
    DEVICE Sequence(const Geometry& g, u64 s)
        : query(g.queries[s]), key(g.keys[s]), queries(g.queries[s + 1] - query), keys(g.keys[s + 1] - key),
          before(keys - queries) {}
};

DEVICE bool is_visible(u64 position, u64 key, u64 window) { return key <= position && position - key < window; }

// The keys that the queries `row .. row + rows` of a sequence see.
struct KeyRange {
    u64 first, end;
    DEVICE KeyRange(const Sequence& s, u64 row, u64 rows, u64 window) {
        u64 position = s.before + row;
        first = position >= window ? position - window + 1 : 0;
        end = position + rows;
    }
};

// The queries of a sequence that see one of its keys `key .. key + rows`.
struct QueryRange {
    u64 first, end;
    DEVICE QueryRange(const Sequence& s, u64 key, u64 rows, u64 window) {
        u64 past = key + rows - 1 + minimum(window, s.keys);
        first = key > s.before ? key - s.before : 0;
        end = past > s.before ? minimum(s.queries, past - s.before) : 0;
    }
};

#define GEOMETRY const u32 *queries, const u32 *keys, u64 sequences, u64 heads, u64 key_heads, u64 dim, u64 window
