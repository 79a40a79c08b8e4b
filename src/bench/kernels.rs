//! `moemesh bench kernels`: products and whole experts by rows, beside what this
//! machine reads and multiplies at most, measured in the same run. Weights come from
//! memory in turn, as they do in decoding, not from a cache.

use std::cmp::Ordering;
use std::fmt::Write as _;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kernels::limits::{Peaks, peaks, read_bandwidth};
use kernels::{Acts, Compute, DType, Isa, Mat, round_bf16};
use model::{Checkpoint, Expert, ExpertGroup, ExpertScratch, Numerics, forward_experts, together};
use serde_json::{Value, json};

use crate::bench::report::machine;
use crate::bench::stats::{Random, median};
use crate::cli::BenchKernelsArgs;
use crate::model_dir;

/// A routed expert's projection in DeepSeek-V3.
const N: usize = 2048;
const K: usize = 7168;
/// Edge of its FP8 blocks.
const BLOCK: usize = 128;
/// Bytes of weights in turn, more than the caches hold.
const FOOTPRINT: usize = 512 << 20;
/// How long one line is measured, and in how many passes at least.
const TIME: Duration = Duration::from_millis(700);
const PASSES: usize = 3;

/// One line.
#[derive(Debug)]
struct Line {
    kernel: String,
    weights: String,
    rows: usize,
    /// GB/s of weights.
    bytes: f64,
    /// GFLOP/s
    flops: f64,
}

/// What the machine does at most, before and after all lines.
#[derive(Debug)]
struct Limits {
    /// GB/s
    bandwidth: [f64; 2],
    peaks: Peaks,
}

impl Limits {
    /// The better of the two, so that no line looks better than it is.
    fn bandwidth(&self) -> f64 {
        self.bandwidth[0].max(self.bandwidth[1])
    }

    /// The fastest way to multiply values of the class.
    fn peak(&self, numerics: Numerics) -> f64 {
        match numerics {
            Numerics::F32 => self.peaks.f32,
            Numerics::Bf16 => {
                let Peaks { f32, bf16, amx } = self.peaks;
                [bf16, amx].into_iter().flatten().fold(f32, f64::max)
            }
        }
    }
}

/// Measures and prints.
pub fn run(args: &BenchKernelsArgs) -> anyhow::Result<()> {
    let numerics: Numerics = args.numerics.parse()?;
    let isa = match &args.isa {
        Some(name) => name.parse::<Isa>()?,
        None => Isa::detect(),
    };
    anyhow::ensure!(isa.is_available(), "this CPU has no {isa}");
    let threads = args.threads.max(1);
    let compute = Compute::new(isa, threads);
    let rows: Vec<usize> = args.rows.iter().map(|&rows| rows.max(1)).collect();

    let (before, peaks) = (read_bandwidth(threads), peaks(threads));
    let mut lines = Vec::new();
    for dtype in [DType::Bf16, DType::Fp8, DType::F32] {
        lines.extend(products(&compute, numerics, dtype, &rows)?);
    }
    let dir = model_dir::find(args.model.as_deref())?;
    let checkpoint = Checkpoint::open(&dir)?;
    lines.extend(experts(&compute, numerics, &checkpoint, &rows)?);
    let limits = Limits { bandwidth: [before, read_bandwidth(threads)], peaks };

    let subject = format!("{isa}, activations {numerics}, {threads} thread(s), {}", machine());
    match args.json {
        true => println!("{:#}", to_json(&subject, &limits, numerics, &lines)),
        false => print!("{}", markdown(&subject, &limits, numerics, &lines)),
    }
    Ok(())
}

