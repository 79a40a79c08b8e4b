//! How fast one thread reads memory: the best of several numbers of streams and distances of prefetching, with the
//! widest loads that there are, since a bound that a kernel can beat is none.

use super::{FOOTPRINT, now};
use std::hint::black_box;

const LINE: usize = 64;
const PASSES: usize = 3;

/// GB/s.
pub fn bandwidth() -> f64 {
    let data = vec![1u8; FOOTPRINT];
    let mut best = f64::INFINITY;
    for ahead in [0, 512, 1024, 2048, 4096] {
        for _ in 0..PASSES {
            for streams in [pass::<1>, pass::<2>, pass::<4>, pass::<8>] {
                let start = now();
                streams(&data, ahead);
                best = best.min(now() - start);
            }
        }
    }
    FOOTPRINT as f64 / best / 1e9
}

/// Reads `data` in `N` streams, and asks for each line `ahead` bytes before it is read.
#[cfg(target_arch = "x86_64")]
fn pass<const N: usize>(data: &[u8], ahead: usize) {
    // SAFETY: the instruction sets are there.
    unsafe {
        if is_x86_feature_detected!("avx512f") {
            avx512::<N>(data, ahead);
        } else if is_x86_feature_detected!("avx2") {
            avx2::<N>(data, ahead);
        } else {
            plain::<N>(data);
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn pass<const N: usize>(data: &[u8], _ahead: usize) {
    plain::<N>(data);
}

fn plain<const N: usize>(data: &[u8]) {
    let (words, _) = data.as_chunks::<8>();
    let mut sums = [0u64; N];
    let part = words.len() / N;
    for i in 0..part {
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum ^= u64::from_ne_bytes(words[n * part + i]);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512<const N: usize>(data: &[u8], ahead: usize) {
    use std::arch::x86_64::*;
    let part = data.len() / N / LINE * LINE;
    let mut sums = [_mm512_setzero_si512(); N];
    for at in (0..part).step_by(LINE) {
        for (n, sum) in sums.iter_mut().enumerate() {
            let p = data[n * part + at..][..LINE].as_ptr();
            // SAFETY: a line is there; a prefetch may be of any address.
            unsafe {
                if ahead > 0 {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(ahead).cast());
                }
                *sum = _mm512_xor_si512(*sum, _mm512_loadu_si512(p.cast()));
            }
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<const N: usize>(data: &[u8], ahead: usize) {
    use std::arch::x86_64::*;
    let part = data.len() / N / LINE * LINE;
    let mut sums = [_mm256_setzero_si256(); N];
    for at in (0..part).step_by(LINE) {
        for (n, sum) in sums.iter_mut().enumerate() {
            let p = data[n * part + at..][..LINE].as_ptr();
            // SAFETY: a line is there; a prefetch may be of any address.
            unsafe {
                if ahead > 0 {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(ahead).cast());
                }
                let a = _mm256_loadu_si256(p.cast());
                let b = _mm256_loadu_si256(p.add(LINE / 2).cast());
                *sum = _mm256_xor_si256(*sum, _mm256_xor_si256(a, b));
            }
        }
    }
    black_box(sums);
}
