// Included in every module: number formats, 16-byte loads and stores, reductions over warps and blocks.
//
// No CUDA header is included, because the user's machine may have none, and nothing is linked. Everything here is
// deterministic: sums have a fixed order, and there are no floating-point atomics.

#define DEVICE __device__ __forceinline__

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The tests compile the kernels as C++ and run them on the CPU, with their own definitions of these macros and
// functions.
#ifndef KERNEL
// A kernel with at most `threads` threads per block: KERNEL(256, name, (parameters)) { .. }. Parameters are pointers,
// int, u32, u64, float and double, without `__restrict__`, which belongs on the device functions that do the work.
// Every kernel is declared in src/backend/cuda/kernels.rs with the same names and types.
#define KERNEL(threads, name, parameters) extern "C" __global__ void __launch_bounds__(threads) name parameters
// The same, with so few registers per thread that `blocks` blocks fit on a multiprocessor.
#define KERNEL_BLOCKS(threads, blocks, name, parameters) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters
// An array in shared memory: SHARED(float, tile, [32][33]);
#define SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions
// The launch's dynamic shared memory, aligned to 16 bytes, as a byte pointer.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// The bits of x rounded to bf16, to nearest even; NaN stays NaN.
DEVICE u16 bf16_bits(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

#define FULL_WARP 0xffffffffu
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// --- number formats --------------------------------------------------------------------------------------------------

// The upper half of an f32.
struct bf16 {
    u16 bits;
};

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(bf16 x) { return __int_as_float((int)((u32)x.bits << 16)); }

// Rounds to nearest even; NaN stays NaN.
DEVICE bf16 to_bf16(float x) {
    bf16 y;
    y.bits = bf16_bits(x);
    return y;
}

template <class T> DEVICE T from_f32(float x);
template <> DEVICE float from_f32<float>(float x) { return x; }
template <> DEVICE bf16 from_f32<bf16>(float x) { return to_bf16(x); }

// x rounded to T, where a separate pass over it would have stored it.
template <class T> DEVICE float rounded(float x) { return to_f32(from_f32<T>(x)); }

// --- loads and stores ------------------------------------------------------------------------------------------------

// Elements of T in 16 bytes, the widest load of a thread.
template <class T> struct Width {
    static const int value = 16 / (int)sizeof(T);
};

// Calls function<T, W>(..) for rows of n elements. W is 16 bytes' worth if that keeps every row aligned, else 1.
#define BY_WIDTH(T, n, function, ...) \
    (n) % Width<T>::value ? function<T, 1>(__VA_ARGS__) : function<T, Width<T>::value>(__VA_ARGS__)

struct alignas(16) Quad {
    u32 word[4];
};

// W consecutive values in registers, as f32.
template <int W> struct Pack {
    float v[W];
};

// W elements as f32: in 16-byte loads if W elements are a multiple of 16 bytes (then `from` must be aligned to 16
// bytes), else one by one.
template <int W, class T> DEVICE Pack<W> load(const T* from) {
    Pack<W> out;
    if constexpr (W * sizeof(T) % 16 == 0) {
        const int E = Width<T>::value;
#pragma unroll
        for (int i = 0; i < W / E; i++) {
            Quad q = reinterpret_cast<const Quad*>(from)[i];
            const T* values = reinterpret_cast<const T*>(&q);
#pragma unroll
            for (int j = 0; j < E; j++) out.v[i * E + j] = to_f32(values[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) out.v[i] = to_f32(from[i]);
    }
    return out;
}

// The first `count` of W elements, the others 0: what lies behind them may never have been written.
template <int W, class T> DEVICE Pack<W> load_first(const T* from, u64 count) {
    if (count >= W) return load<W>(from);
    Pack<W> out = {};
#pragma unroll
    for (int i = 0; i < W; i++)
        if ((u64)i < count) out.v[i] = to_f32(from[i]);
    return out;
}

template <int W, class T> DEVICE void store(T* to, const Pack<W>& x) {
    if constexpr (W * sizeof(T) % 16 == 0) {
        const int E = Width<T>::value;
#pragma unroll
        for (int i = 0; i < W / E; i++) {
            Quad q;
            T* values = reinterpret_cast<T*>(&q);
#pragma unroll
            for (int j = 0; j < E; j++) values[j] = from_f32<T>(x.v[i * E + j]);
            reinterpret_cast<Quad*>(to)[i] = q;
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) to[i] = from_f32<T>(x.v[i]);
    }
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

template <class T> DEVICE T minimum(T a, T b) { return a < b ? a : b; }
// A NaN in b is ignored.
template <class T> DEVICE T maximum(T a, T b) { return b > a ? b : a; }

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// --- reductions over warps and blocks, with the same result in every lane --------------------------------------------

template <class T> DEVICE T warp_sum(T x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_WARP, x, lane);
    return x;
}

template <class T> DEVICE T warp_max(T x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x = maximum(x, __shfl_xor_sync(FULL_WARP, x, lane));
    return x;
}

// Over all threads of a one-dimensional block of whole warps. Every thread of the block must call it.
template <class T> DEVICE T block_sum(T x) {
    SHARED(T, partial, [32]);
    x = warp_sum(x);
    u32 warps = blockDim.x / 32;
    if (warps == 1) return x;
    __syncthreads();  // an earlier sum may still be read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < warps ? partial[threadIdx.x % 32] : T(0));
}

DEVICE float block_max(float x) {
    SHARED(float, partial, [32]);
    x = warp_max(x);
    u32 warps = blockDim.x / 32;
    if (warps == 1) return x;
    __syncthreads();  // an earlier maximum may still be read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max(threadIdx.x % 32 < warps ? partial[threadIdx.x % 32] : NEGATIVE_INFINITY);
}
