//! What a peer may send an expert node, and what a router may meet: bad frames,
//! a node of another model, a lost node.

use std::time::Duration;

use proto::MAX_MESSAGE_BYTES;
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::expert_data_client::ExpertDataClient;
use proto::v1::{
    DescribeRequest, DispatchFrame, DispatchReply, Dtype, ErrorCode, NodeStatusRequest,
};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::support::{Fixture, Sandbox, block_on, http};

fn node(mesh: &Sandbox, index: usize) -> Channel {
    let socket = mesh.socket(&format!("expert-node-{index}"));
    mesh::transport::channel(
        &mesh::transport::Endpoint::Unix(socket),
        None,
        mesh::tls::Expected::any(mesh::tls::Role::ExpertNode),
    )
    .unwrap()
}

/// A frame for `expert` of layer 1 with one row of ones, in f32.
fn frame(hidden: u32, expert: u32) -> DispatchFrame {
    DispatchFrame {
        ticket: 1,
        layer: 1,
        dtype: Dtype::F32 as i32,
        hidden,
        slot_counts: vec![1],
        experts: vec![expert],
        rows: [1f32.to_le_bytes()].concat().repeat(hidden as usize).into(),
        ..Default::default()
    }
}

async fn exchange(channel: Channel, frames: Vec<DispatchFrame>) -> Vec<DispatchReply> {
    let (send, receive) = mpsc::channel(64);
    let mut replies = ExpertDataClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .dispatch(ReceiverStream::new(receive))
        .await
        .unwrap()
        .into_inner();
    let mut got = Vec::new();
    for frame in frames {
        send.send(frame).await.unwrap();
        got.push(replies.message().await.unwrap().unwrap());
    }
    got
}

#[test]
fn a_bad_frame_is_refused_by_name_and_its_neighbours_are_answered() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mesh = Sandbox::of(&fixture.dir).numerics("f32").start().await;
        let channel = node(&mesh, 0);
        let about = ExpertControlClient::new(channel.clone())
            .describe(DescribeRequest {})
            .await
            .unwrap()
            .into_inner();
        let hidden = about.hidden;
        let mine = about.owned.iter().find(|layer| layer.layer == 1).unwrap().experts[0];
        let good = || frame(hidden, mine);

        type Edit = fn(&mut DispatchFrame);
        let cases: [(Edit, ErrorCode); 9] = [
            (|f| f.rows = f.rows.slice(1..), ErrorCode::Invalid),
            (|f| f.hidden = u32::MAX, ErrorCode::Invalid),
            (|f| f.dtype = 77, ErrorCode::Invalid),
            (|f| f.dtype = Dtype::Bf16 as i32, ErrorCode::Invalid),
            (|f| f.slot_counts = vec![u32::MAX], ErrorCode::Invalid),
            (|f| f.experts = vec![u32::MAX], ErrorCode::Invalid),
            (|f| f.layer = 99, ErrorCode::NotResident),
            (|f| f.versions = vec![5], ErrorCode::VersionMismatch),
            (
                |f| f.rows = f32::NAN.to_le_bytes().repeat(f.hidden as usize).into(),
                ErrorCode::NonFinite,
            ),
        ];
        let mut frames = vec![good()];
        for (edit, _) in &cases {
            let mut bad = good();
            edit(&mut bad);
            frames.extend([bad, good()]);
        }
        let replies = exchange(channel, frames).await;
        let want = &replies[0].rows;
        assert_eq!(want.len(), hidden as usize * 4);
        for ((_, code), pair) in cases.iter().zip(replies[1..].chunks(2)) {
            let error = pair[0].error.as_ref().unwrap();
            assert_eq!(error.code, *code as i32, "{}", error.message);
            assert!(!error.message.is_empty() && pair[0].rows.is_empty());
            assert_eq!(&pair[1].rows, want, "the neighbour of {code:?}");
        }
        mesh.stop();
    });
}

