//! `moemesh bench compare`: a mesh and another engine's OpenAI server on the same
//! checkpoint, the same CPUs and the same requests, in one run. Every round measures
//! every workload on both, in random order, while the other is stopped (SIGSTOP).
//! Samples in which other processes took the CPU are thrown away, and what is
//! quoted is the median of the rounds' ratios: absolute rates change from hour to
//! hour, ratios of neighbours hardly.

mod engine;
mod peer;
mod report;

use std::sync::Arc;

use anyhow::{Context as _, bail};

use self::engine::Engine;
use self::peer::Peer;
use self::report::{Comparison, Rounds};
use crate::bench::load::{self, Length, Shape, Target};
use crate::bench::procs::{self, Memory, Meter};
use crate::bench::report::{machine, shape};
use crate::bench::serve::vocab_of;
use crate::bench::stats::Random;
use crate::cli::BenchCompareArgs;
use crate::client::openai::first_model;
use crate::config::local::Local;
use crate::generate::with_quiet_mesh;
use crate::model_dir;

/// Rounds that are tried for each that is wanted.
const PATIENCE: usize = 2;
/// Prompts of one prefill sample.
const PREFILLS: usize = 2;
/// Share of the CPU that other processes may take in a sample.
const MOST_OTHERS: f64 = 0.08;

/// What is measured in every round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Tokens a second of streams that run together, prompts left out.
    Decode { streams: usize, tokens: usize },
    /// Tokens a second of prompts alone, one at a time.
    Prefill { tokens: usize },
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Decode { streams: 1, .. } => f.write_str("decode, 1 stream"),
            Self::Decode { streams, .. } => write!(f, "decode, {streams} streams"),
            Self::Prefill { tokens } => write!(f, "prefill, {tokens} tokens"),
        }
    }
}

/// One measurement of one engine.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Tokens a second.
    pub rate: f64,
    /// Share of the machine's CPU time that other processes took.
    pub others: f64,
}

impl Sample {
    pub fn is_quiet(self) -> bool {
        self.others <= MOST_OTHERS
    }
}

/// Runs the comparison and prints it.
pub async fn run(args: BenchCompareArgs) -> anyhow::Result<()> {
    if let Some(cpus) = &args.cpus {
        engine::pin(cpus).context("cannot pin to --cpus")?;
    }
    let workloads = workloads(&args);
    if workloads.is_empty() {
        bail!("nothing to measure: give --streams, or --prefill-tokens above 0");
    }
    let local = Local::for_one_command(&args.mesh)?;
    let vocab = vocab_of(&local)?;
    let model = model_dir::find(local.model.as_deref())?;
    let command = peer::command(&args, &local, &model)?;
    let subject = shape(&local);
    let comparison = with_quiet_mesh(&local, async |server| {
        let name = first_model(&server).await?;
        let target = Target::open(server, name.clone(), vocab).await.context("warm-up")?;
        let ours = Engine::new("moemesh", target, procs::own_mesh());
        ours.pause();
        eprintln!("{subject}; starting {}", command.line());
        let peer = Peer::start(&command).await?;
        let target = peer.target(vocab).await?;
        let theirs = Engine::new(&command.name, target, peer.processes());
        theirs.pause();
        let (rounds, memory) = measure([&ours, &theirs], &workloads, &args).await?;
        Ok(Comparison {
            model: name,
            subject: subject.clone(),
            peer: command.line(),
            names: [ours.name.clone(), theirs.name.clone()],
            machine: machine(),
            rounds,
            memory,
        })
    })
    .await?;
    print!("{}", if args.json { comparison.json() } else { comparison.markdown() });
    Ok(())
}

fn workloads(args: &BenchCompareArgs) -> Vec<Workload> {
    let streams = args.streams.iter().filter(|&&streams| streams > 0);
    let mut all: Vec<Workload> = streams
        .map(|&streams| Workload::Decode {
            streams,
            tokens: if streams == 1 { args.decode_tokens } else { args.decode_tokens.div_ceil(2) },
        })
        .collect();
    if args.prefill_tokens > 0 {
        all.push(Workload::Prefill { tokens: args.prefill_tokens });
    }
    all
}

async fn measure(
    engines: [&Engine; 2],
    workloads: &[Workload],
    args: &BenchCompareArgs,
) -> anyhow::Result<(Vec<Rounds>, [Memory; 2])> {
    let wanted = args.rounds.max(1);
    let mut random = Random::new(args.seed);
    let mut rounds: Vec<Rounds> = workloads.iter().map(|&workload| Rounds::new(workload)).collect();
    let mut memory = [Memory::default(); 2];
    // No request is made twice to one engine, and both get the same ones.
    let mut next = args.seed << 32 | 1;
    for round in 1..=wanted * PATIENCE {
        for rounds in rounds.iter_mut().filter(|rounds| rounds.kept() < wanted) {
            let first = next;
            next += 1 << 10;
            let order = if random.below(2) == 0 { [0, 1] } else { [1, 0] };
            let mut pair = [Sample { rate: 0.0, others: 1.0 }; 2];
            for which in order {
                let engine = engines[which];
                engine.resume().await.with_context(|| format!("waking {}", engine.name))?;
                let sample = sample(engine, rounds.workload, first, args).await;
                memory[which] = memory[which].max(Memory::of(&engine.processes));
                engine.pause();
                pair[which] = sample.with_context(|| format!("measuring {}", engine.name))?;
            }
            rounds.pairs.push(pair);
            eprintln!("round {round}: {}", rounds.last_line(&engines.map(|e| e.name.as_str())));
        }
    }
    Ok((rounds, memory))
}

async fn sample(
    engine: &Engine,
    workload: Workload,
    first: u64,
    args: &BenchCompareArgs,
) -> anyhow::Result<Sample> {
    let target: Arc<Target> = engine.target.clone();
    let meter = Meter::start(&engine.processes);
    let rate = match workload {
        Workload::Decode { streams, tokens } => {
            let prompt = Length::exactly(args.prompt_tokens);
            load::decode(&target, first, streams, prompt, tokens).await?
        }
        Workload::Prefill { tokens } => {
            let shape = Shape { prompt: Length::exactly(tokens), answer: Length::exactly(1) };
            let done = load::closed(target, first, 1, PREFILLS, shape).await?;
            let spent: f64 = done.answers.iter().map(|a| a.summary.first.as_secs_f64()).sum();
            done.prompt_tokens() as f64 / spent
        }
    };
    Ok(Sample { rate, others: meter.stop().others })
}
