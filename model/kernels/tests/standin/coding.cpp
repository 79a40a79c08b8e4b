// coding.cu through the stand-in, as a library that tests/standin.rs calls.
#define STANDIN "standin.h"
#include "coding.cu"

extern "C" void standin_quantize(u32 blocks_x, u32 blocks_y, u32 threads, const u16* x, u32 x_stride, u32 rows, u32 k,
                                 u8* codes, u32 stride, float* scales, u32 scale_stride) {
    standin::launch({blocks_x, blocks_y, 1}, threads, 1,
                    [&] { quantize(x, x_stride, rows, k, codes, stride, scales, scale_stride); });
}

extern "C" void standin_arrive_fp8(u32 blocks_x, u32 blocks_y, u32 threads, const u8* arrived, const u32* sources,
                                   u32 rows, u32 k, u8* codes, u32 stride, float* scales, u32 scale_stride) {
    standin::launch({blocks_x, blocks_y, 1}, threads, 1,
                    [&] { arrive_fp8(arrived, sources, rows, k, codes, stride, scales, scale_stride); });
}

extern "C" void standin_arrive_bf16(u32 blocks_x, u32 blocks_y, u32 threads, const u8* arrived, const u32* sources,
                                    u32 rows, u32 k, u16* out, u32 stride) {
    standin::launch({blocks_x, blocks_y, 1}, threads, 1, [&] { arrive_bf16(arrived, sources, rows, k, out, stride); });
}
