//! Where a step's time goes, part by part, beside the time that its bytes take to be read.
//!
//! All experts are local, on as many threads as `--threads` says (2). `cargo bench -p model --bench step` runs a small
//! synthetic model; a directory as argument is a checkpoint to take instead. `--numerics`, `--isa`, and names of
//! cases (`decode1x64`: one sequence at 64 positions; `prefill512`) choose among what is measured.

use std::env;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::local::{Local, pages};
use model::profile::{PARTS, Part, account, spent};
use model::sample::{History, NonFinite, Params, Row, Scratch, sample_all};
use model::synthetic::{Recipe, TempDir};
use model::{Checkpoint, Chunk, Compute, Config, Isa, KvPool, LogitRows, Numerics, PageId};
use serde_json::json;

const PAGE_TOKENS: usize = 64;
/// Positions of the cache, for sixteen sequences of 4096 and a few steps.
const POSITIONS: usize = 16 * (4096 + 2 * PAGE_TOKENS);
/// Tokens of a step of a prompt.
const CHUNK: usize = 512;

fn main() {
    if env::args().len() == 1 {
        return println!("left out: measures for minutes; `cargo bench -p model` runs it");
    }
    let mut args = env::args().skip(1);
    let (mut threads, mut numerics, mut isa) = (2, Numerics::Bf16, Isa::detect());
    let (mut dir, mut cases) = (None, Vec::new());
    while let Some(arg) = args.next() {
        let mut value = || args.next().expect("a value after the option");
        match arg.as_str() {
            "--bench" => {}
            "--threads" => threads = value().parse().expect("a number of threads"),
            "--numerics" => numerics = value().parse().expect("f32 or bf16"),
            "--isa" => isa = value().parse().expect("an instruction set"),
            path if Path::new(path).is_dir() => dir = Some(path.to_owned()),
            case => cases.push(case.to_owned()),
        }
    }
    let written = match dir {
        None => Some(TempDir::with(&bench_s()).expect("a temporary checkpoint")),
        Some(_) => None,
    };
    let dir =
        written.as_ref().map_or_else(|| dir.unwrap_or_default().into(), |d| d.path().to_owned());
    let checkpoint = Checkpoint::open(&dir).expect("a checkpoint");
    let compute = Arc::new(Compute::new(isa, threads));
    let bandwidth = bandwidth(&compute);
    println!(
        "{}: {numerics}, {isa}, {threads} threads that read {bandwidth:.1} GB/s",
        dir.display()
    );
    let model = Local::load(&checkpoint, numerics, compute).expect("a model");
    let pages = POSITIONS / PAGE_TOKENS;
    let mut kv = KvPool::new(checkpoint.config(), numerics, pages, PAGE_TOKENS).expect("a cache");
    kv.fill();
    let mut bench = Bench { model, kv, config: checkpoint.config().clone(), numerics, bandwidth };
    let wanted =
        |case: &str| cases.is_empty() || cases.iter().any(|c| case.starts_with(c.as_str()));
    for context in [64, 512, 4096] {
        for count in [1, 8, 16] {
            let case = format!("decode{count}x{context}");
            if wanted(&case) {
                bench.decode(&case, count, context);
            }
        }
    }
    for count in [512, 2048] {
        let case = format!("prefill{count}");
        if wanted(&case) {
            bench.prefill(&case, count);
        }
    }
}

/// Three layers of a model of 1.3 B parameters in twelve.
fn bench_s() -> Recipe {
    Recipe::small().with(json!({
        "hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 8, "q_lora_rank": 768, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "moe_intermediate_size": 512, "intermediate_size": 4096, "vocab_size": 49152,
        "max_position_embeddings": 8192,
    }))
}

/// What all threads read together from memory, in GB/s: the best of several passes.
fn bandwidth(compute: &Compute) -> f64 {
    let words: Vec<u64> = (0..1 << 25).collect();
    let piece = 1 << 17;
    let pass = || {
        let start = Instant::now();
        compute.pool.run(words.len() / piece, &|i| {
            let piece = &words[i * piece..(i + 1) * piece];
            let mut sums = [0u64; 32];
            for line in piece.as_chunks::<32>().0 {
                sums.iter_mut().zip(line).for_each(|(s, w)| *s = s.wrapping_add(*w));
            }
            black_box(sums);
        });
        (words.len() * 8) as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..8).map(|_| pass()).fold(0.0, f64::max)
}

struct Bench {
    model: Local,
    kv: KvPool,
    config: Config,
    numerics: Numerics,
    bandwidth: f64,
}

/// What a case came to, over all its steps.
#[derive(Default)]
struct Account {
    tokens: usize,
    steps: usize,
    /// Sum of the sequences' positions over the steps.
    positions: usize,
    /// Experts that had rows, over steps and layers.
    experts: usize,
    logits: usize,
    wall: Duration,
    greedy: Duration,
    drawn: Duration,
}

impl Bench {
    fn decode(&mut self, case: &str, count: usize, context: usize) {
        let tables: Vec<_> = (0..count).map(|_| self.table(context + PAGE_TOKENS)).collect();
        let steps = if count == 1 { 24 } else { 8 };
        let mut done = Account::default();
        for step in 0..steps + 2 {
            if step == 2 {
                done = Account::default();
                account(true);
            }
            let tokens: Vec<u32> = (0..count).map(|i| self.token(step * 31 + i * 7919)).collect();
            let chunks = tables.iter().zip(tokens.chunks(1)).map(|(pages, tokens)| Chunk {
                tokens,
                start: context + step,
                pages,
                logits: LogitRows::Last,
            });
            self.step(&chunks.collect::<Vec<_>>(), &mut done);
        }
        self.report(case, &done);
        tables.into_iter().flatten().for_each(|page| self.kv.free(page));
    }

