//! Scenarios in which processes are well and the network is not: silence each
//! way, delay and a thin line, resets, connections clogged in turn.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::load::{Balancer, Clients, asks};
use super::observe::{Figures, ms};
use super::run::{alone, run};
use super::scenario::{
    Check, Fault, Faulting, Load, Scenario, When, bars, count, is_long, seconds,
};
use crate::support::faultproxy::{Direction, Faults, Once, Way};
use crate::support::sandbox::Plan;
use crate::support::{Sandbox, tiny};

const TOKENS: usize = 64;
/// Runs with a collector, and without.
const PAIRS: usize = 5;
/// From a healed network to a mesh that is whole.
const HEAL: Duration = Duration::from_secs(5);

/// A fault proxy before each of four nodes, every expert on two of them.
fn proxied() -> Plan {
    Sandbox::of(tiny()).expert_nodes(4).replicas(2).proxied()
}

fn load(streams: usize, time: Duration) -> Load {
    Load { streams, tokens: TOKENS, time }
}

/// Says so where a scenario is left out of the short form.
fn skipped(id: &str) -> bool {
    if !is_long() {
        println!("{id} skipped: MOEMESH_CHAOS_LONG=1 runs it");
    }
    !is_long()
}

#[test]
fn r7_partition() {
    let silent = Way { blackhole: true, ..Way::default() };
    let hold = Duration::from_secs(if is_long() { 5 } else { 3 });
    let one_way = [
        Faults::both(silent),
        Faults { to_server: silent, ..Faults::default() },
        Faults { to_client: silent, ..Faults::default() },
    ];
    run(Scenario {
        id: "R7",
        title: "a node cut off, both ways and each way",
        mesh: proxied(),
        load: load(16, seconds(6, 300)),
        faults: Faulting {
            when: When::Every(Duration::from_millis(500)),
            what: one_way.map(|faults| Fault::Network { faults, hold }).to_vec(),
        },
        checks: vec![
            Check::NoneFailed,
            Check::Identical,
            Check::Retried,
            Check::Amplification(1.2),
            Check::History,
        ]
        .into_iter()
        .chain(bars([Check::Gap(Duration::from_millis(1200)), Check::Recovery(hold + HEAL)]))
        .collect(),
    });
}

#[test]
fn r8_delay_and_a_thin_line() {
    if skipped("R8") {
        return;
    }
    let far = Way {
        delay: Duration::from_millis(25),
        jitter: Duration::from_millis(50),
        ..Way::default()
    };
    let thin = Way { rate: Some(10_000_000 / 8), ..Way::default() };
    let hold = Duration::from_secs(10);
    run(Scenario {
        id: "R8",
        title: "50 to 150 ms more for a node, then 10 Mbit/s",
        mesh: proxied(),
        load: load(8, seconds(60, 60)),
        faults: Faulting {
            when: When::Every(Duration::from_millis(300)),
            what: [far, thin]
                .map(|way| Fault::Network { faults: Faults::both(way), hold })
                .to_vec(),
        },
        checks: vec![Check::NoneFailed, Check::Identical, Check::Amplification(1.2)],
    });
}

#[test]
fn r9_reset_after_any_byte() {
    // A frame of one row is some 600 bytes here, a reply some 2,100: the sweep
    // goes through several of each, and through HTTP/2's own frames.
    let (every, end) = (count(500, 7), 3000);
    let sweep = (0..end).step_by(every);
    let resets = sweep.flat_map(|after| {
        [Direction::ToServer, Direction::ToClient].map(|direction| Fault::Harm {
            direction,
            after: after as u64,
            what: Once::Reset,
        })
    });
    let what: Vec<Fault> = resets.collect();
    run(Scenario {
        id: "R9",
        title: "a connection reset after n bytes, n swept",
        mesh: proxied(),
        load: Load { streams: 1, tokens: 16, time: Duration::ZERO },
        faults: Faulting { when: When::Event(vec![3; what.len()]), what },
        checks: vec![Check::NoneFailed, Check::Identical, Check::Retried],
    });
}

