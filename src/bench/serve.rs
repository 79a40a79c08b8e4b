//! `moemesh bench serve`: a server, or a mesh of its own, under load: decode in a
//! closed or an open loop, prefill, and what a long prompt does to running streams.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};

use crate::bench::load::{self, Done, Length, Piece, Shape, Streams, Target};
use crate::bench::procs::{self, Memory, Meter, Process};
use crate::bench::report::{self, Intrusion, Report, Row};
use crate::bench::stats::Times;
use crate::cli::BenchServeArgs;
use crate::client::http::Server;
use crate::client::openai::first_model;
use crate::config::local::Local;
use crate::generate::with_quiet_mesh;
use crate::model_dir;

/// Of a server whose vocabulary is not known: every model has as many tokens.
const LEAST_VOCAB: u32 = 256;
/// Pieces that each running stream has written before a long prompt arrives.
const BEFORE: usize = 48;

/// Measures a server, or a mesh of its own, and prints the table.
pub async fn run(args: BenchServeArgs) -> anyhow::Result<()> {
    if let Some(rate) = args.rates.iter().find(|rate| !rate.is_finite() || **rate <= 0.0) {
        bail!("--rate {rate} is not a number of requests a second");
    }
    let report = match &args.url {
        Some(url) => {
            let server = Server::from_url(url, args.api_key.clone())?;
            let model = match &args.mesh.model {
                Some(name) => name.display().to_string(),
                None => first_model(&server).await?,
            };
            let vocab = args.vocab.unwrap_or(LEAST_VOCAB);
            let target = Target::open(server, model, vocab).await.context("warm-up")?;
            measure(target, url.clone(), &args).await?
        }
        None => {
            let local = Local::for_one_command(&args.mesh)?;
            let vocab = match args.vocab {
                Some(vocab) => vocab,
                None => vocab_of(&local)?,
            };
            let shape = report::shape(&local);
            with_quiet_mesh(&local, async |server| {
                let model = first_model(&server).await?;
                let target = Target::open(server, model, vocab).await.context("warm-up")?;
                measure(target, shape, &args).await
            })
            .await?
        }
    };
    print!("{}", if args.json { report.json() } else { report.markdown() });
    Ok(())
}

