//! Nodes that hang, lie or are missing: no token changes, nobody waits who need
//! not, and what is done without is said.

use std::sync::atomic::Ordering;
use std::time::Duration;

use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::{DescribeRequest, NodeDescription};
use serde_json::{Value, json};

use crate::nodes::node;
use crate::support::evil::{Evil, EvilNode};
use crate::support::process::signal;
use crate::support::{Fixture, Sandbox, block_on, http};

fn extra(tokens: u32) -> Value {
    json!({ "max_tokens": tokens, "ignore_eos": true, "return_token_ids": true })
}

/// Token ids of each prompt, one after the other on a mesh at peace.
async fn undisturbed(mesh: &Sandbox, fixture: &Fixture, prompts: usize, tokens: u32) -> Vec<Value> {
    let mut want = Vec::new();
    for prompt in fixture.prompts.iter().take(prompts) {
        want.push(mesh.complete(&prompt.tokens, extra(tokens)).await["token_ids"].clone());
    }
    want
}

struct Answer {
    status: hyper::StatusCode,
    degraded: Option<u64>,
    body: Value,
}

fn body(prompt: &[u32], tokens: u32) -> Value {
    let mut body = json!({ "model": "test", "prompt": prompt, "temperature": 0 });
    body.as_object_mut().unwrap().extend(extra(tokens).as_object().unwrap().clone());
    body
}

async fn ask(address: http::Address, policy: &str, body: Value) -> Answer {
    let (status, headers, body) =
        http::post_with(&address, "/v1/completions", &[("x-moemesh-on-missing", policy)], &body)
            .await;
    let degraded = headers.get("x-moemesh-degraded");
    let degraded = degraded.map(|value| value.to_str().unwrap().parse().unwrap());
    Answer { status, degraded, body }
}

/// All prompts at once.
async fn together(mesh: &Sandbox, fixture: &Fixture, want: &[Value], tokens: u32) {
    let mut streams = tokio::task::JoinSet::new();
    for (index, prompt) in fixture.prompts.iter().take(want.len()).enumerate() {
        let (address, body) = (mesh.http.clone(), body(&prompt.tokens, tokens));
        streams.spawn(async move { (index, ask(address, "wait", body).await) });
    }
    while let Some(one) = streams.join_next().await {
        let (index, answer) = one.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert_eq!(answer.body["choices"][0]["token_ids"], want[index], "stream {index}");
    }
}

#[test]
fn a_node_that_stops_costs_no_token_and_returns() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mesh = Sandbox::of(&fixture.dir).expert_nodes(3).replicas(2).start().await;
        let want = undisturbed(&mesh, &fixture, 8, 200).await;
        let load = together(&mesh, &fixture, &want, 200);
        let harm = async {
            for node in 0..3 {
                while mesh.router_status().await.running == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                let before = mesh.router_status().await.nodes[node].frames;
                signal(mesh.nodes[node].id(), "STOP");
                tokio::time::sleep(Duration::from_millis(300)).await;
                signal(mesh.nodes[node].id(), "CONT");
                assert!(before > 0, "it was in use");
            }
        };
        tokio::join!(load, harm);
        // Each of them is asked again in the end.
        for node in 0..3 {
            let before = mesh.router_status().await.nodes[node].frames;
            while mesh.router_status().await.nodes[node].frames == before {
                together(&mesh, &fixture, &want[..2], 200).await;
            }
        }
        mesh.wait_idle().await;
        mesh.stop();
    });
}

#[test]
fn a_stopped_node_is_noticed_without_traffic_and_without_a_replica_waited_for() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let plan = Sandbox::of(&fixture.dir).expert_nodes(2);
        let mesh = plan.router("expert_wait", "\"10m\"").start().await;
        let want = undisturbed(&mesh, &fixture, 2, 400).await;
        let detail = async || mesh.router_status().await.nodes[1].detail.clone();
        signal(mesh.nodes[1].id(), "STOP");
        while !detail().await.contains("no sign of life") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        signal(mesh.nodes[1].id(), "CONT");
        while !detail().await.starts_with("up") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        mesh.wait_ready().await;
        let load = together(&mesh, &fixture, &want, 400);
        let harm = async {
            while mesh.router_status().await.running < 2 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            signal(mesh.nodes[1].id(), "STOP");
            // It may be so long that the node is disconnected: that makes no difference.
            while !mesh.metrics("router-0").await.contains("moemesh_router_parked 2") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            signal(mesh.nodes[1].id(), "CONT");
        };
        tokio::join!(load, harm);
        mesh.wait_idle().await;
        mesh.stop();
    });
}

