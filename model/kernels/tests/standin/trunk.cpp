// The trunk's kernels and the products through the stand-in, as a library that standin/driver.rs calls.
#define STANDIN "warps.h"
#include "attention.cu"
#include "coding.cu"
#include "gate.cu"
#include "rows.cu"
#include "sample.cu"
#define Shared ProductShared // attention has one, too
#include "experts.cu"
#undef Shared

#include <utility>

template <typename... P, size_t... I>
static void call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(args[I])...);
}

template <typename... P>
static void launch(void (*kernel)(P...), Dim grid, u32 threads, u64 seed, void** args) {
    standin::launch(grid, threads, seed, [=] { call(kernel, args, std::index_sequence_for<P...>{}); });
}

// Runs a kernel by its name, `args` pointing to its parameters as in a launch on a GPU; 0 if there is none.
extern "C" int standin_launch(const char* name, u32 blocks_x, u32 blocks_y, u32 threads, u64 seed, void** args) {
#define KERNEL(kernel) \
    if (!strcmp(name, #kernel)) return launch(kernel, {blocks_x, blocks_y, 1}, threads, seed, args), 1
    KERNEL(attend);
    KERNEL(merge);
    KERNEL(gate_scores_bf16);
    KERNEL(gate_scores_f32);
    KERNEL(gate_choose);
    KERNEL(embed_bf16);
    KERNEL(embed_f32);
    KERNEL(rms_norm);
    KERNEL(queries);
    KERNEL(latent);
    KERNEL(join);
    KERNEL(combine);
    KERNEL(sample);
    KERNEL(quantize);
    KERNEL(gate_up_fp8_16);
    KERNEL(gate_up_fp8_64);
    KERNEL(gate_up_fp8_128);
    KERNEL(down_fp8_16);
    KERNEL(down_fp8_64);
    KERNEL(down_fp8_128);
    KERNEL(linear_fp8_16);
    KERNEL(linear_fp8_64);
    KERNEL(linear_fp8_128);
    KERNEL(gate_up_bf16_16);
    KERNEL(gate_up_bf16_64);
    KERNEL(gate_up_bf16_128);
    KERNEL(down_bf16_16);
    KERNEL(down_bf16_64);
    KERNEL(down_bf16_128);
    KERNEL(linear_bf16_16);
    KERNEL(linear_bf16_64);
    KERNEL(linear_bf16_128);
    return 0;
}
