//! Scenarios in which processes die, hang, crawl or are restarted.

use std::time::Duration;

use super::load::{Outcome, asks, run as ask_once};
use super::observe::{self, ms, until};
use super::run::{alone, run};
use super::scenario::{
    Check, Fault, Faulting, Load, Role, Scenario, When, Which, bars, count, is_long, seconds,
    skipped,
};
use crate::support::certs::Certs;
use crate::support::sandbox::Plan;
use crate::support::{Sandbox, tiny};

const STREAMS: usize = 16;
const TOKENS: usize = 64;
/// A new process is there after so long, as a supervisor would have it.
const DOWN: Duration = Duration::from_millis(500);

/// Four nodes, every expert on two of them.
fn replicated() -> Plan {
    Sandbox::of(tiny()).expert_nodes(4).replicas(2)
}

#[test]
fn r1_replica_kill() {
    let time = seconds(6, 600);
    run(Scenario {
        id: "R1",
        title: "a random node killed, every expert on two",
        mesh: replicated().set("gateway", "max_concurrent", 64),
        load: Load { streams: STREAMS, tokens: TOKENS, time },
        faults: Faulting {
            when: When::Every(if is_long() { Duration::from_secs(5) } else { time / 5 }),
            what: vec![Fault::Kill { role: Role::Node, which: Which::Random, down: DOWN }],
        },
        checks: [
            vec![
                Check::NoneFailed,
                Check::Identical,
                Check::Answered(if is_long() { 2000 } else { 40 }),
                Check::Retried,
                Check::Amplification(1.2),
                Check::History,
            ],
            bars([Check::Gap(Duration::from_millis(400))]),
        ]
        .concat(),
    });
}

#[test]
fn r2_hang() {
    run(Scenario {
        id: "R2",
        title: "a node stopped for 3 s, every expert on two",
        mesh: replicated(),
        load: Load { streams: STREAMS, tokens: TOKENS, time: seconds(5, 300) },
        faults: Faulting {
            when: When::Every(Duration::from_secs(1)),
            what: vec![Fault::Stop {
                role: Role::Node,
                which: Which::Random,
                hold: Duration::from_secs(3),
            }],
        },
        checks: vec![
            Check::NoneFailed,
            Check::Identical,
            Check::Retried,
            Check::Amplification(1.2),
            Check::History,
        ]
        .into_iter()
        .chain(bars([Check::Gap(Duration::from_millis(1200))]))
        .collect(),
    });
}

#[test]
fn r2_router_hang() {
    if !is_long() {
        return println!("R2 for routers skipped: MOEMESH_CHAOS_LONG=1 runs it");
    }
    run(Scenario {
        id: "R2r",
        title: "the busiest of two routers stopped for 8 s",
        mesh: replicated().routers(2),
        load: Load { streams: 8, tokens: TOKENS, time: seconds(60, 60) },
        faults: Faulting {
            when: When::Every(Duration::from_secs(1)),
            what: vec![Fault::Stop {
                role: Role::Router,
                which: Which::Busiest,
                hold: Duration::from_secs(8),
            }],
        },
        checks: vec![Check::NoneFailed, Check::Identical, Check::Resumed],
    });
}

#[test]
fn r3_no_replica() {
    run(Scenario {
        id: "R3",
        title: "a node killed and started again, no replica",
        mesh: Sandbox::of(tiny()).expert_nodes(3),
        load: Load { streams: 8, tokens: TOKENS, time: seconds(6, 180) },
        faults: Faulting {
            when: When::Every(Duration::from_secs(if is_long() { 3 } else { 1 })),
            what: vec![Fault::Kill { role: Role::Node, which: Which::Next, down: DOWN }],
        },
        checks: [
            vec![Check::NoneFailed, Check::Identical],
            bars([Check::Recovery(Duration::from_secs(5))]),
        ]
        .concat(),
    });
}

#[test]
fn r4_router_kill() {
    let last = TOKENS - 1;
    let classes = [0, 1, 2, TOKENS / 2, last - 1, last];
    run(Scenario {
        id: "R4",
        title: "the busiest of two routers killed at token k",
        mesh: replicated().routers(2),
        load: Load { streams: 8, tokens: TOKENS, time: Duration::ZERO },
        faults: Faulting {
            when: When::Event(classes.repeat(count(1, 10))),
            what: vec![Fault::Kill { role: Role::Router, which: Which::Busiest, down: DOWN }],
        },
        checks: vec![Check::NoneFailed, Check::Identical, Check::Resumed, Check::History],
    });
}

