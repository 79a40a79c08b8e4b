// A stand-in for the GPU: what hopper.cuh wraps, and the words of CUDA that kernels use, on a CPU by their documented
// semantics (PTX ISA 8.x, the sections that hopper.cuh names). Blocks run one after the other; a block's threads are
// fibers that take turns, in an order drawn anew for each run.
//
// It is made to find what a GPU hides: copies by TMA happen late and in any order, and a wgmma reads its operands and
// writes its registers only when it is waited for. What waits for ever, leaves shared memory, misaligns a copy or issues
// wgmmas that differ within a warpgroup ends the run with a message. How hardware rounds inside a wgmma is not modelled.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim {
    u32 x, y, z;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

// A block's shared memory, at an address that TMA's swizzle may look at, and a fence behind it.
constexpr u32 SHARED_BYTES = 232448, FENCE = 4096;
alignas(1024) u8 memory[SHARED_BYTES + FENCE];

namespace standin {

struct Wgmma {
    float* d;
    u32 columns;
    u64 a, b;
    bool add, fp8;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    u32 thread;
    bool done = false;
    std::vector<Wgmma> wgmmas;
    u32 issued = 0; // wgmmas so far
};

struct Copy {
    u8* to;
    TensorMap map;
    u64* bar;
    int at[3];
};

inline std::vector<Fiber> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline std::vector<Copy> copies;
inline std::vector<std::vector<Wgmma>> issued; // by warpgroup, to compare its threads
inline u64 progress, random_state;

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "stand-in: block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
    exit(3);
}

inline u32 draw(u32 below) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)(random_state >> 33) % below;
}

// Lets the others run.
inline void yield() {
    Fiber* self = current;
    swapcontext(&self->context, &scheduler);
}

template <typename F>
void wait_until(F&& ready) {
    while (!ready()) yield();
    progress++;
}

// Barriers of a number of threads: arrivals, and how often it was passed.
struct Barrier {
    u32 arrived = 0;
    u64 passed = 0;
    void sync(u32 threads) {
        const u64 before = passed;
        progress++;
        if (++arrived == threads) {
            arrived = 0;
            passed++;
        } else {
            wait_until([&] { return passed != before; });
        }
    }
};
inline Barrier named[16], warps[32];
inline u32 exchanged[32][32];

inline u32 lane() { return threadIdx.x % 32; }
inline u32 warp() { return threadIdx.x / 32; }