/// One projection of DeepSeek-V3's experts, as many copies as no cache holds.
fn products(
    compute: &Compute,
    numerics: Numerics,
    dtype: DType,
    rows: &[usize],
) -> anyhow::Result<Vec<Line>> {
    let size = N * K * dtype.size();
    let copies = FOOTPRINT.div_ceil(size);
    let mut random = Random::new(1);
    let one: Vec<u8> = match dtype {
        DType::F32 => numbers(&mut random, N * K).flat_map(f32::to_le_bytes).collect(),
        DType::Bf16 => {
            let rounded = numbers(&mut random, N * K).map(round_bf16);
            rounded.flat_map(|value| value.to_le_bytes()).collect()
        }
        // Without the codes that mean NaN.
        DType::Fp8 => (0..N * K).map(|_| random.next() as u8 & 0xf7).collect(),
    };
    let bytes = kernels::limits::copies(&one, copies);
    let blocks = N.div_ceil(BLOCK) * K.div_ceil(BLOCK);
    let scales: Vec<u8> = numbers(&mut random, blocks).flat_map(f32::to_le_bytes).collect();
    let mats: Vec<Mat<'_>> = bytes
        .chunks_exact(size)
        .map(|bytes| match dtype {
            DType::F32 => Mat::f32(bytes, N, K),
            DType::Bf16 => Mat::bf16(bytes, N, K),
            DType::Fp8 => Mat::fp8(bytes, &scales, N, K, (BLOCK, BLOCK)),
        })
        .collect::<Result<_, _>>()?;
    let line = |&rows: &usize| {
        let wide: Vec<f32> = numbers(&mut Random::new(2), rows * K).collect();
        let narrow: Vec<_> = wide.iter().map(|x| round_bf16(*x)).collect();
        let x = match numerics {
            Numerics::F32 => Acts::F32(&wide),
            Numerics::Bf16 => Acts::Bf16(&narrow),
        };
        let mut y = vec![0.0; rows * N];
        let seconds = typical(mats.len(), |turn| {
            compute.matmul(x, rows, mats[turn], &mut y);
            black_box(&mut y);
        });
        Line {
            kernel: format!("product [{N}, {K}]"),
            weights: format!("{dtype:?}").to_lowercase(),
            rows,
            bytes: size as f64 / seconds / 1e9,
            flops: 2.0 * (rows * N * K) as f64 / seconds / 1e9,
        }
    };
    Ok(rows.iter().map(line).collect())
}

/// Whole experts of a checkpoint, gate to down, one layer's at a time.
fn experts(
    compute: &Compute,
    numerics: Numerics,
    checkpoint: &Arc<Checkpoint>,
    rows: &[usize],
) -> anyhow::Result<Vec<Line>> {
    let config = checkpoint.config();
    let layers: Vec<Vec<Expert>> = config
        .moe_layers()
        .map(|layer| (0..config.experts).map(|e| Expert::load(checkpoint, layer, e)).collect())
        .collect::<Result<_, _>>()?;
    let bytes = layers.first().and_then(|layer| layer.first()).context("no experts")?.bytes();
    let values = 3 * config.hidden * config.moe_intermediate;
    let stored = match bytes.cmp(&(2 * values)) {
        Ordering::Less => "fp8",
        Ordering::Equal => "bf16",
        Ordering::Greater => "f32",
    };
    let mut scratch = ExpertScratch::default();
    let mut line = |&rows: &usize| {
        let all = rows * config.experts;
        let x: Vec<u8> = match numerics {
            Numerics::F32 => numbers(&mut Random::new(3), all * config.hidden)
                .flat_map(f32::to_le_bytes)
                .collect(),
            Numerics::Bf16 => numbers(&mut Random::new(3), all * config.hidden)
                .flat_map(|x| round_bf16(x).to_le_bytes())
                .collect(),
        };
        let mut out = Vec::new();
        let seconds = typical(layers.len(), |turn| {
            let groups: Vec<ExpertGroup<'_>> =
                layers[turn].iter().map(|expert| ExpertGroup { expert, rows }).collect();
            let lie = together(&x, config.hidden * numerics.bytes());
            forward_experts(compute, numerics, &groups, &lie, &mut out, &mut scratch);
            black_box(&mut out);
        });
        Line {
            kernel: format!("{} experts of {}", config.experts, bytes_in_words(bytes)),
            weights: stored.to_owned(),
            rows,
            bytes: (config.experts * bytes) as f64 / seconds / 1e9,
            flops: 2.0 * (all * values) as f64 / seconds / 1e9,
        }
    };
    Ok(rows.iter().map(&mut line).collect())
}

