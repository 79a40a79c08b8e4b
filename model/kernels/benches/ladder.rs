//! How fast each rung of the ladder is, beside what this machine could do in the same minute.
//!
//! Each line first checks the device against the plain one of its class, bit for bit, then times a product on one thread
//! with weights that come from memory, as they do in decoding, and prints the best of several passes. A line for the
//! pool says what it costs to share a job. `cargo bench -p kernels` runs all of it; arguments choose among it: names of
//! instruction sets, numbers of rows, `pool`, what is multiplied as `bf16*fp8` (activations, weights), and the weight's
//! shape as `512x1024` (outputs, k).

use half::bf16;
use kernels::{Acts, DType, Isa, Kernels, Mat, Out, Packed};
use std::env;
use std::hint::black_box;

#[path = "ladder/pool.rs"]
mod pool;

/// Outputs and k of a weight.
type Shape = (usize, usize);
/// A routed expert's projection in DeepSeek-V3.
const SHAPE: Shape = (2048, 7168);
/// Edge of its FP8 blocks.
const BLOCK: usize = 128;
/// Bytes of weights in turn, more than any cache here holds.
const FOOTPRINT: usize = 192 << 20;
const PASSES: usize = 5;

fn main() {
    if env::args().len() == 1 {
        return println!("left out: measures for minutes; `cargo bench -p kernels` runs it");
    }
    let chosen: Vec<String> = env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |isa: Isa| {
        let names = ["scalar", "avx2", "avx512", "avx512bf16", "amx"];
        !chosen.iter().any(|c| names.contains(&c.as_str())) || chosen.contains(&isa.to_string())
    };
    let mut rows: Vec<usize> = chosen.iter().filter_map(|c| c.parse().ok()).collect();
    if rows.is_empty() {
        rows = vec![1, 2, 4, 8, 16, 64, 256];
    }
    let classes = ["f32", "bf16"]
        .into_iter()
        .flat_map(|class| [DType::F32, DType::Bf16, DType::Fp8].map(|dtype| (class, dtype)));
    let mut pairs: Vec<(&str, DType)> =
        classes.clone().filter(|p| chosen.contains(&pair(*p))).collect();
    if pairs.is_empty() {
        pairs = classes.collect();
    }
    let shape = chosen.iter().find_map(|c| {
        let (n, k) = c.split_once('x')?;
        Some((n.parse().ok()?, k.parse().ok()?))
    });
    let shape = shape.unwrap_or(SHAPE);
    let isas: Vec<Isa> = Isa::available().into_iter().filter(|isa| wanted(*isa)).collect();
    let only_pool = chosen.len() == 1 && chosen[0] == "pool";
    if chosen.is_empty() || chosen.iter().any(|c| c == "pool") {
        pool::report();
    }
    if only_pool {
        return;
    }
    let bandwidth = kernels::limits::read_bandwidth(1);
    println!("memory read, one thread: {bandwidth:.1} GB/s");
    for isa in isas {
        let (f32_peak, bf16_peak) = kernels::limits::peak_of(isa);
        println!("\n{isa}: fused multiply-add peak {f32_peak:.0} GFLOP/s, bf16 {bf16_peak:.0}");
        println!("acts * weight  rows      GB/s  of memory    GFLOP/s  of peak");
        for (class, dtype) in &pairs {
            let peak = if *class == "bf16" { bf16_peak } else { f32_peak };
            for &rows in rows.iter().filter(|r| isa != Isa::Scalar || **r <= 2) {
                let (gb, gflop) = measure(isa, *dtype, *class == "bf16", rows, shape);
                println!(
                    "{:13} {rows:5} {gb:9.2}     {:5.0} % {gflop:10.1}   {:5.0} %",
                    pair((class, *dtype)),
                    100.0 * gb / bandwidth,
                    100.0 * gflop / peak,
                );
            }
        }
    }
}

/// What is multiplied, in a line and as an argument.
fn pair((class, dtype): (&str, DType)) -> String {
    format!("{class}*{dtype:?}").to_lowercase()
}

