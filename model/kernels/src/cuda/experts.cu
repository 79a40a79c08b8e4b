// Routed experts: y = down(silu(gate x) * up x) for many experts over ragged rows, weights resident in slots.
//
// One product kernel serves decode and prefill. Weights are the M side of wgmma and rows the N side, so that a tile of
// 16, 64 or 128 rows costs the same weight traffic, and a row's value is the same chain of additions in each: k ascends in
// steps of 32 bytes; FP8 sums each 128 k by itself, from zero, and adds it to an f32 sum scaled (DeepSeek-V3 report,
// section 3.3.2); bf16 sums all of k in one. What differs is only how many rows a weight that was read is used for.
//
// A block is a warpgroup that loads (one thread, TMA) and two that multiply, 64 weight rows each: gate and up of the same
// 64 columns, or 128 columns of down. Blocks stay, and walk over the tiles; loads run ahead across tiles.
//
// `linear` is `down` with results left in f32: the trunk's projections, whose heads are groups where each has a weight.
#include "hopper.cuh"

constexpr u32 K_BYTES = 128;   // bytes of k in a stage: one swizzled row
constexpr u32 M = 64;          // weight rows of a warpgroup
constexpr u32 SHARED = 232448; // what a block of sm_90 may have (227 KiB), asked for by every launch
constexpr u32 CONSUMERS = 256;
constexpr u32 THREADS = CONSUMERS + 128;

// Rows of one expert, as the host lays them out (cuda/schedule.rs).
struct Group {
    u32 slot;
    u32 row;   // first row among all
    u32 rows;
    u32 first; // row tiles of the groups before
};

// What one launch computes (cuda/schedule.rs has the same fields).
struct Call {
    const u8* scales0; // f32 [n / 128][k / 128] of the first weight in slot 0; FP8 only
    const u8* scales1; // of the second
    u64 slot_bytes;
    const Group* groups;
    void* out;         // [rows][out_stride], bf16 or f32 as the kernel leaves them
    u32 out_stride;
    u32 group_count;
    u32 tiles;         // all tiles: row tiles times column tiles
    u32 column_tiles;
    u32 columns;       // of the output
    u32 k_blocks;
    u32 second;        // where the second warpgroup's columns begin: 0 in another weight, 64 in the same
};

template <u32 ROWS>
struct Shared {
    static constexpr u32 STAGES = ROWS == 16 ? 10 : ROWS == 64 ? 7 : 5;
    static constexpr u32 SCALES = ROWS < 32 ? 32 : ROWS; // TMA writes to multiples of 128 bytes
    alignas(1024) u8 weights[STAGES][2][M * K_BYTES];
    alignas(1024) u8 rows[STAGES][ROWS * K_BYTES];
    alignas(128) float scales[STAGES][SCALES];
    alignas(128) float exchange[ROWS / 2][128];
    u64 full[STAGES];
    u64 empty[STAGES];
};
static_assert(sizeof(Shared<16>) + 1024 <= SHARED && sizeof(Shared<64>) + 1024 <= SHARED);
static_assert(sizeof(Shared<128>) + 1024 <= SHARED);

// This block's tiles, in order. Tiles of a group that share weights follow each other.
template <u32 ROWS>
struct Walk {
    const Call& call;
    u32 tile;
    u32 group = 0;
    Group at{};
    u32 column = 0; // first output column
    u32 row = 0;    // first row among all
    u32 rows = 0;   // rows that are the tile's

    __device__ explicit Walk(const Call& c) : call(c), tile(blockIdx.x) {}

