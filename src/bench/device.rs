//! `moemesh bench device`: a GPU's expert kernels against a plain reference in double, and their times beside what
//! the device copies and multiplies at most, measured in the same run. Everything of it needs a GPU.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context as _, bail};
use expert_node::device::Device;
use kernels::cuda::reference::{self, distance};
use kernels::cuda::{Arena, BLOCK, Coding, ExpertShape, Gpu, GpuError, GroupedFfn, Layout, Piece};
use kernels::{Mat, f32_to_fp8, round_bf16};

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
    let ordinal = match args.device {
        Device::Cuda(ordinal) => ordinal,
        Device::Cpu => bail!("the CPU is measured by `moemesh bench kernels`"),
    };
    let gpu = Gpu::open(ordinal)?;
    let seed = args.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64)
    });
    println!("{gpu:?}, {} processors, seed {seed}", gpu.processors());
    for coding in [Coding::Fp8, Coding::Bf16] {
        for sizes in [UNEVEN, DEEPSEEK] {
            println!("{}", check(&gpu, coding, sizes, seed)?);
        }
    }
    if !args.check {
        print!("{}", measure(&gpu, args, seed)?);
    }
    Ok(())
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

    /// Rows through the experts in slots, `work` as (slot, rows).
    fn forward(&mut self, work: &[(u32, usize)], x: &[u8]) -> anyhow::Result<Vec<u8>> {
        let mut out = vec![0xff; x.len()];
        let mut pieces = pieces(work, self.layout.shape.hidden, x, &mut out);
        self.ffn.poison()?;
        self.ffn.forward(&mut pieces)?;
        Ok(out)
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

fn pieces<'a>(
    work: &[(u32, usize)],
    hidden: usize,
    mut x: &'a [u8],
    mut out: &'a mut [u8],
) -> Vec<Piece<'a>> {
    let cut = |&(slot, rows): &(u32, usize)| {
        let (mine, rest) = x.split_at(rows * hidden * 2);
        let (to, after) = std::mem::take(&mut out).split_at_mut(rows * hidden * 2);
        (x, out) = (rest, after);
        Piece { slot, x: mine, out: to }
    };
    work.iter().map(cut).collect()
}

/// Ragged rows against the reference, and every row by itself against the batch, bit for bit.
fn check(gpu: &Gpu, coding: Coding, sizes: (usize, usize), seed: u64) -> anyhow::Result<String> {
    let mut random = Random::new(seed);
    let mut experts = Experts::new(gpu, coding, sizes, (3, 3), &mut random)?;
    let work = [(2, 3), (0, 1), (1, 17), (0, 16), (2, 64), (1, 70), (0, 129)];
    let (hidden, all) = (sizes.0, work.iter().map(|(_, rows)| rows).sum::<usize>());
    let x = rows(all, hidden, &mut random);
    let out = experts.forward(&work, &x)?;

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
        let by_itself = experts.forward(&[(slot, 1)], &x[bytes.clone()])?;
        if by_itself != out[bytes] {
            bail!("{coding:?} {sizes:?}: row {row} by itself is not the row in its batch");
        }
        alone += 1;
    }
    let off = distance(&got, &expected);
    if off.is_nan() || off > TOLERANCE {
        bail!("{coding:?} {sizes:?}: off by {off:.2e}, {TOLERANCE:.0e} is let pass");
    }
    Ok(format!("{coding:?} {sizes:?}: off by {off:.2e}; {alone} rows alone are the same bits"))
}

fn values(bytes: &[u8]) -> Vec<f32> {
    let values = bytes.as_chunks::<2>().0.iter();
    values.map(|x| f32::from_bits(u32::from(u16::from_le_bytes(*x)) << 16)).collect()
}

