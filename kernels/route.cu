// The router: softmax over E experts, the K largest, and the backward of both, in f32. One warp per token; a lane has
// every 32nd expert. Grid: ceil(T / 4) blocks of 128 threads. Memory-bound, but small: E values per token.

DEVICE u64 token_of_warp() { return (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

// Whether (value a, expert i) comes before (b, j): larger values first, equal values by expert. NO_EXPERT comes last.
#define NO_EXPERT 0xffffffffu
DEVICE bool before(float a, u32 i, float b, u32 j) { return j == NO_EXPERT || (i != NO_EXPERT && (a > b || (a == b && i < j))); }

// ids [T, K], weights [T, K] (divided by their sum if `renormalize`), probabilities [T, E]. E is at most 1024: a lane
// marks its experts in 32 bits.
KERNEL(128, route, (const float* logits, u32* ids, float* weights, float* probabilities, u64 tokens, u32 experts, u32 top_k,
                    int renormalize)) {
    u64 t = token_of_warp();
    if (t >= tokens) return;
    u32 lane = threadIdx.x % 32;
    logits += t * experts;
    float* p = probabilities + t * experts;
    ids += t * top_k;
    weights += t * top_k;

    float highest = NEGATIVE_INFINITY;
    for (u32 e = lane; e < experts; e += 32) highest = maximum(highest, logits[e]);
    highest = warp_max(highest);
    float total = 0.0f;
    for (u32 e = lane; e < experts; e += 32) {
        p[e] = expf(logits[e] - highest);
        total += p[e];
    }
    float inverse = 1.0f / warp_sum(total);
    for (u32 e = lane; e < experts; e += 32) p[e] *= inverse;

    u32 taken = 0;
    float sum = 0.0f;
    for (u32 k = 0; k < top_k; k++) {
        float best = 0.0f;
        u32 id = NO_EXPERT;
        for (u32 e = lane; e < experts; e += 32) {
            // NaN counts as the smallest value, so that the K experts are distinct for any logits.
            float x = p[e] == p[e] ? p[e] : -1.0f;
            if (!(taken >> e / 32 & 1) && before(x, e, best, id)) best = x, id = e;
        }
        for (int other = 16; other > 0; other /= 2) {
            float x = __shfl_xor_sync(FULL_WARP, best, other);
            u32 e = __shfl_xor_sync(FULL_WARP, id, other);
            if (before(x, e, best, id)) best = x, id = e;
        }
        if (id % 32 == lane) {
            taken |= 1u << id / 32;
            ids[k] = id;
            weights[k] = p[id];
        }
        sum += best < 0.0f ? __int_as_float(0x7fc00000) : best;
    }
    if (renormalize) {
        __syncwarp();
        for (u32 k = lane; k < top_k; k += 32) weights[k] /= sum;
    }
}

// dlogits [T, E] from the gradient of the routing weights [T, K]. Through the division by the sum s (w = p / s):
// dp_k = (dw_k − Σ_j dw_j·w_j) / s. Through the softmax: dlogit = p · (dp − Σ p·dp), dp = 0 for experts not chosen.
KERNEL(128, route_backward, (const float* dweights, const u32* ids, const float* weights, const float* probabilities,
                             float* dlogits, u64 tokens, u32 experts, u32 top_k, int renormalize)) {
    u64 t = token_of_warp();
    if (t >= tokens) return;
    u32 lane = threadIdx.x % 32;
    dweights += t * top_k;
    ids += t * top_k;
    weights += t * top_k;
    const float* p = probabilities + t * experts;
    dlogits += t * experts;

    float along = 0.0f, scale = 1.0f;
    if (renormalize) {
        float total = 0.0f;
        for (u32 k = 0; k < top_k; k++) {
            along += dweights[k] * weights[k];
            total += p[ids[k]];
        }
        scale = 1.0f / total;
    }
    float mean = 0.0f;
    for (u32 k = 0; k < top_k; k++) mean += p[ids[k]] * ((dweights[k] - along) * scale);
    for (u32 e = lane; e < experts; e += 32) dlogits[e] = -p[e] * mean;
    __syncwarp();
    for (u32 k = lane; k < top_k; k += 32) dlogits[ids[k]] = p[ids[k]] * ((dweights[k] - along) * scale - mean);
}

// weights [slots] = 0 where the expert of the slot is among `count` experts. Grid: one thread per slot.
KERNEL(256, zero_weights, (const u32* ids, float* weights, const u32* experts, u64 slots, u64 count)) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= slots) return;
    for (u64 j = 0; j < count; j++) {
        if (ids[i] == experts[j]) weights[i] = 0.0f;
    }
}
