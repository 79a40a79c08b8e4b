//! Every actor, handler and working thread is made to panic, by failpoints that
//! only debug builds have: the part is rebuilt or its process ends, readiness
//! says so, and only the request that was hit fails.

use std::process::Command;
use std::time::Duration;

use super::load::{Outcome, asks, run as ask_once};
use super::observe::{is_whole, ms, until};
use super::run::alone;
use super::scenario::count;
use crate::support::{Sandbox, tiny};

/// Failpoint, the process that has it, and whether that ends of it, as where a thread that computes dies.
const POINTS: [(&str, &str, bool); 7] = [
    ("intake", "router-0", false),
    ("fleet", "router-0", false),
    ("link", "router-0", false),
    ("engine", "router-0", true),
    ("executor", "expert-node-0", true),
    ("handler", "gateway-0", false),
    ("stream", "gateway-0", false),
];
/// A process that ends is started again by its supervisor after so long.
const DOWN: Duration = Duration::from_millis(100);

#[test]
fn r18_panics() {
    if !cfg!(debug_assertions) {
        return println!("R18 skipped: a release build has no failpoints");
    }
    alone(async {
        let plan = Sandbox::of(tiny()).expert_nodes(3).replicas(2).failpoints().logged();
        let mut mesh = plan.start().await;
        let asks = asks(16);
        let mut slowest: Vec<(&str, Duration)> = Vec::new();
        for (point, process, ends) in POINTS {
            let mut worst = Duration::ZERO;
            for _ in 0..count(1, 5) {
                let whole = until(Duration::from_secs(60), async || is_whole(&mesh).await).await;
                assert!(whole.is_some(), "not whole before {point}");
                let armed = mesh.dir.join(format!("{process}.fail")).join(point);
                std::fs::write(&armed, "").unwrap();
                let mut failed = 0;
                // Requests until the point is passed; a link's needs its node to go.
                if point == "link" || point == "fleet" {
                    mesh.nodes[2].kill();
                    mesh.nodes[2].restart();
                }
                let begun = std::time::Instant::now();
                while armed.exists() {
                    assert!(begun.elapsed() < Duration::from_secs(30), "{point} was never passed");
                    let sample = ask_once(&mesh.http, 0, &asks, &0.into()).await;
                    failed += usize::from(!matches!(sample.outcome, Outcome::Whole(_)));
                }
                let hit = std::time::Instant::now();
                // A process says that all is well until it ends.
                let (mut back, mut ended) = (false, false);
                while !back && hit.elapsed() < Duration::from_secs(60) {
                    let all = [&mut mesh.nodes, &mut mesh.routers, &mut mesh.gateways];
                    for process in all.into_iter().flatten() {
                        if process.ended().is_some() {
                            ended = true;
                            tokio::time::sleep(DOWN).await;
                            process.restart();
                        }
                    }
                    back = ended == ends && is_whole(&mesh).await;
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                assert_eq!(ended, ends, "whether {process} ended of {point}");
                assert!(back, "never whole after {point}");
                worst = worst.max(hit.elapsed());
                assert!(failed <= 1, "{failed} requests failed with {point}");
                let after = ask_once(&mesh.http, 1, &asks, &0.into()).await;
                assert!(matches!(after.outcome, Outcome::Whole(_)), "{point}: {:?}", after.outcome);
            }
            slowest.push((point, worst));
        }
        let list: Vec<String> =
            slowest.iter().map(|(point, took)| format!("{point} {} ms", ms(*took))).collect();
        println!("| R18 | panics of {} parts | back after: {} |", POINTS.len(), list.join(", "));
        println!(
            "{}",
            serde_json::json!({
                "id": "R18",
                "back_ms": slowest.iter().map(|(p, t)| (*p, ms(*t))).collect::<Vec<_>>(),
            })
        );
        mesh.stop();
    });
}

#[test]
fn only_debug_builds_have_failpoints() {
    let binary = env!("CARGO_BIN_EXE_moemesh");
    let found = Command::new("grep").args(["-qa", "FAILPOINTS_DIR", binary]).status().unwrap();
    assert_eq!(found.success(), cfg!(debug_assertions));
}