// An mbarrier's 64 bits: phase, arrivals per phase, arrivals to come, bytes to come.
struct Mbarrier {
    u64 phase : 1, count : 15, pending : 16;
    long long bytes : 32;
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier(u64* bar) { return *reinterpret_cast<Mbarrier*>(bar); }

inline void settle(Mbarrier& bar) {
    progress++;
    if (bar.pending == 0 && bar.bytes == 0) {
        bar.phase ^= 1;
        bar.pending = bar.count;
    }
}

// Address bits 4-6 are exchanged for their sum with bits 7-9 (the 128-byte mode).
inline u64 swizzled(u64 address) { return address ^ (address >> 7 & 7) << 4; }

inline u64 offset(const void* p) {
    const u64 at = static_cast<const u8*>(p) - memory;
    if (at >= SHARED_BYTES) fail("an address that is not in shared memory");
    return at;
}

// A map as tests/standin.rs makes it: address, rank, bytes of an element, swizzle; from 4 on sizes, from 7 on strides,
// from 9 on the box.
inline void perform(const Copy& copy) {
    const u64* map = copy.map.opaque;
    const u8* from = reinterpret_cast<const u8*>(map[0]);
    const u32 rank = map[1], size = map[2];
    const u64 *sizes = map + 4, *strides = map + 7, *box = map + 9;
    const u64 extent[3] = {box[0], box[1], rank > 2 ? box[2] : 1};
    u64 written = 0;
    for (u64 k = 0; k < extent[2]; k++)
        for (u64 j = 0; j < extent[1]; j++)
            for (u64 i = 0; i < extent[0]; i++, written++) {
                const long long at[3] = {copy.at[0] + (long long)i, copy.at[1] + (long long)j, copy.at[2] + (long long)k};
                bool inside = true;
                u64 bytes = 0;
                for (u32 d = 0; d < rank; d++) {
                    inside = inside && at[d] >= 0 && (u64)at[d] < sizes[d];
                    bytes += at[d] * (d ? strides[d - 1] : size);
                }
                u64 to = offset(copy.to) + written * size;
                if (map[3]) to = swizzled(to);
                if (inside) memcpy(memory + to, from + bytes, size);
                else memset(memory + to, 0, size);
            }
    Mbarrier& bar = mbarrier(copy.bar);
    bar.bytes = bar.bytes - (long long)(written * size);
    settle(bar);
}

inline void load(void* to, const TensorMap* map, u64* bar, u32 rank, int c0, int c1, int c2) {
    if (map->opaque[1] != rank) fail("a copy of another rank than its map");
    if (offset(to) % (map->opaque[3] ? 1024 : 128)) fail("a copy to a misaligned address");
    copies.push_back({static_cast<u8*>(to), *map, bar, {c0, c1, c2}});
    progress++;
}

inline float e4m3(u8 code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    const float value = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return code & 0x80 ? -value : value;
}

// Element `k` of row `row` of an operand that its descriptor describes.
inline float element(u64 desc, u32 row, u32 k, bool fp8) {
    const u64 start = (desc & 0x3fff) << 4, stride = (desc >> 32 & 0x3fff) << 4;
    if (desc >> 62 != 1 || (desc >> 49 & 7)) fail("an operand that is not swizzled by 128 bytes from its base");
    const u64 at = swizzled(start + row / 8 * stride + row % 8 * 128 + (fp8 ? k : 2 * k));
    if (at + 2 > SHARED_BYTES) fail("an operand that is not in shared memory");
    if (fp8) return e4m3(memory[at]);
    u16 half;
    memcpy(&half, memory + at, 2);
    u32 wide = (u32)half << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

inline void wgmma(float* d, u32 columns, u64 a, u64 b, bool add, bool fp8) {
    const Wgmma op{d, columns, a, b, add, fp8};
    auto& log = issued[threadIdx.x / 128];
    if (current->issued == log.size()) log.push_back(op);
    const Wgmma& first = log[current->issued++];
    if (first.columns != columns || first.a != a || first.b != b || first.add != add || first.fp8 != fp8)
        fail("threads of a warpgroup issue different wgmmas");
    current->wgmmas.push_back(op);
    progress++;
}

// Carries out what this thread has issued: its elements of every product.
inline void finish() {
    const u32 t = threadIdx.x % 128;
    for (const Wgmma& op : current->wgmmas)
        for (u32 i = 0; i < op.columns / 2; i++) {
            const u32 row = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
            double sum = op.add ? op.d[i] : 0.0;
            for (u32 k = 0; k < (op.fp8 ? 32 : 16); k++)
                sum += (double)element(op.a, row, k, op.fp8) * element(op.b, column, k, op.fp8);
            op.d[i] = (float)sum;
        }
    current->wgmmas.clear();
    progress++;
}

inline std::function<void()> body;

inline void enter() {
    body();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

// Runs `threads` threads of every block of the grid through `kernel`.
inline void launch(Dim grid, u32 threads, u64 seed, std::function<void()> kernel) {
    body = std::move(kernel);
    gridDim = grid;
    blockDim = {threads, 1, 1};
    random_state = seed;
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
            memset(memory, 0xff, sizeof memory);
            for (Barrier& bar : named) bar = {};
            for (Barrier& bar : warps) bar = {};
            copies.clear();
            issued.assign(threads / 128 + 1, {});
            fibers.clear();
            fibers.resize(threads);
            for (u32 t = 0; t < threads; t++) {
                Fiber& fiber = fibers[t];
                constexpr size_t STACK = 128 << 10;
                fiber.thread = t;
                fiber.stack.reset(new char[STACK]);
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.get();
                fiber.context.uc_stack.ss_size = STACK;
                makecontext(&fiber.context, enter, 0);
            }
            for (u32 left = threads, idle = 0; left;) {
                const u64 before = progress;
                const u32 start = draw(threads);
                for (u32 i = 0; i < threads; i++) {
                    Fiber& fiber = fibers[(start + i) % threads];
                    if (fiber.done) continue;
                    current = &fiber;
                    threadIdx = {fiber.thread, 0, 0};
                    swapcontext(&scheduler, &fiber.context);
                    left -= fiber.done;
                }
                while (!copies.empty() && (draw(3) == 0 || progress == before)) {
                    const u32 which = draw(copies.size());
                    const Copy copy = copies[which];
                    copies.erase(copies.begin() + which);
                    perform(copy);
                }
                idle = progress == before ? idle + 1 : 0;
                if (left && idle > 3) fail("all threads wait for ever");
            }
            if (!copies.empty()) fail("copies that nobody waited for");
            for (u32 i = 0; i < FENCE; i++)
                if (memory[SHARED_BYTES + i] != 0xff) fail("a write beyond shared memory");
        }
}

} // namespace standin

// --- CUDA ---

inline void __syncthreads() { standin::named[0].sync(blockDim.x); }
inline void __syncwarp() { standin::warps[standin::warp()].sync(32); }
inline float __shfl_xor_sync(u32, float value, u32 apart) {
    auto& values = standin::exchanged[standin::warp()];
    memcpy(&values[standin::lane()], &value, 4);
    __syncwarp();
    memcpy(&value, &values[standin::lane() ^ apart], 4);
    __syncwarp();
    return value;
}

// --- hopper.cuh ---

inline u32 shared_address(const void* p) { return (u32)standin::offset(p); }
inline void mbarrier_init(u64* bar, u32 count) { standin::mbarrier(bar) = {0, count, count, 0}; }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(u64* bar) {
    standin::Mbarrier& m = standin::mbarrier(bar);
    if (m.pending == 0) standin::fail("more arrivals than a phase has");
    m.pending = m.pending - 1;
    standin::settle(m);
}
inline void mbarrier_expect(u64* bar, u32 bytes) {
    standin::mbarrier(bar).bytes = standin::mbarrier(bar).bytes + bytes;
    mbarrier_arrive(bar);
}
inline void mbarrier_wait(u64* bar, u32 parity) {
    standin::wait_until([&] { return standin::mbarrier(bar).phase != parity; });
}
inline void tma_prefetch(const TensorMap*) {}
inline void tma_load_2d(void* to, const TensorMap* map, u64* bar, int c0, int c1) {
    standin::load(to, map, bar, 2, c0, c1, 0);
}
inline void tma_load_3d(void* to, const TensorMap* map, u64* bar, int c0, int c1, int c2) {
    standin::load(to, map, bar, 3, c0, c1, c2);
}
inline u64 wgmma_operand(const void* tile) {
    if (standin::offset(tile) % 1024) standin::fail("an operand that is not aligned to 1024 bytes");
    return (u64)((shared_address(tile) & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
inline void wgmma_wait() { standin::finish(); }
template <int N>
void wgmma_e4m3(float (&d)[N], u64 a, u64 b, bool add) {
    standin::wgmma(d, 2 * N, a, b, add, true);
}
template <int N>
void wgmma_bf16(float (&d)[N], u64 a, u64 b, bool add) {
    standin::wgmma(d, 2 * N, a, b, add, false);
}
template <int N>
void registers_give_back() {}
template <int N>
void registers_take() {}
inline void barrier_sync(u32 id, u32 threads) { standin::named[id].sync(threads); }
inline float __uint_as_float(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline float bf16_to_f32(u16 x) { return __uint_as_float((u32)x << 16); }
inline u16 f32_to_bf16(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// The code nearest to x, found by looking at all.
inline u8 f32_to_e4m3(float x) {
    if (std::isnan(x)) return 0x7f;
    const float magnitude = fminf(fabsf(x), 448.0f);
    u8 best = 0;
    for (u8 code = 1; code < 0x7f; code++) {
        const double here = fabs((double)standin::e4m3(code) - magnitude), there = fabs((double)standin::e4m3(best) - magnitude);
        if (here < there || (here == there && code % 2 == 0)) best = code;
    }
    return best | (std::signbit(x) ? 0x80 : 0);
}
inline u16 f32_to_e4m3x2(float lo, float hi) { return f32_to_e4m3(lo) | f32_to_e4m3(hi) << 8; }
