//! `moemesh bench dispatch`: what one layer's dispatch and gather takes. The
//! router's side (links, placement, exchange) runs here and stub nodes, which
//! answer with the rows they are given, in a process of their own: [`peer`].
//! Three questions: how long a round trip takes beside a plain echo ([`trips`]),
//! what a layer costs with its experts on many nodes ([`spread`]), and what a
//! whole token then costs a router ([`tokens`]).

mod cores;
mod peer;
mod router_process;
mod spread;
mod tokens;
mod trips;

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, anyhow};
use mesh::link::Identity;
use mesh::near::Shortcut;
use mesh::transport::Endpoint;
use proto::v1::Dtype;
use router::exchange::{Combine, Shape, Wire};
use router::measure::{Config, Dispatcher};
use serde_json::{Value, json};

use crate::bench::report::machine;
use crate::cli::BenchDispatchArgs;
use cores::Cores;
use peer::{Ask, Layer, Offer};
use spread::Cost;
use trips::Trip;

/// Measures and prints; or is the other process.
pub async fn run(args: BenchDispatchArgs) -> anyhow::Result<()> {
    if let Some(ask) = &args.peer {
        return peer::serve(serde_json::from_str(ask)?).await;
    }
    if args.model.is_some() {
        print!("{}", tokens::run(&args).await?);
        return Ok(());
    }
    // The dispatcher drives a runtime of its own, so it needs a thread that has none.
    let (said, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || said.send(measure(&args)));
    print!("{}", ended.await.context("the measuring thread panicked")??);
    Ok(())
}

fn measure(args: &BenchDispatchArgs) -> anyhow::Result<String> {
    let machine = machine();
    let trips = if args.nodes.is_empty() { trips::measure(args)? } else { Vec::new() };
    let spread =
        args.nodes.iter().map(|&nodes| spread::cost(nodes, args)).collect::<Result<Vec<_>, _>>()?;
    if args.json {
        let trips: Vec<Value> = trips.iter().map(Trip::json).collect();
        let spread: Vec<Value> = spread.iter().flatten().map(Cost::json).collect();
        let report = json!({ "machine": machine, "round_trips": trips, "nodes": spread });
        return Ok(format!("{report:#}\n"));
    }
    let mut text = format!("dispatch and gather of one layer, on {machine}\n\n");
    if !trips.is_empty() {
        text += &trips::table(&trips, if args.tcp { "TCP" } else { "Unix" });
    }
    if !spread.is_empty() {
        text += "| nodes | tokens | CPU of the router's side per token and layer, µs | round trip p50, µs |\n\
                 |---:|---:|---:|---:|\n";
        text.extend(spread.iter().flatten().map(Cost::line));
    }
    Ok(text)
}

/// The other process; ends with this value.
struct Peer {
    process: Child,
    offer: Offer,
}

impl Peer {
    /// Starts it on its side of `cores`; the calling thread goes to the other.
    fn start(ask: &Ask, cores: Cores) -> anyhow::Result<Self> {
        // A process begins where the thread is that starts it.
        cores.take_theirs()?;
        let process = Command::new(std::env::current_exe()?)
            .args(["bench", "dispatch", "--peer", &serde_json::to_string(ask)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the process of the stub nodes");
        cores.take_ours()?;
        let mut process = process?;
        let mut line = String::new();
        if let Some(out) = process.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        let offer = serde_json::from_str(&line).context("the stub nodes did not come up")?;
        Ok(Self { process, offer })
    }

    /// To the experts of one layer.
    fn dispatcher(&self, layer: Layer) -> anyhow::Result<Dispatcher> {
        let Layer { hidden, experts, top_k } = layer;
        let nodes: Result<Vec<Endpoint>, _> = self.offer.nodes.iter().map(|n| n.parse()).collect();
        Dispatcher::connect(Config {
            nodes: nodes?,
            identity: Identity {
                model_digest: expert_node::stub::DIGEST.to_vec(),
                numerics: expert_node::stub::NUMERICS.class(kernels::Isa::detect()),
                hidden: hidden as u32,
            },
            shape: Shape {
                hidden: hidden as u32,
                dtype: Dtype::Bf16,
                top_k: top_k as u32,
                wire: Wire::Exact,
                combine: Combine::Router,
            },
            layer: expert_node::stub::LAYER,
            experts,
            shared_rows: Shortcut::Auto,
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
