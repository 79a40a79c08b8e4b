//! Too much work, and work that nobody waits for any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::load::{Ask, Balancer, Clients, Outcome, Sample, asks, run as ask_once};
use super::observe::{Figures, metric, ms, quantile, until};
use super::run::alone;
use super::scenario::{count, is_long, seconds, seed};
use crate::support::dice::Dice;
use crate::support::http::{self, Address};
use crate::support::{Sandbox, tiny};

const TOKENS: usize = 64;
/// Sequences that the gateway lets in at once.
const DOOR: usize = 32;

/// Requests at a fixed pace, whatever becomes of those before them.
async fn open_loop(
    address: &Address,
    asks: Arc<Vec<Ask>>,
    rate: f64,
    time: Duration,
) -> Vec<Sample> {
    let begun = Instant::now();
    let mut open = JoinSet::new();
    let total = (rate * time.as_secs_f64()) as usize;
    for turn in 0..total {
        let due = begun + Duration::from_secs_f64(turn as f64 / rate);
        tokio::time::sleep_until(due.into()).await;
        let (address, asks) = (address.clone(), asks.clone());
        open.spawn(async move { ask_once(&address, turn % asks.len(), &asks, &0.into()).await });
    }
    let mut samples = Vec::new();
    while let Some(sample) = open.join_next().await {
        samples.push(sample.unwrap());
    }
    samples
}

/// Whole answers a second.
fn goodput(samples: &[Sample], took: Duration) -> f64 {
    let whole = samples.iter().filter(|sample| matches!(sample.outcome, Outcome::Whole(_)));
    whole.count() as f64 / took.as_secs_f64()
}

#[test]
fn r15_overload() {
    alone(async {
        let plan =
            Sandbox::of(tiny()).expert_nodes(2).logged().set("gateway", "max_concurrent", DOOR);
        let mesh = plan.start().await;
        let asks = Arc::new(asks(TOKENS));
        let time = seconds(2, 60);
        let balancer = Arc::new(Balancer::new(&mesh.addresses));
        // The peak is what as many clients as the gateway lets in can get.
        let begun = Instant::now();
        let clients = Clients::start(DOOR, asks.clone(), balancer);
        tokio::time::sleep(time).await;
        let samples = clients.finish().await;
        let took = begun.elapsed();
        let calm = Figures::of(&samples, &vec![None; asks.len()], took);
        let peak = goodput(&samples, took);
        let begun = Instant::now();
        let samples = open_loop(&mesh.http, asks.clone(), 3.0 * peak, time).await;
        let took = begun.elapsed();
        let run = Figures::of(&samples, &vec![None; asks.len()], took);
        let good = goodput(&samples, took);
        let refused = samples.iter().filter(|sample| matches!(sample.outcome, Outcome::Refused(_)));
        let mut waits: Vec<Duration> = refused.map(|sample| sample.first).collect();
        let (refusals, p50, p99) =
            (waits.len(), quantile(&mut waits, 0.5), quantile(&mut waits, 0.99));
        println!(
            "| R15 | overload 3×, open loop, {} requests | goodput {:.1} of {peak:.1} a second \
             ({:.0} %) | {} refused with Retry-After, p50 {} p99 {} max {} ms | gap p99 {} ms \
             (at the peak {} ms) | {} cut |",
            samples.len(),
            good,
            100.0 * good / peak,
            refusals,
            ms(p50),
            ms(p99),
            ms(waits.last().copied().unwrap_or_default()),
            ms(run.gap_p99),
            ms(calm.gap_p99),
            run.cut.len(),
        );
        println!(
            "{}",
            serde_json::json!({
                "id": "R15", "peak": peak, "goodput": good, "refused": refusals,
                "refusal_ms": [ms(p50), ms(p99)], "gap_p99_ms": [ms(run.gap_p99), ms(calm.gap_p99)],
            })
        );
        if is_long() {
            assert!(good >= 0.9 * peak, "goodput {good:.1} of {peak:.1}");
            assert!(p99 <= Duration::from_millis(50), "refusals took {p99:?}");
        }
        assert!(refusals > 0, "three times the peak was no overload");
        assert_eq!(run.cut.len(), 0, "{:?}", run.cut);
        mesh.wait_idle().await;
        mesh.stop();
    });
}

/// What must come back to where it was.
async fn held(mesh: &Sandbox) -> (u64, f64, u64) {
    let router = mesh.router_status().await;
    let router = u64::from(router.running + router.waiting + router.tickets_in_flight)
        + router.kv_pages_used;
    let gateway = metric(&mesh.http, "moemesh_gateway_sequences_in_flight").await;
    let mut rows = 0;
    for node in 0..mesh.nodes.len() {
        let side = Address::Unix(mesh.socket(&format!("expert-node-{node}-admin")));
        rows += metric(&side, "moemesh_expert_node_queued_rows").await as u64;
    }
    (router, gateway, rows)
}

