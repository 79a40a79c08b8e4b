//! The forms in which rows may travel: over Unix sockets that nodes known by
//! host:port offer, in FP8, and summed at the nodes. Through real processes: what
//! keeps its bits is compared bit for bit, what does not within a bound.

use serde_json::Value;

use crate::identity::scores;
use crate::support::sandbox::Plan;
use crate::support::{Fixture, Sandbox, block_on};

/// Largest difference of the log-probabilities that both have of a prompt's positions.
fn apart(a: &Value, b: &Value) -> f64 {
    let positions = |scores: &Value| scores[0].as_array().unwrap().clone();
    let mut most = 0.0f64;
    let mut compared = 0;
    for (a, b) in positions(a).iter().zip(positions(b)) {
        let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { continue };
        for (token, score) in a {
            let Some(other) = b.get(token) else { continue };
            let value = |score: &Value| score["logprob"].as_f64().unwrap();
            most = most.max((value(score) - value(other)).abs());
            compared += 1;
        }
    }
    assert!(compared > 20, "{compared} scores were compared");
    most
}

fn longest(fixture: &Fixture) -> &[u32] {
    let lengths = fixture.prompts.iter().map(|prompt| prompt.tokens.as_slice());
    lengths.max_by_key(|tokens| tokens.len()).unwrap()
}

/// The longest prompt's scores and the class that the router says it has.
async fn run(fixture: &Fixture, plan: Plan) -> (Value, String) {
    let mesh = plan.start().await;
    let got = scores(&mesh, longest(fixture)).await;
    let class = mesh.router_status().await.numerics;
    mesh.stop();
    (got, class)
}

fn plan(fixture: &Fixture, numerics: &'static str, nodes: usize) -> Plan {
    Sandbox::of(&fixture.dir).numerics(numerics).expert_nodes(nodes)
}

#[test]
fn a_node_of_the_same_host_is_reached_over_its_unix_socket() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let (want, _) = run(&fixture, plan(&fixture, "bf16", 2)).await;
        for (setting, way) in [("auto", "up, over its Unix socket"), ("off", "up")] {
            let quoted = format!("{setting:?}");
            let mesh = plan(&fixture, "bf16", 2).tcp().node("local_socket", quoted).start().await;
            let got = scores(&mesh, longest(&fixture)).await;
            assert!(got == want, "{setting}");
            for node in mesh.router_status().await.nodes {
                assert!(node.connected && node.endpoint.starts_with("127.0.0.1:"));
                if cfg!(target_os = "linux") {
                    assert_eq!(node.detail, way);
                }
            }
            mesh.stop();
        }
    });
}

#[test]
fn rows_in_fp8_are_near_and_the_number_of_nodes_changes_no_bit() {
    block_on(async {
        for (name, numerics, bound) in [("plain", "bf16", 1.0), ("fp8", "f32", 1.0)] {
            let fixture = Fixture::load(name);
            let fp8 = |nodes| plan(&fixture, numerics, nodes).router("wire", "\"fp8\"");
            let (exact, class) = run(&fixture, plan(&fixture, numerics, 1)).await;
            let (alone, marked) = run(&fixture, fp8(0)).await;
            assert_eq!(marked, format!("{class}+fp8-wire"));
            let off = apart(&exact, &alone);
            println!("{name} {numerics}: fp8 rows are off by {off}");
            assert!(off > 0.0 && off < bound, "{name} {numerics}: off by {off}");
            for nodes in [1, 3] {
                let (got, _) = run(&fixture, fp8(nodes)).await;
                assert!(got == alone, "{name} {numerics}, {nodes} nodes");
            }
        }
    });
}

#[test]
fn sums_at_the_nodes_are_near_and_the_same_for_one_placement() {
    block_on(async {
        for (numerics, bound) in [("bf16", 0.5), ("f32", 1e-3)] {
            let fixture = Fixture::load("plain");
            let summed = || plan(&fixture, numerics, 3).router("combine", "\"node\"");
            let (exact, class) = run(&fixture, plan(&fixture, numerics, 3)).await;
            let (got, marked) = run(&fixture, summed()).await;
            assert_eq!(marked, format!("{class}+node-combine"));
            let off = apart(&exact, &got);
            println!("{numerics}: sums at the nodes are off by {off}");
            assert!(off < bound, "{numerics}: off by {off}");
            // Micro-batches cut the batch, not the placement.
            let again = run(&fixture, summed().router("micro_batches", "\"always\"")).await.0;
            assert!(again == got, "{numerics}");
        }
    });
}
