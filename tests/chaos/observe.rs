//! What is measured from outside while a scenario runs: the routers' accounts of
//! themselves, the processes' metrics, and the figures made of them.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::v1::RouterStatus;
use serde_json::{Value, json};

use super::load::{Outcome, Sample};
use crate::support::Sandbox;
use crate::support::http::{self, Address};

const STATUS_TIMEOUT: Duration = Duration::from_millis(500);

/// The status of every router that answers; `None` for one that does not.
pub async fn statuses(mesh: &Sandbox) -> Vec<Option<RouterStatus>> {
    let mut all = Vec::new();
    for router in 0..mesh.routers.len() {
        let asked = tokio::time::timeout(STATUS_TIMEOUT, mesh.status_of(router)).await;
        all.push(asked.ok().and_then(Result::ok));
    }
    all
}

/// Every router serves, is linked to every node, and every gateway is ready.
pub async fn is_whole(mesh: &Sandbox) -> bool {
    for status in statuses(mesh).await {
        if !status.is_some_and(|s| s.ready && s.nodes.iter().all(|node| node.connected)) {
            return false;
        }
    }
    for address in &mesh.addresses {
        if !http::get(address, "/readyz").await.is_ok_and(|(status, _)| status == 200) {
            return false;
        }
    }
    true
}

/// The sum of a metric's series in a process's Prometheus text; 0 where it does not answer.
pub async fn metric(address: &Address, name: &str) -> f64 {
    let Ok((_, text)) = http::get(address, "/metrics").await else { return 0.0 };
    let series = text.lines().filter(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ') || rest.starts_with('{'))
    });
    series.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// Counters that outlive the process that counts: what a killed one had counted
/// when it was last looked at is kept.
#[derive(Default)]
pub struct Lasting(Mutex<Vec<(f64, f64)>>);

impl Lasting {
    pub fn see(&self, source: usize, value: f64) {
        let mut all = self.0.lock();
        if all.len() <= source {
            all.resize(source + 1, (0.0, 0.0));
        }
        let (before, last) = &mut all[source];
        if value < *last {
            *before += *last;
        }
        *last = value;
    }

    pub fn sum(&self) -> f64 {
        self.0.lock().iter().map(|(before, last)| before + last).sum()
    }
}

/// What routers and gateways count over a run.
#[derive(Default)]
pub struct Counters {
    pub frames: Lasting,
    pub retries: Lasting,
    pub stale: Lasting,
    pub resumed: Lasting,
    pub damaged: Lasting,
}

impl Counters {
    pub async fn look(&self, mesh: &Sandbox) {
        for (at, status) in statuses(mesh).await.iter().enumerate() {
            let Some(status) = status else { continue };
            self.frames.see(at, status.nodes.iter().map(|node| node.frames as f64).sum());
            self.retries.see(at, status.nodes.iter().map(|node| node.retries as f64).sum());
            let side = Address::Unix(mesh.socket(&format!("router-{at}-admin")));
            self.stale.see(at, metric(&side, "moemesh_router_stale_replies_total").await);
            self.damaged.see(at, metric(&side, "moemesh_router_damaged_streams_total").await);
        }
        for (at, address) in mesh.addresses.iter().enumerate() {
            self.resumed.see(at, metric(address, "moemesh_gateway_resumed_total").await);
        }
    }
}

/// The `share` quantile of times; zero of none.
pub fn quantile(times: &mut [Duration], share: f64) -> Duration {
    times.sort_unstable();
    let at = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
    times.get(at).copied().unwrap_or_default()
}

/// What a set of requests comes to.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub answered: usize,
    pub refused: usize,
    pub cut: Vec<String>,
    pub different: usize,
    pub tokens_per_second: f64,
    pub gap_p50: Duration,
    pub gap_p99: Duration,
    pub gap_max: Duration,
    pub first_max: Duration,
}