#[test]
fn r5_gateway_kill() {
    alone(async {
        let streams = 32;
        let mut mesh = replicated().logged().start().await;
        let asks = std::sync::Arc::new(asks(400));
        let mut slowest = Duration::ZERO;
        let kills = count(2, 10);
        for _ in 0..kills {
            let mut clients = tokio::task::JoinSet::new();
            for client in 0..streams {
                let (address, asks) = (mesh.http.clone(), asks.clone());
                clients.spawn(async move {
                    ask_once(&address, client % asks.len(), &asks, &0.into()).await.outcome
                });
            }
            while mesh.router_status().await.running < streams as u32 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            mesh.gateways[0].kill();
            let freed = until(Duration::from_secs(30), async || {
                let now = mesh.router_status().await;
                now.running + now.waiting == 0 && now.kv_pages_used == 0
            });
            slowest = slowest.max(freed.await.expect("orphans were never freed"));
            while let Some(outcome) = clients.join_next().await {
                let outcome = outcome.unwrap();
                assert!(
                    matches!(outcome, Outcome::Broken(_)),
                    "a cut stream looked whole: {outcome:?}"
                );
            }
            mesh.gateways[0].restart();
            mesh.wait_ready().await;
        }
        println!(
            "| R5 | a gateway killed under {streams} streams | {kills} kills | orphans freed ≤ {} ms | \
             no `[DONE]` on {} cut streams |",
            ms(slowest),
            kills * streams
        );
        println!("{}", serde_json::json!({ "id": "R5", "kills": kills, "freed_ms": ms(slowest) }));
        assert!(
            !is_long() || slowest <= Duration::from_secs(1),
            "orphans held their pages for {slowest:?}"
        );
    });
}

#[test]
fn r6_slow_node() {
    if !is_long() {
        return println!("R6 skipped: MOEMESH_CHAOS_LONG=1 runs it");
    }
    if let Err(why) = super::quota::Quota::set(std::process::id(), 1000) {
        return println!("R6 skipped: {why}");
    }
    run(Scenario {
        id: "R6",
        title: "a node with 10 % of a CPU, every expert on two",
        mesh: replicated(),
        load: Load { streams: STREAMS, tokens: TOKENS, time: seconds(60, 60) },
        faults: Faulting {
            when: When::Every(Duration::from_secs(1)),
            what: vec![Fault::Slow { percent: 10, hold: Duration::from_secs(5) }],
        },
        checks: vec![Check::NoneFailed, Check::Identical, Check::Amplification(1.2)],
    });
}

#[test]
fn r14_rolling_restart() {
    let restart = |role| Fault::Restart { role, which: Which::Next };
    let (node, router, gateway) =
        (restart(Role::Node), restart(Role::Router), restart(Role::Gateway));
    run(Scenario {
        id: "R14",
        title: "every process restarted under load",
        mesh: replicated().routers(2).gateways(2),
        load: Load { streams: STREAMS, tokens: TOKENS, time: seconds(7, 120) },
        faults: Faulting {
            when: When::Every(Duration::from_millis(50)),
            what: vec![node, router, gateway, node, router, gateway, node, node],
        },
        checks: vec![Check::NoneFailed, Check::Identical],
    });
}

/// tests/tls has the short form.
#[test]
fn r14_certificates() {
    if skipped("R14c") {
        return;
    }
    let certs = Certs::new(&["--expert-nodes", "4", "--routers", "2", "--gateways", "2"]);
    let restart = |role| Fault::Restart { role, which: Which::Next };
    let (node, router, gateway) =
        (restart(Role::Node), restart(Role::Router), restart(Role::Gateway));
    run(Scenario {
        id: "R14c",
        title: "new certificates for all under load, and processes that connect anew",
        mesh: replicated().routers(2).gateways(2).tls(&certs.0),
        load: Load { streams: STREAMS, tokens: TOKENS, time: seconds(60, 60) },
        faults: Faulting {
            when: When::Every(Duration::from_millis(500)),
            what: vec![Fault::Rotate, node, Fault::Rotate, router, Fault::Rotate, gateway],
        },
        checks: vec![Check::NoneFailed, Check::Identical],
    });
}

/// The mesh that `moemesh up` keeps: its children are killed, it restarts them.
#[test]
fn r1_under_up() {
    use crate::support::Up;
    use crate::support::process::signal;
    alone(async {
        let model = tiny();
        let extra = ["--expert-nodes", "3", "--replicas", "2"];
        let mut up = Up::start(&model, &extra, &[]).await;
        let asks: Vec<_> = asks(TOKENS)
            .into_iter()
            .map(|mut ask| {
                ask.body["model"] = serde_json::Value::Null;
                ask
            })
            .collect();
        let asks = std::sync::Arc::new(asks);
        let balancer =
            std::sync::Arc::new(super::load::Balancer::new(std::slice::from_ref(&up.http)));
        let clients = super::load::Clients::start(4, asks, balancer);
        let mut kills = 0;
        for _ in 0..count(3, 30) {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let nodes = up.children("expert-node");
            let victim = nodes[kills % nodes.len()];
            signal(victim, "KILL");
            let back = until(Duration::from_secs(30), async || {
                let now = up.children("expert-node");
                now.len() == 3 && !now.contains(&victim)
            });
            assert!(back.await.is_some(), "`up` did not start the node again");
            up.wait_ready().await;
            kills += 1;
        }
        let samples = clients.finish().await;
        let figures = observe::Figures::of(&samples, &vec![None; 12], Duration::from_secs(1));
        println!(
            "| R1 up | nodes killed under `moemesh up` | {kills} kills | {} answered, {} refused, \
             cut {:?} |",
            figures.answered, figures.refused, figures.cut
        );
        assert_eq!((figures.cut.len(), figures.refused), (0, 0), "{:?}", figures.cut);
        assert!(figures.answered > 0 && up.end("INT").success());
    });
}
