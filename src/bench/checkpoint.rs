//! `moemesh bench make-checkpoint`: a checkpoint of the DeepSeek-V3 architecture
//! with random weights, for benchmarks that every engine runs on the same bytes.
//!
//! A weight depends on the seed, its tensor's name and its place, so the file is
//! the same on every machine and whatever the threads. The FP8 variant holds the
//! bf16 one's weights, quantised. `config.json` comes last: what was broken off
//! is no checkpoint. Nothing that exists is written over.

mod noise;
mod shape;
mod tokenizer;

use std::fs::{self, File};
use std::io::{BufWriter, IsTerminal as _, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use model::blocks::{Squares, quantize};
use serde_json::{Map, json};

use self::noise::Stream;
use crate::cli::MakeCheckpointArgs;
use crate::config::roles::cpus;
use crate::published::{self, Stored, Tensor};

/// Values made at a time; a whole number of FP8 blocks' rows in every size below.
const CHUNK: usize = 8 << 20;
const WEIGHTS: &str = "model.safetensors";

/// Writes the checkpoint that was asked for and says what it is.
pub fn make(args: &MakeCheckpointArgs) -> anyhow::Result<()> {
    let dir = &args.dir;
    let occupied = fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
    if occupied || dir.is_file() {
        bail!("{} exists and is not empty: name a new directory", dir.display());
    }
    let text = serde_json::to_string_pretty(&shape::config(args.size, args.dtype))?;
    let config = model::Config::from_json(&text, "config.json")?;
    let tensors = published::tensors(&config);

    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let put = |name: &str, text: String| {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    let path = dir.join(WEIGHTS);
    let error = write_weights(&path, &tensors, args.seed)
        .with_context(|| format!("cannot write {}", path.display()))?;
    put("tokenizer.json", tokenizer::tokenizer(config.vocab).to_string())?;
    put("tokenizer_config.json", format!("{:#}\n", tokenizer::settings(config.max_positions)))?;
    put("generation_config.json", format!("{:#}\n", tokenizer::generation()))?;
    put("config.json", text + "\n")?;

    let values: usize = tensors.iter().map(Tensor::values).sum();
    let bytes: usize = tensors.iter().map(Tensor::bytes).sum();
    println!(
        "{}: {:.2} B parameters, {:.1} MB: {}",
        dir.display(),
        values as f64 / 1e9,
        bytes as f64 / 1e6,
        config.summary()
    );
    if let Some(error) = error.relative() {
        println!(
            "FP8 against bf16: relative root mean square error {:.3} % of the quantised weights",
            100.0 * error
        );
    }
    Ok(())
}

/// Streams the tensors to a file: header first, as all sizes are known.
fn write_weights(path: &Path, tensors: &[Tensor], seed: u64) -> anyhow::Result<Squares> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for (name, dtype, shape, bytes) in tensors.iter().flat_map(Tensor::entries) {
        let offsets = [end, end + bytes];
        end += bytes;
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
    }
    let mut header = json!(header).to_string();
    // Readers may ask for aligned tensors.
    header.push_str(&" ".repeat(header.len().next_multiple_of(64) - header.len() + 56));

    let progress = bar(end as u64);
    let mut out = BufWriter::new(File::create_new(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut error = Squares::default();
    for tensor in tensors {
        error.add(write_tensor(&mut out, tensor, seed)?);
        progress.inc(tensor.bytes() as u64);
    }
    out.into_inner().map_err(|failed| failed.into_error())?.sync_all()?;
    progress.finish_and_clear();
    Ok(error)
}

fn write_tensor(out: &mut impl Write, tensor: &Tensor, seed: u64) -> std::io::Result<Squares> {
    let stream = Stream::new(seed, &tensor.name, tensor.centre, tensor.spread);
    let columns = tensor.shape[tensor.shape.len() - 1];
    let mut error = Squares::default();
    let mut scales = Vec::new();
    let count = tensor.values();
    // Whole rows of blocks, so that a chunk can be quantised by itself.
    let step = match tensor.stored {
        Stored::Fp8 { block: (rows, _) } => (CHUNK / columns / rows).max(1) * rows * columns,
        _ => CHUNK,
    };
    for start in (0..count).step_by(step) {
        let mut values = vec![0.0f32; step.min(count - start)];
        in_parallel(&mut values, |at, values| stream.fill(start + at, values));
        match tensor.stored {
            Stored::F32 => out.write_all(&bytes(&values, f32::to_le_bytes))?,
            Stored::Bf16 => out.write_all(&bytes(&values, noise::bf16_bytes))?,
            Stored::Fp8 { block } => {
                let mut codes = vec![0u8; values.len()];
                let first = scales.len();
                let bands = (values.len() / columns).div_ceil(block.0);
                scales.resize(first + bands * columns.div_ceil(block.1), 0.0);
                error.add(quantize(&values, columns, block, &mut codes, &mut scales[first..]));
                out.write_all(&codes)?;
            }
        }
    }
    out.write_all(&bytes(&scales, f32::to_le_bytes))?;
    Ok(error)
}

fn bytes<const N: usize>(values: &[f32], convert: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| convert(*value)).collect()
}

/// Fills the parts of `values` on all CPUs; `fill` is told where its part starts.
fn in_parallel(values: &mut [f32], fill: impl Fn(usize, &mut [f32]) + Sync) {
    let part = values.len().div_ceil(cpus()).max(1 << 16);
    std::thread::scope(|scope| {
        for (index, values) in values.chunks_mut(part).enumerate() {
            let fill = &fill;
            scope.spawn(move || fill(index * part, values));
        }
    });
}

fn bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    // The template is fixed and parses; the other style would do as well.
    let style = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar.with_style(style)
}

#[cfg(test)]
mod tests;
