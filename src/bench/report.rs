//! What `bench serve` found, as a markdown table for people and as JSON for
//! programs. Says what was measured and on what machine.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use crate::bench::procs::{Memory, Usage};
use crate::bench::stats::Times;
use crate::config::local::Local;
use crate::config::roles::cpus;

/// All rows of one run.
#[derive(Debug)]
pub struct Report {
    /// The mesh or the URL that was measured.
    pub subject: String,
    pub model: String,
    /// Prompts were token ids.
    pub ids: bool,
    pub rows: Vec<Row>,
    pub intrusion: Option<Intrusion>,
    /// Of the mesh's processes together.
    pub memory: Option<Memory>,
}

/// One measurement.
#[derive(Debug)]
pub struct Row {
    pub what: String,
    pub load: String,
    pub requests: usize,
    pub prompt_tokens: u64,
    /// Tokens that the rate counts.
    pub tokens: u64,
    pub wall: Duration,
    /// Time to the first token, of each request.
    pub first: Times,
    /// Time per token after the first, of each request that has one.
    pub per_token: Times,
    /// Times between pieces of text.
    pub gaps: Times,
    pub usage: Usage,
}

impl Row {
    /// Tokens a second over all streams, prompts included in the time.
    fn rate(&self) -> f64 {
        self.tokens as f64 / self.wall.as_secs_f64()
    }

    /// Share of the CPU that others took; unknown where the server's processes are.
    fn others(&self) -> Option<f64> {
        (!self.usage.cpu.is_empty()).then_some(self.usage.others)
    }
}

/// What a long prompt did to running streams.
#[derive(Debug)]
pub struct Intrusion {
    pub streams: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Until its first token.
    pub took: Duration,
    /// Times between the streams' pieces before it came.
    pub before: Times,
    /// Those that overlap the time until its first token.
    pub during: Times,
}

impl Intrusion {
    fn ratio(&self) -> Option<f64> {
        Some(self.during.percentile(99)? / self.before.percentile(99)?)
    }
}

impl Report {
    pub fn markdown(&self) -> String {
        let mut text = format!("{}: {}, on {}\n\n", self.model, self.subject, machine());
        if !self.rows.is_empty() {
            text.push_str(
                "| measured | load | tokens/s | TTFT p50 / p95 / p99, ms | TPOT, ms | ITL, ms \
                 | CPU s | others |\n|---|---|---:|---:|---:|---:|---|---:|\n",
            );
        }
        for row in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {} | {:.1} | {} | {} | {} | {} | {} |",
                row.what,
                row.load,
                row.rate(),
                row.first.cell(),
                row.per_token.cell(),
                row.gaps.cell(),
                cpu_cell(&row.usage),
                row.others()
                    .map_or_else(|| "–".to_owned(), |part| format!("{:.0} %", 100.0 * part)),
            );
        }
        if let Some(found) = &self.intrusion {
            let _ = writeln!(
                text,
                "| {} streams, ITL p50 / p95 / p99, ms | |\n|---|---:|\n| before | {} |\n\
                 | while a prompt of {} tokens was read ({:.1} s) | {} |\n| p99, ratio | {} |",
                found.streams,
                found.before.cell(),
                found.prompt,
                found.took.as_secs_f64(),
                found.during.cell(),
                found.ratio().map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}")),
            );
        }
        if let Some(Memory { peak_rss, pss }) = self.memory {
            let _ = writeln!(
                text,
                "\nMemory of all processes: {pss:.0} MB (PSS), peak resident {peak_rss:.0} MB"
            );
        }
        if !self.ids {
            text.push_str("\nThe server takes no token ids: prompts were text.\n");
        }
        text
    }

    pub fn json(&self) -> String {
        let rows: Vec<Value> = self.rows.iter().map(row_json).collect();
        let intrusion = self.intrusion.as_ref().map(|found| {
            json!({
                "streams": found.streams,
                "prompt_tokens": found.prompt,
                "prompt_ttft_ms": found.took.as_secs_f64() * 1e3,
                "itl_before_ms": found.before.json(),
                "itl_during_ms": found.during.json(),
                "p99_ratio": found.ratio(),
            })
        });
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": self.model,
            "subject": self.subject,
            "machine": machine(),
            "token_ids": self.ids,
            "rows": rows,
            "intrusion": intrusion,
            "memory": self.memory.map(Memory::json),
        });
        format!("{report:#}\n")
    }
}

