//! Scenarios in which processes are well and the network is not: silence each
//! way, delay and a thin line, resets, connections clogged in turn.

use std::time::Duration;

use super::run::run;
use super::scenario::{Check, Fault, Faulting, Load, Scenario, When, count, is_long, seconds};
use crate::support::faultproxy::{Direction, Faults, Way};
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
        [Direction::ToServer, Direction::ToClient]
            .map(|direction| Fault::Reset { direction, after: after as u64 })
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
