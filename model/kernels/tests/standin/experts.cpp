// experts.cu through the stand-in, as a library that tests/standin.rs calls.
#define STANDIN "standin.h"
#include "experts.cu"

using Product = void (*)(const TensorMap, const TensorMap, const TensorMap, const TensorMap, const Call);

static const struct {
    const char* name;
    Product run;
} PRODUCTS[] = {
#define NAMED(name) {#name, name}
    NAMED(gate_up_fp8_16),  NAMED(gate_up_fp8_64),  NAMED(gate_up_fp8_128),  NAMED(down_fp8_16),
    NAMED(down_fp8_64),     NAMED(down_fp8_128),    NAMED(gate_up_bf16_16),  NAMED(gate_up_bf16_64),
    NAMED(gate_up_bf16_128), NAMED(down_bf16_16),   NAMED(down_bf16_64),     NAMED(down_bf16_128),
};

// Runs a product by its kernel's name; 0 if there is none.
extern "C" int standin_product(const char* name, u32 blocks, u32 threads, u64 seed, const TensorMap* maps, const Call* call) {
    for (const auto& product : PRODUCTS)
        if (!strcmp(product.name, name)) {
            standin::launch({blocks, 1, 1}, threads, seed,
                            [&] { product.run(maps[0], maps[1], maps[2], maps[3], *call); });
            return 1;
        }
    return 0;
}
