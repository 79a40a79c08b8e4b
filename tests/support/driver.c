// A CUDA driver as far as `Gpu::open` and the first allocations go, for tests of what is said where a machine's does not
// do: FAKE_CUDA is "version devices major minor free", and no memory beyond `free` bytes is given.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int version, devices, major, minor;
static unsigned long long left;

static void *handle(void) { return &version; }

int cuInit(unsigned flags) {
    const char *told = getenv("FAKE_CUDA");
    (void)flags;
    return told && sscanf(told, "%d %d %d %d %llu", &version, &devices, &major, &minor, &left) == 5 ? 0 : 999;
}
int cuDriverGetVersion(int *to) { return *to = version, 0; }
int cuDeviceGetCount(int *to) { return *to = devices, 0; }
int cuDeviceGet(int *to, int ordinal) { return *to = ordinal, 0; }
int cuDeviceGetName(char *to, int len, int device) { return snprintf(to, len, "NVIDIA TEST-%d", device), 0; }
int cuDeviceGetAttribute(int *to, int which, int device) {
    (void)device;
    return *to = which == 75 ? major : which == 76 ? minor : 1, 0;
}
int cuDevicePrimaryCtxRetain(void **to, int device) { return (void)device, *to = handle(), 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, 0; }
int cuCtxGetCurrent(void **to) { return *to = handle(), 0; }
int cuCtxSetCurrent(void *context) { return (void)context, 0; }
int cuCtxSynchronize(void) { return 0; }
int cuStreamCreate(void **to, unsigned flags) { return (void)flags, *to = handle(), 0; }
int cuStreamDestroy_v2(void *stream) { return (void)stream, 0; }
int cuStreamSynchronize(void *stream) { return (void)stream, 0; }
int cuModuleLoadData(void **to, const void *image) { return (void)image, *to = handle(), 0; }
int cuModuleUnload(void *module) { return (void)module, 0; }
int cuModuleGetFunction(void **to, void *module, const char *name) { return (void)module, (void)name, *to = handle(), 0; }
int cuFuncSetAttribute(void *function, int which, int value) { return (void)function, (void)which, (void)value, 0; }
int cuMemGetInfo_v2(size_t *available, size_t *all) { return *available = left, *all = 1ull << 36, 0; }
int cuMemAlloc_v2(unsigned long long *to, size_t len) {
    if (len > left) return 2; // CUDA_ERROR_OUT_OF_MEMORY
    left -= len;
    return *to = 1 << 20, 0;
}
int cuMemFree_v2(unsigned long long address) { return (void)address, 0; }
int cuMemsetD8_v2(unsigned long long address, unsigned char value, size_t len) {
    return (void)address, (void)value, (void)len, 0;
}
int cuMemHostAlloc(void **to, size_t len, unsigned flags) { return (void)flags, *to = malloc(len), 0; }
int cuMemFreeHost(void *bytes) { return free(bytes), 0; }
int cuTensorMapEncodeTiled(void *map) { return memset(map, 0, 128), 0; }
int cuEventCreate(void **to, unsigned flags) { return (void)flags, *to = handle(), 0; }
int cuEventDestroy_v2(void *event) { return (void)event, 0; }
int cuGetErrorName(int error, const char **to) { return *to = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN", 0; }