/// All times, as a table.
fn measure(gpu: &Gpu, args: &BenchDeviceArgs, seed: u64) -> anyhow::Result<String> {
    let mut text = String::new();
    let (copied, host) = (gpu.copy_rate()?, gpu.host_rate()?);
    writeln!(text, "memory copied (read and written): {:.0} GB/s", copied / 1e9)?;
    writeln!(text, "from pinned host memory: {:.1} GB/s", host / 1e9)?;
    for coding in [Coding::Fp8, Coding::Bf16] {
        let peak = gpu.matmul_rate(coding)?;
        match peak {
            Some(peak) => writeln!(text, "cuBLASLt, {coding:?}: {:.0} TFLOP/s", peak / 1e12)?,
            None => writeln!(text, "cuBLASLt, {coding:?}: not found, not measured")?,
        }
        text += &products(gpu, args, coding, (copied, peak), seed)?;
    }
    Ok(text)
}

fn products(
    gpu: &Gpu,
    args: &BenchDeviceArgs,
    coding: Coding,
    (copied, peak): (f64, Option<f64>),
    seed: u64,
) -> anyhow::Result<String> {
    let mut random = Random::new(seed);
    let count = args.experts.max(1);
    let mut experts = Experts::new(gpu, coding, DEEPSEEK, (1, count), &mut random)
        .with_context(|| format!("{count} experts of DeepSeek-V3; --experts takes fewer"))?;
    let (hidden, inner) = DEEPSEEK;
    let mut text = format!(
        "\n| {coding:?}, {count} experts, rows each | us | GB/s of weights | of copying | TFLOP/s | of cuBLASLt |\n\
         |---|---|---|---|---|---|\n"
    );
    for &rows_each in &args.rows {
        let active = count.min(CAPACITY / rows_each.clamp(1, CAPACITY));
        let work: Vec<(u32, usize)> = (0..active as u32).map(|slot| (slot, rows_each)).collect();
        let x = rows(active * rows_each, hidden, &mut random);
        let mut out = vec![0; x.len()];
        let mut pieces = pieces(&work, hidden, &x, &mut out);
        let took = experts.ffn.time(&mut pieces, 20)?;
        let bytes = (active * experts.layout.bytes) as f64 / took;
        let flops = 6.0 * (active * rows_each * hidden * inner) as f64 / took;
        let of_peak =
            peak.map_or("–".to_owned(), |peak| format!("{:.0} %", 100.0 * flops / peak));
        writeln!(
            text,
            "| {active} x {rows_each} | {:.0} | {:.0} | {:.0} % | {:.0} | {of_peak} |",
            took * 1e6,
            bytes / 1e9,
            100.0 * bytes / copied,
            flops / 1e12
        )?;
    }
    let (alone, beside) = replacement(gpu, &mut experts, &mut random)?;
    writeln!(
        text,
        "\nreplacing one expert of {} bytes: {:.2} ms, {:.2} ms while others compute",
        experts.layout.bytes,
        alone * 1e3,
        beside * 1e3
    )?;
    Ok(text)
}

/// Seconds of filling the last slot, alone and while the others compute.
fn replacement(
    gpu: &Gpu,
    experts: &mut Experts,
    random: &mut Random,
) -> Result<(f64, f64), GpuError> {
    const TIMES: u32 = 10;
    let arena = experts.ffn.arena().clone();
    let last = arena.slots() as u32 - 1;
    let packed = gpu.pin("an expert", experts.layout.bytes)?;
    let fill = || {
        let start = Instant::now();
        (0..TIMES).try_for_each(|_| arena.fill(last, &packed))?;
        Ok::<_, GpuError>(start.elapsed().as_secs_f64() / f64::from(TIMES))
    };
    let alone = fill()?;
    let hidden = experts.layout.shape.hidden;
    let work: Vec<(u32, usize)> = (0..last.max(1)).map(|slot| (slot, 4)).collect();
    let x = rows(work.len() * 4, hidden, random);
    let mut out = vec![0; x.len()];
    let done = AtomicBool::new(false);
    let beside = std::thread::scope(|scope| {
        let computing = scope.spawn(|| {
            let mut pieces = pieces(&work, hidden, &x, &mut out);
            while !done.load(Ordering::Acquire) {
                experts.ffn.forward(&mut pieces)?;
            }
            Ok::<_, GpuError>(())
        });
        let beside = fill();
        done.store(true, Ordering::Release);
        match computing.join() {
            Ok(computed) => computed.and(beside),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })?;
    Ok((alone, beside))
}
