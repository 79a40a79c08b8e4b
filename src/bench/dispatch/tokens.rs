//! What a token costs a router process, trunk and all, by the number of nodes
//! that its experts are on. One router for each number, measured in turns.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::ensure;
use serde_json::{Value, json};

use super::Peer;
use super::cores::Cores;
use super::peer::{Ask, Model};
use super::router_process::{RouterProcess, Used};
use crate::bench::report::machine;
use crate::bench::stats::median;
use crate::cli::BenchDispatchArgs;
use crate::model_dir;

/// Tokens that one stream generates in a turn; several generate half as many each.
const TOKENS: u32 = 96;

/// A router in front of so many nodes.
struct Side {
    nodes: usize,
    router: RouterProcess,
    _peer: Peer,
}

/// So many streams on so many nodes: one for each round.
struct Cell {
    streams: usize,
    nodes: usize,
    used: Vec<Used>,
    /// CPU time to that of the first number of nodes, in the same round.
    ratios: Vec<f64>,
}

pub async fn run(args: &BenchDispatchArgs) -> anyhow::Result<String> {
    let dir = model_dir::find(args.model.as_deref())?;
    let experts = model::Checkpoint::open(&dir)?.config().experts;
    for &nodes in &args.nodes {
        ensure!((1..=experts).contains(&nodes), "{nodes} nodes: 1 to {experts}");
    }
    ensure!(!args.streams.contains(&0), "--streams 0: at least one");
    let mut sides = Vec::new();
    for &nodes in &args.nodes {
        sides.push(Side::start(nodes, &dir, args.threads).await?);
    }
    let cells = measure(&sides, args).await?;
    let machine = machine();
    if args.json {
        let cells: Vec<Value> = cells.iter().map(Cell::json).collect();
        let report = json!({ "machine": machine, "threads": args.threads, "router": cells });
        return Ok(format!("{report:#}\n"));
    }
    let mut text = format!(
        "a router of {} threads with {} stub nodes, on {machine}\n\n\
         | streams | nodes | CPU per token, µs | to the first | frames per token | tokens/s |\n\
         |---:|---:|---:|---:|---:|---:|\n",
        args.threads,
        args.nodes.iter().map(usize::to_string).collect::<Vec<_>>().join(" and "),
    );
    cells.iter().for_each(|cell| cell.line(&mut text));
    Ok(text)
}

impl Side {
    async fn start(nodes: usize, model: &Path, threads: usize) -> anyhow::Result<Self> {
        let ask = Ask { tcp: false, nodes, model: Model::Checkpoint(model.to_owned()) };
        let peer = tokio::task::spawn_blocking(move || Peer::start(&ask, Cores::Any)).await??;
        let router = RouterProcess::start(model, &peer.offer.nodes, threads).await?;
        Ok(Self { nodes, router, _peer: peer })
    }
}

async fn measure(sides: &[Side], args: &BenchDispatchArgs) -> anyhow::Result<Vec<Cell>> {
    let mut cells: Vec<Cell> = Vec::new();
    for &streams in &args.streams {
        let new = |side: &Side| Cell { streams, nodes: side.nodes, used: vec![], ratios: vec![] };
        let mut row: Vec<Cell> = sides.iter().map(new).collect();
        let tokens = if streams == 1 { TOKENS } else { TOKENS / 2 };
        // The first round finds pages, windows and buffers cold.
        for round in 0..=args.rounds.max(1) {
            let mut first = None;
            for (side, cell) in sides.iter().zip(&mut row) {
                let used = side.router.generate(streams, tokens, round as u64).await?;
                let first = *first.get_or_insert(used.cpu_us());
                if round > 0 {
                    cell.ratios.push(used.cpu_us() / first);
                    cell.used.push(used);
                }
            }
        }
        cells.append(&mut row);
    }
    Ok(cells)
}

impl Used {
    fn cpu_us(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.tokens as f64
    }
}

impl Cell {
    fn middle(&self, of: impl Fn(&Used) -> f64) -> f64 {
        median(&self.used.iter().map(of).collect::<Vec<_>>()).unwrap_or(f64::NAN)
    }

    fn figures(&self) -> [f64; 4] {
        [
            self.middle(Used::cpu_us),
            median(&self.ratios).unwrap_or(f64::NAN),
            self.middle(|used| used.frames as f64 / used.tokens as f64),
            self.middle(|used| used.tokens as f64 / used.wall.as_secs_f64()),
        ]
    }

    fn line(&self, text: &mut String) {
        let (streams, nodes, [cpu, ratio, frames, rate]) =
            (self.streams, self.nodes, self.figures());
        let _ = writeln!(
            text,
            "| {streams} | {nodes} | {cpu:.0} | {ratio:.2} | {frames:.1} | {rate:.0} |"
        );
    }

    fn json(&self) -> Value {
        let [cpu, ratio, frames, rate] = self.figures();
        json!({
            "streams": self.streams,
            "nodes": self.nodes,
            "cpu_us_per_token": cpu,
            "ratio_to_first": ratio,
            "frames_per_token": frames,
            "tokens_per_second": rate,
        })
    }
}
