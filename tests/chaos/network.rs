//! Scenarios in which processes are well and the network is not: silence each
//! way, delay and a thin line, resets, connections clogged in turn.

use std::time::Duration;

use super::run::run;
use super::scenario::{
    Check, Fault, Faulting, Load, Scenario, When, bars, count, is_long, seconds, skipped,
};
use crate::support::faultproxy::{Direction, Faults, Once, Way};
use crate::support::netns::{Harm, Netns};
use crate::support::sandbox::Plan;
use crate::support::{Sandbox, tiny};

const TOKENS: usize = 64;
/// From a healed network to a mesh that is whole.
const HEAL: Duration = Duration::from_secs(5);

/// A fault proxy before each of four nodes, every expert on two of them.
fn proxied() -> Plan {
    Sandbox::of(tiny()).expert_nodes(4).replicas(2).proxied()
}

fn load(streams: usize, time: Duration) -> Load {
    Load { streams, tokens: TOKENS, time }
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

/// Nodes in namespaces of their own, and packets that are really lost on the way.
fn on_a_wire(id: &'static str, title: &'static str, streams: usize, faults: Vec<Fault>, time: u64) {
    let Some(net) = Netns::start(4) else { return };
    let (pause, gap) = (Duration::from_millis(500), Duration::from_millis(1200));
    run(Scenario {
        id,
        title,
        mesh: Sandbox::of(tiny()).expert_nodes(4).replicas(2).netns(&net),
        load: load(streams, seconds(3, time)),
        faults: Faulting { when: When::Every(pause), what: faults },
        checks: [
            vec![Check::NoneFailed, Check::Identical, Check::Amplification(1.2), Check::History],
            bars([Check::Gap(gap)]),
        ]
        .concat(),
    });
}

#[test]
fn r7_wire_cut() {
    let hold = Duration::from_secs(if is_long() { 5 } else { 2 });
    let faults =
        [Harm::Cut, Harm::To, Harm::From].map(|harm| Fault::Wire { harm, all: false, hold });
    on_a_wire("R7n", "a node's packets lost, both ways and each way", 16, faults.to_vec(), 300);
}

#[test]
fn r8_wire_loses() {
    if skipped("R8n") {
        return;
    }
    let hold = Duration::from_secs(10);
    let faults = [Harm::Lossy(1), Harm::Lossy(5), Harm::Thin(10)].map(|harm| Fault::Wire {
        harm,
        all: true,
        hold,
    });
    on_a_wire("R8n", "1 % and 5 % of all packets lost, then 10 Mbit/s", 8, faults.to_vec(), 120);
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
