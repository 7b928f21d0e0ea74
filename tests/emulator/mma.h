// Stands in for kernels/mma.cuh on the CPU: the same functions, as the PTX manual defines the instructions.

struct Fragment {
    u32 r[4];
};

// Each thread's groups of asynchronous copies, the last one open.
struct Copy {
    bf16* to;
    const bf16* from;
    bool valid;

    void run() const {
        for (int i = 0; i < 8; i++) to[i].bits = valid ? from[i].bits : 0;
    }
};
static std::vector<std::vector<Copy>> copies[1024];
// Whether a thread's copies have completed without a fence_async_proxy after them (wgmma.h).
static bool unfenced[1024];

DEVICE u32 shared_address(const void* at) { return (u32)(static_cast<const unsigned char*>(at) - emulator::arena.bytes); }

DEVICE void cp_async_16(bf16* to, const bf16* from, bool valid) {
    auto& groups = copies[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({to, from, valid});
    if (emulator::eager) groups.back().back().run();
}
DEVICE void cp_async_commit_group() {
    auto& groups = copies[threadIdx.x];
    groups.resize(groups.empty() ? 2 : groups.size() + 1);
}
template <int pending> DEVICE void cp_async_wait_group() {
    auto& groups = copies[threadIdx.x];
    for (; groups.size() > pending + 1; groups.erase(groups.begin()))
        for (const Copy& copy : groups.front()) {
            unfenced[threadIdx.x] = true;
            if (!emulator::eager) copy.run();
        }
}

DEVICE u32 pair(bf16 low, bf16 high) { return (u32)low.bits | (u32)high.bits << 16; }
DEVICE u32 to_bf16x2(float low, float high) { return pair(to_bf16(low), to_bf16(high)); }

// What the lanes of a warp pass to each other.
static const bf16* lane_rows[1024];
static u32 lane_operands[1024][6];

template <bool transposed> DEVICE Fragment ldmatrix_x4(u32 address) {
    const bf16* row = reinterpret_cast<const bf16*>(emulator::arena.bytes + address);
    int lane = (int)(threadIdx.x % 32), at = lane / 4, two = lane % 4 * 2;
    const bf16** rows = lane_rows + (threadIdx.x - lane);
    rows[lane] = row;
    __syncwarp();
    Fragment f;
    for (int i = 0; i < 4; i++, rows += 8)
        f.r[i] = transposed ? pair(rows[two][at], rows[two + 1][at]) : pair(rows[at][two], rows[at][two + 1]);
    __syncwarp();
    return f;
}

template <bool transposed> DEVICE Fragment ldmatrix_x4(const bf16* row) { return ldmatrix_x4<transposed>(shared_address(row)); }

// Element (row, k) of a is in lane 4 (row % 8) + k % 8 / 2, register row / 8 + 2 (k / 8), half k % 2; element (k, col)
// of b is in lane 4 col + k % 8 / 2, register k / 8, half k % 2; c[0..2] are row lane / 4, columns 2 (lane % 4) and the
// next, c[2..4] are the same columns 8 rows below.
DEVICE void mma_m16n8k16(float (&c)[4], const Fragment& a, u32 b0, u32 b1) {
    int lane = (int)(threadIdx.x % 32);
    u32(*operands)[6] = lane_operands + (threadIdx.x - lane);
    for (int i = 0; i < 4; i++) operands[lane][i] = a.r[i];
    operands[lane][4] = b0;
    operands[lane][5] = b1;
    __syncwarp();
    auto half = [](u32 two, int k) { return __int_as_float((int)(k % 2 ? two & 0xffff0000u : two << 16)); };
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            u32 x = operands[lane / 4 * 4 + k % 8 / 2][i / 2 + k / 8 * 2];
            u32 y = operands[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2][4 + k / 8];
            c[i] += half(x, k) * half(y, k);
        }
    __syncwarp();
}