#[test]
fn a_node_of_another_model_is_refused_with_the_reason() {
    block_on(async {
        let (plain, tied) = (Fixture::load("plain"), Fixture::load("tied"));
        let stranger = Sandbox::of(&tied.dir).expert_nodes(1).start().await;
        let nodes = format!("[\"unix:{}\"]", stranger.socket("expert-node-0").display());
        let mesh = Sandbox::of(&plain.dir).router_nodes(nodes).spawn();
        for _ in 0..600 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let socket = mesh.socket("router-0");
            if !socket.exists() {
                continue;
            }
            let status = mesh.router_status().await;
            if status.nodes[0].detail.contains("another model") {
                // The gateway may still be starting.
                match http::get(&mesh.http, "/readyz").await {
                    Ok((code, body)) => return assert_eq!(code, 503, "{body}"),
                    Err(_) => continue,
                }
            }
        }
        panic!("the router never said why: {:?}", mesh.router_status().await);
    });
}

#[test]
fn losing_a_node_under_load_changes_no_token() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let plan = Sandbox::of(&fixture.dir).expert_nodes(3).replicas(2);
        let mut mesh = plan.router("attempt_timeout", "\"500ms\"").start().await;
        let prompts = || fixture.prompts.iter().take(8);
        let extra = || json!({ "max_tokens": 200, "ignore_eos": true, "return_token_ids": true });
        let mut want = Vec::new();
        for prompt in prompts() {
            want.push(mesh.complete(&prompt.tokens, extra()).await["token_ids"].clone());
        }
        let address = mesh.http.clone();
        let mut streams = tokio::task::JoinSet::new();
        for (index, prompt) in prompts().enumerate() {
            let (address, tokens) = (address.clone(), prompt.tokens.clone());
            let mut body = json!({ "model": "test", "prompt": tokens, "temperature": 0 });
            body.as_object_mut().unwrap().extend(extra().as_object().unwrap().clone());
            streams.spawn(
                async move { (index, http::post(&address, "/v1/completions", &body).await) },
            );
        }
        // Every node is lost once and comes back, while the streams run.
        for node in 0..3 {
            while mesh.router_status().await.running == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            mesh.nodes[node].kill();
            mesh.nodes[node].restart();
            while !mesh.router_status().await.nodes[node].connected {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        while let Some(one) = streams.join_next().await {
            let (index, (status, answer)) = one.unwrap();
            assert_eq!(status, 200, "{answer}");
            assert_eq!(answer["choices"][0]["token_ids"], want[index], "stream {index}");
        }
        mesh.wait_idle().await;
        mesh.stop();
    });
}

#[test]
fn without_a_replica_requests_wait_for_the_node_to_come_back() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let plan = Sandbox::of(&fixture.dir).expert_nodes(2);
        let mut mesh = plan.router("loss_grace", "\"0s\"").start().await;
        let prompt = fixture.prompts[3].tokens.clone();
        let extra = || json!({ "max_tokens": 64, "ignore_eos": true, "return_token_ids": true });
        let want = mesh.complete(&prompt, extra()).await["token_ids"].clone();
        mesh.nodes[1].kill();
        let body = json!({
            "model": "test", "prompt": prompt, "temperature": 0, "max_tokens": 64,
            "ignore_eos": true, "return_token_ids": true,
        });
        // A new request is refused while an expert is missing …
        let mut refused = false;
        for _ in 0..200 {
            let (status, _) = http::post(&mesh.http, "/v1/completions", &body).await;
            refused |= status == 503;
            if refused {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(refused, "a mesh with missing experts says 503");
        // … and served again, with the same tokens, once the node is back.
        mesh.nodes[1].restart();
        mesh.wait_ready().await;
        assert_eq!(mesh.complete(&prompt, extra()).await["token_ids"], want);
    });
}

#[test]
fn a_node_counts_the_rows_of_each_expert() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mesh = Sandbox::of(&fixture.dir).expert_nodes(1).start().await;
        mesh.complete(&fixture.prompts[4].tokens, json!({ "max_tokens": 4, "ignore_eos": true }))
            .await;
        let status = ExpertControlClient::new(node(&mesh, 0))
            .status(NodeStatusRequest {})
            .await
            .unwrap()
            .into_inner();
        let counted: u64 = status.loads.iter().map(|load| load.rows).sum();
        assert_eq!(counted, status.rows);
        assert!(counted > 0 && status.queued_rows == 0);
        let (_, metrics) =
            http::get(&http::Address::Unix(mesh.socket("expert-node-0-admin")), "/metrics")
                .await
                .unwrap();
        assert!(
            metrics.contains(&format!("moemesh_expert_node_rows_total {counted}")),
            "{metrics}"
        );
    });
}
