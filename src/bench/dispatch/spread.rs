//! What a token costs the router's side, by the number of nodes that its experts
//! are spread over: CPU time of the thread that dispatches and gathers.

use std::path::Path;
use std::time::{Duration, Instant};

use model::Routed;
use serde_json::{Value, json};

use super::Peer;
use super::cores::Cores;
use super::peer::{Ask, Layer, Model};
use super::router_process::on_cpu;
use crate::bench::stats::{Random, Times};
use crate::cli::BenchDispatchArgs;

/// The model whose rows are spread over many nodes.
const SPREAD: Layer = Layer { hidden: 1024, experts: 64, top_k: 8 };
/// Tokens of a layer in that.
const SPREAD_TOKENS: [usize; 2] = [1, 16];

/// What a token costs the router's side, spread over so many nodes.
pub struct Cost {
    nodes: usize,
    tokens: usize,
    cpu_us: f64,
    trip: Times,
}

impl Cost {
    pub fn line(&self) -> String {
        let Self { nodes, tokens, cpu_us, trip } = self;
        let trip = trip.percentile(50).unwrap_or(f64::NAN) * 1e3;
        format!("| {nodes} | {tokens} | {cpu_us:.1} | {trip:.0} |\n")
    }

    pub fn json(&self) -> Value {
        json!({
            "nodes": self.nodes,
            "tokens": self.tokens,
            "cpu_us_per_token_and_layer": self.cpu_us,
            "round_trip_ms": self.trip.json(),
        })
    }
}

pub fn cost(nodes: usize, args: &BenchDispatchArgs) -> anyhow::Result<Vec<Cost>> {
    let Layer { hidden, experts, top_k } = SPREAD;
    anyhow::ensure!((1..=experts as usize).contains(&nodes), "{nodes} nodes: 1 to {experts}");
    let ask = Ask { tcp: args.tcp, nodes, model: Model::Layer(SPREAD) };
    let peer = Peer::start(&ask, Cores::Any)?;
    let mut dispatcher = peer.dispatcher(SPREAD)?;
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
    on_cpu(Path::new("/proc/thread-self"))
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