fn bytes_in_words(bytes: usize) -> String {
    match bytes {
        0..1_000_000 => format!("{:.0} kB", bytes as f64 / 1e3),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

/// Seconds of one turn: the median over as many as there is time for, after all have
/// been read in once.
fn typical(turns: usize, mut work: impl FnMut(usize)) -> f64 {
    (0..turns).for_each(&mut work);
    let (began, mut spent) = (Instant::now(), Vec::new());
    let mut turn = 0;
    while spent.len() < PASSES || began.elapsed() < TIME {
        let start = Instant::now();
        work(turn % turns);
        spent.push(start.elapsed().as_secs_f64());
        turn += 1;
    }
    median(&spent).unwrap_or(f64::INFINITY)
}

/// Repeatable numbers between 0.5 and 1, of either sign: a product never waits for
/// subnormal ones.
fn numbers(random: &mut Random, count: usize) -> impl Iterator<Item = f32> {
    (0..count).map(|_| {
        let bits = random.next() as u32;
        f32::from_bits((bits & 0x8000_0000) | 0x3f00_0000 | (bits & 0x7f_ffff))
    })
}

fn cell(peak: Option<f64>) -> String {
    peak.map_or_else(|| "–".to_owned(), |peak| format!("{peak:.0}"))
}

fn markdown(subject: &str, limits: &Limits, numerics: Numerics, lines: &[Line]) -> String {
    let [before, after] = limits.bandwidth;
    let mut text = format!(
        "{subject}\n\nMemory is read at {before:.1} GB/s (at the end {after:.1}); multiply-adds in \
         registers: f32 {:.0} GFLOP/s, bf16 pairs {}, bf16 tiles {}.\n\n\
         | kernel | weights | rows | GB/s | of memory | GFLOP/s | of peak |\n\
         |---|---|---:|---:|---:|---:|---:|\n",
        limits.peaks.f32,
        cell(limits.peaks.bf16),
        cell(limits.peaks.amx),
    );
    for line in lines {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.1} | {:.0} % | {:.0} | {:.0} % |",
            line.kernel,
            line.weights,
            line.rows,
            line.bytes,
            100.0 * line.bytes / limits.bandwidth(),
            line.flops,
            100.0 * line.flops / limits.peak(numerics),
        );
    }
    text
}

fn to_json(subject: &str, limits: &Limits, numerics: Numerics, lines: &[Line]) -> Value {
    let all: Vec<Value> = lines
        .iter()
        .map(|line| {
            json!({
                "kernel": line.kernel,
                "weights": line.weights,
                "rows": line.rows,
                "gb_per_second": line.bytes,
                "of_memory": line.bytes / limits.bandwidth(),
                "gflop_per_second": line.flops,
                "of_peak": line.flops / limits.peak(numerics),
            })
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "subject": subject,
        "limits": {
            "read_gb_per_second": limits.bandwidth,
            "f32_gflop_per_second": limits.peaks.f32,
            "bf16_gflop_per_second": limits.peaks.bf16,
            "amx_gflop_per_second": limits.peaks.amx,
        },
        "lines": all,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_to_the_better_limit() {
        let peaks = Peaks { f32: 100.0, bf16: Some(50.0), amx: None };
        let limits = Limits { bandwidth: [10.0, 20.0], peaks };
        let line = Line {
            kernel: "product".to_owned(),
            weights: "bf16".to_owned(),
            rows: 4,
            bytes: 15.0,
            flops: 60.0,
        };
        let lines = [line];
        let table = markdown("here", &limits, Numerics::Bf16, &lines);
        assert!(table.ends_with("| product | bf16 | 4 | 15.0 | 75 % | 60 | 60 % |\n"), "{table}");
        let parsed = to_json("here", &limits, Numerics::Bf16, &lines);
        assert_eq!(parsed["lines"][0]["of_memory"], 0.75);
        let tiles = Limits { peaks: Peaks { amx: Some(400.0), ..peaks }, ..limits };
        assert_eq!((tiles.peak(Numerics::Bf16), tiles.peak(Numerics::F32)), (400.0, 100.0));
    }

    #[test]
    fn every_turn_has_its_weights_and_the_middle_one_counts() {
        let mut seen = Vec::new();
        let seconds = typical(3, |turn| {
            seen.push(turn);
            std::thread::sleep(Duration::from_millis(if seen.len() == 5 { 400 } else { 100 }));
        });
        assert_eq!(seen[..6], [0, 1, 2, 0, 1, 2]);
        assert!((0.1..0.2).contains(&seconds), "{seconds}");
    }

    #[test]
    fn the_tiny_model_is_measured() {
        let compute = Compute::new(Isa::detect(), 1);
        let checkpoint = Checkpoint::open(model_dir::find(None).unwrap()).unwrap();
        let lines = experts(&compute, Numerics::Bf16, &checkpoint, &[1]).unwrap();
        assert_eq!((lines.len(), lines[0].weights.as_str()), (1, "bf16"));
        assert!(lines[0].bytes > 0.0 && lines[0].flops.is_finite());
    }
}
