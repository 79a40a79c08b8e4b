//! `moemesh bench device`: a GPU's expert kernels against a plain reference in double, and their times beside what
//! the device copies and multiplies at most, measured in the same run. With a checkpoint, one of its layers through an
//! expert node ([`node`]), which a CPU can be too.

mod node;
mod replacement;

use std::io::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use expert_node::device::Device;
use kernels::cuda::reference::{self, distance};
use kernels::cuda::{Arena, BLOCK, Coding, ExpertShape, Gpu, GroupedFfn, Layout, Piece, Row};
use kernels::{Mat, f32_to_fp8, round_bf16};
use model::Numerics;
use model::rows::{encode_fp8, fp8_row_bytes, through_fp8};
use serde_json::json;

use crate::bench::stats::Random;
use crate::cli::BenchDeviceArgs;

/// An expert of DeepSeek-V3.
const DEEPSEEK: (usize, usize) = (7168, 2048);
/// Sizes that are no multiples of tiles and blocks.
const UNEVEN: (usize, usize) = (712, 328);
/// ‖out − reference‖ / ‖reference‖ that is let pass.
const TOLERANCE: f64 = 1e-2;
/// Rows of a chunk.
const CAPACITY: usize = 1 << 14;

/// Checks, then measures, and prints.
pub fn run(args: &BenchDeviceArgs) -> anyhow::Result<()> {
    if let Some(dir) = &args.model {
        return node::measure(args, dir);
    }
    let ordinal = match args.device {
        Device::Cuda(ordinal) => ordinal,
        Device::Cpu => bail!("the CPU's kernels are measured by `moemesh bench kernels`"),
    };
    let gpu = Gpu::open(ordinal)?;
    let seed = args.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64)
    });
    println!("{gpu:?}, {} processors, seed {seed}", gpu.processors());
    for coding in [Coding::Fp8, Coding::Bf16] {
        let all = [UNEVEN, DEEPSEEK];
        for &sizes in if args.small { &all[..1] } else { &all } {
            println!("{}", check(&gpu, coding, sizes, seed)?);
        }
    }
    if args.check || args.small { Ok(()) } else { measure(&gpu, args, seed) }
}

/// Experts' weights, and the slots that they are in.
struct Experts {
    weights: Vec<[(Vec<u8>, Vec<u8>); 3]>,
    layout: Layout,
    ffn: GroupedFfn,
}

impl Experts {
    /// `made` experts of random weights, over and over again in `slots` slots.
    fn new(
        gpu: &Gpu,
        coding: Coding,
        (hidden, inner): (usize, usize),
        (made, slots): (usize, usize),
        random: &mut Random,
    ) -> anyhow::Result<Experts> {
        let layout = Layout::new(ExpertShape { hidden, inner, coding });
        let arena = Arc::new(Arena::new(gpu, layout, slots)?);
        let mut weights = Vec::new();
        let mut packed = gpu.pin("an expert", layout.bytes)?;
        for _ in 0..made {
            weights.push(layout.parts.map(|part| weight(coding, part.n, part.k, random)));
        }
        for slot in 0..slots {
            layout.pack(&mats(&layout, &weights[slot % made])?, &mut packed)?;
            arena.fill(slot as u32, &packed)?;
        }
        Ok(Experts { weights, layout, ffn: GroupedFfn::new(arena, CAPACITY)? })
    }

    /// Rows through the experts in slots, `work` as (slot, rows); in FP8 as they travel if `fp8`.
    fn forward(&mut self, work: &[(u32, usize)], x: &[u8], fp8: bool) -> anyhow::Result<Vec<u8>> {
        let hidden = self.layout.shape.hidden;
        let width = if fp8 { fp8_row_bytes(hidden) } else { 2 * hidden };
        self.ffn.poison()?;
        self.ffn.begin(x.len() / width)?;
        self.ffn.compute(&pieces(work), &|id| Row { id, fp8, bytes: &x[id * width..][..width] })?;
        let results = self.ffn.results()?;
        Ok((0..x.len() / width).flat_map(|row| results.row(row)).copied().collect())
    }
}

