// Tensor core instructions of sm_80 and later: asynchronous copies to shared memory (cp.async), ldmatrix, mma.sync. The
// tests replace this file, to run the kernels on the CPU.

// The registers of an ldmatrix.x4 or of operand a of mma.m16n8k16: each holds two bf16, the first in the lower half.
struct Fragment {
    u32 r[4];
};

DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Copies 16 bytes from global to shared memory asynchronously; writes zeros instead unless `valid`.
DEVICE void cp_async_16(bf16* to, const bf16* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// Closes a group of this thread's copies.
DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the `pending` latest of this thread's groups are incomplete.
template <int pending> DEVICE void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Loads four 8 x 8 matrices; lane 8 i + r passes the shared address of row r of matrix i. r[i] gets, of matrix i, row lane / 4
// and columns 2 (lane % 4) and the next; of its transpose if `transposed`.
template <bool transposed> DEVICE Fragment ldmatrix_x4(u32 row) {
    Fragment f;
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                     : "r"(row)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                     : "r"(row)
                     : "memory");
    return f;
}

template <bool transposed> DEVICE Fragment ldmatrix_x4(const bf16* row) { return ldmatrix_x4<transposed>(shared_address(row)); }

// c += a · b for a 16 x 16 and b 16 x 8, accumulated in f32. The whole warp takes part.
DEVICE void mma_m16n8k16(float (&c)[4], const Fragment& a, u32 b0, u32 b1) {
    // Volatile, so that the compiler does not move it into a branch.
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}

// Both values rounded to bf16, `low` in the lower half.
DEVICE u32 to_bf16x2(float low, float high) {
    u32 two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}
