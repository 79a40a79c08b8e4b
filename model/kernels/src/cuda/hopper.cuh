// Hopper's instructions that CUDA C++ has no word for, each behind one small function. This is the only file with
// inline assembly; kernels are plain C++ over it, so that a stand-in for the CPU replaces this file alone: it defines
// STANDIN, the path of a header with the same functions.
//
// Sections named below are those of the PTX ISA, version 8.x. Nothing of NVIDIA's headers is included.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// A CUtensorMap: made by cuTensorMapEncodeTiled, passed by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

#ifdef STANDIN
#include STANDIN
#else

// The address that shared-space instructions take ("Generic Addressing", cvta).
__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// --- mbarrier ("Parallel Synchronization and Communication Instructions: mbarrier") ---

// Phase 0 begins; it ends when `count` arrivals and all expected bytes have been seen.
__device__ __forceinline__ void mbarrier_init(u64* bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

// Makes initialised barriers visible to other threads' and to TMA's accesses; a barrier of the block has to follow.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and has the phase wait for `bytes` more bytes of asynchronous copies.
__device__ __forceinline__ void mbarrier_expect(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u64* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

// Waits until the phase of this parity has ended. A fresh barrier counts as if phase 1 had ended.
__device__ __forceinline__ void mbarrier_wait(u64* bar, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(bar)),
        "r"(parity)
        : "memory");
}

// --- TMA ("Data Movement and Conversion Instructions: cp.async.bulk.tensor") ---

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box at these coordinates (innermost first) to shared memory, zeros where it is outside the tensor, and
// counts the whole box's bytes off `bar`'s phase. One thread issues it; `to` is 128-byte aligned, 1024 if swizzled.
__device__ __forceinline__ void tma_load_2d(void* to, const TensorMap* map, u64* bar, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1)
        : "memory");
}

__device__ __forceinline__ void tma_load_3d(void* to, const TensorMap* map, u64* bar, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// --- wgmma ("Asynchronous Warpgroup Level Matrix Instructions") ---

// Descriptor of a K-major operand whose rows are 128 bytes of K, in eights of 1024 bytes, swizzled by 128 bytes ("Matrix
// Descriptor Format"): bits 0-13 address / 16; 16-29 leading offset, not used in this mode; 32-45 stride offset / 16,
// from one eight of rows to the next; 49-51 base offset 0, as tiles are 1024-byte aligned; 62-63 mode 1, 128 bytes.
// A step of 32 bytes along K is 2 added to it: hardware swizzles the sum's address bits.
__device__ __forceinline__ u64 wgmma_operand(const void* tile) {
    return (u64)((shared_address(tile) & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// Orders earlier register and shared accesses of the warpgroup before wgmmas to come.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all committed wgmmas of the warpgroup are complete.
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// d[64, N] = a[64, K] b[N, K]^T, + d if `add`; K is 32 bytes. Thread t of the warpgroup has in d[i] row
// 16 (t / 32) + (t % 32) / 4 + 8 ((i / 2) % 2), column 8 (i / 4) + 2 (t % 4) + i % 2 ("Register Fragments for wgmma").
#define REGS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define REGS_8(d, i) REGS_4(d, i), REGS_4(d, i + 4)
#define REGS_32(d, i) REGS_8(d, i), REGS_8(d, i + 8), REGS_8(d, i + 16), REGS_8(d, i + 24)
#define LIST_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LIST_32                                                                                                         \
    LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
           "%29, %30, %31"
#define LIST_64                                                                                                     \
    LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
            "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(shape, types, list, a_at, b_at, p_at, tail, ...)                                                     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" p_at ", 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned." shape "." types " {" list "}, %" a_at ", %" b_at ", add, 1, 1" tail \
                 ";\n}"                                                                                            \
                 : __VA_ARGS__                                                                                     \
                 : "l"(a), "l"(b), "r"((u32)add)                                                                   \
                 : "memory")

__device__ __forceinline__ void wgmma_e4m3(float (&d)[8], u64 a, u64 b, bool add) {
    WGMMA("m64n16k32", "f32.e4m3.e4m3", LIST_8, "8", "9", "10", "", REGS_8(d, 0));
}
__device__ __forceinline__ void wgmma_e4m3(float (&d)[32], u64 a, u64 b, bool add) {
    WGMMA("m64n64k32", "f32.e4m3.e4m3", LIST_32, "32", "33", "34", "", REGS_32(d, 0));
}
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], u64 a, u64 b, bool add) {
    WGMMA("m64n128k32", "f32.e4m3.e4m3", LIST_64, "64", "65", "66", "", REGS_32(d, 0), REGS_32(d, 32));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[8], u64 a, u64 b, bool add) {
    WGMMA("m64n16k16", "f32.bf16.bf16", LIST_8, "8", "9", "10", ", 0, 0", REGS_8(d, 0));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[32], u64 a, u64 b, bool add) {
    WGMMA("m64n64k16", "f32.bf16.bf16", LIST_32, "32", "33", "34", ", 0, 0", REGS_32(d, 0));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[64], u64 a, u64 b, bool add) {
    WGMMA("m64n128k16", "f32.bf16.bf16", LIST_64, "64", "65", "66", ", 0, 0", REGS_32(d, 0), REGS_32(d, 32));
}

// --- registers and barriers ---

// Moves registers between warpgroups ("Miscellaneous Instructions: setmaxnreg"); every warp of a warpgroup calls it.
template <int N>
__device__ __forceinline__ void registers_give_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Waits for `threads` threads at barrier `id`; 0 is __syncthreads.
__device__ __forceinline__ void barrier_sync(u32 id, u32 threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- products of a warp ("Warp Level Matrix Instructions": ldmatrix, mma.m16n8k16) ---

// Four 8 x 8 matrices of 16-bit values in shared memory: lane i gives the address of row i % 8 of matrix i / 8, 16-byte
// aligned. Lane t has in x[m] the values 2 (t % 4) and the next one of matrix m's row t / 4.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the transposed matrices: x[m] has column t / 4 of matrix m, rows 2 (t % 4) and the next one.
__device__ __forceinline__ void load_matrices_transposed(u32 (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d[16, 8] += a[16, 16] b[8, 16]^T in bf16. Lane t has of a rows t / 4 and, in a[1] and a[3], t / 4 + 8; columns 2 (t % 4)
// and the next one and, in a[2] and a[3], these + 8. It has of b row t / 4, the same columns; of d rows t / 4 and, in d[2]
// and d[3], t / 4 + 8, columns 2 (t % 4) and the next one.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- copies by threads ("Data Movement and Conversion Instructions: cp.async") ---

// Starts copying 16 bytes, 16-byte aligned on both sides, to shared memory.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all copies that this thread has committed.
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// --- conversions ("Data Movement and Conversion Instructions: cvt"), to nearest even ---

__device__ __forceinline__ float bf16_to_f32(u16 x) {
    return __uint_as_float((u32)x << 16);
}

__device__ __forceinline__ u16 f32_to_bf16(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Two e4m3 codes, `lo` in the low byte; beyond 448 is 448, NaN is NaN.
__device__ __forceinline__ u16 f32_to_e4m3x2(float lo, float hi) {
    u16 y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(hi), "f"(lo));
    return y;
}

#endif