    // Finds the tile; false after the last. `width` is the output columns of a tile.
    __device__ bool find(u32 width) {
        if (tile >= call.tiles) return false;
        while (group + 1 < call.group_count && tile >= call.groups[group + 1].first * call.column_tiles) group++;
        at = call.groups[group];
        const u32 local = tile - at.first * call.column_tiles;
        const u32 row_tiles = (at.rows + ROWS - 1) / ROWS;
        column = local / row_tiles * width;
        const u32 within = local % row_tiles * ROWS;
        row = at.row + within;
        rows = at.rows - within < ROWS ? at.rows - within : ROWS;
        return true;
    }
    __device__ void next() { tile += gridDim.x; }
};

template <u32 STAGES>
struct Ring {
    u32 stage = 0;
    u32 parity = 0;
    __device__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ float silu(float x) {
    return x / (1.0f + expf(-x));
}

__device__ __forceinline__ void leave(u16& to, float x) {
    to = f32_to_bf16(x);
}
__device__ __forceinline__ void leave(float& to, float x) {
    to = x;
}

template <u32 ROWS, bool FP8, bool GATED, typename Out>
__device__ __forceinline__ void product(const TensorMap& w0, const TensorMap& w1, const TensorMap& x,
                                        const TensorMap& xs, const Call& call) {
    extern __shared__ u8 memory[];
    using S = Shared<ROWS>;
    S& s = *reinterpret_cast<S*>((reinterpret_cast<u64>(memory) + 1023) / 1024 * 1024);
    constexpr u32 WIDTH = GATED ? M : 2 * M;
    constexpr u32 K = FP8 ? K_BYTES : K_BYTES / 2; // elements of k in a stage
    const u32 thread = threadIdx.x, lane = thread % 32;

    if (thread == 0) {
        for (u32 i = 0; i < S::STAGES; i++) {
            mbarrier_init(&s.full[i], 1);
            mbarrier_init(&s.empty[i], CONSUMERS / 32);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    Walk<ROWS> walk(call);
    Ring<S::STAGES> ring;
    if (thread >= CONSUMERS) {
        registers_give_back<40>();
        if (thread != CONSUMERS) return;
        tma_prefetch(&w0);
        tma_prefetch(&w1);
        tma_prefetch(&x);
        constexpr u32 BYTES = 2 * M * K_BYTES + ROWS * K_BYTES + (FP8 ? ROWS * 4 : 0);
        for (; walk.find(WIDTH); walk.next()) {
            for (u32 block = 0; block < call.k_blocks; block++, ring.advance()) {
                u64* full = &s.full[ring.stage];
                mbarrier_wait(&s.empty[ring.stage], ring.parity ^ 1);
                mbarrier_expect(full, BYTES);
                const int k = block * K;
                tma_load_3d(s.weights[ring.stage][0], &w0, full, k, walk.column, walk.at.slot);
                tma_load_3d(s.weights[ring.stage][1], &w1, full, k, walk.column + call.second, walk.at.slot);
                tma_load_2d(s.rows[ring.stage], &x, full, k, walk.row);
                if (FP8) tma_load_2d(s.scales[ring.stage], &xs, full, walk.row, block);
            }
        }
        return;
    }

    registers_take<232>();
    const u32 half = thread / 128; // which weight
    for (; walk.find(WIDTH); walk.next()) {
        float sum[ROWS / 2];
#pragma unroll
        for (u32 i = 0; i < ROWS / 2; i++) sum[i] = 0.0f;
        const u8* table = (half ? call.scales1 : call.scales0) + walk.at.slot * call.slot_bytes;
        const float* scales = reinterpret_cast<const float*>(table) + (u64)(walk.column / 128) * call.k_blocks;
        float weight = FP8 ? scales[0] : 1.0f;
        for (u32 block = 0; block < call.k_blocks; block++, ring.advance()) {
            const float next = FP8 && block + 1 < call.k_blocks ? scales[block + 1] : 0.0f;
            mbarrier_wait(&s.full[ring.stage], ring.parity);
            const u64 a = wgmma_operand(s.weights[ring.stage][half]);
            const u64 b = wgmma_operand(s.rows[ring.stage]);
            if constexpr (FP8) {
                float part[ROWS / 2];
#pragma unroll
                for (u32 i = 0; i < ROWS / 2; i++) part[i] = 0.0f;
                wgmma_fence();
#pragma unroll
                for (u32 step = 0; step < 4; step++) wgmma_e4m3(part, a + 2 * step, b + 2 * step, step > 0);
                wgmma_commit();
                wgmma_wait();
                const float* rows = s.scales[ring.stage] + 2 * (lane % 4);
#pragma unroll
                for (u32 i = 0; i < ROWS / 2; i += 4) {
                    const float even = weight * rows[2 * i], odd = weight * rows[2 * i + 1];
                    sum[i] = fmaf(part[i], even, sum[i]);
                    sum[i + 1] = fmaf(part[i + 1], odd, sum[i + 1]);
                    sum[i + 2] = fmaf(part[i + 2], even, sum[i + 2]);
                    sum[i + 3] = fmaf(part[i + 3], odd, sum[i + 3]);
                }
            } else {
                wgmma_fence();
#pragma unroll
                for (u32 step = 0; step < 4; step++) wgmma_bf16(sum, a + 2 * step, b + 2 * step, block + step > 0);
                wgmma_commit();
                wgmma_wait();
            }
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&s.empty[ring.stage]);
            weight = next;
        }

        const u32 m = thread % 128 / 32 * 16 + lane / 4; // row of sum[0] in the fragment: a column of the output
        if (GATED && half == 1) {
#pragma unroll
            for (u32 i = 0; i < ROWS / 2; i++) s.exchange[i][thread % 128] = sum[i];
        }
        if (GATED) barrier_sync(1, CONSUMERS);
        if (!GATED || half == 0) {
            const u32 from = walk.column + (GATED ? 0 : half * M) + m;
            Out* out = static_cast<Out*>(call.out) + (u64)walk.row * call.out_stride + from;
#pragma unroll
            for (u32 i = 0; i < ROWS / 2; i++) {
                const u32 down = 8 * (i / 2 % 2), row = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
                const float value = GATED ? silu(sum[i]) * s.exchange[i][thread % 128] : sum[i];
                if (row < walk.rows && from + down < call.columns) {
                    leave(out[(u64)row * call.out_stride + down], value);
                }
            }
        }
        if (GATED) barrier_sync(1, CONSUMERS); // before the next tile's exchange
    }
}

#define PRODUCT(name, rows, fp8, gated, out)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                 \
        name(const __grid_constant__ TensorMap w0, const __grid_constant__ TensorMap w1,                     \
             const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap xs, const Call call) {   \
        product<rows, fp8, gated, out>(w0, w1, x, xs, call);                                                 \
    }

PRODUCT(gate_up_fp8_16, 16, true, true, u16)
PRODUCT(gate_up_fp8_64, 64, true, true, u16)
PRODUCT(gate_up_fp8_128, 128, true, true, u16)
PRODUCT(down_fp8_16, 16, true, false, u16)
PRODUCT(down_fp8_64, 64, true, false, u16)
PRODUCT(down_fp8_128, 128, true, false, u16)
PRODUCT(gate_up_bf16_16, 16, false, true, u16)
PRODUCT(gate_up_bf16_64, 64, false, true, u16)
PRODUCT(gate_up_bf16_128, 128, false, true, u16)
PRODUCT(down_bf16_16, 16, false, false, u16)
PRODUCT(down_bf16_64, 64, false, false, u16)
PRODUCT(down_bf16_128, 128, false, false, u16)
PRODUCT(linear_fp8_16, 16, true, false, float)
PRODUCT(linear_fp8_64, 64, true, false, float)
PRODUCT(linear_fp8_128, 128, true, false, float)
PRODUCT(linear_bf16_16, 16, false, false, float)
PRODUCT(linear_bf16_64, 64, false, false, float)
PRODUCT(linear_bf16_128, 128, false, false, float)
