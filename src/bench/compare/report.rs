//! What a comparison found: ratios first.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::bench::compare::{Sample, Workload};
use crate::bench::procs::Memory;
use crate::bench::stats::{median, range};

/// All samples of one workload.
#[derive(Debug)]
pub struct Rounds {
    pub workload: Workload,
    /// Ours and theirs, by round.
    pub pairs: Vec<[Sample; 2]>,
}

impl Rounds {
    pub fn new(workload: Workload) -> Self {
        Self { workload, pairs: Vec::new() }
    }

    /// The rounds in which nothing else ran.
    fn quiet(&self) -> impl Iterator<Item = &[Sample; 2]> {
        self.pairs.iter().filter(|pair| pair.iter().all(|sample| sample.is_quiet()))
    }

    pub fn kept(&self) -> usize {
        self.quiet().count()
    }

    /// Ours over theirs, by round.
    fn ratios(&self) -> Vec<f64> {
        self.quiet().map(|[ours, theirs]| ours.rate / theirs.rate).collect()
    }

    fn rates(&self, which: usize) -> Vec<f64> {
        self.quiet().map(|pair| pair[which].rate).collect()
    }

    /// One line on the round that was measured last.
    pub fn last_line(&self, names: &[&str; 2]) -> String {
        let Some([ours, theirs]) = self.pairs.last() else { return String::new() };
        let noise = 100.0 * ours.others.max(theirs.others);
        let fate = if ours.is_quiet() && theirs.is_quiet() { "" } else { ", not counted" };
        format!(
            "{}: {} {:.1}, {} {:.1} tokens/s, ratio {:.2} (others {noise:.0} %{fate})",
            self.workload,
            names[0],
            ours.rate,
            names[1],
            theirs.rate,
            ours.rate / theirs.rate,
        )
    }
}

/// The whole comparison.
#[derive(Debug)]
pub struct Comparison {
    pub model: String,
    pub subject: String,
    /// The other engine's command line.
    pub peer: String,
    pub names: [String; 2],
    pub machine: String,
    pub rounds: Vec<Rounds>,
    /// The most that each engine's processes were seen to use.
    pub memory: [Memory; 2],
}

impl Comparison {
    pub fn markdown(&self) -> String {
        let [ours, theirs] = &self.names;
        let mut text = format!(
            "{}: {ours} ({}) beside {theirs}, on {}\n\n`{}`\n\n",
            self.model, self.subject, self.machine, self.peer
        );
        let _ = writeln!(
            text,
            "| measured | ratio, median [range] | {ours}, tokens/s | {theirs}, tokens/s | rounds |\n\
             |---|---:|---:|---:|---:|"
        );
        for rounds in &self.rounds {
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} of {} |",
                rounds.workload,
                cell(&rounds.ratios(), 2),
                cell(&rounds.rates(0), 1),
                cell(&rounds.rates(1), 1),
                rounds.kept(),
                rounds.pairs.len(),
            );
        }
        let [a, b] = self.memory;
        for (what, a, b) in
            [("memory (PSS), MB", a.pss, b.pss), ("peak resident, MB", a.peak_rss, b.peak_rss)]
        {
            let _ = writeln!(text, "| {what} | {:.2} | {a:.0} | {b:.0} | |", a / b);
        }
        text
    }

    pub fn json(&self) -> String {
        let rounds: Vec<Value> = self.rounds.iter().map(rounds_json).collect();
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": self.model,
            "subject": self.subject,
            "peer": self.peer,
            "engines": self.names,
            "machine": self.machine,
            "workloads": rounds,
            "memory": self.memory.map(Memory::json),
        });
        format!("{report:#}\n")
    }
}

fn rounds_json(rounds: &Rounds) -> Value {
    let samples: Vec<Value> = rounds
        .pairs
        .iter()
        .map(|pair| {
            json!({
                "tokens_per_second": pair.map(|sample| sample.rate),
                "other_processes": pair.map(|sample| sample.others),
                "counted": pair.iter().all(|sample| sample.is_quiet()),
            })
        })
        .collect();
    json!({
        "measured": rounds.workload.to_string(),
        "ratio": median(&rounds.ratios()),
        "tokens_per_second": [median(&rounds.rates(0)), median(&rounds.rates(1))],
        "rounds": samples,
    })
}

/// Median and range, or a dash.
fn cell(values: &[f64], digits: usize) -> String {
    match (median(values), range(values)) {
        (Some(middle), Some((low, high))) => {
            format!("{middle:.digits$} [{low:.digits$}–{high:.digits$}]")
        }
        _ => "–".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison() -> Comparison {
        let sample = |rate, others| Sample { rate, others };
        let pairs = vec![
            [sample(10.0, 0.01), sample(20.0, 0.0)],
            [sample(90.0, 0.01), sample(30.0, 0.0)],
            // Somebody else ran: of no account.
            [sample(99.0, 0.01), sample(1.0, 0.5)],
            [sample(40.0, 0.08), sample(40.0, 0.0)],
        ];
        let workload = Workload::Decode { streams: 8, tokens: 64 };
        Comparison {
            model: "m".to_owned(),
            subject: "bf16".to_owned(),
            peer: "srv -m m".to_owned(),
            names: ["moemesh".to_owned(), "srv".to_owned()],
            machine: "here".to_owned(),
            rounds: vec![Rounds { workload, pairs }],
            memory: [Memory { peak_rss: 3.0, pss: 2.0 }, Memory { peak_rss: 6.0, pss: 1.0 }],
        }
    }

    #[test]
    fn the_median_is_of_ratios_of_quiet_rounds() {
        let table = comparison().markdown();
        let row = "| decode, 8 streams | 1.00 [0.50–3.00] | 40.0 [10.0–90.0] | \
                   30.0 [20.0–40.0] | 3 of 4 |\n";
        assert!(table.contains(row), "{table}");
        assert!(table.contains("| memory (PSS), MB | 2.00 | 2 | 1 | |"), "{table}");
        let parsed: Value = serde_json::from_str(&comparison().json()).unwrap();
        assert_eq!(parsed["workloads"][0]["ratio"], 1.0);
        assert_eq!(parsed["workloads"][0]["rounds"][2]["counted"], false);
    }

    #[test]
    fn without_a_quiet_round_nothing_is_claimed() {
        let mut comparison = comparison();
        comparison.rounds[0].pairs.truncate(3);
        comparison.rounds[0].pairs.drain(..2);
        assert!(comparison.markdown().contains("| – | – | – | 0 of 1 |"));
        let line = comparison.rounds[0].last_line(&["a", "b"]);
        assert!(line.contains("ratio 99.00") && line.contains("not counted"), "{line}");
    }
}
