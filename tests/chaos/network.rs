//! Scenarios in which processes are well and the network is not: silence each
//! way, delay and a thin line, resets, connections clogged in turn.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::load::{Balancer, Clients, asks};
use super::observe::{Figures, ms};
use super::run::{alone, run};
use super::scenario::{Check, Fault, Faulting, Load, Scenario, When, count, is_long, seconds};
use crate::support::faultproxy::{Direction, Faults, Once, Way};
use crate::support::sandbox::Plan;
use crate::support::{Sandbox, tiny};

const TOKENS: usize = 64;

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
        ],
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
    if skipped("R8 flipped bits") {
        return;
    }
    let flips = (0..3).flat_map(|turn| {
        [Direction::ToServer, Direction::ToClient].map(|direction| Fault::Harm {
            direction,
            after: 20_000 + 61 * turn,
            what: Once::Flip,
        })
    });
    let what: Vec<Fault> = flips.collect();
    run(Scenario {
        id: "R8f",
        title: "a bit flipped on a plaintext connection",
        mesh: proxied(),
        load: Load { streams: 1, tokens: 32, time: Duration::ZERO },
        faults: Faulting { when: When::Event(vec![3; what.len()]), what },
        checks: vec![],
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
        let mut figures = Vec::new();
        for plan in [plan(), traced] {
            let mesh = plan.start().await;
            let asks = Arc::new(asks(TOKENS));
            let count = asks.len();
            let clients = Clients::start(16, asks, Arc::new(Balancer::new(&mesh.addresses)));
            let begun = Instant::now();
            tokio::time::sleep(seconds(10, 60)).await;
            let samples = clients.finish().await;
            figures.push(Figures::of(&samples, &vec![None; count], begun.elapsed()));
            mesh.wait_idle().await;
        }
        let [without, with] = [&figures[0], &figures[1]];
        println!(
            "| R17 | a trace collector that hangs, 1 % traced | {} answered, {} refused, {} cut | \
             gap p99 {} ms (without a collector {}) | {:.0} of {:.0} tok/s |",
            with.answered,
            with.refused,
            with.cut.len(),
            ms(with.gap_p99),
            ms(without.gap_p99),
            with.tokens_per_second,
            without.tokens_per_second,
        );
        assert_eq!((with.cut.len(), with.refused), (0, 0), "{:?}", with.cut);
    });
}
