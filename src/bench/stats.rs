//! What many measurements say: percentiles of samples, medians of ratios, and a
//! generator of numbers that are the same in every run.

use std::time::Duration;

use serde_json::{Value, json};

/// Samples of one quantity in milliseconds, sorted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Times(Vec<f64>);

impl Times {
    pub fn new(times: impl IntoIterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = times.into_iter().map(|time| time.as_secs_f64() * 1e3).collect();
        ms.sort_unstable_by(f64::total_cmp);
        Self(ms)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The `percent`th percentile (nearest rank), `None` of nothing.
    pub fn percentile(&self, percent: usize) -> Option<f64> {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied()
    }

    /// 50th, 95th and 99th percentile, for a table.
    pub fn cell(&self) -> String {
        self.percentiles(1)
    }

    /// The same to the microsecond.
    pub fn fine(&self) -> String {
        self.percentiles(3)
    }

    fn percentiles(&self, digits: usize) -> String {
        let all: Option<Vec<String>> = [50, 95, 99]
            .into_iter()
            .map(|percent| Some(format!("{:.digits$}", self.percentile(percent)?)))
            .collect();
        all.map_or_else(|| "–".to_owned(), |all| all.join(" / "))
    }

    pub fn json(&self) -> Value {
        json!({
            "count": self.len(),
            "p50": self.percentile(50),
            "p95": self.percentile(95),
            "p99": self.percentile(99),
        })
    }
}

/// The middle value, or the mean of the two in the middle; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        1 => sorted.get(middle).copied(),
        _ => Some((sorted.get(middle.checked_sub(1)?)? + sorted.get(middle)?) / 2.0),
    }
}

/// The smallest and the largest value.
pub fn range(values: &[f64]) -> Option<(f64, f64)> {
    let first = *values.first()?;
    Some(values.iter().fold((first, first), |(low, high), &x| (low.min(x), high.max(x))))
}

/// splitmix64: the same numbers for the same seed, everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mix(self.0)
    }

    /// Evenly distributed in `0..end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Evenly distributed above 0, up to 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

/// What splitmix64's state grows by.
pub const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// splitmix64's output for a state.
pub fn mix(state: u64) -> u64 {
    let word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// When the requests of an open loop arrive, from its start: a Poisson process of
/// `rate` a second.
pub fn arrivals(rate: f64, count: usize, seed: u64) -> Vec<Duration> {
    let mut random = Random::new(seed);
    let mut at = 0.0;
    let next = |_| {
        at -= random.unit().ln() / rate;
        Duration::from_secs_f64(at)
    };
    (0..count).map(next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let times = Times::new((1..=20).rev().map(Duration::from_millis));
        assert_eq!(times.percentile(50), Some(10.0));
        assert_eq!(times.percentile(95), Some(19.0));
        assert_eq!(times.percentile(99), Some(20.0));
        assert_eq!(times.cell(), "10.0 / 19.0 / 20.0");
        let one = Times::new([Duration::from_millis(7)]);
        assert_eq!((one.percentile(50), one.percentile(99)), (Some(7.0), Some(7.0)));
        assert_eq!(Times::default().percentile(50), None);
        assert_eq!(Times::default().cell(), "–");
        assert!(Times::default().json()["p50"].is_null());
    }

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert_eq!(range(&[3.0, 1.0, 2.0]), Some((1.0, 3.0)));
        assert_eq!(range(&[]), None);
    }

    #[test]
    fn arrivals_are_poisson_and_the_same_in_every_run() {
        let arrivals_of = |seed| arrivals(4.0, 20_000, seed);
        let times = arrivals_of(7);
        assert_eq!(times, arrivals_of(7));
        assert_ne!(times[..5], arrivals_of(8)[..5]);
        let gaps: Vec<f64> = times.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
        // An exponential gap spreads as far as it is long; an even one would not.
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.03, "{variance}");
    }
}