/// Memory of router and gateway that no file backs.
async fn anonymous(mesh: &Sandbox) -> [f64; 2] {
    let name = "moemesh_process_anonymous_bytes";
    let side = Address::Unix(mesh.socket("router-0-admin"));
    [metric(&side, name).await, metric(&mesh.http, name).await]
}

/// When a client goes away.
enum Leave {
    /// Whatever it has had by then.
    At(Duration),
    AfterEvents(usize),
}

async fn leave(address: Address, ask: usize, asks: Arc<Vec<Ask>>, when: Leave) {
    let Ask { path, body } = &asks[ask];
    let asked = http::ask(&address, path, body);
    let after = match when {
        Leave::At(time) => {
            let _ = tokio::time::timeout(time, asked).await;
            return;
        }
        Leave::AfterEvents(after) => after,
    };
    let Ok(response) = asked.await else { return };
    let mut events = http::Events::of(response);
    for _ in 0..after {
        if events.next().await.is_none() {
            return;
        }
    }
}

#[test]
fn r16_cancel_storm() {
    alone(async {
        let mesh = Sandbox::of(tiny()).expert_nodes(2).logged().start().await;
        let asks = Arc::new(asks(200));
        let seed = seed();
        let mut dice = Dice(seed);
        let storms = count(3, 60);
        let each = count(150, 500);
        let mut slowest = Duration::ZERO;
        let mut memory = Vec::new();
        for _ in 0..storms {
            let mut clients = JoinSet::new();
            for turn in 0..each {
                let when = match dice.below(3) {
                    0 => Leave::At(Duration::from_micros(dice.below(20_000) as u64)),
                    _ => Leave::AfterEvents(dice.below(60)),
                };
                clients.spawn(leave(mesh.http.clone(), turn % asks.len(), asks.clone(), when));
                tokio::time::sleep(Duration::from_micros(dice.below(4000) as u64)).await;
            }
            while clients.join_next().await.is_some() {}
            let freed =
                until(Duration::from_secs(30), async || held(&mesh).await == (0, 0.0, 0)).await;
            let Some(freed) = freed else {
                panic!("seed {seed}: never freed: {:?}", held(&mesh).await)
            };
            slowest = slowest.max(freed);
            memory.push(anonymous(&mesh).await);
        }
        let side = Address::Unix(mesh.socket("router-0-admin"));
        let cancelled = metric(&side, "moemesh_router_cancelled_total").await;
        // Allocators keep what they once had, so the first third only warms up. A leak goes on.
        let third = storms / 3;
        let mean = |part: usize, of: usize| {
            let of_part = memory[part * third..(part + 1) * third].iter();
            of_part.map(|bytes| bytes[of]).sum::<f64>() / third as f64
        };
        let growth = [0, 1].map(|of| [1, 2].map(|part| mean(part, of) / mean(part - 1, of)));
        let [router, gateway] = growth;
        println!(
            "| R16 | {} clients that leave at random | {cancelled} sequences cancelled at the router | \
             freed ≤ {} ms | anonymous memory, second third to first ×{:.3} router, ×{:.3} gateway, \
             third to second ×{:.3}, ×{:.3} |",
            storms * each,
            ms(slowest),
            router[0],
            gateway[0],
            router[1],
            gateway[1],
        );
        println!(
            "{}",
            serde_json::json!({
                "id": "R16", "seed": seed, "n": storms * each, "cancelled": cancelled,
                "freed_ms": ms(slowest), "growth": growth,
                "anonymous_mib": memory.iter().map(|m| m.map(|b| b / 1048576.0)).collect::<Vec<_>>(),
            })
        );
        if is_long() {
            assert!(router[1] <= 1.05 && gateway[1] <= 1.05, "memory grows: {growth:?}");
        }
        assert!(cancelled > 0.0, "nobody left while a sequence ran");
        mesh.stop();
    });
}

/// Sequences whose step waits for a lost expert are let go when their clients go.
#[test]
fn cancels_are_heard_while_a_step_waits_for_an_expert() {
    alone(async {
        let mut mesh = Sandbox::of(tiny()).expert_nodes(2).logged().start().await;
        let asks = Arc::new(asks(400));
        let mut clients = JoinSet::new();
        for client in 0..4 {
            let (address, asks) = (mesh.http.clone(), asks.clone());
            clients.spawn(async move { ask_once(&address, client, &asks, &0.into()).await });
        }
        while mesh.router_status().await.running < 4 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        mesh.nodes[1].kill();
        while mesh.router_status().await.nodes[1].connected {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(mesh.router_status().await.running, 4, "they wait for the expert");
        clients.shutdown().await;
        let freed = until(Duration::from_secs(25), async || held(&mesh).await.0 == 0).await;
        let freed = freed.expect("the step went on waiting for an expert for nobody");
        println!("freed {} ms after their clients went", ms(freed));
        // What is left of the step does not harm the next one.
        mesh.nodes[1].restart();
        mesh.wait_ready().await;
        let sample = ask_once(&mesh.http, 0, &super::load::asks(8), &0.into()).await;
        assert!(matches!(sample.outcome, Outcome::Whole(_)), "{:?}", sample.outcome);
        mesh.stop();
    });
}