/// Tokens of the model that a mesh is about to serve.
pub fn vocab_of(local: &Local) -> anyhow::Result<u32> {
    let path = model_dir::find(local.model.as_deref())?.join("config.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let config = model::Config::from_json(&text, &path.display().to_string())?;
    Ok(u32::try_from(config.vocab)?)
}

async fn measure(target: Target, subject: String, args: &BenchServeArgs) -> anyhow::Result<Report> {
    let model = target.model().to_owned();
    let mut run = Run {
        ids: target.takes_ids(),
        target: Arc::new(target),
        // A server somewhere else has no processes here.
        processes: if args.url.is_none() { procs::own_mesh() } else { Vec::new() },
        memory: Memory::default(),
        next: args.seed << 32 | 1,
        rows: Vec::new(),
    };
    let shape = Shape { prompt: args.prompt_tokens, answer: args.decode_tokens };
    let requests = args.requests.max(1);
    let mut intrusion = None;
    if let Some(prompt) = args.intruder {
        let streams = args.streams.first().copied().unwrap_or(1).max(1);
        intrusion = Some(run.intrude(streams, prompt, args).await?);
    } else if args.rates.is_empty() {
        for &streams in &args.streams {
            let streams = streams.max(1);
            let first = run.take(streams * requests);
            let load = load::closed(run.target.clone(), first, streams, requests, shape);
            run.row(format!("decode, {} tokens each", shape.answer), plural(streams), load).await?;
        }
    } else {
        for &rate in &args.rates {
            let first = run.take(requests);
            let load = load::open(run.target.clone(), first, rate, requests, shape, args.seed);
            let what = format!("{} tokens after {}", shape.answer, shape.prompt);
            run.row(what, format!("{rate} requests/s"), load).await?;
        }
    }
    if args.prefill_tokens > 0 && args.intruder.is_none() {
        let prompt = Length::exactly(args.prefill_tokens);
        let shape = Shape { prompt, answer: Length::exactly(1) };
        let first = run.take(requests);
        let load = load::closed(run.target.clone(), first, 1, requests, shape);
        run.row(format!("prefill, {prompt} tokens each"), plural(1), load).await?;
        if let Some(row) = run.rows.last_mut() {
            row.tokens = row.prompt_tokens;
        }
    }
    let Run { rows, memory, processes, ids, .. } = run;
    // Without rows nothing was looked at.
    let memory = (!processes.is_empty() && !rows.is_empty()).then_some(memory);
    Ok(Report { subject, model, ids, rows, intrusion, memory })
}

fn plural(streams: usize) -> String {
    format!("{streams} stream{}", if streams == 1 { "" } else { "s" })
}

struct Run {
    target: Arc<Target>,
    ids: bool,
    processes: Vec<Process>,
    memory: Memory,
    /// The next request's number; none is asked twice, so that no cache helps.
    next: u64,
    rows: Vec<Row>,
}

impl Run {
    fn take(&mut self, requests: usize) -> u64 {
        let first = self.next;
        self.next += requests as u64;
        first
    }

    async fn row(
        &mut self,
        what: String,
        load: String,
        work: impl Future<Output = anyhow::Result<Done>>,
    ) -> anyhow::Result<()> {
        let meter = Meter::start(&self.processes);
        let done = work.await?;
        let usage = meter.stop();
        self.memory = self.memory.max(Memory::of(&self.processes));
        self.rows.push(Row {
            what,
            load,
            requests: done.answers.len(),
            prompt_tokens: done.prompt_tokens(),
            tokens: done.tokens(),
            wall: done.wall,
            first: done.ttft(),
            per_token: done.tpot(),
            gaps: done.itl(),
            usage,
        });
        Ok(())
    }

    /// Lets `streams` streams run, sends them a long prompt, and compares the times
    /// between their tokens while it was being read with those before.
    async fn intrude(
        &mut self,
        streams: usize,
        prompt: usize,
        args: &BenchServeArgs,
    ) -> anyhow::Result<Intrusion> {
        let first = self.take(streams + 1);
        let answer = Length::exactly(args.decode_tokens.most().max(args.prompt_tokens.most()));
        let shape = Shape { prompt: args.prompt_tokens, answer };
        let mut running = Streams::start(&self.target, first + 1, streams, shape);
        let early = "a stream ended before the long prompt was answered: raise --decode-tokens";
        let warm = running.until(|heard| heard.iter().all(|pieces| pieces.len() >= BEFORE));
        ensure!(warm.await?, early);
        let asked = Instant::now();
        let long = Shape { prompt: Length::exactly(prompt), answer: Length::exactly(1) };
        let took = tokio::select! {
            answer = self.target.ask(first, long) => answer?.summary.first,
            ended = running.until(|_| false) => bail!(ended.map(|_| early)?),
        };
        // The gap that the answer falls into ends only now.
        let until = asked + took;
        let over = |pieces: &Vec<Piece>| pieces.last().is_some_and(|piece| piece.at > until);
        ensure!(running.until(|heard| heard.iter().all(over)).await?, early);
        let all = running.heard();
        let (before, during) = split(&all, asked, until);
        Ok(Intrusion { streams, prompt, took, before, during })
    }
}

/// The gaps that ended before `asked`, when all streams ran, and those that
/// overlap the time from then to `until`.
fn split(streams: &[Vec<Piece>], asked: Instant, until: Instant) -> (Times, Times) {
    let begun = streams.iter().filter_map(|pieces| pieces.first()).map(|piece| piece.at).max();
    let begun = begun.unwrap_or(asked);
    let gaps = || streams.iter().flat_map(|pieces| pieces.windows(2).map(|w| (w[0].at, w[1].at)));
    let before = gaps().filter(|&(from, to)| from >= begun && to <= asked);
    let during = gaps().filter(|&(from, to)| to > asked && from < until);
    (Times::new(before.map(|(from, to)| to - from)), Times::new(during.map(|(from, to)| to - from)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_stall_counts_where_it_overlaps_the_long_prompt() {
        let start = Instant::now();
        let piece = |ms: &u64| Piece { at: start + Duration::from_millis(*ms), tokens: 1 };
        let at = |ms: &[u64]| ms.iter().map(piece).collect();
        let streams: [Vec<Piece>; 2] = [at(&[0, 10, 20, 30, 95, 105]), at(&[5, 15, 25, 90, 100])];
        let when = |ms| start + Duration::from_millis(ms);
        let (before, during) = split(&streams, when(30), when(80));
        // From 5 ms on, when both run: three gaps of the one, two of the other.
        assert_eq!(before, Times::new([10, 10, 10, 10].map(Duration::from_millis)));
        assert_eq!(during, Times::new([65, 65].map(Duration::from_millis)));
    }
}
