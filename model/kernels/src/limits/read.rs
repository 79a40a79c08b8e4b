//! How fast memory is read: the best of several numbers of streams and distances of prefetching, with the widest loads
//! that there are and large pages where the system gives them, since a bound that a kernel can beat is none.

use std::hint::black_box;

const LINE: usize = 64;

/// What is read at once.
pub(super) type Line = [u64; LINE / 8];

/// `count` copies of `one`, one after another, in large pages where the system gives them.
pub(super) fn copies<T: Copy>(one: &[T], count: usize) -> Vec<T> {
    let mut all = Vec::<T>::with_capacity(one.len() * count);
    want_large_pages(all.as_ptr().cast(), size_of_val(one) * count);
    (0..count).for_each(|_| all.extend_from_slice(one));
    all
}

/// A hint, before the memory is written for the first time.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn want_large_pages(at: *const u8, bytes: usize) {
    const PAGE: usize = 4096;
    const MADVISE: i64 = 28;
    const HUGEPAGE: i64 = 14;
    let skip = at.align_offset(PAGE);
    // SAFETY: the system call changes no byte, only how those are mapped that the caller owns; it changes RCX and R11.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") MADVISE => _, in("rdi") at.wrapping_add(skip),
            in("rsi") bytes.saturating_sub(skip), in("rdx") HUGEPAGE, lateout("rcx") _,
            lateout("r11") _, options(nostack));
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn want_large_pages(_at: *const u8, _bytes: usize) {}

/// A way to read.
#[derive(Clone, Copy)]
pub(super) struct Way {
    streams: usize,
    /// Bytes that a line is asked for before it is read, or none.
    ahead: usize,
}

impl Way {
    pub(super) fn all() -> impl Iterator<Item = Way> {
        [1, 2, 4, 8, 16].into_iter().flat_map(|streams| {
            [0, 512, 1024, 2048].into_iter().map(move |ahead| Way { streams, ahead })
        })
    }

    /// Reads all of `data`.
    pub(super) fn read(self, data: &[Line]) {
        match self.streams {
            1 => pass::<1>(data, self.ahead),
            2 => pass::<2>(data, self.ahead),
            4 => pass::<4>(data, self.ahead),
            8 => pass::<8>(data, self.ahead),
            _ => pass::<16>(data, self.ahead),
        }
    }
}

/// Reads `data` in `N` streams.
fn pass<const N: usize>(data: &[Line], ahead: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction sets are there.
    unsafe {
        if is_x86_feature_detected!("avx512f") {
            return avx512::<N>(data, ahead);
        }
        if is_x86_feature_detected!("avx2") {
            return avx2::<N>(data, ahead);
        }
    }
    let _ = ahead;
    plain::<N>(data);
}

fn plain<const N: usize>(data: &[Line]) {
    let mut sums = [0u64; N];
    let part = data.len() / N;
    for i in 0..part {
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum = data[n * part + i].iter().fold(*sum, |sum, word| sum ^ word);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512<const N: usize>(data: &[Line], ahead: usize) {
    use std::arch::x86_64::*;
    let part = data.len() / N;
    let mut sums = [_mm512_setzero_si512(); N];
    for i in 0..part {
        for (n, sum) in sums.iter_mut().enumerate() {
            let p = data[n * part + i].as_ptr();
            // SAFETY: a line is there; a prefetch may be of any address.
            unsafe {
                if ahead > 0 {
                    _mm_prefetch::<_MM_HINT_T0>(p.cast::<i8>().wrapping_add(ahead));
                }
                *sum = _mm512_xor_si512(*sum, _mm512_loadu_si512(p.cast()));
            }
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<const N: usize>(data: &[Line], ahead: usize) {
    use std::arch::x86_64::*;
    let part = data.len() / N;
    let mut sums = [_mm256_setzero_si256(); N];
    for i in 0..part {
        for (n, sum) in sums.iter_mut().enumerate() {
            let p = data[n * part + i].as_ptr().cast::<__m256i>();
            // SAFETY: a line is there; a prefetch may be of any address.
            unsafe {
                if ahead > 0 {
                    _mm_prefetch::<_MM_HINT_T0>(p.cast::<i8>().wrapping_add(ahead));
                }
                let (a, b) = (_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1)));
                *sum = _mm256_xor_si256(*sum, _mm256_xor_si256(a, b));
            }
        }
    }
    black_box(sums);
}
