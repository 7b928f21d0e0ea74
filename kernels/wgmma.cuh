// Warpgroup matrix multiply-accumulate, which only sm_90a has: wgmma.mma_async.m64nNk16, N = TILE_COLUMNS. Both operands come from
// shared memory (wgmma_layout.cuh), the accumulators are in registers, and the work is asynchronous. All four warps of
// the warpgroup take part in each of these functions except fence_async_proxy. The tests replace this file, to run the
// kernels on the CPU.

#define ACCUMULATORS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define ACCUMULATORS_16(i) ACCUMULATORS_4(i), ACCUMULATORS_4(i + 4), ACCUMULATORS_4(i + 8), ACCUMULATORS_4(i + 12)
// Accumulators listed as in/out operands, so that the compiler cannot move accesses to them across the asynchronous
// wgmma. The operands after them are numbered from 64 or from 128.
#define ACCUMULATORS_64(i) ACCUMULATORS_16(i), ACCUMULATORS_16(i + 16), ACCUMULATORS_16(i + 32), ACCUMULATORS_16(i + 48)
#define REGISTERS_64                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#if TILE_COLUMNS == 128
#define ACCUMULATORS ACCUMULATORS_64(0)
#define INSTRUCTION "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
#define REGISTERS REGISTERS_64
#define OPERANDS "%64, %65, onto, 1, 1, %66, %67"
#define ONTO "%68"
#define PENDING "%64"
#else
#define ACCUMULATORS ACCUMULATORS_64(0), ACCUMULATORS_64(64)
#define INSTRUCTION "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"
#define REGISTERS                                                                                      \
    REGISTERS_64                                                                                       \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "               \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "     \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define OPERANDS "%128, %129, onto, 1, 1, %130, %131"
#define ONTO "%132"
#define PENDING "%128"
#endif

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
        "{ .reg .pred onto; setp.ne.b32 onto, " ONTO ", 0;" INSTRUCTION " {" REGISTERS "}, " OPERANDS "; }"
        : ACCUMULATORS
        : "l"(a), "l"(b), "n"(k_major_a ? 0 : 1), "n"(k_major_b ? 0 : 1), "r"(1));
}

// Closes a group of wgmma.
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the `pending` latest groups are incomplete. Operands of the others may then be overwritten; the
// accumulators may be read when none is pending.
template <int pending> DEVICE void wgmma_wait_group(Accumulators& c) {
    asm volatile("wgmma.wait_group.sync.aligned " PENDING ";" : ACCUMULATORS : "n"(pending) : "memory");
}
