// Gated activations: silu(gate) · up, with the routing weight of its row, too, and the sigmoid gate of a shared expert.
// Memory-bound: every operand is read once. Grid of all kernels here: one block of up to 256 threads per row.

// gate_up [n, 2F] → y [n, F]
template <class T, int W> DEVICE void swiglu(const T* gate_up, T* y, u64 f) {
    const T* gate = gate_up + blockIdx.x * 2 * f;
    const T* up = gate + f;
    y += blockIdx.x * f;
    for (u64 c = threadIdx.x * W; c < f; c += blockDim.x * W) {
        Pack<W> g = load<W>(gate + c), u = load<W>(up + c);
#pragma unroll
        for (int j = 0; j < W; j++) g.v[j] = g.v[j] * sigmoid(g.v[j]) * u.v[j];
        store<W>(y + c, g);
    }
}

// silu'(g) = σ(g) · (1 + g · (1 − σ(g)))
template <class T, int W> DEVICE void swiglu_backward(const T* dy, const T* gate_up, T* dx, u64 f) {
    const T* gate = gate_up + blockIdx.x * 2 * f;
    const T* up = gate + f;
    dy += blockIdx.x * f;
    dx += blockIdx.x * 2 * f;
    for (u64 c = threadIdx.x * W; c < f; c += blockDim.x * W) {
        Pack<W> g = load<W>(gate + c), u = load<W>(up + c), d = load<W>(dy + c);
#pragma unroll
        for (int j = 0; j < W; j++) {
            float s = sigmoid(g.v[j]), value = g.v[j] * s;
            g.v[j] = d.v[j] * u.v[j] * s * (1.0f + g.v[j] * (1.0f - s));
            u.v[j] = d.v[j] * value;
        }
        store<W>(dx + c, g);
        store<W>(dx + f + c, u);
    }
}

// y[row] = w · silu(gate) · up, w = weights[slot_of[row]]. silu(gate) · up is rounded to T first.
template <class T, int W>
DEVICE void weighted_swiglu(const T* gate_up, const float* weights, const u32* slot_of, T* y, u64 f) {
    float w = weights[slot_of[blockIdx.x]];
    const T* gate = gate_up + blockIdx.x * 2 * f;
    const T* up = gate + f;
    y += blockIdx.x * f;
    for (u64 c = threadIdx.x * W; c < f; c += blockDim.x * W) {
        Pack<W> g = load<W>(gate + c), u = load<W>(up + c);
#pragma unroll
        for (int j = 0; j < W; j++) g.v[j] = w * to_f32(from_f32<T>(g.v[j] * sigmoid(g.v[j]) * u.v[j]));
        store<W>(y + c, g);
    }
}

// With d = dy[row], h = silu(gate) · up: dweights[slot] = ⟨d, h⟩, and dx is the gradient for w · d. h and w · d are rounded to T.
template <class T, int W>
DEVICE void weighted_swiglu_backward(const T* dy, const T* gate_up, const float* weights, const u32* slot_of, T* dx,
                                     float* dweights, u64 f) {
    u32 slot = slot_of[blockIdx.x];
    float w = weights[slot], dot = 0.0f;
    const T* gate = gate_up + blockIdx.x * 2 * f;
    const T* up = gate + f;
    dy += blockIdx.x * f;
    dx += blockIdx.x * 2 * f;
    for (u64 c = threadIdx.x * W; c < f; c += blockDim.x * W) {
        Pack<W> g = load<W>(gate + c), u = load<W>(up + c), d = load<W>(dy + c);
#pragma unroll
        for (int j = 0; j < W; j++) {
            float s = sigmoid(g.v[j]), value = g.v[j] * s;
            dot += d.v[j] * to_f32(from_f32<T>(value * u.v[j]));
            float weighted = to_f32(from_f32<T>(d.v[j] * w));
            g.v[j] = weighted * u.v[j] * s * (1.0f + g.v[j] * (1.0f - s));
            u.v[j] = weighted * value;
        }
        store<W>(dx + c, g);
        store<W>(dx + f + c, u);
    }
    dot = block_sum(dot);
    if (threadIdx.x == 0) dweights[slot] = dot;
}

// y[t] = σ(gate[t]) · x[t]
template <class T, int W> DEVICE void sigmoid_gate(const T* x, const T* gate, T* y, u64 d) {
    float s = sigmoid(to_f32(gate[blockIdx.x]));
    x += blockIdx.x * d;
    y += blockIdx.x * d;
    for (u64 c = threadIdx.x * W; c < d; c += blockDim.x * W) {
        Pack<W> a = load<W>(x + c);
#pragma unroll
        for (int j = 0; j < W; j++) a.v[j] *= s;
        store<W>(y + c, a);
    }
}

// dx = σ · dy; dgate = σ · (1 − σ) · ⟨dy, x⟩
template <class T, int W> DEVICE void sigmoid_gate_backward(const T* dy, const T* x, const T* gate, T* dx, T* dgate, u64 d) {
    float s = sigmoid(to_f32(gate[blockIdx.x])), dot = 0.0f;
    dy += blockIdx.x * d;
    x += blockIdx.x * d;
    dx += blockIdx.x * d;
    for (u64 c = threadIdx.x * W; c < d; c += blockDim.x * W) {
        Pack<W> a = load<W>(x + c), g = load<W>(dy + c);
#pragma unroll
        for (int j = 0; j < W; j++) {
            dot += g.v[j] * a.v[j];
            g.v[j] *= s;
        }
        store<W>(dx + c, g);
    }
    dot = block_sum(dot);
    if (threadIdx.x == 0) dgate[blockIdx.x] = from_f32<T>(s * (1.0f - s) * dot);
}

#define TYPED(T, name)                                                                                            \
    KERNEL(256, swiglu_##name, (const T* gate_up, T* y, u64 f)) { BY_WIDTH(T, f, swiglu, gate_up, y, f); }        \
    KERNEL(256, swiglu_backward_##name, (const T* dy, const T* gate_up, T* dx, u64 f)) {                          \
        BY_WIDTH(T, f, swiglu_backward, dy, gate_up, dx, f);                                                      \
    }                                                                                                             \
    KERNEL(256, weighted_swiglu_##name, (const T* gate_up, const float* weights, const u32* slot_of, T* y, u64 f)) { \
        BY_WIDTH(T, f, weighted_swiglu, gate_up, weights, slot_of, y, f);                                         \
    }                                                                                                             \
    KERNEL(256, weighted_swiglu_backward_##name, (const T* dy, const T* gate_up, const float* weights,            \
                                                  const u32* slot_of, T* dx, float* dweights, u64 f)) {           \
        BY_WIDTH(T, f, weighted_swiglu_backward, dy, gate_up, weights, slot_of, dx, dweights, f);                 \
    }                                                                                                             \
    KERNEL(256, sigmoid_gate_##name, (const T* x, const T* gate, T* y, u64 d)) {                                  \
        BY_WIDTH(T, d, sigmoid_gate, x, gate, y, d);                                                              \
    }                                                                                                             \
    KERNEL(256, sigmoid_gate_backward_##name, (const T* dy, const T* x, const T* gate, T* dx, T* dgate, u64 d)) { \
        BY_WIDTH(T, d, sigmoid_gate_backward, dy, x, gate, dx, dgate, d);                                         \
    }

TYPED(float, f32)
TYPED(bf16, bf16)
