// The subset of CUDA C++ that is needed to run the kernels on the CPU: this file, common.cuh and a module are compiled
// as one file. mma.h and wgmma.h replace the module's files of PTX instructions.
//
// Blocks run one after another, in order or shuffled by a seed. The threads of a block are fibers: each runs until it
// must wait for others (a barrier, a shuffle, a vote), then the next one runs. Shared memory is filled with NaN
// patterns before each block. Detected errors are: a barrier that not all threads reach, arguments of wrong types, a
// block larger than the launch bound, writes beyond dynamic shared memory, and misuse of asynchronous copies and wgmma.
// Floating-point atomics do not exist here, because no kernel may use them.

#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

typedef unsigned long long u64;
typedef void (*Function)();

// --- kernels and their arguments -------------------------------------------------------------------------------------

template <class T> constexpr char code() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_same_v<T, int>) return 'i';
    else if constexpr (std::is_same_v<T, unsigned>) return 'u';
    else if constexpr (std::is_same_v<T, u64>) return 'l';
    else if constexpr (std::is_same_v<T, float>) return 'f';
    else {
        static_assert(std::is_same_v<T, double>, "a kernel's parameter is a pointer, int, u32, u64, float or double");
        return 'd';
    }
}

template <class T> T argument(u64 bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct Kernel {
    std::string name, signature;
    unsigned threads;
    Function function;
    void (*call)(Function, const u64*);
};

static std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

template <class... P, size_t... I>
void call_with(Function function, const u64* arguments, std::index_sequence<I...>) {
    reinterpret_cast<void (*)(P...)>(function)(argument<P>(arguments[I])...);
}

template <class... P> int add(const char* name, unsigned threads, void (*function)(P...)) {
    kernels().push_back({name, std::string{code<P>()...}, threads, reinterpret_cast<Function>(function),
                         [](Function f, const u64* a) { call_with<P...>(f, a, std::index_sequence_for<P...>()); }});
    return 0;
}

// --- fibers ----------------------------------------------------------------------------------------------------------

struct Barrier {
    unsigned arrived = 0, generation = 0;
};

const size_t STACK = 128 * 1024;

struct Fiber {
    ucontext_t context;
    jmp_buf state;
    std::unique_ptr<char[]> stack;
    bool started = false, done = true;
    // It waits for this barrier to leave this generation.
    const Barrier* waiting = nullptr;
    unsigned generation = 0;
};

// The values exchanged by the lanes of one mask. Two sets, because a fast lane may already be at the next exchange.
struct Exchange {
    unsigned mask;
    Barrier barrier;
    u64 slots[2][32];
};

struct Block {
    const Kernel* kernel;
    const u64* arguments;
    Barrier barrier;
    std::vector<std::vector<Exchange>> warps;
};

static std::vector<std::unique_ptr<Fiber>> fibers;
static Fiber* running;
static jmp_buf scheduler;
static Block block;
static std::string error;

// Returns to the scheduler until this fiber runs again.
__attribute__((noinline)) static void yield() {
    if (!_setjmp(running->state)) _longjmp(scheduler, 1);
    asm volatile("" ::: "memory");  // a compiler barrier: other fibers have changed globals
}

[[noreturn]] static void fail(const std::string& message) {
    char at[160];
    snprintf(at, sizeof at, " (block %u,%u,%u thread %u)", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    error = message + at;
    _longjmp(scheduler, 1);
}

static void fiber_main() {
    for (;;) {
        block.kernel->call(block.kernel->function, block.arguments);
        running->done = true;
        yield();
    }
}

__attribute__((noinline)) static void resume(Fiber* fiber) {
    running = fiber;
    if (_setjmp(scheduler)) return;
    if (fiber->started) _longjmp(fiber->state, 1);
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = STACK;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    setcontext(&fiber->context);
}

static void arrive(Barrier& barrier, unsigned expected) {
    unsigned generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    Fiber* self = running;
    self->waiting = &barrier;
    self->generation = generation;
    yield();
    self->waiting = nullptr;
}

// Waits for the lanes of the mask and returns their values.
static const u64* exchange(unsigned mask, u64 value) {
    unsigned lane = threadIdx.x % 32;
    if (!(mask >> lane & 1)) fail("a lane that is not in its own mask");
    if (threadIdx.x / 32 * 32 + 32 - __builtin_clz(mask) > blockDim.x) fail("a mask with lanes that the block lacks");
    auto& masks = block.warps[threadIdx.x / 32];
    Exchange* with = nullptr;
    for (Exchange& e : masks) with = e.mask == mask ? &e : with;
    if (!with) {
        if (masks.size() == masks.capacity()) fail("a warp with more than 32 different masks");
        masks.push_back({mask, {}, {}});
        with = &masks.back();
    }
    u64* slots = with->slots[with->barrier.generation % 2];
    slots[lane] = value;
    arrive(with->barrier, __builtin_popcount(mask));
    return slots;
}

// --- shared memory ---------------------------------------------------------------------------------------------------

const size_t STATIC_LIMIT = 48 * 1024, ARENA = 512 * 1024;
const size_t DYNAMIC_AT = 256;  // not aligned to more than that, as after static arrays on a GPU
const unsigned char POISON = 0xff;  // NaN in every floating-point format
struct alignas(1024) Arena {
    unsigned char bytes[ARENA];
};
static Arena arena;
static std::vector<std::pair<const void*, size_t>> arrays;  // of this block: declaration and offset
static size_t dynamic_end, arena_used;

static void begin_shared(size_t dynamic) {
    dynamic_end = DYNAMIC_AT + (dynamic + 15) / 16 * 16;
    arrays.clear();
    arena_used = dynamic_end + 64;
    memset(arena.bytes, POISON, arena_used);
}

static void* shared(const void* declaration, size_t size) {
    for (auto& a : arrays)
        if (a.first == declaration) return arena.bytes + a.second;
    size_t at = arena_used;
    arena_used += (size + 15) / 16 * 16;
    if (arena_used - dynamic_end - 64 > STATIC_LIMIT) fail("more than 48 KiB of static shared memory");
    memset(arena.bytes + at, POISON, arena_used - at);
    arrays.push_back({declaration, at});
    return arena.bytes + at;
}

// Asynchronous copies run immediately in shuffled launches, else only when they are waited for: one finds writes that
// come too early, the other reads that come too early.
static bool eager;
static u64 blocks_run;  // including the current one

// --- running ---------------------------------------------------------------------------------------------------------

static u64 random_state;
static unsigned below(unsigned n) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return unsigned((random_state >> 33) % n);
}

template <class T> void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[below(unsigned(i))]);
}

