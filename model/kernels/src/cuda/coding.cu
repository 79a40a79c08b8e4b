// Rows on their way into products: as they came from the host, and between an expert's two products.
//
// Rows arrive in bf16, or in FP8 as they travelled: e4m3 codes, then an f32 scale per 128 of them, little-endian
// (model/src/rows.rs). Each lies at a multiple of 16 bytes; `sources` says of every row of the batch where, in sixteens
// of bytes, times 2, plus 1 if it is in FP8. Rows that several experts share arrive once.
//
// A warp has one block of 128 values of one row: blockIdx.x rows of 4, blockIdx.y blocks; a lane has 4 values.
#include "hopper.cuh"

constexpr u32 BLOCK = 128;

struct Place {
    u32 row, lane, first; // first of the lane's 4 values

    __device__ Place() : row(blockIdx.x * 4 + threadIdx.x / 32), lane(threadIdx.x % 32), first(blockIdx.y * BLOCK + lane * 4) {}
};

// The lane's values of a bf16 row, zeros beyond its end.
__device__ __forceinline__ void halves(u16 (&values)[4], const u16* row, u32 first, u32 k) {
    for (u32 i = 0; i < 4; i++) values[i] = first + i < k ? row[first + i] : (u16)0;
}

// Codes a block: its scale is its largest magnitude / 448, never so small that a quotient overflows, as for rows that
// travel. Strides are multiples of 16, so that four codes are either all inside a row or all beyond it.
__device__ __forceinline__ void encode(const u16 (&halves)[4], const Place& at, u8* codes, u32 stride, float* scales,
                                       u32 scale_stride) {
    float values[4];
    float largest = 0.0f;
    for (u32 i = 0; i < 4; i++) {
        values[i] = bf16_to_f32(halves[i]);
        largest = fmaxf(largest, fabsf(values[i]));
    }
    for (u32 apart = 16; apart > 0; apart /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, apart));
    const float scale = fmaxf(largest / 448.0f, 1.17549435e-38f);
    const u32 lo = f32_to_e4m3x2(values[0] / scale, values[1] / scale);
    const u32 hi = f32_to_e4m3x2(values[2] / scale, values[3] / scale);
    if (at.first < stride) *reinterpret_cast<u32*>(codes + (u64)at.row * stride + at.first) = lo | hi << 16;
    if (at.lane == 0) scales[(u64)blockIdx.y * scale_stride + at.row] = scale;
}

// The lane's codes of an FP8 row, zeros beyond its end; rows are aligned, lengths need not be.
__device__ __forceinline__ u32 codes_of(const u8* row, u32 first, u32 k) {
    if (first + 4 <= k) return *reinterpret_cast<const u32*>(row + first);
    u32 four = 0;
    for (u32 i = 0; i < 4 && first + i < k; i++) four |= (u32)row[first + i] << 8 * i;
    return four;
}

// The scale of block blockIdx.y, which need not be aligned.
__device__ __forceinline__ float scale_of(const u8* row, u32 k) {
    const u8* at = row + k + 4 * blockIdx.y;
    return __uint_as_float((u32)at[0] | (u32)at[1] << 8 | (u32)at[2] << 16 | (u32)at[3] << 24);
}

// What a finite code stands for: its bits as those of an f32, whose exponent is 120 larger. Exact, below normal too.
__device__ __forceinline__ float e4m3_to_f32(u32 code) {
    return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 1.329227996e36f; // 2^120
}

// Rows for FP8 weights: codes [rows][stride], scales [k / 128][scale_stride]. FP8 rows stay as they are.
extern "C" __global__ void __launch_bounds__(128)
    arrive_fp8(const u8* arrived, const u32* sources, u32 rows, u32 k, u8* codes, u32 stride, float* scales,
               u32 scale_stride) {
    const Place at;
    if (at.row >= rows) return;
    const u32 source = sources[at.row];
    const u8* row = arrived + (u64)(source >> 1) * 16;
    if (source & 1) {
        if (at.first < stride) {
            *reinterpret_cast<u32*>(codes + (u64)at.row * stride + at.first) = codes_of(row, at.first, k);
        }
        if (at.lane == 0) scales[(u64)blockIdx.y * scale_stride + at.row] = scale_of(row, k);
        return;
    }
    u16 values[4];
    halves(values, reinterpret_cast<const u16*>(row), at.first, k);
    encode(values, at, codes, stride, scales, scale_stride);
}

// Rows for bf16 weights: [rows][stride] in bf16. FP8 rows become what a CPU makes of them.
extern "C" __global__ void __launch_bounds__(128)
    arrive_bf16(const u8* arrived, const u32* sources, u32 rows, u32 k, u16* out, u32 stride) {
    const Place at;
    if (at.row >= rows) return;
    const u32 source = sources[at.row];
    const u8* row = arrived + (u64)(source >> 1) * 16;
    u16 values[4];
    if (source & 1) {
        const u32 four = codes_of(row, at.first, k);
        const float scale = scale_of(row, k);
        for (u32 i = 0; i < 4; i++) values[i] = f32_to_bf16(e4m3_to_f32(four >> 8 * i & 0xff) * scale);
    } else {
        halves(values, reinterpret_cast<const u16*>(row), at.first, k);
    }
    for (u32 i = 0; i < 4; i++) {
        if (at.first + i < stride) out[(u64)at.row * stride + at.first + i] = values[i];
    }
}

// bf16 rows, side by side, as codes and scales: what is between an expert's two products, and what the trunk's FP8
// weights take.
extern "C" __global__ void __launch_bounds__(128)
    quantize(const u16* x, u32 x_stride, u32 rows, u32 k, u8* codes, u32 stride, float* scales, u32 scale_stride) {
    const Place at;
    if (at.row >= rows) return;
    u16 values[4];
    halves(values, x + (u64)at.row * x_stride, at.first, k);
    encode(values, at, codes, stride, scales, scale_stride);
}
