//! What this machine can do at most, for `moemesh bench`: how fast memory is read, and how fast
//! multiply-adds go that never leave the registers. Of use only beside measurements of the same minute.

mod read;

use crate::Isa;
use crate::packed::{Line, aligned};
use std::hint::black_box;
use std::ops::Deref;
use std::sync::Barrier;
use std::time::Instant;

/// Bytes that are read, more than the caches hold that one machine has to itself.
const FOOTPRINT: usize = 1 << 30;
const PASSES: usize = 3;
/// Multiply-adds of each accumulator in one pass.
const ROUNDS: usize = 1 << 21;

/// GFLOP/s of fused multiply-adds on `threads` threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    pub f32: f64,
    /// Of pairs of bf16 values with VDPBF16PS, where the CPU has it.
    pub bf16: Option<f64>,
    /// Of bf16 tiles with TDPBF16PS, where the CPU has it.
    pub amx: Option<f64>,
}

/// Measures [`Peaks`].
pub fn peaks(threads: usize) -> Peaks {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f");
        let rate = |flops: usize, f: fn()| rate(threads, flops, f);
        // SAFETY, of the calls below: the instruction set was found to be there.
        let f32 = match (avx512, avx2) {
            // SAFETY: as above.
            (true, _) => rate(2 * 16 * x86::ACCUMULATORS, || unsafe { x86::avx512() }),
            // SAFETY: as above.
            (_, true) => rate(2 * 8 * x86::ACCUMULATORS, || unsafe { x86::avx2() }),
            _ => rate(2 * PLAIN, plain),
        };
        let has_bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
        // SAFETY: as above.
        let bf16 = || rate(2 * 32 * x86::ACCUMULATORS, || unsafe { x86::bf16() });
        // SAFETY: as above.
        let amx = || rate(2 * 16 * 16 * 32 * 4, || unsafe { x86::amx() });
        Peaks { f32, bf16: has_bf16.then(bf16), amx: Isa::Amx.is_available().then(amx) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        Peaks { f32: rate(threads, 2 * PLAIN, plain), bf16: None, amx: None }
    }
}

/// GFLOP/s of one thread with the instructions of `isa`, which has to be available: in f32, and in bf16, which is the
/// same where there is no instruction for it.
pub fn peak_of(isa: Isa) -> (f64, f64) {
    assert!(isa.is_available(), "this cpu has no {isa}");
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY, of the calls below: `isa` is available.
        let wide = || {
            // SAFETY: as above.
            rate(1, 2 * 16 * x86::ACCUMULATORS, || unsafe { x86::avx512() })
        };
        match isa {
            Isa::Scalar => {}
            Isa::Avx2 => {
                // SAFETY: as above.
                let f32 = rate(1, 2 * 8 * x86::ACCUMULATORS, || unsafe { x86::avx2() });
                return (f32, f32);
            }
            Isa::Avx512 => {
                let f32 = wide();
                return (f32, f32);
            }
            Isa::Avx512Bf16 => {
                // SAFETY: as above.
                return (wide(), rate(1, 2 * 32 * x86::ACCUMULATORS, || unsafe { x86::bf16() }));
            }
            Isa::Amx => {
                // SAFETY: as above.
                return (wide(), rate(1, 2 * 16 * 16 * 32 * 4, || unsafe { x86::amx() }));
            }
        }
    }
    let f32 = rate(1, 2 * PLAIN, plain);
    (f32, f32)
}

/// GFLOP/s of `threads` threads that each run `f`, [`ROUNDS`] rounds of `flops`.
fn rate(threads: usize, flops: usize, f: fn()) -> f64 {
    flops as f64 * ROUNDS as f64 * threads as f64 / best(threads, |_| f()) / 1e9
}

/// GB/s at which `threads` threads read memory together, each its own part.
pub fn read_bandwidth(threads: usize) -> f64 {
    let one: [read::Line; 1 << 10] = [[1; 8]; 1 << 10];
    let data = read::copies(&one, FOOTPRINT / size_of_val(&one));
    let part = |thread| &data[data.len() * thread / threads..data.len() * (thread + 1) / threads];
    let ways = read::Way::all();
    let seconds = ways.map(|way| best(threads, |thread| way.read(part(thread))));
    FOOTPRINT as f64 / seconds.fold(f64::INFINITY, f64::min) / 1e9
}

/// `count` copies of a weight's bytes, to be read in turn as fast as memory is. They begin at a cache line's edge, as
/// those of a checkpoint do that is made for mapping.
pub fn copies(one: &[u8], count: usize) -> impl Deref<Target = [u8]> + use<> {
    assert!(one.len().is_multiple_of(size_of::<Line>()), "a weight of whole cache lines");
    let mut lines = Vec::new();
    aligned::<u8>(&mut lines, one.len()).copy_from_slice(one);
    Copies(read::copies(&lines, count))
}

struct Copies(Vec<Line>);

impl Deref for Copies {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Seconds of the fastest of several passes that `threads` threads make side by side.
fn best(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let run = |thread: usize| {
        let pass = || {
            barrier.wait();
            let start = Instant::now();
            work(thread);
            barrier.wait();
            start.elapsed().as_secs_f64()
        };
        (0..PASSES).map(|_| pass()).fold(f64::INFINITY, f64::min)
    };
    std::thread::scope(|scope| {
        for thread in 1..threads {
            let run = &run;
            scope.spawn(move || run(thread));
        }
        run(0)
    })
}

/// Independent accumulators of [`plain`].
const PLAIN: usize = 16;

fn plain() {
    let mut acc = black_box([1.0f32; PLAIN]);
    let (a, b) = (black_box(0.9f32), black_box(0.1f32));
    for _ in 0..ROUNDS {
        // Two roundings: without the instruction, a fused one would be a function call.
        acc = acc.map(|x| x * a + b);
    }
    black_box(acc);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{ROUNDS, black_box};
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// As many chains as hide the latency of two units.
    pub const ACCUMULATORS: usize = 12;

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2() {
        let (a, b) = (_mm256_set1_ps(black_box(0.9)), _mm256_set1_ps(black_box(0.1)));
        let mut acc = [_mm256_set1_ps(1.0); ACCUMULATORS];
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512() {
        let (a, b) = (_mm512_set1_ps(black_box(0.9)), _mm512_set1_ps(black_box(0.1)));
        let mut acc = [_mm512_set1_ps(1.0); ACCUMULATORS];
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn bf16() {
        // SAFETY: both are 512 bits, and any bits are bf16 values.
        let a: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi16(black_box(0x3f00))) };
        let mut acc = [_mm512_set1_ps(1.0); ACCUMULATORS];
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm512_dpbf16_ps(*acc, a, a);
            }
        }
        black_box(acc);
    }

    /// Four sums of tiles in turn, each of 16 by 16 elements and 32 products.
    pub unsafe fn amx() {
        #[repr(C, align(64))]
        struct Config([u8; 64]);
        let mut config = Config([0; 64]);
        config.0[0] = 1;
        for tile in 0..8 {
            (config.0[16 + 2 * tile], config.0[48 + tile]) = (64, 16);
        }
        // SAFETY: the caller has AMX; a valid configuration, and no memory but it. Nothing else
        // holds values in tiles.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config);
            for _ in 0..ROUNDS {
                asm!(
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7"
                );
            }
            asm!("tilerelease");
        }
    }
}
