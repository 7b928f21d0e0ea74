// Tensor cores from sm_80 on: the instructions that feed them and the one that multiplies.

#define TENSOR_CORES

// Two bf16 in a register, the first in the lower half.
struct Fragment {
    u32 r[4];
};

#ifdef __CUDA_ARCH__

DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// 16 bytes from global to shared memory, in the background; zeros unless `valid`.
DEVICE void copy_16(bf16* to, const bf16* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// Ends a group of copies.
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last `pending` groups have arrived.
template <int pending> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Four 8 x 8 matrices; lane 8 i + r gives the address of row r of matrix i. Of matrix i, r[i] gets row lane / 4, columns
// 2 (lane % 4) and the next; of its transpose if `transposed`.
template <bool transposed> DEVICE Fragment load_matrices(const bf16* row) {
    Fragment f;
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                     : "r"(shared_address(row))
                     : "memory");
    return f;
}

// c += a · b with a 16 x 16, b 16 x 8, in f32.
DEVICE void multiply_add(float (&c)[4], const Fragment& a, u32 b0, u32 b1) {
    // Volatile: the whole warp executes it together, so it must not be moved into a branch.
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}

// The two rounded to bf16, `low` in the lower half.
DEVICE u32 rounded_pair(float low, float high) {
    u32 two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

#else  // The same by what the PTX manual says, so that tests can run it on the CPU.

// Each thread's groups of copies, the last one open.
struct Copy {
    bf16* to;
    const bf16* from;
    bool valid;

    void run() const {
        for (int i = 0; i < 8; i++) to[i].bits = valid ? from[i].bits : 0;
    }
};
static std::vector<std::vector<Copy>> copies[1024];
// Whether a thread's copies arrived without being shown to products of warpgroups (wgmma.cuh).
static bool unshown[1024];

DEVICE u32 shared_address(const void* at) { return (u32)(static_cast<const unsigned char*>(at) - emulator::arena.bytes); }

DEVICE void copy_16(bf16* to, const bf16* from, bool valid) {
    auto& groups = copies[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({to, from, valid});
    if (emulator::at_once) groups.back().back().run();
}
DEVICE void copies_end() {
    auto& groups = copies[threadIdx.x];
    groups.resize(groups.empty() ? 2 : groups.size() + 1);
}
template <int pending> DEVICE void copies_wait() {
    auto& groups = copies[threadIdx.x];
    for (; groups.size() > pending + 1; groups.erase(groups.begin()))
        for (const Copy& copy : groups.front()) {
            unshown[threadIdx.x] = true;
            if (!emulator::at_once) copy.run();
        }
}

DEVICE u32 pair(bf16 low, bf16 high) { return (u32)low.bits | (u32)high.bits << 16; }
DEVICE u32 rounded_pair(float low, float high) { return pair(to_bf16(low), to_bf16(high)); }

// What the lanes of a warp show each other.
static const bf16* shown_rows[1024];
static u32 shown_factors[1024][6];

template <bool transposed> DEVICE Fragment load_matrices(const bf16* row) {
    int lane = (int)(threadIdx.x % 32), at = lane / 4, two = lane % 4 * 2;
    const bf16** rows = shown_rows + (threadIdx.x - lane);
    rows[lane] = row;
    __syncwarp();
    Fragment f;
    for (int i = 0; i < 4; i++, rows += 8)
        f.r[i] = transposed ? pair(rows[two][at], rows[two + 1][at]) : pair(rows[at][two], rows[at][two + 1]);
    __syncwarp();
    return f;
}

// Element (row, k) of a is in lane 4 (row % 8) + k % 8 / 2, register row / 8 + 2 (k / 8), half k % 2; element (k, col) of b
// in lane 4 col + k % 8 / 2, register k / 8, half k % 2; c[0..2] are row lane / 4, columns 2 (lane % 4) and the next,
// c[2..4] those 8 rows below.
DEVICE void multiply_add(float (&c)[4], const Fragment& a, u32 b0, u32 b1) {
    int lane = (int)(threadIdx.x % 32);
    u32(*factors)[6] = shown_factors + (threadIdx.x - lane);
    for (int i = 0; i < 4; i++) factors[lane][i] = a.r[i];
    factors[lane][4] = b0;
    factors[lane][5] = b1;
    __syncwarp();
    auto half = [](u32 two, int k) { return __int_as_float((int)(k % 2 ? two & 0xffff0000u : two << 16)); };
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            u32 x = factors[lane / 4 * 4 + k % 8 / 2][i / 2 + k / 8 * 2];
            u32 y = factors[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2][4 + k / 8];
            c[i] += half(x, k) * half(y, k);
        }
    __syncwarp();
}

#endif