/// A weight `[n, k]` and its scales.
fn weight(coding: Coding, n: usize, k: usize, random: &mut Random) -> (Vec<u8>, Vec<u8>) {
    match coding {
        Coding::Fp8 => {
            let codes = (0..n * k).map(|_| f32_to_fp8(unit(random) * 400.0)).collect();
            let blocks = n.div_ceil(BLOCK) * k.div_ceil(BLOCK);
            let scale = |_| (1e-5 + unit(random).abs() * 1e-4).to_le_bytes();
            (codes, (0..blocks).flat_map(scale).collect())
        }
        Coding::Bf16 => {
            let value = |_| round_bf16(unit(random) * 0.03).to_le_bytes();
            ((0..n * k).flat_map(value).collect(), Vec::new())
        }
    }
}

fn mats<'a>(layout: &Layout, weights: &'a [(Vec<u8>, Vec<u8>); 3]) -> anyhow::Result<[Mat<'a>; 3]> {
    let mat = |i: usize| {
        let (part, (bytes, scales)) = (&layout.parts[i], &weights[i]);
        match layout.shape.coding {
            Coding::Fp8 => Mat::fp8(bytes, scales, part.n, part.k, (BLOCK, BLOCK)),
            Coding::Bf16 => Mat::bf16(bytes, part.n, part.k),
        }
    };
    Ok([mat(0)?, mat(1)?, mat(2)?])
}

