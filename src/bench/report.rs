//! What a benchmark found, as a markdown table for people and as JSON for
//! programs. Says what was measured and on what machine.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::json;

use crate::config::local::Local;
use crate::config::roles::cpus;

/// All rows of one run.
pub struct Report {
    /// The mesh or the URL that was measured.
    pub subject: String,
    pub model: String,
    pub rows: Vec<Row>,
}

/// One measurement.
pub struct Row {
    pub what: String,
    pub streams: usize,
    /// Tokens a second over all streams.
    pub rate: f64,
    /// Time to the first token, of each request.
    pub first: Vec<Duration>,
    /// Time per token after the first, of each request that has one.
    pub per_token: Vec<Duration>,
}

impl Report {
    pub fn markdown(&self) -> String {
        let mut text = format!("{}: {}, on {}\n\n", self.model, self.subject, machine());
        text.push_str(
            "| measured | streams | tokens/s | TTFT p50 / p95, ms | TPOT p50 / p95, ms |\n\
             |---|---:|---:|---:|---:|\n",
        );
        for row in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {} | {:.1} | {} | {} |",
                row.what,
                row.streams,
                row.rate,
                cell(&row.first),
                cell(&row.per_token)
            );
        }
        text
    }

    pub fn json(&self) -> String {
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "measured": row.what,
                    "streams": row.streams,
                    "tokens_per_second": row.rate,
                    "requests": row.first.len(),
                    "ttft_ms": { "p50": ms(&row.first, 50), "p95": ms(&row.first, 95) },
                    "tpot_ms": { "p50": ms(&row.per_token, 50), "p95": ms(&row.per_token, 95) },
                })
            })
            .collect();
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": self.model,
            "subject": self.subject,
            "machine": machine(),
            "rows": rows,
        });
        format!("{report:#}\n")
    }
}

/// The shape of a mesh in words.
pub fn shape(local: &Local) -> String {
    let Local { gateways, routers, expert_nodes, replicas, numerics, threads, .. } = local;
    format!(
        "{numerics}, gateways {gateways}, routers {routers}, expert nodes {expert_nodes} \
         (replicas {replicas}), threads {threads}"
    )
}

fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = name.map_or(std::env::consts::ARCH, |(_, name)| name);
    format!("{} CPUs ({name})", cpus())
}

fn cell(times: &[Duration]) -> String {
    match (ms(times, 50), ms(times, 95)) {
        (Some(half), Some(most)) => format!("{half:.1} / {most:.1}"),
        _ => "–".to_owned(),
    }
}

/// The `percent`th percentile in milliseconds (nearest rank).
fn ms(times: &[Duration], percent: usize) -> Option<f64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).map(|time| time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let times: Vec<_> = (1..=20).rev().map(Duration::from_millis).collect();
        assert_eq!(ms(&times, 50), Some(10.0));
        assert_eq!(ms(&times, 95), Some(19.0));
        assert_eq!(ms(&times[..1], 95), Some(20.0));
        assert_eq!(ms(&[], 50), None);
    }

    #[test]
    fn a_row_without_a_value_is_shown_as_such() {
        let row = Row {
            what: "prefill, 512 tokens each".to_owned(),
            streams: 1,
            rate: 1234.56,
            first: vec![Duration::from_millis(415)],
            per_token: Vec::new(),
        };
        let report = Report { subject: "bf16".into(), model: "tiny".into(), rows: vec![row] };
        let table = report.markdown();
        assert!(table.ends_with("| prefill, 512 tokens each | 1 | 1234.6 | 415.0 / 415.0 | – |\n"));
        assert!(serde_json::from_str::<serde_json::Value>(&report.json()).is_ok());
    }
}
