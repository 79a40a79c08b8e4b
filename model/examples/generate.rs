//! Greedy generation in one process: `cargo run -p model --example generate -- DIR [--bf16]
//! [--tokens N] ids...`
//!
//! Prints the ids that follow the given ones, and how long prefill and decode took.

use std::sync::Arc;
use std::time::Instant;

use model::local::{Local, pages};
use model::{Checkpoint, Chunk, Compute, Isa, KvPool, LogitRows, Numerics, sample};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("usage: generate DIR [--bf16] [--tokens N] ids...")?;
    let (mut numerics, mut count, mut threads) = (Numerics::F32, 32, 2);
    let mut tokens: Vec<u32> = Vec::new();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bf16" => numerics = Numerics::Bf16,
            "--tokens" => count = arguments.next().ok_or("--tokens N")?.parse()?,
            "--threads" => threads = arguments.next().ok_or("--threads N")?.parse()?,
            id => tokens.push(id.parse()?),
        }
    }
    let checkpoint = Checkpoint::open(&dir)?;
    let config = checkpoint.config();
    eprintln!("{}", config.summary());
    let compute = Arc::new(Compute::new(Isa::detect(), threads));
    let mut model = Local::load(&checkpoint, numerics, compute.clone())?;
    let total = tokens.len() + count;
    let mut kv = KvPool::new(config, numerics, total.div_ceil(64), 64)?;
    let pages = pages(&mut kv, total).ok_or("the pool is too small")?;
    let params = sample::Params::greedy();
    let scratch = sample::Scratch::new(compute.kernels);

    let prompt = tokens.len();
    let mut start = 0;
    let mut clock = Instant::now();
    let mut prefill = 0.0;
    while tokens.len() < total {
        let (chunk, position) = (&tokens[start..], tokens.len() as u64);
        let chunk = Chunk { tokens: chunk, start, pages: &pages, logits: LogitRows::Last };
        let logits = model.run(&[chunk], &mut kv, |_, _| {})?;
        let history = sample::History::default();
        let choice = sample::sample(logits, &params, &history, position, &scratch)?;
        if start == 0 {
            prefill = clock.elapsed().as_secs_f64();
            clock = Instant::now();
        }
        start = tokens.len();
        tokens.push(choice.token);
    }
    let decode = clock.elapsed().as_secs_f64();
    println!("{:?}", &tokens[prompt..]);
    eprintln!(
        "prefill {:.1} tokens/s, decode {:.1} tokens/s ({}, {}, {threads} threads)",
        prompt as f64 / prefill,
        (count.max(2) - 1) as f64 / decode,
        numerics,
        compute.kernels.isa()
    );
    Ok(())
}
