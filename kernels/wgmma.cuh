// Warpgroup matrix multiply-accumulate, which only sm_90a has: wgmma.mma_async.m64n128k16. Both operands come from
// shared memory (wgmma_layout.cuh), the accumulators are in registers, and the work is asynchronous. All four warps of
// the warpgroup take part in each of these functions except fence_async_proxy. The tests replace this file, to run the
// kernels on the CPU.

#define ACCUMULATORS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define ACCUMULATORS_16(i) ACCUMULATORS_4(i), ACCUMULATORS_4(i + 4), ACCUMULATORS_4(i + 8), ACCUMULATORS_4(i + 12)
// Accumulators listed as in/out operands, so that the compiler cannot move accesses to them across the asynchronous
// wgmma.
#define ACCUMULATORS ACCUMULATORS_16(0), ACCUMULATORS_16(16), ACCUMULATORS_16(32), ACCUMULATORS_16(48)

// Makes this thread's writes to shared memory visible to wgmma, which reads through the async proxy. A barrier must
// follow before another warp's wgmma reads them.
// NO_ASYNC_FENCE leaves it out, only to measure what it costs (benches/cuda_ops): results may then be wrong.
DEVICE void fence_async_proxy() {
#ifndef NO_ASYNC_FENCE
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Orders earlier register accesses before the next wgmma on these accumulators.
DEVICE void wgmma_fence(Accumulators& c) { asm volatile("wgmma.fence.sync.aligned;" : ACCUMULATORS::"memory"); }

// c += a · b over a depth of 16, asynchronously. a and b are descriptors; `k_major_a`, `k_major_b`: their layouts.
template <bool k_major_a, bool k_major_b> DEVICE void wgmma(Accumulators& c, u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred onto; setp.ne.b32 onto, %68, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, onto, 1, 1, %66, %67; }"
        : ACCUMULATORS
        : "l"(a), "l"(b), "n"(k_major_a ? 0 : 1), "n"(k_major_b ? 0 : 1), "r"(1));
}

// Closes a group of wgmma.
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups. Only then may the accumulators be read and the operands be overwritten.
DEVICE void wgmma_wait_all(Accumulators& c) { asm volatile("wgmma.wait_group.sync.aligned 0;" : ACCUMULATORS::"memory"); }