#[test]
fn r10_swizzle_clog() {
    if skipped("R10") {
        return;
    }
    run(Scenario {
        id: "R10",
        title: "connections clogged one by one, freed in another order",
        mesh: proxied(),
        load: load(16, seconds(60, 60)),
        faults: Faulting {
            when: When::Every(Duration::from_millis(500)),
            what: vec![Fault::Swizzle { hold: Duration::from_secs(2) }],
        },
        checks: vec![Check::NoneFailed, Check::Identical],
    });
}

/// What flipped bits do on a plaintext connection: said, not demanded, as rows
/// carry no checksum of their own.
#[test]
fn r8_flipped_bits() {
    // Here and there: in rows, most of them, and in what HTTP/2 and gRPC put around them.
    let flips = (0..count(3, 30)).flat_map(|turn| {
        [Direction::ToServer, Direction::ToClient].map(|direction| Fault::Harm {
            direction,
            after: 2_000 + 61 * turn as u64,
            what: Once::Flip,
        })
    });
    let what: Vec<Fault> = flips.collect();
    let least = what.len() / 3;
    run(Scenario {
        id: "R8f",
        title: "a bit flipped on a plaintext connection",
        mesh: proxied(),
        load: Load { streams: 1, tokens: 32, time: Duration::ZERO },
        faults: Faulting { when: When::Event(vec![3; what.len()]), what },
        checks: vec![Check::NoneFailed, Check::Identical, Check::Noticed(least)],
    });
}

/// The collector of traces takes everything and answers nothing.
#[test]
fn r17_collector_hangs() {
    if skipped("R17") {
        return;
    }
    alone(async {
        let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let otlp = format!("\"http://{}\"", deaf.local_addr().unwrap());
        let plan = || Sandbox::of(tiny()).expert_nodes(4).replicas(2).logged();
        let traced = ["gateway", "router", "expert-node"].into_iter().fold(plan(), |plan, role| {
            plan.set(role, "otlp", &otlp).set(role, "trace_sample", 0.01)
        });
        // In turns, so that what the machine does meanwhile meets both; how far runs of the same
        // mesh lie apart is what a difference has to exceed.
        let meshes = [plan().start().await, traced.start().await];
        let mut p99 = [Vec::new(), Vec::new()];
        let mut answered = [0, 0];
        for turn in 0..2 * PAIRS {
            let (which, asks) = (turn % 2, Arc::new(asks(TOKENS)));
            let (mesh, count) = (&meshes[which], asks.len());
            let clients = Clients::start(16, asks, Arc::new(Balancer::new(&mesh.addresses)));
            let begun = Instant::now();
            tokio::time::sleep(seconds(60, 120) / (2 * PAIRS as u32)).await;
            let samples = clients.finish().await;
            let figures = Figures::of(&samples, &vec![None; count], begun.elapsed());
            mesh.wait_idle().await;
            assert_eq!((figures.cut.len(), figures.refused), (0, 0), "{:?}", figures.cut);
            answered[which] += figures.answered;
            p99[which].push(figures.gap_p99);
        }
        p99.iter_mut().for_each(|times| times.sort_unstable());
        let [without, with] = &p99;
        let (middle, shown) = (PAIRS / 2, |times: &[Duration]| {
            times.iter().map(|time| ms(*time).to_string()).collect::<Vec<_>>().join(", ")
        });
        let ratio = with[middle].as_secs_f64() / without[middle].as_secs_f64();
        println!(
            "| R17 | a trace collector that hangs, 1 % traced, {PAIRS} runs each in turn | {} and {} \
             answered, 0 cut | gap p99 {} ms, without a collector {} ms | median ×{ratio:.3} |",
            answered[1],
            answered[0],
            shown(with),
            shown(without),
        );
        let most = without[PAIRS - 1].max(without[middle].mul_f64(1.05));
        assert!(
            with[middle] <= most,
            "slower than any run without a collector: {with:?}, {without:?}"
        );
        for mesh in meshes {
            mesh.stop();
        }
    });
}
