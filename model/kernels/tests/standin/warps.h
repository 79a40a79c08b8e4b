// What the trunk's kernels use beyond standin.h: products of a warp and copies by threads, by the sections of the PTX ISA
// that hopper.cuh names. A copy is made only when it is waited for.
#pragma once

#include "standin.h"

namespace standin {

// What every lane of a warp shows the others in one exchange. Two take turns, so that one barrier suffices.
struct Shown {
    u32 words[32][6];
    const void* address[32];
};
inline Shown shown[32][2];
inline u32 turns[1024];

// Shows the warp `mine`, and gives what all have shown.
template <typename F>
Shown& exchange(F&& show) {
    Shown& here = shown[warp()][turns[threadIdx.x]++ % 2];
    show(here, lane());
    __syncwarp();
    return here;
}

inline float half_of(u32 pair, u32 which) {
    const u32 bits = (pair >> 16 * which) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline u16 value_at(const void* row, u32 column) {
    if (offset(row) % 16) fail("a row of a matrix that is not aligned to 16 bytes");
    u16 value;
    memcpy(&value, static_cast<const u8*>(row) + 2 * column, 2);
    return value;
}

struct ThreadCopy {
    void* to;
    const void* from;
    bool committed;
};
inline std::vector<ThreadCopy> thread_copies[1024];

} // namespace standin

inline u32 __shfl_xor_sync(u32, u32 value, u32 apart) {
    const auto& all = standin::exchange([&](auto& here, u32 lane) { here.words[lane][0] = value; });
    return all.words[standin::lane() ^ apart][0];
}

inline void load_matrices(u32 (&x)[4], const void* row) {
    const auto& all = standin::exchange([&](auto& here, u32 lane) { here.address[lane] = row; });
    const u32 t = standin::lane();
    for (u32 m = 0; m < 4; m++) {
        const void* from = all.address[8 * m + t / 4];
        x[m] = standin::value_at(from, 2 * (t % 4)) | (u32)standin::value_at(from, 2 * (t % 4) + 1) << 16;
    }
}

inline void load_matrices_transposed(u32 (&x)[4], const void* row) {
    const auto& all = standin::exchange([&](auto& here, u32 lane) { here.address[lane] = row; });
    const u32 t = standin::lane();
    for (u32 m = 0; m < 4; m++)
        x[m] = standin::value_at(all.address[8 * m + 2 * (t % 4)], t / 4) |
               (u32)standin::value_at(all.address[8 * m + 2 * (t % 4) + 1], t / 4) << 16;
}

inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const auto& all = standin::exchange([&](auto& here, u32 lane) {
        const u32 words[6] = {a[0], a[1], a[2], a[3], b0, b1};
        memcpy(here.words[lane], words, sizeof words);
    });
    const u32 t = standin::lane();
    for (u32 i = 0; i < 4; i++) {
        const u32 row = t / 4 + 8 * (i / 2), column = 2 * (t % 4) + i % 2;
        double sum = d[i];
        for (u32 k = 0; k < 16; k++) {
            const u32 of_a = all.words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const u32 of_b = all.words[column * 4 + k % 8 / 2][4 + k / 8];
            sum += (double)standin::half_of(of_a, k % 2) * standin::half_of(of_b, k % 2);
        }
        d[i] = (float)sum;
    }
}

inline void copy_async(void* to, const void* from) {
    if (standin::offset(to) % 16 || (u64)from % 16) standin::fail("a copy that is not aligned to 16 bytes");
    standin::thread_copies[threadIdx.x].push_back({to, from, false});
}
inline void copy_async_commit() {
    for (auto& copy : standin::thread_copies[threadIdx.x]) copy.committed = true;
}
inline void copy_async_wait() {
    auto& copies = standin::thread_copies[threadIdx.x];
    for (const auto& copy : copies) {
        if (!copy.committed) standin::fail("a copy that is waited for but not committed");
        memcpy(copy.to, copy.from, 16);
    }
    copies.clear();
}