/// GB/s of weights read and GFLOP/s of one product.
fn measure(isa: Isa, dtype: DType, bf16_class: bool, rows: usize, (n, k): Shape) -> (f64, f64) {
    let device = Kernels::new(isa);
    let size = n * k * dtype.size();
    let copies = if isa == Isa::Scalar { 1 } else { FOOTPRINT.div_ceil(size) };
    let bytes = kernels::limits::copies(&weight(dtype, n * k), copies);
    let scales: Vec<u8> =
        numbers(n.div_ceil(BLOCK) * k.div_ceil(BLOCK)).flat_map(f32::to_le_bytes).collect();
    let mats: Vec<Mat<'_>> = bytes
        .chunks_exact(size)
        .map(|bytes| match dtype {
            DType::F32 => Mat::f32(bytes, n, k),
            DType::Bf16 => Mat::bf16(bytes, n, k),
            DType::Fp8 => Mat::fp8(bytes, &scales, n, k, (BLOCK, BLOCK)),
        })
        .collect::<Result<_, _>>()
        .unwrap_or_else(|e| panic!("{e}"));
    let x32: Vec<f32> = numbers(rows * k).collect();
    let x16: Vec<bf16> = x32.iter().map(|x| bf16::from_f32(*x)).collect();
    let x = if bf16_class { Acts::Bf16(&x16) } else { Acts::F32(&x32) };
    let mut y = vec![0.0; rows * n];
    let mut packed = Packed::new();

    let part = mats[0].rows(100..117);
    let (mut got, mut want) = (vec![0.0f32; rows * 17], vec![0.0f32; rows * 17]);
    device.matmul(x, rows, part, &mut got, 17);
    Kernels::reference(isa).matmul(x, rows, part, &mut want, 17);
    assert!(got.iter().zip(&want).all(|(g, w)| g.to_bits() == w.to_bits()), "bits differ");

    let passes = if isa == Isa::Scalar { 1 } else { PASSES };
    let best = (0..passes)
        .map(|_| {
            let start = now();
            // A few products are enough where each takes long.
            let turns = if rows > 16 { copies.min(2) } else { copies };
            for mat in &mats[..turns] {
                device.pack(x, rows, *mat, &mut packed);
                device.matmul_packed(&packed, *mat, &mut Out::new(&mut y, rows, n, n));
                black_box(&mut y);
            }
            (now() - start) / turns as f64
        })
        .fold(f64::INFINITY, f64::min);
    (size as f64 / best / 1e9, 2.0 * (rows * n * k) as f64 / best / 1e9)
}

/// Seconds this thread has been on a CPU, so that other work on the machine is not counted.
#[cfg(target_os = "linux")]
fn now() -> f64 {
    /// `struct timespec` of 64-bit Linux.
    #[repr(C)]
    struct Timespec {
        seconds: i64,
        nanoseconds: i64,
    }
    unsafe extern "C" {
        fn clock_gettime(clock: i32, time: *mut Timespec) -> i32;
    }
    const CLOCK_THREAD_CPUTIME_ID: i32 = 3;
    let mut time = Timespec { seconds: 0, nanoseconds: 0 };
    // SAFETY: the C library's function, and a place for its answer.
    let failed = unsafe { clock_gettime(CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "the thread's clock");
    time.seconds as f64 + time.nanoseconds as f64 / 1e9
}

/// Seconds since the first call.
#[cfg(not(target_os = "linux"))]
fn now() -> f64 {
    static START: std::sync::LazyLock<std::time::Instant> =
        std::sync::LazyLock::new(std::time::Instant::now);
    START.elapsed().as_secs_f64()
}

/// A weight's bytes: normal numbers of all signs.
fn weight(dtype: DType, count: usize) -> Vec<u8> {
    match dtype {
        DType::F32 => numbers(count).flat_map(f32::to_le_bytes).collect(),
        DType::Bf16 => numbers(count).flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::Fp8 => numbers(count).map(|x| (x.to_bits() >> 15) as u8 & 0xf7 | 0x40).collect(),
    }
}

/// Repeatable numbers between 0.5 and 1, of either sign.
fn numbers(n: usize) -> impl Iterator<Item = f32> {
    let mut state = 1u32;
    (0..n).map(move |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from_bits((state & 0x8000_0000) | 0x3f00_0000 | (state >> 8 & 0x7f_ffff))
    })
}
