//! `moemesh plan`: what a mesh will need, said before there is one.

mod fit;

use std::fmt::Write as _;
use std::fs;

use anyhow::Context as _;
use model::Config;
use serde_json::json;

use self::fit::{Budget, NodeFit, Parts};
use crate::cli::PlanArgs;
use crate::exit::BadCheckpoint;
use crate::model_dir;
use crate::status::table::table;

/// Prints how a model fits on devices.
///
/// # Errors
/// No such model, or one that this program does not serve.
pub fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let path = model_dir::find(args.model.as_deref())?.join("config.json");
    let name = path.display().to_string();
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {name}"))?;
    let config =
        Config::from_json(&text, &name).map_err(|error| BadCheckpoint(error.to_string()))?;
    let parts = Parts::of(&config);
    let budget = Budget {
        device: args.device_memory,
        usable: (args.device_memory as f64 * args.memory_utilization) as u64,
        replicas: args.replicas,
    };
    let least = fit::least(&parts, &budget);
    let counts = match args.nodes.as_slice() {
        [] => fit::worth_showing(&parts, &budget, least),
        asked => asked.iter().cloned().flatten().collect(),
    };
    let rows: Vec<NodeFit> = counts.iter().map(|&n| fit::node(&parts, &budget, n)).collect();
    if args.json {
        println!("{:#}", to_json(&config, &parts, &budget, least, &rows));
    } else {
        print!("{}", render(&config, &parts, &budget, least, &rows));
    }
    Ok(())
}

fn render(
    config: &Config,
    parts: &Parts,
    budget: &Budget,
    least: Option<u16>,
    rows: &[NodeFit],
) -> String {
    let mut text = format!("{}\n\n", config.summary());
    let line = |what: &str, bytes: u64, about: String| vec![what.to_owned(), gb(bytes), about];
    let mlp = parts.dense + parts.shared;
    text += &table(
        &["part", "bytes", ""],
        &[
            line(
                "routed experts",
                parts.routed,
                format!(
                    "{} of {}, {} a layer in {} layers",
                    parts.count(),
                    gb(parts.expert()),
                    parts.experts,
                    parts.moe_layers
                ),
            ),
            line(
                "trunk",
                parts.trunk(),
                format!(
                    "attention {}, dense and shared networks {}, embedding and head {}, gates and norms {}",
                    gb(parts.attention),
                    gb(mlp),
                    gb(parts.embedding),
                    gb(parts.small)
                ),
            ),
            line("KV cache of a token", parts.kv_token, "in bf16".to_owned()),
        ],
    );
    let rows: Vec<Vec<String>> = rows.iter().map(|row| columns(row, budget)).collect();
    text += &table(&["expert nodes", "experts a node", "bytes a node", "of usable", "fits"], &rows);
    let of = format!("{} of a device's {}", gb(budget.usable), gb(budget.device));
    let _ = match least {
        Some(nodes) => writeln!(
            text,
            "At least {nodes} expert node{}, with {} owner{} of each expert, if {of} may be used.",
            plural(u64::from(nodes)),
            budget.replicas,
            plural(u64::from(budget.replicas)),
        ),
        None => writeln!(
            text,
            "No number of nodes is enough: an expert of each layer takes {}, and {of} may be used.",
            gb(parts.expert() * parts.moe_layers)
        ),
    };
    let _ = match fit::kv_tokens(parts, budget) {
        Some(tokens) => writeln!(
            text,
            "A router's device has {} beside the trunk of {}: KV cache of {tokens} tokens.",
            gb(budget.usable - parts.trunk_on_gpu),
            gb(parts.trunk_on_gpu)
        ),
        None => writeln!(
            text,
            "The trunk of {} does not fit on a router's device.",
            gb(parts.trunk_on_gpu)
        ),
    };
    text
}

fn columns(row: &NodeFit, budget: &Budget) -> Vec<String> {
    let share = 100.0 * row.bytes as f64 / budget.usable as f64;
    vec![
        row.nodes.to_string(),
        row.experts.to_string(),
        gb(row.bytes),
        format!("{share:.0} %"),
        if row.fits { "yes" } else { "no" }.to_owned(),
    ]
}

fn to_json(
    config: &Config,
    parts: &Parts,
    budget: &Budget,
    least: Option<u16>,
    rows: &[NodeFit],
) -> serde_json::Value {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "expert_nodes": row.nodes, "experts_a_node": row.experts,
                "bytes_a_node": row.bytes, "fits": row.fits,
            })
        })
        .collect();
    json!({
        "model": config.summary(),
        "device_bytes": budget.device, "usable_bytes": budget.usable, "replicas": budget.replicas,
        "expert_bytes": parts.expert(), "experts": parts.count(),
        "trunk_bytes": parts.trunk(), "trunk_bytes_on_a_gpu": parts.trunk_on_gpu,
        "kv_bytes_a_token": parts.kv_token,
        "kv_tokens_a_router": fit::kv_tokens(parts, budget),
        "least_expert_nodes": least, "by_nodes": rows,
    })
}

fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Bytes in powers of ten, as memory of devices is sold.
fn gb(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        1e9.. => format!("{:.1} GB", bytes / 1e9),
        1e6.. => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} kB", bytes / 1e3),
    }
}