static void run_block(std::vector<unsigned>& order, bool shuffled) {
    unsigned threads = blockDim.x;
    block.barrier = {};
    blocks_run++;
    for (auto& masks : block.warps) masks.clear();
    for (unsigned t = 0; t < threads; t++) fibers[t]->done = false, fibers[t]->waiting = nullptr;
    if (shuffled) shuffle(order);
    unsigned halted = 0;  // bit mask of warps that do not run for a while
    for (unsigned left = threads; left > 0;) {
        bool moved = false;
        if (shuffled && below(8) == 0) halted = below(1u << 16) << 16 | below(1u << 16);
        for (unsigned t : order) {
            Fiber* fiber = fibers[t].get();
            if (fiber->done || (fiber->waiting && fiber->waiting->generation == fiber->generation)) continue;
            moved = true;
            if (halted >> t / 32 & 1) continue;
            threadIdx.x = t;
            resume(fiber);
            if (!error.empty()) return;
            left -= fiber->done;
        }
        if (!moved) {
            error = "threads wait at a barrier or a warp's exchange that others never reach";
            return;
        }
    }
    for (size_t i = 0; i < 64; i++)
        if (arena.bytes[dynamic_end + i] != POISON) error = "written beyond the dynamic shared memory";
}

}  // namespace emulator

// The types of a kernel's parameters; null if there is no such kernel.
extern "C" const char* emulator_signature(const char* name) {
    for (const auto& k : emulator::kernels())
        if (k.name == name) return k.signature.c_str();
    return nullptr;
}

