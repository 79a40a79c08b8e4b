// From logits to a token, for rows that ask for nothing but a temperature and min-p: greedy, or a draw by Philox under
// (seed, position), in the order of ids, as model/src/sample.rs draws. Rows with penalties, top-k, top-p or
// log-probabilities are sampled there, from their logits.
#include "hopper.cuh"

constexpr u32 SAMPLE_THREADS = 256;
constexpr u32 REFUSED = ~0u; // logits that are not finite

struct Draw {
    u64 seed;
    u64 position;
    float temperature; // below 1e-5: greedy
    float min_p;
};

// A number in [0, 1) with 53 random bits (Philox4x32-10, Salmon et al. 2011).
__device__ __forceinline__ double uniform(u64 seed, u64 position) {
    u32 counter[4] = {(u32)position, (u32)(position >> 32), 0, 0};
    u32 key[2] = {(u32)seed, (u32)(seed >> 32)};
    for (u32 round = 0; round < 10; round++) {
        const u64 first = (u64)0xD2511F53u * counter[0], second = (u64)0xCD9E8D57u * counter[2];
        const u32 next[4] = {(u32)(second >> 32) ^ counter[1] ^ key[0], (u32)second,
                             (u32)(first >> 32) ^ counter[3] ^ key[1], (u32)first};
        for (u32 i = 0; i < 4; i++) counter[i] = next[i];
        key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    const u64 bits = ((u64)counter[1] << 32 | counter[0]) >> 11;
    return (double)bits * (1.0 / 9007199254740992.0);
}

struct Found {
    float value;
    u32 index;
};

// One block a row, logits f32 [rows][vocab]. A thread has consecutive ids, so that sums of weights are in the order of ids.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    sample(const float* logits, const Draw* draws, u32 vocab, u32* tokens) {
    extern __shared__ u8 memory[];
    double* sums = reinterpret_cast<double*>(memory);                 // [SAMPLE_THREADS]
    Found* best = reinterpret_cast<Found*>(sums + SAMPLE_THREADS);    // [SAMPLE_THREADS]
    const u32 t = threadIdx.x;
    const Draw draw = draws[blockIdx.x];
    logits += (u64)blockIdx.x * vocab;
    const u32 each = (vocab + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    const u32 from = t * each < vocab ? t * each : vocab, to = from + each < vocab ? from + each : vocab;

    // The largest logit, the lowest id of equals. NaN and infinities, which x - x is not 0 of, have the row refused.
    Found mine{0.0f, REFUSED};
    bool finite = true;
    for (u32 i = from; i < to; i++) {
        const float x = logits[i];
        finite = finite && x - x == 0.0f;
        if (mine.index == REFUSED || x > mine.value) mine = {x, i};
    }
    best[t] = mine;
    sums[t] = finite ? 0.0 : 1.0;
    __syncthreads();
    Found top = best[0];
    double bad = 0.0;
    for (u32 i = 0; i < SAMPLE_THREADS; i++) {
        if (best[i].index != REFUSED && best[i].value > top.value) top = best[i];
        bad += sums[i];
    }
    const bool greedy = draw.temperature < 1e-5f;
    if (bad != 0.0 || greedy) {
        if (t == 0) tokens[blockIdx.x] = bad != 0.0 ? REFUSED : top.index;
        return; // all threads alike
    }
    __syncthreads(); // all have read the sums

    // Weights by the largest, whose own is 1: min-p is a bound on them.
    const float most = top.value / draw.temperature;
    double sum = 0.0;
    for (u32 i = from; i < to; i++) {
        const float weight = expf(logits[i] / draw.temperature - most);
        if (weight > 0.0f && weight >= draw.min_p) sum += weight;
    }
    sums[t] = sum;
    __syncthreads();
    if (t != 0) return;
    double total = 0.0;
    u32 end = 0; // the last thread that has any
    for (u32 i = 0; i < SAMPLE_THREADS; i++) {
        total += sums[i];
        if (sums[i] > 0.0) end = i;
    }
    double left = uniform(draw.seed, draw.position) * total;
    u32 last = top.index;
    for (u32 i = 0; i <= end && left >= 0.0; i++) {
        if (i < end && left >= sums[i]) {
            left -= sums[i];
            continue;
        }
        for (u32 id = i * each; id < (i + 1) * each && id < vocab; id++) {
            const float weight = expf(logits[id] / draw.temperature - most);
            if (!(weight > 0.0f && weight >= draw.min_p)) continue;
            last = id;
            left -= weight;
            if (left < 0.0) break;
        }
    }
    // Rounding can leave a remainder at the very end of the interval: then it is the last one.
    tokens[blockIdx.x] = last;
}
