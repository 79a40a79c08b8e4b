// The trunk's work on single rows, as model/src does it on the CPU: embedding, norms, rotation, what goes to the cache,
// and putting a layer together. Activations are f32 and are rounded to bf16 where they enter a product.
//
// A block has one row, and sums are taken in an order that only the row's length decides.
#include "hopper.cuh"

constexpr u32 ROW_THREADS = 256; // of every kernel here

// The sum over the block's threads, the same in all of them: lanes by halves, then warps in order.
__device__ __forceinline__ float block_sum(float x) {
    extern __shared__ u8 memory[];
    float* sums = reinterpret_cast<float*>(memory);
    for (u32 apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (u32 warp = 0; warp < ROW_THREADS / 32; warp++) sum += sums[warp];
    __syncthreads();
    return sum;
}

// 1 / sqrt of the mean square of x[n], plus eps.
__device__ __forceinline__ float inverse_rms(const float* x, u32 n, float eps) {
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < n; i += ROW_THREADS) sum = fmaf(x[i], x[i], sum);
    return 1.0f / sqrtf(block_sum(sum) / (float)n + eps);
}

// Turns a pair by an angle.
__device__ __forceinline__ void turn(float a, float b, float cos, float sin, float& x, float& y) {
    x = fmaf(a, cos, -(b * sin));
    y = fmaf(b, cos, a * sin);
}

// residual[row] = table[tokens[row]], of a table [vocab][n].
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    embed_bf16(const u16* table, const u32* tokens, u32 n, float* residual) {
    const u64 row = blockIdx.x, from = tokens[row];
    for (u32 i = threadIdx.x; i < n; i += ROW_THREADS) residual[row * n + i] = bf16_to_f32(table[from * n + i]);
}
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    embed_f32(const float* table, const u32* tokens, u32 n, float* residual) {
    const u64 row = blockIdx.x, from = tokens[row];
    for (u32 i = threadIdx.x; i < n; i += ROW_THREADS) residual[row * n + i] = table[from * n + i];
}

// x += delta, if there is one (its rows `delta_stride` apart, 0 for a bias); then the norm of x, in f32 if `wide` is given,
// and as bf16 in rows `stride` apart.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    rms_norm(float* x, const float* delta, u32 delta_stride, const float* weight, float eps, u32 n, float* wide, u16* out,
             u32 stride) {
    const u64 row = blockIdx.x;
    x += row * n;
    if (delta) {
        // Each thread's own values, which it reads again below.
        for (u32 i = threadIdx.x; i < n; i += ROW_THREADS) x[i] += delta[row * delta_stride + i];
    }
    const float inverse = inverse_rms(x, n, eps);
    for (u32 i = threadIdx.x; i < n; i += ROW_THREADS) {
        const float y = x[i] * inverse * weight[i];
        if (wide) wide[row * n + i] = y;
        out[row * stride + i] = f32_to_bf16(y);
    }
}

// Queries q, f32 [rows][heads][nope + rope], as attention takes them: the plain part as bf16 [heads][rows][nope], to go
// through the keys' up-projection head by head; the other rotated, bf16 [rows][heads][rope]. `table` has cosines, then
// sines, of each row: [rows][rope]. A pair's values are neighbours (`interleave`) or rope / 2 apart.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    queries(const float* q, const float* table, u32 heads, u32 nope, u32 rope, u32 interleave, u16* plain, u16* rotated) {
    const u64 row = blockIdx.x, rows = gridDim.x;
    const u32 width = nope + rope, half = rope / 2;
    q += row * heads * width;
    table += row * rope;
    for (u32 i = threadIdx.x; i < heads * nope; i += ROW_THREADS) {
        const u32 head = i / nope, column = i % nope;
        plain[(head * rows + row) * nope + column] = f32_to_bf16(q[head * width + column]);
    }
    for (u32 i = threadIdx.x; i < heads * half; i += ROW_THREADS) {
        const u32 head = i / half, pair = i % half;
        const u32 a = interleave ? 2 * pair : pair, b = interleave ? 2 * pair + 1 : pair + half;
        const float* from = q + head * width + nope;
        u16* to = rotated + (row * heads + head) * rope;
        float x, y;
        turn(from[a], from[b], table[pair], table[half + pair], x, y);
        to[a] = f32_to_bf16(x);
        to[b] = f32_to_bf16(y);
    }
}

// What a row puts into the cache, from latent f32 [rows][rank + rope]: bias added if there is one, the first `rank` values
// normed, the others rotated. `places` has each row's page and slot; `cache` is the layer's part of the first page.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    latent(float* x, const float* bias, const float* weight, float eps, const float* table, u32 rank, u32 rope,
           u32 interleave, const u32* places, u16* cache, u64 page_stride) {
    const u64 row = blockIdx.x;
    const u32 width = rank + rope, half = rope / 2;
    x += row * width;
    table += row * rope;
    if (bias) {
        for (u32 i = threadIdx.x; i < width; i += ROW_THREADS) x[i] += bias[i];
        __syncthreads();
    }
    u16* to = cache + places[2 * row] * page_stride + (u64)places[2 * row + 1] * width;
    const float inverse = inverse_rms(x, rank, eps);
    for (u32 i = threadIdx.x; i < rank; i += ROW_THREADS) to[i] = f32_to_bf16(x[i] * inverse * weight[i]);
    for (u32 pair = threadIdx.x; pair < half; pair += ROW_THREADS) {
        const u32 a = interleave ? 2 * pair : pair, b = interleave ? 2 * pair + 1 : pair + half;
        float first, second;
        turn(x[rank + a], x[rank + b], table[pair], table[half + pair], first, second);
        to[rank + a] = f32_to_bf16(first);
        to[rank + b] = f32_to_bf16(second);
    }
}

// Values of all heads, bf16 [heads][rows][n], beside each other as the output projection takes them: [rows][stride].
extern "C" __global__ void __launch_bounds__(ROW_THREADS) join(const u16* values, u32 heads, u32 n, u16* out, u32 stride) {
    const u64 row = blockIdx.x, rows = gridDim.x;
    for (u32 i = threadIdx.x; i < heads * n; i += ROW_THREADS)
        out[row * stride + i] = values[(i / n * rows + row) * n + i % n];
}

// residual += (sum over slots of weight * result) + shared, in this order (DeepSeek-V3 report, eq. 12). Results are bf16
// [rows][slots][n]; a slot whose weight is 0 is left out, whatever its result; shared is f32 [rows][n] or nothing.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    combine(const u16* results, const float* weights, u32 slots, const float* shared, u32 n, float* residual) {
    const u64 row = blockIdx.x;
    for (u32 i = threadIdx.x; i < n; i += ROW_THREADS) {
        float sum = 0.0f;
        for (u32 slot = 0; slot < slots; slot++) {
            const float weight = weights[row * slots + slot];
            if (weight != 0.0f) sum = fmaf(weight, bf16_to_f32(results[(row * slots + slot) * n + i]), sum);
        }
        if (shared) sum += shared[row * n + i];
        residual[row * n + i] += sum;
    }
}