fn row_json(row: &Row) -> Value {
    let cpu: serde_json::Map<String, Value> =
        row.usage.cpu.iter().map(|(name, seconds)| (name.clone(), json!(seconds))).collect();
    json!({
        "measured": row.what,
        "load": row.load,
        "tokens_per_second": row.rate(),
        "requests": row.requests,
        "prompt_tokens": row.prompt_tokens,
        "seconds": row.wall.as_secs_f64(),
        "ttft_ms": row.first.json(),
        "tpot_ms": row.per_token.json(),
        "itl_ms": row.gaps.json(),
        "cpu_seconds": cpu,
        "other_processes": row.others(),
    })
}

/// CPU seconds by role, processes of one role together.
fn cpu_cell(usage: &Usage) -> String {
    let mut roles: Vec<(&str, f64)> = Vec::new();
    for (name, seconds) in &usage.cpu {
        let role = name.rsplit_once('-').map_or(name.as_str(), |(role, _)| role);
        match roles.iter_mut().find(|(known, _)| *known == role) {
            Some((_, sum)) => *sum += seconds,
            None => roles.push((role, *seconds)),
        }
    }
    roles.sort_unstable_by_key(|(role, _)| *role);
    let cells: Vec<String> =
        roles.iter().map(|(role, seconds)| format!("{role} {seconds:.2}")).collect();
    if cells.is_empty() { "–".to_owned() } else { cells.join(", ") }
}

/// The shape of a mesh in words.
pub fn shape(local: &Local) -> String {
    let Local { gateways, routers, expert_nodes, replicas, numerics, threads, weights, .. } = local;
    format!(
        "{numerics}, weights {weights}, gateways {gateways}, routers {routers}, expert nodes \
         {expert_nodes} (replicas {replicas}), threads {threads}"
    )
}

/// This machine in words.
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = name.map_or(std::env::consts::ARCH, |(_, name)| name);
    format!("{} CPUs ({name}), {}", cpus(), kernels::Isa::detect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let row = Row {
            what: "decode, 3 tokens each".to_owned(),
            load: "1 stream".to_owned(),
            requests: 1,
            prompt_tokens: 16,
            tokens: 3,
            wall: Duration::from_secs(2),
            first: Times::new([Duration::from_millis(415)]),
            per_token: Times::default(),
            gaps: Times::new([Duration::from_millis(5)]),
            usage: Usage {
                cpu: vec![
                    ("router-0".to_owned(), 1.0),
                    ("expert-node-0".to_owned(), 0.25),
                    ("expert-node-1".to_owned(), 0.5),
                ],
                others: 0.021,
            },
        };
        let memory = Some(Memory { peak_rss: 10.0, pss: 7.5 });
        let (subject, model) = ("bf16".to_owned(), "tiny".to_owned());
        Report { subject, model, ids: true, rows: vec![row], intrusion: None, memory }
    }

    #[test]
    fn a_row_without_a_value_is_shown_as_such() {
        let table = report().markdown();
        let row = "| decode, 3 tokens each | 1 stream | 1.5 | 415.0 / 415.0 / 415.0 | – | \
                   5.0 / 5.0 / 5.0 | expert-node 0.75, router 1.00 | 2 % |\n";
        assert!(table.contains(row), "{table}");
        assert!(table.ends_with("8 MB (PSS), peak resident 10 MB\n"), "{table}");
    }

    #[test]
    fn json_holds_what_the_table_shows() {
        let mut report = report();
        let ms = Duration::from_millis;
        report.intrusion = Some(Intrusion {
            streams: 8,
            prompt: 4096,
            took: ms(900),
            before: Times::new([ms(10)]),
            during: Times::new([ms(25)]),
        });
        assert!(report.markdown().contains("| p99, ratio | 2.50 |"));
        let parsed: Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(parsed["rows"][0]["cpu_seconds"]["expert-node-1"], 0.5);
        assert_eq!(parsed["rows"][0]["tokens_per_second"], 1.5);
        assert_eq!(parsed["intrusion"]["p99_ratio"], 2.5);
        assert_eq!(parsed["memory"]["pss_mb"], 7.5);
    }
}