impl Figures {
    /// `expected[ask]` is what the undisturbed stream said.
    pub fn of(samples: &[Sample], expected: &[Option<String>], took: Duration) -> Self {
        let mut figures = Self::default();
        let mut gaps = Vec::new();
        for sample in samples {
            match &sample.outcome {
                Outcome::Whole(said) => {
                    figures.answered += 1;
                    let same = expected[sample.ask].as_ref().is_none_or(|want| want == said);
                    figures.different += usize::from(!same);
                    figures.first_max = figures.first_max.max(sample.first);
                }
                Outcome::Refused(_) => figures.refused += 1,
                Outcome::Broken(why) => figures.cut.push(why.clone()),
            }
            gaps.extend_from_slice(&sample.gaps);
        }
        figures.tokens_per_second = gaps.len() as f64 / took.as_secs_f64();
        figures.gap_p50 = quantile(&mut gaps, 0.5);
        figures.gap_p99 = quantile(&mut gaps, 0.99);
        figures.gap_max = gaps.last().copied().unwrap_or_default();
        figures
    }

    fn json(&self) -> Value {
        json!({
            "answered": self.answered, "refused": self.refused, "cut": self.cut.len(),
            "different": self.different, "tokens_per_second": self.tokens_per_second.round(),
            "gap_ms": [ms(self.gap_p50), ms(self.gap_p99), ms(self.gap_max)],
            "first_max_ms": ms(self.first_max),
        })
    }
}

pub fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}

/// One row of the table, and a line of JSON.
pub struct Report {
    pub id: &'static str,
    pub title: String,
    pub seed: u64,
    pub calm: Figures,
    pub run: Figures,
    pub faults: usize,
    /// Faults that happened while sequences ran.
    pub in_flight: usize,
    pub recovery: Vec<Duration>,
    pub frames: f64,
    pub retries: f64,
    pub stale: f64,
    pub resumed: f64,
    pub damaged: f64,
    pub notes: Vec<String>,
}

impl Report {
    /// Frames sent, to those that had to be.
    pub fn amplification(&self) -> f64 {
        if self.frames > 0.0 { self.frames / (self.frames - self.retries).max(1.0) } else { 1.0 }
    }

    pub fn print(&self) {
        let Self { id, title, seed, calm, run, faults, in_flight, .. } = self;
        let slowest = self.recovery.iter().max().copied().unwrap_or_default();
        let share = run.tokens_per_second / calm.tokens_per_second.max(1.0);
        println!(
            "| {id} | {title} | {} answered, {} refused, {} cut, {} different | {faults} faults, \
             {in_flight} in flight | gap p50 {} p99 {} max {} ms (calm {} / {} / {}) | {:.0} % of \
             calm {:.0} tok/s | whole again ≤ {} ms | {} retries, ×{:.3} | {} resumed | {} |",
            run.answered,
            run.refused,
            run.cut.len(),
            run.different,
            ms(run.gap_p50),
            ms(run.gap_p99),
            ms(run.gap_max),
            ms(calm.gap_p50),
            ms(calm.gap_p99),
            ms(calm.gap_max),
            share * 100.0,
            calm.tokens_per_second,
            ms(slowest),
            self.retries,
            self.amplification(),
            self.resumed,
            self.notes.join("; "),
        );
        let line = json!({
            "id": id, "seed": seed, "n": run.answered, "calm": calm.json(), "run": run.json(),
            "faults": faults, "in_flight": in_flight, "recovery_max_ms": ms(slowest),
            "frames": self.frames, "retries": self.retries, "stale": self.stale,
            "amplification": self.amplification(), "resumed": self.resumed, "damaged": self.damaged, "notes": self.notes,
        });
        println!("{line}");
    }
}

/// Looks at `condition` until it holds; how long that took, or none after `patience`.
pub async fn until(
    patience: Duration,
    mut condition: impl AsyncFnMut() -> bool,
) -> Option<Duration> {
    let begun = Instant::now();
    while begun.elapsed() < patience {
        if condition().await {
            return Some(begun.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    None
}
