// Stands in for kernels/wgmma.cuh on the CPU: the same functions, as the PTX manual defines the instructions. A wgmma
// without a fence, operands that change before it is complete, and accumulators that are read too early are found.

DEVICE void fence_async_proxy() { unfenced[threadIdx.x] = false; }

DEVICE const void* shared_at(u32 address) { return emulator::arena.bytes + address; }

// The element (row, k) of the 16 columns, along the depth, of the operand with this descriptor.
DEVICE float element(u64 descriptor, bool k_major, u32 row, u32 k) {
    u32 start = (u32)(descriptor & 0x3fff) << 4, leading = (u32)(descriptor >> 16 & 0x3fff) << 4,
        stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
    u32 at = k_major ? start + row / 8 * stride + row % 8 * 128 + k * 2
                     : start + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128;
    at ^= at / 128 % 8 * 16;
    return to_f32(*reinterpret_cast<const bf16*>(shared_at(at)));
}

static std::vector<float> elements(u64 a, bool k_major_a, u64 b, bool k_major_b) {
    std::vector<float> all;
    for (u32 k = 0; k < 16; k++) {
        for (u32 m = 0; m < 64; m++) all.push_back(element(a, k_major_a, m, k));
        for (u32 n = 0; n < TILE_COLUMNS; n++) all.push_back(element(b, k_major_b, n, k));
    }
    return all;
}

// The wgmmas of a warpgroup in this block: the descriptors that the first thread to arrive passed, and the elements
// read, until the wgmma is complete.
struct Issued {
    size_t group;  // the wgmma group that it belongs to
    u64 a, b;
    std::vector<float> (*read)(u64, u64);
    std::vector<float> operands;
};
struct Warpgroup {
    u64 block;
    std::vector<Issued> issued;
    size_t complete;
};
static Warpgroup warpgroups[8];

// A thread's wgmmas in this block, and its accumulators while some are in flight.
struct ThreadState {
    u64 block;
    size_t count, groups;
    bool fenced, in_flight, committed;
    Accumulators sums;
};
static ThreadState thread_states[1024];

template <class T> T& of_this_block(T& state) {
    if (state.block != emulator::blocks_run) state = T{};
    state.block = emulator::blocks_run;
    return state;
}

DEVICE void wgmma_fence(Accumulators&) {
    of_this_block(thread_states[threadIdx.x]).fenced = true;
    __syncwarp();
}
template <bool k_major_a, bool k_major_b> DEVICE void wgmma(Accumulators& c, u64 a, u64 b) {
    auto& mine = of_this_block(thread_states[threadIdx.x]);
    auto& group = of_this_block(warpgroups[threadIdx.x / 128]);
    if (!mine.fenced) emulator::fail("a wgmma without wgmma_fence");
    if (group.issued.size() == mine.count)
        group.issued.push_back({mine.groups, a, b, [](u64 a, u64 b) { return elements(a, k_major_a, b, k_major_b); }, {}});
    Issued& p = group.issued[mine.count++];
    if (p.a != a || p.b != b) emulator::fail("the threads of a warpgroup pass different descriptors to a wgmma");
    if (threadIdx.x % 128 == 0) {
        for (u32 t = 0; t < blockDim.x; t++)
            if (unfenced[t]) emulator::fail("a wgmma before fence_async_proxy in every thread that copied");
        for (u64 d : {a, b})
            if (d >> 62 != 1 || d >> 46 << 48 != 0) emulator::fail("a descriptor without the 128-byte swizzle");
        p.operands = p.read(a, b);
    }
    if (!mine.in_flight) {
        memcpy(mine.sums, c, sizeof c);
        for (float& sum : c) sum = __int_as_float(-1);  // NaN, until no wgmma is in flight
    }
    mine.in_flight = true;
    mine.committed = false;
    u32 lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (u32 k = 0; k < 16; k++) {
        float x[2] = {element(a, k_major_a, row, k), element(a, k_major_a, row + 8, k)};
        for (u32 i = 0; i < TILE_COLUMNS / 2; i++)
            mine.sums[i] += x[i / 2 % 2] * element(b, k_major_b, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
    }
}
DEVICE void wgmma_commit_group() {
    thread_states[threadIdx.x].fenced = false;
    thread_states[threadIdx.x].committed = true;
    thread_states[threadIdx.x].groups++;
}
template <int pending> DEVICE void wgmma_wait_group(Accumulators& c) {
    auto& mine = of_this_block(thread_states[threadIdx.x]);
    auto& group = of_this_block(warpgroups[threadIdx.x / 128]);
    if (mine.in_flight && !mine.committed) emulator::fail("wgmma_wait_group before wgmma_commit_group");
    if (pending == 0 && mine.in_flight) {
        memcpy(c, mine.sums, sizeof c);
        mine.in_flight = false;
    }
    for (; threadIdx.x % 128 == 0 && group.complete < mine.count && group.issued[group.complete].group + pending < mine.groups;
         group.complete++) {
        Issued& p = group.issued[group.complete];
        auto now = p.read(p.a, p.b);  // compared as bits: NaN is equal to itself
        if (memcmp(now.data(), p.operands.data(), now.size() * sizeof(float)))
            emulator::fail("an operand was overwritten before its wgmma was complete");
        p.operands = {};
    }
    __syncwarp();
}
