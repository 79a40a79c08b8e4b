//! `moemesh bench dispatch`: what one layer's dispatch and gather takes. The
//! router's side (links, placement, exchange) runs here and stub nodes, which
//! answer with the rows they are given, in a process of their own: [`peer`]. The
//! yardstick is a plain blocking echo of the same bytes between the same two
//! processes over the same kind of socket, in alternating blocks of one run.

mod peer;

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use mesh::link::Identity;
use mesh::transport::Endpoint;
use model::Routed;
use proto::v1::Dtype;
use router::exchange::Shape;
use router::measure::{Config, Dispatcher};
use serde_json::{Value, json};

use crate::bench::report::machine;
use crate::bench::stats::{Random, Times, median};
use crate::cli::BenchDispatchArgs;
use peer::{Ask, Echo, Offer};

/// Payloads that are measured, in bytes each way.
const PAYLOADS: [usize; 7] = [64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// Values of a row, where a payload has so many.
const HIDDEN: usize = 2048;
/// The model whose rows are spread over many nodes.
const SPREAD: (usize, u32, usize) = (1024, 64, 8);
/// Tokens of a layer in that.
const SPREAD_TOKENS: [usize; 2] = [1, 16];

/// Measures and prints; or is the other process.
pub async fn run(args: BenchDispatchArgs) -> anyhow::Result<()> {
    if let Some(ask) = &args.peer {
        return peer::serve(serde_json::from_str(ask)?).await;
    }
    // The dispatcher drives a runtime of its own, so it needs a thread that has none.
    let (said, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || said.send(measure(&args)));
    print!("{}", ended.await.context("the measuring thread panicked")??);
    Ok(())
}

fn measure(args: &BenchDispatchArgs) -> anyhow::Result<String> {
    let trips = if args.nodes.is_empty() { round_trips(args)? } else { Vec::new() };
    let spread =
        args.nodes.iter().map(|&nodes| cost(nodes, args)).collect::<Result<Vec<_>, _>>()?;
    if args.json {
        let trips: Vec<Value> = trips.iter().map(Trip::json).collect();
        let spread: Vec<Value> = spread.iter().flatten().map(Cost::json).collect();
        let report = json!({ "machine": machine(), "round_trips": trips, "nodes": spread });
        return Ok(format!("{report:#}\n"));
    }
    let mut text = format!("dispatch and gather of one layer, on {}\n\n", machine());
    if !trips.is_empty() {
        text += &format!(
            "| bytes each way | {} echo p50 / p95, µs | dispatch p50 / p95, µs | ratio | MB/s |\n\
             |---:|---:|---:|---:|---:|\n",
            if args.tcp { "TCP" } else { "Unix" }
        );
        text.extend(trips.iter().map(Trip::line));
    }
    if !spread.is_empty() {
        text += "| nodes | tokens | CPU of the router's side per token and layer, µs | round trip p50, µs |\n\
                 |---:|---:|---:|---:|\n";
        text.extend(spread.iter().flatten().map(Cost::line));
    }
    Ok(text)
}

/// One payload, both ways of sending it.
struct Trip {
    bytes: usize,
    echo: Times,
    dispatch: Times,
    /// Dispatch to echo, medians of each round.
    ratio: f64,
}

impl Trip {
    fn line(&self) -> String {
        let cell = |times: &Times| {
            let us = |percent| times.percentile(percent).unwrap_or(f64::NAN) * 1e3;
            format!("{:.0} / {:.0}", us(50), us(95))
        };
        let (bytes, ratio) = (self.bytes, self.ratio);
        let (echo, dispatch, rate) = (cell(&self.echo), cell(&self.dispatch), self.rate());
        format!("| {bytes} | {echo} | {dispatch} | {ratio:.2} | {rate:.0} |\n")
    }

    /// Megabytes a second, both directions together.
    fn rate(&self) -> f64 {
        2.0 * self.bytes as f64 / 1e3 / self.dispatch.percentile(50).unwrap_or(f64::NAN)
    }

    fn json(&self) -> Value {
        json!({
            "bytes": self.bytes,
            "echo_ms": self.echo.json(),
            "dispatch_ms": self.dispatch.json(),
            "ratio": self.ratio,
            "mb_per_second": self.rate(),
        })
    }
}

fn round_trips(args: &BenchDispatchArgs) -> anyhow::Result<Vec<Trip>> {
    let mut trips = Vec::new();
    for bytes in PAYLOADS {
        let hidden = HIDDEN.min(bytes / 2);
        let ask = Ask { tcp: args.tcp, nodes: 1, hidden, experts: 1, top_k: 1 };
        let peer = Peer::start(&ask)?;
        let mut dispatcher = peer.dispatcher()?;
        let mut echo = Echo::connect(&peer.offer.echo, bytes)?;
        let rows: Vec<u8> =
            (0..bytes / 2).flat_map(|i| (0x3f80 + i as u16 % 100).to_le_bytes()).collect();
        let count = rows.len() / (2 * hidden);
        let routed = Routed {
            rows: &rows,
            count,
            top_k: 1,
            experts: &vec![0; count],
            weights: &vec![1.0; count],
        };

        let block = if bytes > 64 << 10 { 20 } else { 100 };
        let (mut raw, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=args.rounds.max(1) {
            let mut plain = Vec::new();
            for _ in 0..block {
                let start = Instant::now();
                echo.round_trip(&rows)?;
                plain.push(start.elapsed());
            }
            let mut sent = Vec::new();
            for _ in 0..block {
                let start = Instant::now();
                dispatcher.round_trip(&routed)?;
                sent.push(start.elapsed());
            }
            // The first round finds caches, windows and buffers cold.
            if round > 0 {
                ratios.push(middle(&sent) / middle(&plain));
                raw.extend(plain);
                ours.extend(sent);
            }
        }
        let same =
            (0..count).all(|slot| dispatcher.row(slot) == &rows[slot * 2 * hidden..][..2 * hidden]);
        anyhow::ensure!(same, "the nodes answered with other rows than they were sent");
        let ratio = median(&ratios).unwrap_or(f64::NAN);
        trips.push(Trip { bytes, echo: Times::new(raw), dispatch: Times::new(ours), ratio });
    }
    Ok(trips)
}

fn middle(times: &[Duration]) -> f64 {
    median(&times.iter().map(Duration::as_secs_f64).collect::<Vec<_>>()).unwrap_or(f64::NAN)
}

/// What a token costs the router's side, spread over so many nodes.
struct Cost {
    nodes: usize,
    tokens: usize,
    cpu_us: f64,
    trip: Times,
}

impl Cost {
    fn line(&self) -> String {
        let Self { nodes, tokens, cpu_us, trip } = self;
        let trip = trip.percentile(50).unwrap_or(f64::NAN) * 1e3;
        format!("| {nodes} | {tokens} | {cpu_us:.1} | {trip:.0} |\n")
    }

    fn json(&self) -> Value {
        json!({
            "nodes": self.nodes,
            "tokens": self.tokens,
            "cpu_us_per_token_and_layer": self.cpu_us,
            "round_trip_ms": self.trip.json(),
        })
    }
}

fn cost(nodes: usize, args: &BenchDispatchArgs) -> anyhow::Result<Vec<Cost>> {
    let (hidden, experts, top_k) = SPREAD;
    anyhow::ensure!((1..=experts as usize).contains(&nodes), "{nodes} nodes: 1 to {experts}");
    let peer = Peer::start(&Ask { tcp: args.tcp, nodes, hidden, experts, top_k })?;
    let mut dispatcher = peer.dispatcher()?;
    let mut random = Random::new(1);
    let mut costs = Vec::new();
    for tokens in SPREAD_TOKENS {
        let rows = vec![0x3c; tokens * hidden * 2];
        let weights = vec![1.0; tokens * top_k];
        let (mut cpu, mut trip) = (Duration::ZERO, Vec::new());
        let trips = 50 * args.rounds.max(1);
        for number in 0..trips + 50 {
            let chosen: Vec<u32> =
                (0..tokens).flat_map(|_| choose(&mut random, experts, top_k)).collect();
            let routed =
                Routed { rows: &rows, count: tokens, top_k, experts: &chosen, weights: &weights };
            let (start, before) = (Instant::now(), thread_cpu()?);
            dispatcher.round_trip(&routed)?;
            if number >= 50 {
                cpu += thread_cpu()? - before;
                trip.push(start.elapsed());
            }
        }
        let cpu_us = cpu.as_secs_f64() * 1e6 / (trips * tokens) as f64;
        costs.push(Cost { nodes, tokens, cpu_us, trip: Times::new(trip) });
    }
    Ok(costs)
}

/// `top_k` of `experts`, ascending.
fn choose(random: &mut Random, experts: u32, top_k: usize) -> Vec<u32> {
    let mut all: Vec<u32> = (0..experts).collect();
    for at in 0..top_k {
        let other = at + random.below(u64::from(experts) - at as u64) as usize;
        all.swap(at, other);
    }
    all.truncate(top_k);
    all.sort_unstable();
    all
}

/// Time this thread has been on a CPU.
fn thread_cpu() -> anyhow::Result<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let first = text.split_whitespace().next().context("schedstat is empty")?;
    Ok(Duration::from_nanos(first.parse()?))
}

/// The other process; ends with this value.
struct Peer {
    process: Child,
    ask: Ask,
    offer: Offer,
}

impl Peer {
    fn start(ask: &Ask) -> anyhow::Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["bench", "dispatch", "--peer", &serde_json::to_string(ask)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the process of the stub nodes")?;
        let mut line = String::new();
        if let Some(out) = process.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        let offer = serde_json::from_str(&line).context("the stub nodes did not come up")?;
        Ok(Self { process, ask: ask.clone(), offer })
    }

    fn dispatcher(&self) -> anyhow::Result<Dispatcher> {
        let Ask { hidden, experts, top_k, .. } = self.ask;
        let nodes: Result<Vec<Endpoint>, _> = self.offer.nodes.iter().map(|n| n.parse()).collect();
        Dispatcher::connect(Config {
            nodes: nodes?,
            identity: Identity {
                model_digest: expert_node::stub::DIGEST.to_vec(),
                numerics: expert_node::stub::NUMERICS.class(kernels::Isa::detect()),
                hidden: hidden as u32,
            },
            shape: Shape { hidden: hidden as u32, dtype: Dtype::Bf16, top_k: top_k as u32 },
            layer: expert_node::stub::LAYER,
            experts,
        })
        .map_err(|missing| anyhow!("the stub nodes cannot be reached: {missing}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        // Nothing is left of it that could be asked why.
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_experts_are_distinct_and_ascending() {
        let mut random = Random::new(7);
        for _ in 0..100 {
            let chosen = choose(&mut random, 10, 8);
            assert_eq!(chosen.len(), 8);
            assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]) && chosen[7] < 10);
        }
    }
}
