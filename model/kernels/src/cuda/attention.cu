// Multi-head latent attention over the paged cache, absorbed, in decode and prefill alike (DeepSeek-V2 paper, section
// 2.1.2): every head's query goes over the same cached rows, of which the first `rank` values are the values too.
//
// A block has one token and 32 of its heads, and a span of 512 positions counted from the sequence's beginning, which it
// takes 64 at a time, with the running maximum of flash attention. A token with one span is done then; others leave a
// part for each span, which `merge` puts together in ascending order. What a token gets is a function of its queries and
// of the positions up to its own: batch, chunks and pages do not show.
//
// Products are mma.sync, as the second one reads the cached rows transposed.
#include "hopper.cuh"

constexpr u32 HEADS = 32;
constexpr u32 POSITIONS = 64;
constexpr u32 SPAN = 512;
constexpr u32 WARPS = 8;
constexpr u32 MOST_WIDTH = 576; // kv_lora + qk_rope, a multiple of 8
constexpr u32 MOST_RANK = 512;  // kv_lora, a multiple of 8
constexpr u32 PITCH = MOST_WIDTH + 8; // an odd number of 16 bytes: no bank conflicts in ldmatrix
constexpr float NOTHING = -3.402823466e38f;

// A token of the step.
struct Row {
    u32 pages;    // its sequence's first page in the table
    u32 position;
    u32 part;     // of its first span, if it has several
};

struct Span {
    u32 row;
    u32 index;
};

struct Attend {
    const u16* absorbed; // bf16 [heads][rows][rank]
    const u16* rotated;  // bf16 [rows][heads][width - rank]
    const u16* cache;    // bf16, the layer's part of the first page: [page_tokens][width]
    u64 page_stride;     // values from page to page
    const u32* pages;
    const Row* row;
    const Span* spans;
    u16* out;            // bf16 [heads][rows][rank]
    float* parts;        // [parts][heads][rank], by the span's maximum
    float* tops;         // [parts][heads][2]: maximum, and sum of weights
    u32 rows;
    u32 heads;
    u32 width;
    u32 rank;
    u32 page_tokens;
    float scale;
};

struct Shared {
    u16 query[HEADS][PITCH];
    u16 keys[2][POSITIONS][PITCH];
    float scores[HEADS][POSITIONS + 4];
    u16 weights[HEADS][POSITIONS + 8];
    float factor[HEADS];
    float top[HEADS];
    float sum[HEADS];
};
static_assert(sizeof(Shared) <= 232448);

// Largest (or sum) over a warp, the same in every lane.
__device__ __forceinline__ float warp_max(float x) {
    for (u32 apart = 16; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, apart));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (u32 apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
    return x;
}

// Starts copying positions `first`.. to `keys`, of which `count` are seen; the rest, and what is beyond `width`, is zero.
__device__ __forceinline__ void fetch(u16 (&keys)[POSITIONS][PITCH], const Attend& call, const Row& row, u32 first,
                                      u32 count, u32 padded) {
    const u32 pieces = padded / 8;
    for (u32 i = threadIdx.x; i < POSITIONS * pieces; i += blockDim.x) {
        const u32 at = i / pieces, column = i % pieces * 8, position = first + at;
        u16* to = &keys[at][column];
        if (at < count && column < call.width) {
            const u64 page = call.pages[row.pages + position / call.page_tokens];
            const u64 slot = position % call.page_tokens;
            copy_async(to, call.cache + page * call.page_stride + slot * call.width + column);
        } else {
            for (u32 j = 0; j < 8; j++) to[j] = 0;
        }
    }
    copy_async_commit();
}

