// Products of a warpgroup (four warps), of which sm_90a alone has the instruction: wgmma.mma_async, m64n128k16. Both factors
// come from shared memory, in the background; only the sums are in registers. After mma.cuh.
//
// A factor lies there in atoms of 1 KiB: 8 lines of 128 bytes, in line i the piece of 16 bytes p at p ^ i, atoms aligned to
// their size. A line is 64 numbers along the depth of one row ("K-major"), or 64 rows' numbers at one depth ("MN-major").
// See the PTX manual, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Matrix Descriptor".

// Sums of 64 x 128 over 128 threads: sums[4 j + 2 h + i] is row 16 (warp % 4) + lane / 4 + 8 h, column 8 j + 2 (lane % 4) + i.
typedef float Sums[64];

const u32 ATOM = 1024;

// A factor from `at` on: `stride` bytes lead from 8 lines to the next 8 (rows if K-major, depths if MN-major), `leading` from
// 64 rows to the next 64 if MN-major.
DEVICE u64 factor(const bf16* at, u32 leading, u32 stride) {
    const u64 swizzle_of_128_bytes = 1;
    return (u64)(shared_address(at) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | swizzle_of_128_bytes << 62;
}

// The factor that begins `elements` further on.
DEVICE u64 further(u64 factor, u32 elements) { return factor + elements * sizeof(bf16) / 16; }

// Shared memory from its first whole atom on: ATOM bytes more than are needed must be there.
DEVICE bf16* whole_atoms(unsigned char* memory) {
    return reinterpret_cast<bf16*>(memory + (ATOM - shared_address(memory) % ATOM) % ATOM);
}

#ifdef __CUDA_ARCH__

#define SUMS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
// The sums as operands, so that the compiler keeps what it does with them on the right side.
#define SUMS SUMS_16(0), SUMS_16(16), SUMS_16(32), SUMS_16(48)

// What this thread copied may be read by products, which see memory another way ("async proxy"); a barrier must follow before
// others' products read it.
DEVICE void copies_show() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first of some products that add to these sums. The whole warpgroup must come here, and to all below.
DEVICE void products_begin(Sums& c) { asm volatile("wgmma.fence.sync.aligned;" : SUMS::"memory"); }
// c += a · b over a depth of 16, in the background. `a_along`: a is K-major; `b_along`: b is.
template <bool a_along, bool b_along> DEVICE void product(Sums& c, u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred onto; setp.ne.b32 onto, %68, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, onto, 1, 1, %66, %67; }"
        : SUMS
        : "l"(a), "l"(b), "n"(a_along ? 0 : 1), "n"(b_along ? 0 : 1), "r"(1));
}
// Ends a group of products.
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all products. Only then may the sums be read and the factors be overwritten.
DEVICE void products_wait(Sums& c) { asm volatile("wgmma.wait_group.sync.aligned 0;" : SUMS::"memory"); }

#else  // The same by what the PTX manual says, so that tests can run it on the CPU.

DEVICE void copies_show() { unshown[threadIdx.x] = false; }

DEVICE const void* shared_at(u32 address) { return emulator::arena.bytes + address; }

// The element (row, k) of a factor's 16 columns along the depth.
DEVICE float element(u64 factor, bool along, u32 row, u32 k) {
    u32 start = (u32)(factor & 0x3fff) << 4, leading = (u32)(factor >> 16 & 0x3fff) << 4, stride = (u32)(factor >> 32 & 0x3fff) << 4;
    u32 at = along ? start + row / 8 * stride + row % 8 * 128 + k * 2
                   : start + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128;
    at ^= at / 128 % 8 * 16;
    return to_f32(*reinterpret_cast<const bf16*>(shared_at(at)));
}

static std::vector<float> elements(u64 a, bool a_along, u64 b, bool b_along) {
    std::vector<float> all;
    for (u32 k = 0; k < 16; k++) {
        for (u32 m = 0; m < 64; m++) all.push_back(element(a, a_along, m, k));
        for (u32 n = 0; n < 128; n++) all.push_back(element(b, b_along, n, k));
    }
    return all;
}

// A warpgroup's products of this block: what its first thread to come gave them, and what they read, until they are done.
struct Product {
    u64 a, b;
    std::vector<float> (*read)(u64, u64);
    std::vector<float> factors;
};
struct Products {
    u64 block;
    std::vector<Product> all;
    size_t done;
};
static Products warpgroups[8];

// A thread's products of this block, and its sums while some are under way.
struct Issued {
    u64 block;
    size_t count;
    bool begun, under_way, ended;
    Sums sums;
};
static Issued issued[1024];

template <class T> T& of_this_block(T& state) {
    if (state.block != emulator::blocks_run) state = T{};
    state.block = emulator::blocks_run;
    return state;
}

DEVICE void products_begin(Sums&) {
    of_this_block(issued[threadIdx.x]).begun = true;
    __syncwarp();
}
template <bool a_along, bool b_along> DEVICE void product(Sums& c, u64 a, u64 b) {
    auto& mine = of_this_block(issued[threadIdx.x]);
    auto& group = of_this_block(warpgroups[threadIdx.x / 128]);
    if (!mine.begun) emulator::fail("a product that was not begun");
    if (group.all.size() == mine.count)
        group.all.push_back({a, b, [](u64 a, u64 b) { return elements(a, a_along, b, b_along); }, {}});
    Product& p = group.all[mine.count++];
    if (p.a != a || p.b != b) emulator::fail("a warpgroup's threads give a product different factors");
    if (threadIdx.x % 128 == 0) {
        for (u32 t = 0; t < blockDim.x; t++)
            if (unshown[t]) emulator::fail("a product before all copies were shown to it");
        for (u64 f : {a, b})
            if (f >> 62 != 1 || f >> 46 << 48 != 0) emulator::fail("a factor that is not in atoms of 128-byte lines");
        p.factors = p.read(a, b);
    }
    if (!mine.under_way) {
        memcpy(mine.sums, c, sizeof c);
        for (float& sum : c) sum = __int_as_float(-1);  // NaN, until it is waited for
    }
    mine.under_way = true;
    mine.ended = false;
    u32 lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (u32 k = 0; k < 16; k++) {
        float x[2] = {element(a, a_along, row, k), element(a, a_along, row + 8, k)};
        for (u32 i = 0; i < 64; i++)
            mine.sums[i] += x[i / 2 % 2] * element(b, b_along, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
    }
}
DEVICE void products_end() {
    issued[threadIdx.x].begun = false;
    issued[threadIdx.x].ended = true;
}
DEVICE void products_wait(Sums& c) {
    auto& mine = of_this_block(issued[threadIdx.x]);
    auto& group = of_this_block(warpgroups[threadIdx.x / 128]);
    if (mine.under_way && !mine.ended) emulator::fail("products are waited for whose group was not ended");
    if (mine.under_way) memcpy(c, mine.sums, sizeof c);
    mine.under_way = false;
    for (; threadIdx.x % 128 == 0 && group.done < mine.count; group.done++) {
        Product& p = group.all[group.done];
        auto now = p.read(p.a, p.b);  // compared as bits: NaN is equal to itself
        if (memcmp(now.data(), p.factors.data(), now.size() * sizeof(float)))
            emulator::fail("a factor was overwritten before its product was done");
        p.factors = {};
    }
    __syncwarp();
}

#endif