// Runs a kernel. Returns null or an error message. A seed other than 0 shuffles blocks and threads.
extern "C" const char* emulator_launch(const char* name, const unsigned* blocks, unsigned threads, size_t shared,
                                       const char* signature, const uint64_t* arguments, uint64_t seed) {
    using namespace emulator;
    error.clear();
    block.kernel = nullptr;
    for (const Kernel& k : kernels())
        if (k.name == name) block.kernel = &k;
    if (!block.kernel) return (error = std::string("there is no kernel ") + name).c_str();
    if (block.kernel->signature != signature)
        return (error = std::string(name) + " takes " + block.kernel->signature + ", not " + signature).c_str();
    if (threads > block.kernel->threads || threads == 0)
        return (error = std::string(name) + ": blocks of " + std::to_string(threads) + " threads").c_str();
    std::vector<u64> bits(arguments, arguments + strlen(signature));
    block.arguments = bits.data();
    while (fibers.size() < threads) {
        fibers.push_back(std::make_unique<Fiber>());
        fibers.back()->stack.reset(new char[STACK]);
    }
    block.warps.resize((threads + 31) / 32);
    for (auto& masks : block.warps) masks.reserve(32);
    gridDim = {blocks[0], blocks[1], blocks[2]};
    blockDim = {threads, 1, 1};
    threadIdx = {0, 0, 0};
    random_state = seed;
    eager = seed != 0;
    std::vector<unsigned> order(threads);
    for (unsigned t = 0; t < threads; t++) order[t] = t;
    std::vector<u64> grid((u64)blocks[0] * blocks[1] * blocks[2]);
    for (u64 i = 0; i < grid.size(); i++) grid[i] = i;
    if (seed) shuffle(grid);
    for (u64 i : grid) {
        blockIdx = {unsigned(i % blocks[0]), unsigned(i / blocks[0] % blocks[1]), unsigned(i / blocks[0] / blocks[1])};
        begin_shared(shared);
        run_block(order, seed != 0);
        if (!error.empty()) {
            for (auto& fiber : fibers) fiber->started = false;
            return (error = std::string(name) + ": " + error).c_str();
        }
    }
    return nullptr;
}

// --- functions of CUDA -----------------------------------------------------------------------------------------------

#define KERNEL(threads, name, parameters)                                                       \
    extern "C" void name parameters;                                                            \
    __attribute__((unused)) static int registered_##name = emulator::add(#name, threads, name); \
    extern "C" void name parameters
#define KERNEL_BLOCKS(threads, blocks, name, parameters) KERNEL(threads, name, parameters)

#define SHARED(type, name, dimensions)        \
    typedef type name##_array dimensions;     \
    static const char name##_declaration = 0; \
    name##_array& name = *static_cast<name##_array*>(emulator::shared(&name##_declaration, sizeof(name##_array)))

#define DYNAMIC_SHARED(name) unsigned char* name = emulator::arena.bytes + emulator::DYNAMIC_AT

static inline void __syncthreads() { emulator::arrive(emulator::block.barrier, blockDim.x); }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(mask, 0); }

template <class T> T __shfl_sync(unsigned mask, T value, int from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    emulator::u64 bits = 0;
    memcpy(&bits, &value, sizeof value);
    const emulator::u64* all = emulator::exchange(mask, bits);
    if (!(mask >> (from & 31) & 1)) emulator::fail("a shuffle from a lane that takes no part");
    return emulator::argument<T>(all[from & 31]);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ lanes);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
    int from = int(threadIdx.x % 32) - int(lanes);
    return __shfl_sync(mask, value, from < 0 ? int(threadIdx.x % 32) : from);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
    int from = int(threadIdx.x % 32) + int(lanes);
    return __shfl_sync(mask, value, from > 31 ? int(threadIdx.x % 32) : from);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const emulator::u64* all = emulator::exchange(mask, predicate != 0);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) votes |= unsigned(all[lane]) << lane;
    return votes;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T, class V> T atomic(T* at, V value, T (*with)(T, T)) {
    static_assert(std::is_integral_v<T>, "floating-point atomics are not deterministic");
    T old = *at;
    *at = with(old, T(value));
    return old;
}
template <class T, class V> T atomicAdd(T* at, V v) { return atomic(at, v, +[](T a, T b) { return T(a + b); }); }
template <class T, class V> T atomicMax(T* at, V v) { return atomic(at, v, +[](T a, T b) { return a > b ? a : b; }); }
template <class T, class V> T atomicMin(T* at, V v) { return atomic(at, v, +[](T a, T b) { return a < b ? a : b; }); }
template <class T, class V> T atomicOr(T* at, V v) { return atomic(at, v, +[](T a, T b) { return T(a | b); }); }
template <class T, class V> T atomicExch(T* at, V v) { return atomic(at, v, +[](T, T b) { return b; }); }
template <class T> T atomicCAS(T* at, T expected, T value) {
    T old = *at;
    if (old == expected) *at = value;
    return old;
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <class T> T __ldg(const T* at) { return *at; }
static inline int __float_as_int(float x) { return emulator::argument<int>(emulator::u64(*(unsigned*)&x)); }
static inline float __int_as_float(int x) { return emulator::argument<float>(emulator::u64((unsigned)x)); }
static inline unsigned short bf16_bits(float x) {
    unsigned bits = (unsigned)__float_as_int(x);
    return (unsigned short)(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline unsigned __float_as_uint(float x) { return (unsigned)__float_as_int(x); }
static inline float __uint_as_float(unsigned x) { return __int_as_float((int)x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
#define __expf expf  // the C library has functions with these names
#define __logf logf
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