// One block per span and 32 heads: (spans, heads / 32).
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attend(const Attend call) {
    extern __shared__ u8 memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Span span = call.spans[blockIdx.x];
    const Row row = call.row[span.row];
    const u32 heads = call.heads, rank = call.rank, rope = call.width - rank;
    const u32 head0 = blockIdx.y * HEADS;
    const u32 padded = (call.width + 31) / 32 * 32;
    const u32 first = span.index * SPAN;
    const u32 end = first + SPAN <= row.position ? first + SPAN : row.position + 1;

    fetch(s.keys[0], call, row, first, end - first < POSITIONS ? end - first : POSITIONS, padded);
    for (u32 i = threadIdx.x; i < HEADS * padded; i += blockDim.x) {
        const u32 at = i / padded, column = i % padded, head = head0 + at;
        u16 value = 0;
        if (head < heads && column < rank) value = call.absorbed[((u64)head * call.rows + span.row) * rank + column];
        else if (head < heads && column < call.width)
            value = call.rotated[((u64)span.row * heads + head) * rope + column - rank];
        s.query[at][column] = value;
    }

    float out[2][8][4]; // 16 heads by 8 columns each: this warp's 64 columns
#pragma unroll
    for (u32 i = 0; i < 64; i++) out[i / 32][i / 4 % 8][i % 4] = 0.0f;
    // Each warp has the softmax of four heads.
    float top[4], sum[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) top[i] = NOTHING, sum[i] = 0.0f;

    u32 turn = 0;
    for (u32 block = first; block < end; block += POSITIONS, turn ^= 1) {
        const u32 seen = end - block < POSITIONS ? end - block : POSITIONS;
        copy_async_wait();
        __syncthreads(); // this turn's keys are there, and nobody reads the other ones any more
        if (block + POSITIONS < end) {
            const u32 next = block + POSITIONS;
            fetch(s.keys[turn ^ 1], call, row, next, end - next < POSITIONS ? end - next : POSITIONS, padded);
        }
        const auto& keys = s.keys[turn];

        // Scores of 32 heads by this warp's 8 positions.
        float score[2][4] = {};
        for (u32 k = 0; k < padded; k += 32) {
            u32 b[4];
            load_matrices(b, &keys[warp * 8 + lane % 8][k + lane / 8 * 8]);
#pragma unroll
            for (u32 half = 0; half < 2; half++)
#pragma unroll
                for (u32 m = 0; m < 2; m++) {
                    u32 a[4];
                    load_matrices(a, &s.query[m * 16 + lane % 16][k + half * 16 + lane / 16 * 8]);
                    mma_bf16(score[m], a, b[2 * half], b[2 * half + 1]);
                }
        }
#pragma unroll
        for (u32 i = 0; i < 8; i++)
            s.scores[i / 4 * 16 + i % 4 / 2 * 8 + lane / 4][warp * 8 + lane % 4 * 2 + i % 2] = score[i / 4][i % 4];
        __syncthreads();

#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 head = warp * 4 + i;
            const float a = lane < seen ? s.scores[head][lane] * call.scale : NOTHING;
            const float b = lane + 32 < seen ? s.scores[head][lane + 32] * call.scale : NOTHING;
            const float now = fmaxf(top[i], warp_max(fmaxf(a, b)));
            const float wa = lane < seen ? expf(a - now) : 0.0f, wb = lane + 32 < seen ? expf(b - now) : 0.0f;
            const float factor = expf(top[i] - now); // 0 the first time
            sum[i] = fmaf(sum[i], factor, warp_sum(wa + wb));
            top[i] = now;
            s.weights[head][lane] = f32_to_bf16(wa);
            s.weights[head][lane + 32] = f32_to_bf16(wb);
            if (lane == 0) s.factor[head] = factor;
        }
        __syncthreads();

        // Weighted sums of 32 heads by this warp's 64 columns.
        u32 a[2][4][4];
#pragma unroll
        for (u32 i = 0; i < 8; i++)
            load_matrices(a[i / 4][i % 4], &s.weights[i / 4 * 16 + lane % 16][i % 4 * 16 + lane / 16 * 8]);
#pragma unroll
        for (u32 m = 0; m < 2; m++) {
            const float upper = s.factor[m * 16 + lane / 4], lower = s.factor[m * 16 + 8 + lane / 4];
#pragma unroll
            for (u32 n = 0; n < 8; n++) {
                out[m][n][0] *= upper, out[m][n][1] *= upper;
                out[m][n][2] *= lower, out[m][n][3] *= lower;
            }
        }
#pragma unroll
        for (u32 n = 0; n < 8; n++) {
            const u32 column = warp * 64 + n * 8;
            if (column >= rank) continue; // all lanes of the warp alike
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 b[4];
                load_matrices_transposed(b, &keys[half * 32 + lane][column]);
#pragma unroll
                for (u32 step = 0; step < 2; step++)
#pragma unroll
                    for (u32 m = 0; m < 2; m++)
                        mma_bf16(out[m][n], a[m][half * 2 + step], b[2 * step], b[2 * step + 1]);
            }
        }
    }

#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (lane == 0) s.top[warp * 4 + i] = top[i], s.sum[warp * 4 + i] = sum[i];
    __syncthreads();
    const bool whole = row.position < SPAN;
    const u64 part = row.part + span.index;
    if (!whole && threadIdx.x < HEADS && head0 + threadIdx.x < heads) {
        float* to = call.tops + (part * heads + head0 + threadIdx.x) * 2;
        to[0] = s.top[threadIdx.x], to[1] = s.sum[threadIdx.x];
    }
#pragma unroll
    for (u32 i = 0; i < 32; i++) { // pairs of columns
        const u32 m = i / 16, n = i / 2 % 8, low = i % 2;
        const u32 at = m * 16 + low * 8 + lane / 4, head = head0 + at, column = warp * 64 + n * 8 + lane % 4 * 2;
        if (head >= heads || column >= rank) continue;
        const float x = out[m][n][2 * low], y = out[m][n][2 * low + 1];
        if (whole) {
            const float scale = 1.0f / s.sum[at];
            const u32 pair = f32_to_bf16(x * scale) | (u32)f32_to_bf16(y * scale) << 16;
            *reinterpret_cast<u32*>(call.out + ((u64)head * call.rows + span.row) * rank + column) = pair;
        } else {
            float* to = call.parts + (part * heads + head) * rank + column;
            to[0] = x, to[1] = y;
        }
    }
}

// Puts the parts of tokens with several spans together: (rows, heads) blocks.
extern "C" __global__ void __launch_bounds__(128) merge(const Attend call) {
    const Row row = call.row[blockIdx.x];
    if (row.position < SPAN) return;
    const u32 spans = row.position / SPAN + 1, head = blockIdx.y;
    const float* tops = call.tops + ((u64)row.part * call.heads + head) * 2;
    const float* parts = call.parts + ((u64)row.part * call.heads + head) * call.rank;
    const u64 stride = call.heads;
    float top = NOTHING, sum = 0.0f;
    for (u32 i = 0; i < spans; i++) top = fmaxf(top, tops[i * stride * 2]);
    for (u32 i = 0; i < spans; i++) sum = fmaf(tops[i * stride * 2 + 1], expf(tops[i * stride * 2] - top), sum);
    const float scale = 1.0f / sum;
    for (u32 column = threadIdx.x; column < call.rank; column += blockDim.x) {
        float x = 0.0f;
        for (u32 i = 0; i < spans; i++)
            x = fmaf(parts[i * stride * call.rank + column], expf(tops[i * stride * 2] - top), x);
        call.out[((u64)head * call.rows + blockIdx.x) * call.rank + column] = f32_to_bf16(x * scale);
    }
}