    fn prefill(&mut self, case: &str, count: usize) {
        let pages = self.table(count);
        let mut done = Account::default();
        for pass in 0..2 {
            if pass == 1 {
                done = Account::default();
                account(true);
            }
            for start in (0..count).step_by(CHUNK) {
                let tokens: Vec<u32> = (start..start + CHUNK).map(|i| self.token(i)).collect();
                let last = start + CHUNK == count;
                let logits = if last { LogitRows::Last } else { LogitRows::None };
                let chunk = Chunk { tokens: &tokens, start, pages: &pages, logits };
                self.step(&[chunk], &mut done);
            }
        }
        self.report(case, &done);
        pages.into_iter().for_each(|page| self.kv.free(page));
    }

    fn table(&mut self, tokens: usize) -> Vec<PageId> {
        pages(&mut self.kv, tokens).expect("the cache holds every case")
    }

    fn token(&self, seed: usize) -> u32 {
        (seed.wrapping_mul(2_654_435_761) % self.config.vocab) as u32
    }

    fn step(&mut self, chunks: &[Chunk<'_>], done: &mut Account) {
        let (mut experts, count) = (0, self.config.experts);
        let start = Instant::now();
        let logits = self.model.run(chunks, &mut self.kv, |_, routed| {
            let mut seen = vec![false; count];
            routed.experts.iter().for_each(|e| seen[*e as usize] = true);
            experts += seen.iter().filter(|seen| **seen).count();
        });
        let logits = logits.expect("chunks that fit the model").to_vec();
        done.wall += start.elapsed();
        done.steps += 1;
        done.experts += experts;
        for chunk in chunks {
            done.tokens += chunk.tokens.len();
            done.positions += chunk.start + chunk.tokens.len();
        }
        let kernels = self.model.trunk().compute().kernels;
        let scratch = Scratch::new(kernels);
        let drawn = Params { top_p: 0.9, ..Params::default() };
        for (params, spent) in [(Params::greedy(), &mut done.greedy), (drawn, &mut done.drawn)] {
            let (mut logits, history) = (logits.clone(), History::default());
            let start = Instant::now();
            let count = logits.len() / self.config.vocab;
            let mut choices: Vec<_> = (0..count).map(|_| Err(NonFinite)).collect();
            let rows = logits.chunks_mut(self.config.vocab).map(|logits| Row {
                logits,
                params: &params,
                history: &history,
                position: 0,
            });
            let pool = &self.model.trunk().compute().pool;
            sample_all(pool, count, rows.zip(&mut choices), &scratch);
            black_box(choices);
            *spent += start.elapsed();
        }
        done.logits += logits.len() / self.config.vocab;
    }

    /// Bytes that a part reads from memory at least, over all steps.
    fn bytes(&self, part: Part, done: &Account) -> usize {
        let Config { hidden, heads, kv_lora, layers, .. } = self.config;
        let config = &self.config;
        let dense = config.first_dense.min(layers);
        let moe = layers - dense;
        let queries = heads * config.qk_head();
        let values = match part {
            Part::Query => {
                let latent = hidden * config.kv_width();
                layers
                    * match config.q_lora {
                        Some(rank) => rank * (hidden + queries) + latent,
                        None => hidden * queries + latent,
                    }
            }
            Part::Absorb => layers * heads * config.qk_nope * kv_lora,
            Part::Values => layers * heads * config.v_head * kv_lora,
            Part::Out => layers * hidden * heads * config.v_head,
            Part::Gate => moe * hidden * config.experts,
            Part::Dense => {
                3 * hidden
                    * (dense * config.dense_intermediate + moe * config.shared_intermediate())
            }
            Part::Experts => {
                return done.experts * 3 * hidden * config.moe_intermediate * 2;
            }
            Part::Attend => {
                return done.positions * layers * config.kv_width() * self.numerics.bytes();
            }
            Part::Logits if done.logits > 0 => hidden * config.vocab,
            _ => 0,
        };
        done.steps * values * 2
    }

    fn report(&self, case: &str, done: &Account) {
        let per_token = |time: Duration| time.as_secs_f64() * 1e6 / done.tokens as f64;
        let threads = self.model.trunk().compute().pool.threads() as f64;
        println!(
            "\n{case}: {:.0} tokens/s, {:.2} ms a step",
            done.tokens as f64 / done.wall.as_secs_f64(),
            done.wall.as_secs_f64() * 1e3 / done.steps as f64
        );
        println!("part           µs/token     %    MB/step     GB/s   × floor");
        let total = per_token(done.wall);
        let line = |name: &str, us: f64, bytes: usize| {
            let mb = bytes as f64 / 1e6 / done.steps as f64;
            print!("{name:12} {us:10.1} {:5.1}", 100.0 * us / total);
            if bytes > 0 {
                let rate = bytes as f64 / (us * done.tokens as f64) / 1e3;
                print!(" {mb:10.2} {rate:8.2} {:9.2}", self.bandwidth / rate);
            }
            println!();
        };
        let (mut bytes, mut parts) = (0, 0.0);
        for part in PARTS {
            let name = format!("{part:?}").to_lowercase();
            if part.inside_tasks() {
                line(&format!("  {name}"), per_token(spent(part)) / threads, 0);
                continue;
            }
            let mine = self.bytes(part, done);
            bytes += mine;
            parts += per_token(spent(part));
            line(&name, per_token(spent(part)), mine);
        }
        line("rest", total - parts, 0);
        line("all", total, bytes);
        line("greedy", per_token(done.greedy), 0);
        line("top-p", per_token(done.drawn), 0);
        account(false);
    }
}
