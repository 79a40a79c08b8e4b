//! Round trips of several sizes beside a plain echo of the same bytes between the
//! same two processes over the same kind of socket, in alternating blocks of one
//! run, with both processes on one CPU and on one each. The echo blocks in its
//! calls. Where each process has a CPU it is also measured staying awake while it
//! waits, as the router does: the difference is the time to wake a CPU.

use std::io;
use std::time::{Duration, Instant};

use model::Routed;
use router::measure::Dispatcher;
use serde_json::{Value, json};

use super::Peer;
use super::cores::Cores;
use super::peer::{Ask, Echo, Layer, Model, Waiting};
use crate::bench::stats::{Times, median};
use crate::cli::BenchDispatchArgs;

/// Payloads that are measured, in bytes each way.
const PAYLOADS: [usize; 7] = [64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// Values of a row, where a payload has so many.
const HIDDEN: usize = 2048;

/// One payload on one placement, each way of sending it.
pub struct Trip {
    cores: Cores,
    bytes: usize,
    dispatch: Times,
    echo: Beside,
    /// The echo that stays awake, where there is a CPU for it.
    awake: Option<Beside>,
}

/// A yardstick and what dispatch takes of it.
struct Beside {
    times: Times,
    /// Dispatch to this, median over the rounds of the ratio of their medians.
    ratio: f64,
}

pub fn measure(args: &BenchDispatchArgs) -> anyhow::Result<Vec<Trip>> {
    let mut trips = Vec::new();
    for cores in Cores::all()? {
        for &bytes in if args.bytes.is_empty() { &PAYLOADS[..] } else { &args.bytes } {
            trips.push(trip(bytes, cores, args)?);
        }
    }
    Ok(trips)
}

pub fn table(trips: &[Trip], socket: &str) -> String {
    let head = format!(
        "| CPUs | bytes each way | {socket} echo p50 / p95, µs | awake echo, µs | dispatch, µs | \
         to echo | to awake echo | MB/s |\n|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    );
    trips.iter().fold(head, |text, trip| text + &trip.line())
}

fn trip(bytes: usize, cores: Cores, args: &BenchDispatchArgs) -> anyhow::Result<Trip> {
    let hidden = HIDDEN.min(bytes / 2);
    anyhow::ensure!(
        hidden > 0 && bytes.is_multiple_of(2 * hidden),
        "{bytes} bytes are not whole rows of {HIDDEN} values"
    );
    let layer = Layer { hidden, experts: 1, top_k: 1 };
    let peer = Peer::start(&Ask { tcp: args.tcp, nodes: 1, model: Model::Layer(layer) }, cores)?;
    let mut dispatcher = peer.dispatcher(layer)?;
    let mut blocking = Echo::connect(&peer.offer.echo, bytes, Waiting::Asleep)?;
    let mut awake = match cores {
        Cores::Apart => Some(Echo::connect(&peer.offer.echo, bytes, Waiting::Awake)?),
        Cores::Together | Cores::Any => None,
    };
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
    let mut sent = Samples::default();
    let mut plain = Samples::default();
    let mut waking = Samples::default();
    for round in 0..=args.rounds.max(1) {
        // The first round finds caches, windows and buffers cold.
        let counts = round > 0;
        plain.block(block, counts, || blocking.round_trip(&rows))?;
        if let Some(awake) = &mut awake {
            waking.block(block, counts, || awake.round_trip(&rows))?;
        }
        sent.block(block, counts, || dispatcher.round_trip(&routed).map_err(io::Error::other))?;
    }
    check(&dispatcher, &rows, count, 2 * hidden)?;
    let beside = |yardstick: Samples| {
        let ratios: Vec<f64> =
            sent.middles.iter().zip(&yardstick.middles).map(|(ours, its)| ours / its).collect();
        Beside { times: Times::new(yardstick.all), ratio: median(&ratios).unwrap_or(f64::NAN) }
    };
    let echo = beside(plain);
    let awake = awake.map(|_| beside(waking));
    Ok(Trip { cores, bytes, echo, awake, dispatch: Times::new(sent.all) })
}

fn check(dispatcher: &Dispatcher, rows: &[u8], count: usize, width: usize) -> anyhow::Result<()> {
    let same = (0..count).all(|slot| dispatcher.row(slot) == &rows[slot * width..][..width]);
    anyhow::ensure!(same, "the nodes answered with other rows than they were sent");
    Ok(())
}

/// Times of one way of sending.
#[derive(Default)]
struct Samples {
    all: Vec<Duration>,
    /// Medians of the rounds, in seconds.
    middles: Vec<f64>,
}

impl Samples {
    fn block(
        &mut self,
        trips: usize,
        counts: bool,
        mut trip: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut times = Vec::with_capacity(trips);
        for _ in 0..trips {
            let start = Instant::now();
            trip()?;
            times.push(start.elapsed());
        }
        if counts {
            let seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
            self.middles.push(median(&seconds).unwrap_or(f64::NAN));
            self.all.extend(times);
        }
        Ok(())
    }
}

impl Trip {
    fn line(&self) -> String {
        let cell = |times: &Times| {
            let us = |percent| times.percentile(percent).unwrap_or(f64::NAN) * 1e3;
            format!("{:.0} / {:.0}", us(50), us(95))
        };
        let (awake, to_awake) = match &self.awake {
            Some(awake) => (cell(&awake.times), format!("{:.2}", awake.ratio)),
            None => ("–".to_owned(), "–".to_owned()),
        };
        format!(
            "| {} | {} | {} | {awake} | {} | {:.2} | {to_awake} | {:.0} |\n",
            self.cores.name(),
            self.bytes,
            cell(&self.echo.times),
            cell(&self.dispatch),
            self.echo.ratio,
            self.rate(),
        )
    }

    /// Megabytes a second, both directions together.
    fn rate(&self) -> f64 {
        2.0 * self.bytes as f64 / 1e3 / self.dispatch.percentile(50).unwrap_or(f64::NAN)
    }

    pub fn json(&self) -> Value {
        let awake = self.awake.as_ref();
        json!({
            "cpus": self.cores.name(),
            "bytes": self.bytes,
            "echo_ms": self.echo.times.json(),
            "awake_echo_ms": awake.map(|awake| awake.times.json()),
            "dispatch_ms": self.dispatch.json(),
            "ratio": self.echo.ratio,
            "ratio_to_awake": awake.map(|awake| awake.ratio),
            "mb_per_second": self.rate(),
        })
    }
}
