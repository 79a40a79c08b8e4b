// The gate of an MoE layer, in f32 in every class, as model/src/gate.rs has it (DeepSeek-V3 report, section 2.1.2).
#include "hopper.cuh"

constexpr u32 GATE_WARPS = 8; // experts of a block, a warp each
constexpr u32 GATE_ROWS = 8;  // rows of a block, for which a weight is read once
constexpr u32 CHUNK = 512;    // values of the rows that are held at once

__device__ __forceinline__ float widened(float x) {
    return x;
}
__device__ __forceinline__ float widened(u16 x) {
    return bf16_to_f32(x);
}

// scores[rows][experts] = sigmoid(x w^T), x f32 [rows][n], w [experts][n]. Blocks: (experts / 8, rows / 8). A lane adds
// every 32nd product in ascending order, then lanes are put together by halves: whatever rows are beside.
template <typename Weight>
__device__ __forceinline__ void scores_of(const float* x, const Weight* w, u32 rows, u32 experts, u32 n, float* scores) {
    extern __shared__ u8 memory[];
    auto* held = reinterpret_cast<float(*)[CHUNK]>(memory); // [GATE_ROWS][CHUNK]
    const u32 lane = threadIdx.x % 32, expert = blockIdx.x * GATE_WARPS + threadIdx.x / 32, first = blockIdx.y * GATE_ROWS;
    float sum[GATE_ROWS] = {};
    for (u32 start = 0; start < n; start += CHUNK) {
        const u32 count = n - start < CHUNK ? n - start : CHUNK;
        __syncthreads(); // all are done with what is held
        for (u32 i = threadIdx.x; i < GATE_ROWS * CHUNK; i += blockDim.x) {
            const u32 row = first + i / CHUNK, at = i % CHUNK;
            held[i / CHUNK][at] = row < rows && at < count ? x[(u64)row * n + start + at] : 0.0f;
        }
        __syncthreads();
        if (expert >= experts) continue;
        for (u32 at = lane; at < count; at += 32) {
            const float weight = widened(w[(u64)expert * n + start + at]);
#pragma unroll
            for (u32 row = 0; row < GATE_ROWS; row++) sum[row] = fmaf(held[row][at], weight, sum[row]);
        }
    }
#pragma unroll
    for (u32 row = 0; row < GATE_ROWS; row++) {
        float all = sum[row];
        for (u32 apart = 16; apart > 0; apart /= 2) all += __shfl_xor_sync(~0u, all, apart);
        if (lane == 0 && expert < experts && first + row < rows)
            scores[(u64)(first + row) * experts + expert] = 1.0f / (1.0f + expf(-all));
    }
}

extern "C" __global__ void __launch_bounds__(GATE_WARPS * 32)
    gate_scores_bf16(const float* x, const u16* w, u32 rows, u32 experts, u32 n, float* scores) {
    scores_of(x, w, rows, experts, n, scores);
}
extern "C" __global__ void __launch_bounds__(GATE_WARPS * 32)
    gate_scores_f32(const float* x, const float* w, u32 rows, u32 experts, u32 n, float* scores) {
    scores_of(x, w, rows, experts, n, scores);
}

struct Routing {
    u32 experts;
    u32 top_k;
    u32 groups;
    u32 kept_groups;
    u32 normed;
    float scaling;
};

// A value's place in the order of choices: NaN is below all numbers. -0 and 0 are equal.
struct Ranked {
    float value;
    u32 index;
};

__device__ __forceinline__ bool better(const Ranked& a, const Ranked& b) {
    const bool lost_a = a.value != a.value, lost_b = b.value != b.value;
    if (lost_a != lost_b) return lost_b;
    if (!lost_a && a.value != b.value) return a.value > b.value;
    return a.index < b.index;
}

// The best of values[n] of those not yet `taken`, the lower index of equals; the same in every lane.
__device__ __forceinline__ u32 best_of(const float* values, const u8* taken, u32 n) {
    constexpr u32 NONE = ~0u;
    Ranked best{0.0f, NONE};
    for (u32 i = threadIdx.x; i < n; i += 32) {
        const Ranked one{values[i], i};
        if (!taken[i] && (best.index == NONE || better(one, best))) best = one;
    }
    for (u32 apart = 16; apart > 0; apart /= 2) {
        Ranked other;
        other.value = __shfl_xor_sync(~0u, best.value, apart);
        other.index = __shfl_xor_sync(~0u, best.index, apart);
        if (other.index != NONE && (best.index == NONE || better(other, best))) best = other;
    }
    return best.index;
}

// Chooses for one row: a warp a row, `scores` f32 [rows][experts], `bias` f32 [experts]; experts and weights [rows][top_k] in
// ascending order of experts. Shared memory: 5 bytes for each expert and group.
extern "C" __global__ void __launch_bounds__(32)
    gate_choose(const float* scores, const float* bias, const Routing routing, u32* chosen, float* weights) {
    extern __shared__ u8 memory[];
    const u32 experts = routing.experts, groups = routing.groups, lane = threadIdx.x;
    float* choice = reinterpret_cast<float*>(memory);
    float* group_choice = choice + experts;
    u8* taken = reinterpret_cast<u8*>(group_choice + groups);
    u8* kept = taken + experts;
    scores += (u64)blockIdx.x * experts;
    chosen += (u64)blockIdx.x * routing.top_k;
    weights += (u64)blockIdx.x * routing.top_k;

    for (u32 i = lane; i < experts; i += 32) choice[i] = scores[i] + bias[i], taken[i] = 0;
    __syncwarp();
    if (routing.kept_groups < groups) {
        const u32 size = experts / groups;
        const float LOWEST = bf16_to_f32(0xff80); // minus infinity
        for (u32 group = lane; group < groups; group += 32) {
            float first = LOWEST, second = LOWEST;
            for (u32 i = group * size; i < (group + 1) * size; i++) {
                const float value = choice[i];
                if (value > first) second = first, first = value;
                else if (value > second) second = value;
            }
            group_choice[group] = size > 1 ? first + second : first;
            kept[group] = 0;
        }
        __syncwarp();
        for (u32 i = 0; i < routing.kept_groups; i++) {
            const u32 group = best_of(group_choice, kept, groups);
            __syncwarp();
            if (lane == 0) kept[group] = 1;
            __syncwarp();
        }
        for (u32 i = lane; i < experts; i += 32)
            if (!kept[i / size]) choice[i] = LOWEST;
        __syncwarp();
    }
    for (u32 i = 0; i < routing.top_k; i++) {
        const u32 expert = best_of(choice, taken, experts);
        __syncwarp();
        if (lane == 0) taken[expert] = 1;
        __syncwarp();
    }
    // Few: one lane writes them down in order, and sums as the CPU does.
    if (lane == 0) {
        float sum = 0.0f;
        for (u32 expert = 0, found = 0; found < routing.top_k; expert++)
            if (taken[expert]) chosen[found] = expert, sum += scores[expert], found++;
        sum += 1e-20f;
        for (u32 i = 0; i < routing.top_k; i++) {
            const float weight = scores[chosen[i]];
            weights[i] = (routing.normed ? weight / sum : weight) * routing.scaling;
        }
    }
}
