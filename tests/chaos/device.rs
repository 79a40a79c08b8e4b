//! A device is lost in the midst of a batch, by failpoints that only debug builds have, as no test has a GPU to break:
//! the process says so in one line and ends, its node leaves the placement, and what it was computing is computed by
//! others, without a client noticing.

use std::time::{Duration, Instant};

use super::load::{Outcome, asks, run as ask_once};
use super::observe::{is_whole, until};
use super::run::alone;
use crate::support::process::Process;
use crate::support::{Sandbox, tiny};

const PATIENCE: Duration = Duration::from_secs(60);
/// Which of the requests: greedy, with log-probabilities.
const ASK: usize = 0;

#[test]
fn a_lost_device_ends_its_process_and_no_stream() {
    if !cfg!(debug_assertions) {
        return println!("skipped: a release build has no failpoints");
    }
    alone(async {
        let plan = Sandbox::of(tiny()).expert_nodes(3).replicas(2).routers(2);
        let mut mesh = plan.failpoints().logged().start().await;
        let whole = until(PATIENCE, async || is_whole(&mesh).await).await;
        assert!(whole.is_some(), "the mesh never became whole");
        let asks = asks(24);
        let Outcome::Whole(expected) = ask_once(&mesh.http, ASK, &asks, &0.into()).await.outcome
        else {
            panic!("an undisturbed request is answered");
        };

        // A prompt goes to the same router again and again.
        let router = usize::from(mesh.status_of(0).await.unwrap().tokens_generated == 0);
        let router_name = format!("router-{router}");
        for (point, process, line) in [
            (
                "device",
                "expert-node-0",
                "the node cannot compute any more: cuda:0 was lost during computing: as told",
            ),
            (
                "trunk",
                router_name.as_str(),
                "the router cannot compute any more: cuda:0 was lost during computing: as told",
            ),
        ] {
            let armed = mesh.dir.join(format!("{process}.fail")).join(point);
            std::fs::write(&armed, "").unwrap();
            let begun = Instant::now();
            while armed.exists() {
                assert!(begun.elapsed() < PATIENCE, "{process} was never asked to compute");
                let said = ask_once(&mesh.http, ASK, &asks, &0.into()).await.outcome;
                assert_eq!(
                    said,
                    Outcome::Whole(expected.clone()),
                    "while {process} lost its device"
                );
            }
            let all = [&mut mesh.nodes, &mut mesh.routers];
            let lost = all.into_iter().flatten().find(|one| one.name == process).unwrap();
            assert_eq!(code(lost).await, Some(1), "{process} ends, and may be started again");
            let log = std::fs::read_to_string(mesh.dir.join(format!("{process}.log"))).unwrap();
            let told: Vec<&str> = log.lines().filter(|line| line.contains("cuda:0")).collect();
            assert_eq!(told, [format!("error: {line}")], "{process}");
        }

        // Nothing was started again: two nodes have all experts, one router computes.
        let left = async || {
            let status = mesh.status_of(1 - router).await.unwrap();
            let connected =
                |name: &str| status.nodes.iter().any(|node| node.node_id == name && node.connected);
            status.ready && !connected("expert-node-0") && connected("expert-node-1")
        };
        assert!(until(PATIENCE, left).await.is_some(), "{:?}", mesh.status_of(1 - router).await);
        let said = ask_once(&mesh.http, ASK, &asks, &0.into()).await.outcome;
        assert_eq!(said, Outcome::Whole(expected), "by those that are left");
    });
}

/// What the process ended with.
async fn code(process: &mut Process) -> Option<i32> {
    let begun = Instant::now();
    loop {
        match process.ended() {
            Some(status) => return status.code(),
            None => assert!(begun.elapsed() < PATIENCE, "{} goes on", process.name),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