#[test]
fn evil_nodes_are_seen_through_and_left_alone() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let honest = Sandbox::of(&fixture.dir).expert_nodes(2).replicas(2).start().await;
        let want = undisturbed(&honest, &fixture, 4, 40).await;
        for evil in Evil::ALL {
            let path = honest.dir.join(format!("{evil:?}.sock"));
            let evil_node = EvilNode::start(&path, node(&honest, 1), evil).await;
            let good = honest.socket("expert-node-0");
            let nodes = format!("[\"unix:{}\", \"unix:{}\"]", good.display(), path.display());
            let mesh = Sandbox::of(&fixture.dir).router_nodes(nodes).start().await;
            while !mesh.router_status().await.nodes.iter().all(|node| node.connected) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let frames = || evil_node.frames.load(Ordering::Relaxed);
            loop {
                together(&mesh, &fixture, &want, 40).await;
                let metrics = mesh.metrics("router-0").await;
                let ejected = !metrics.contains("moemesh_router_ejections_total 0");
                // Its first replies are good, and its stream ends with the second ones.
                let flaps = matches!(evil, Evil::Twice) && frames() >= 3;
                if ejected || flaps {
                    break;
                }
            }
            assert!(frames() >= 3, "{evil:?} did nothing");
            together(&mesh, &fixture, &want, 40).await;
            mesh.wait_idle().await;
            mesh.stop();
        }
        honest.stop();
    });
}

/// What the last node owns of a layer alone.
async fn describe(mesh: &Sandbox, index: usize) -> NodeDescription {
    let mut control = ExpertControlClient::new(node(mesh, index));
    control.describe(DescribeRequest {}).await.unwrap().into_inner()
}

#[test]
fn each_request_decides_what_a_missing_expert_means() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mut mesh = Sandbox::of(&fixture.dir).expert_nodes(3).start().await;
        let prompts: Vec<Vec<u32>> =
            fixture.prompts.iter().take(3).map(|prompt| prompt.tokens.clone()).collect();
        let tokens = 400;
        let want = undisturbed(&mesh, &fixture, 3, tokens).await;
        let gone = describe(&mesh, 2).await;
        let of = |policy: &'static str, prompt: usize| {
            let (address, body) = (mesh.http.clone(), body(&prompts[prompt], tokens));
            tokio::spawn(async move { ask(address, policy, body).await })
        };
        // All three in the same steps when the node is lost.
        let (waits, fails, drops) = (of("wait", 0), of("fail", 1), of("drop", 2));
        while mesh.router_status().await.running < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        mesh.nodes[2].kill();
        let failed = fails.await.unwrap();
        assert_eq!(failed.status, 503, "{}", failed.body);
        assert_eq!(failed.body["error"]["code"], "expert_missing");
        let message = failed.body["error"]["message"].as_str().unwrap();
        let named = gone.owned.iter().any(|layer| {
            let name = |expert| format!("layer {} expert {expert} ", layer.layer);
            layer.experts.iter().any(|&expert| message.contains(&name(expert)))
        });
        assert!(named, "{message}");
        let dropped = drops.await.unwrap();
        assert_eq!(dropped.status, 200, "{}", dropped.body);
        let count = dropped.body["moemesh"]["dropped_experts"].as_u64().unwrap();
        assert!(count > 0 && dropped.degraded == Some(count), "{}", dropped.body);
        let ids = dropped.body["choices"][0]["token_ids"].as_array().unwrap();
        assert_eq!(ids.len(), tokens as usize);
        assert_ne!(dropped.body["choices"][0]["token_ids"], want[2], "some experts matter");
        // New ones: a drop is served while the others are refused.
        while http::get(&mesh.http, "/readyz").await.unwrap().0 == 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let late = |policy| ask(mesh.http.clone(), policy, body(&prompts[1], 8));
        assert_eq!(late("fail").await.status, 503);
        let late = late("drop").await;
        assert_eq!(late.status, 200, "{}", late.body);
        assert!(late.degraded.is_some());
        assert!(!waits.is_finished(), "it waits");
        mesh.nodes[2].restart();
        let waited = waits.await.unwrap();
        assert_eq!(waited.status, 200, "{}", waited.body);
        assert_eq!(waited.body["choices"][0]["token_ids"], want[0]);
        assert_eq!((waited.degraded, waited.body.get("moemesh")), (None, None));
        mesh.wait_ready().await;
        let metrics = mesh.metrics("router-0").await;
        assert!(!metrics.contains("moemesh_router_dropped_experts_total 0"), "{metrics}");
        mesh.wait_idle().await;
    });
}

#[test]
fn a_wait_for_an_expert_ends_after_its_time_and_names_it() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let plan = Sandbox::of(&fixture.dir).expert_nodes(2);
        let mut mesh = plan.router("expert_wait", "\"300ms\"").start().await;
        let (address, body) = (mesh.http.clone(), body(&fixture.prompts[0].tokens, 400));
        let waits = tokio::spawn(async move { ask(address, "wait", body).await });
        while mesh.router_status().await.running == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        mesh.nodes[1].kill();
        let answer = waits.await.unwrap();
        assert_eq!(answer.status, 503, "{}", answer.body);
        let message = answer.body["error"]["message"].as_str().unwrap();
        // The router says it of the sequence, or of itself to one that comes again.
        assert!(message.contains("no live owner") && message.contains("expert 8"), "{message}");
        mesh.wait_idle().await;
    });
}
