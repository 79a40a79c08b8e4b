//! A node without weights, and the node that gives them killed in the middle of it.

use std::time::{Duration, Instant};

use super::etcd::Streams;
use super::observe::{ms, until};
use super::run::alone;
use super::scenario::skipped;
use crate::support::faultproxy::{Faults, Way};
use crate::support::{Sandbox, tiny};

const PATIENCE: Duration = Duration::from_secs(90);
/// Bytes a second from nodes that give weights, so that it takes a while.
const SLOW: u64 = 1 << 20;
const BARE: &str = "expert-node-9";
const FETCHED: &str = "moemesh_expert_node_fetched_bytes_total";

/// Experts that the new node owns.
async fn held(mesh: &Sandbox) -> u32 {
    let status = mesh.router_status().await;
    let bare = status.nodes.iter().find(|node| node.node_id == BARE);
    bare.map_or(0, |node| node.experts)
}

#[test]
fn a_source_dies_in_the_middle_of_a_fetch() {
    source_dies("another owner", 2);
}

#[test]
fn the_only_source_dies_in_the_middle_of_a_fetch_and_comes_back() {
    if !skipped("the only source killed in a fetch") {
        source_dies("nobody else", 1);
    }
}

/// Two nodes behind slow lines own every expert `replicas` times; a third comes with nothing.
fn source_dies(whose: &str, replicas: usize) {
    alone(async {
        let plan = Sandbox::of(tiny()).expert_nodes(2).replicas(replicas).proxied().logged();
        let plan = plan.router("replicas", replicas).router("controller", true);
        let plan = plan.router("replica_grace", "\"1s\"");
        let mut mesh = plan.start().await;
        let streams = Streams::start(&mesh, 2).await;
        let line = Way { rate: Some(SLOW), ..Way::default() };
        let slow = Faults { to_client: line, ..Faults::default() };
        mesh.proxies.iter().for_each(|proxy| proxy.set(slow));
        let router = format!("[\"unix:{}\"]", mesh.socket("router-0").display());
        let bare = format!("{:?}", mesh.bare(&tiny()));
        mesh.add_node(BARE, &[("join", router), ("model_dir", bare)]);

        // Bytes that have left a source and are not yet experts of the other.
        let given = async |of: usize| {
            let name = format!("expert-node-{of}");
            mesh.number(&name, "moemesh_expert_node_given_bytes_total").await
        };
        let mut source = None;
        let under_way = until(PATIENCE, async || {
            for of in 0..2 {
                if given(of).await > 0.0 {
                    source = Some(of);
                }
            }
            source.is_some()
        });
        assert!(under_way.await.is_some(), "nothing was fetched");
        let source = source.unwrap();
        let left = given(source).await;
        mesh.nodes[source].kill();
        let killed = Instant::now();
        let taken = mesh.number(BARE, FETCHED).await;
        assert!(taken < left, "{taken} of {left} bytes had been taken: not in the middle");
        mesh.proxies.iter().for_each(|proxy| proxy.set(Faults::default()));
        if replicas == 1 {
            // What it owned is nowhere else: streams wait until it is back.
            tokio::time::sleep(Duration::from_millis(500)).await;
            mesh.nodes[source].restart();
        }
        let owns = until(PATIENCE, async || held(&mesh).await > 0).await;
        assert!(owns.is_some(), "{:?}", mesh.router_status().await);
        let took = killed.elapsed();
        let fetched = mesh.number(BARE, FETCHED).await;
        assert!(fetched > taken, "{fetched} bytes fetched");
        println!(
            "| – | a source killed in the middle of a fetch, {whose} has its experts | {left} bytes \
             had left it, {taken} were taken | fetched after {} ms |",
            ms(took)
        );
        if replicas == 2 {
            mesh.nodes[source].restart();
        }
        streams.end().await;
        mesh.wait_idle().await;
        mesh.stop();
    });
}