/// In -1..1.
fn unit(random: &mut Random) -> f32 {
    (random.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

fn rows(count: usize, hidden: usize, random: &mut Random) -> Vec<u8> {
    (0..count * hidden).flat_map(|_| round_bf16(unit(random) * 2.0).to_le_bytes()).collect()
}

/// One after the other.
fn pieces(work: &[(u32, usize)]) -> Vec<Piece> {
    let mut end = 0;
    let piece = |&(slot, rows): &(u32, usize)| {
        end += rows;
        Piece { slot, rows: end - rows..end }
    };
    work.iter().map(piece).collect()
}

/// Ragged rows against the reference; every row by itself against the batch, and rows in FP8 against what they stand for,
/// bit for bit.
fn check(gpu: &Gpu, coding: Coding, sizes: (usize, usize), seed: u64) -> anyhow::Result<String> {
    let mut random = Random::new(seed);
    let mut experts = Experts::new(gpu, coding, sizes, (3, 3), &mut random)?;
    let work = [(2, 3), (0, 1), (1, 17), (0, 16), (2, 64), (1, 70), (0, 129)];
    let (hidden, all) = (sizes.0, work.iter().map(|(_, rows)| rows).sum::<usize>());
    let x = rows(all, hidden, &mut random);
    let out = experts.forward(&work, &x, false)?;

    // The reference in double takes its time: some rows of each group.
    let owners = work.iter().flat_map(|&(slot, rows)| std::iter::repeat_n(slot, rows));
    let chosen = owners.enumerate().filter(|(row, _)| row % 23 == 0);
    let (mut got, mut expected) = (Vec::new(), Vec::new());
    let mut alone = 0;
    for (row, slot) in chosen {
        let bytes = row * hidden * 2..(row + 1) * hidden * 2;
        let mats = mats(&experts.layout, &experts.weights[slot as usize])?;
        let row_in = values(&x[bytes.clone()]);
        expected.extend(reference::expert(mats, coding, [row_in.as_slice()]));
        got.extend(values(&out[bytes.clone()]));
        let by_itself = experts.forward(&[(slot, 1)], &x[bytes.clone()], false)?;
        if by_itself != out[bytes] {
            bail!("{coding:?} {sizes:?}: row {row} by itself is not the row in its batch");
        }
        alone += 1;
    }
    let off = distance(&got, &expected);
    if off.is_nan() || off > TOLERANCE {
        bail!("{coding:?} {sizes:?}: off by {off:.2e}, {TOLERANCE:.0e} is let pass");
    }
    // As FP8 weights are multiplied with, bf16 rows are coded as they travel; otherwise they become what a CPU makes of them.
    let (mut coded, mut decoded) = (Vec::new(), Vec::new());
    encode_fp8(Numerics::Bf16, &x, hidden, &mut coded);
    through_fp8(Numerics::Bf16, &x, hidden, &mut decoded);
    let expected = match coding {
        Coding::Fp8 => out,
        Coding::Bf16 => experts.forward(&work, &decoded, false)?,
    };
    if experts.forward(&work, &coded, true)? != expected {
        bail!("{coding:?} {sizes:?}: rows in FP8 are not what they stand for");
    }
    Ok(format!(
        "{coding:?} {sizes:?}: off by {off:.2e}; {alone} rows alone are the same bits, rows in FP8 too"
    ))
}

fn values(bytes: &[u8]) -> Vec<f32> {
    let values = bytes.as_chunks::<2>().0.iter();
    values.map(|x| f32::from_bits(u32::from(u16::from_le_bytes(*x)) << 16)).collect()
}

/// Prints all times as tables, each line when it is there.
fn measure(gpu: &Gpu, args: &BenchDeviceArgs, seed: u64) -> anyhow::Result<()> {
    let (copied, host) = (gpu.copy_rate()?, gpu.host_rate()?);
    println!("memory copied (read and written): {:.0} GB/s", copied / 1e9);
    println!("from pinned host memory: {:.1} GB/s", host / 1e9);
    for coding in [Coding::Fp8, Coding::Bf16] {
        let peak = gpu.matmul_rate(coding)?;
        match peak {
            Some(peak) => println!("cuBLASLt, {coding:?}: {:.0} TFLOP/s", peak / 1e12),
            None => println!("cuBLASLt, {coding:?}: not found, not measured"),
        }
        products(gpu, args, coding, (copied, peak), seed)?;
    }
    Ok(())
}

fn products(
    gpu: &Gpu,
    args: &BenchDeviceArgs,
    coding: Coding,
    (copied, peak): (f64, Option<f64>),
    seed: u64,
) -> anyhow::Result<()> {
    let mut random = Random::new(seed);
    let count = args.experts.max(1);
    let mut experts = Experts::new(gpu, coding, DEEPSEEK, (1, count), &mut random)
        .with_context(|| format!("{count} experts of DeepSeek-V3; --experts takes fewer"))?;
    let (hidden, inner) = DEEPSEEK;
    let mut lines = match &args.lines {
        Some(path) => {
            let opened = std::fs::OpenOptions::new().create(true).append(true).open(path);
            Some(opened.with_context(|| format!("cannot write {}", path.display()))?)
        }
        None => None,
    };
    println!(
        "\n| {coding:?}, {count} experts, rows each | us | GB/s of weights | of copying | TFLOP/s | of cuBLASLt \
         | packed, us | copied in | copied out |\n|---|---|---|---|---|---|---|---|---|"
    );
    for &rows_each in &args.rows {
        let active = count.min(CAPACITY / rows_each.clamp(1, CAPACITY));
        let work: Vec<(u32, usize)> = (0..active as u32).map(|slot| (slot, rows_each)).collect();
        let x = rows(active * rows_each, hidden, &mut random);
        let row = |id: usize| Row { id, fp8: false, bytes: &x[id * 2 * hidden..][..2 * hidden] };
        let took = experts.ffn.time(&pieces(&work), &row, 20)?;
        let bytes = (active * experts.layout.bytes) as f64 / took.compute;
        let flops = 6.0 * (active * rows_each * hidden * inner) as f64 / took.compute;
        let of_peak =
            peak.map_or("–".to_owned(), |peak| format!("{:.0} %", 100.0 * flops / peak));
        let us = |seconds: f64| format!("{:.0}", seconds * 1e6);
        println!(
            "| {active} x {rows_each} | {} | {:.0} | {:.0} % | {:.0} | {of_peak} | {} | {} | {} |",
            us(took.compute),
            bytes / 1e9,
            100.0 * bytes / copied,
            flops / 1e12,
            us(took.pack),
            us(took.copy_in),
            us(took.copy_out)
        );
        let coding = format!("{coding:?}").to_lowercase();
        let line = json!({
            "engine": "moemesh", "coding": coding, "experts": active, "rows": rows_each,
            "us": took.compute * 1e6,
        });
        if let Some(file) = &mut lines {
            writeln!(file, "{line}")?;
        }
    }
    print!("{}", replacement::measure(gpu, &mut experts, &mut random)?);
    Ok(())
}
