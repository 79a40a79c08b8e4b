//! Mutual TLS between real processes: the same answers as without it, and who is
//! not who he should be refused.

mod certificates;

use std::time::Duration;

use mesh::tls::{Expected, Role};
use mesh::transport::{self, Endpoint, channel};
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::expert_control_server::{ExpertControl, ExpertControlServer};
use proto::v1::expert_data_client::ExpertDataClient;
use proto::v1::inference_client::InferenceClient;
use proto::v1::{
    DescribeRequest, DrainReply, DrainRequest, DropReply, DropRequest, FetchPart, FetchRequest,
    GenerateRequest, LoadReply, LoadRequest, NodeDescription, NodeStatus, NodeStatusRequest,
    SetDrainedReply, SetDrainedRequest, WatchRequest,
};
use serde_json::json;
use tonic::{Code, Request, Response, Status};

use crate::support::certs::Certs;
use crate::support::http::{self, Address};
use crate::support::sandbox::tls_settings;
use crate::support::{Fixture, Sandbox, block_on};

fn node_socket(mesh: &Sandbox, index: usize) -> Endpoint {
    Endpoint::Unix(mesh.socket(&format!("expert-node-{index}")))
}

#[test]
fn a_mesh_with_tls_answers_as_one_without() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let certs = Certs::new(&[]);
        let extra = || json!({ "max_tokens": 24, "return_token_ids": true, "logprobs": 3 });
        let plain = Sandbox::of(&fixture.dir).start().await;
        let secured = Sandbox::of(&fixture.dir).tls(&certs.0).start().await;
        for prompt in fixture.prompts.iter().take(4) {
            let want = plain.complete(&prompt.tokens, extra()).await;
            assert_eq!(secured.complete(&prompt.tokens, extra()).await, want);
        }
        let status = secured.router_status().await;
        assert!(status.nodes.iter().all(|node| node.connected), "{status:?}");
        let admin = Address::Unix(secured.socket("expert-node-0-admin"));
        let (_, metrics) = http::get(&admin, "/metrics").await.unwrap();
        for want in [
            "moemesh_tls_certificate_expiry_seconds{certificate=\"own\"} 31",
            "moemesh_tls_certificate_expiry_seconds{certificate=\"authority\"} 315",
            "moemesh_tls_denied_calls_total 0",
        ] {
            assert!(metrics.contains(want), "{want}: {metrics}");
        }
        secured.stop();
        plain.stop();
    });
}

/// What each caller is told who calls what is not his to call.
#[test]
fn calls_are_for_the_roles_in_the_table_only() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let certs = Certs::new(&[]);
        let mesh = Sandbox::of(&fixture.dir).tls(&certs.0).start().await;
        let gateway = certs.of(Role::Gateway, "gateway-0");
        let router = certs.of(Role::Router, "router-0");
        let node = certs.of(Role::ExpertNode, "expert-node-1");
        let operator = certs.of(Role::Operator, "operator-0");
        let to_node = |tls| {
            channel(&node_socket(&mesh, 0), Some(tls), Expected::any(Role::ExpertNode)).unwrap()
        };
        let router_socket = Endpoint::Unix(mesh.socket("router-0"));
        let to_router =
            |tls| channel(&router_socket, Some(tls), Expected::any(Role::Router)).unwrap();

        let mut denied = Vec::new();
        for tls in [&gateway, &node, &operator] {
            let frames = tokio_stream::iter(Vec::new());
            denied.push(ExpertDataClient::new(to_node(tls)).dispatch(frames).await.unwrap_err());
        }
        for tls in [&gateway, &node] {
            let mut control = ExpertControlClient::new(to_node(tls));
            denied.push(control.describe(DescribeRequest {}).await.unwrap_err());
            denied.push(control.status(NodeStatusRequest {}).await.unwrap_err());
            denied.push(control.drain(DrainRequest::default()).await.unwrap_err());
        }
        for tls in [&router, &node] {
            let mut inference = InferenceClient::new(to_router(tls));
            denied.push(inference.generate(GenerateRequest::default()).await.unwrap_err());
        }
        for status in &denied {
            assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
            assert!(status.message().contains(" may not call /moemesh.v1."), "{status:?}");
        }
        let want = "expert-node/expert-node-1 may not call /moemesh.v1.Inference/Generate, \
                    which is for gateway and operator";
        assert_eq!(denied.last().unwrap().message(), want);

        // What is allowed works: an operator may even generate.
        let request = GenerateRequest {
            request_id: "by-hand".to_owned(),
            tokens: fixture.prompts[0].tokens.clone(),
            max_tokens: 2,
            sampling: Some(proto::v1::Sampling::default()),
            ..Default::default()
        };
        let mut events = InferenceClient::new(to_router(&operator))
            .generate(request)
            .await
            .unwrap()
            .into_inner();
        assert!(events.message().await.unwrap().is_some());
        let about = ExpertControlClient::new(to_node(&operator)).status(NodeStatusRequest {}).await;
        assert!(about.is_ok());
        let admin = Address::Unix(mesh.socket("expert-node-0-admin"));
        let (_, metrics) = http::get(&admin, "/metrics").await.unwrap();
        assert!(metrics.contains("moemesh_tls_denied_calls_total 9"), "{metrics}");
        // Nobody was harmed.
        mesh.complete(&fixture.prompts[0].tokens, json!({ "max_tokens": 2 })).await;
    });
}

/// A node that says it is whoever it is told to.
struct Pretender(&'static str);

#[tonic::async_trait]
impl ExpertControl for Pretender {
    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<NodeDescription>, Status> {
        Ok(Response::new(NodeDescription { node_id: self.0.to_owned(), ..Default::default() }))
    }

    async fn status(&self, _: Request<NodeStatusRequest>) -> Result<Response<NodeStatus>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        Err(Status::unimplemented(""))
    }

    type WatchStream = tokio_stream::Empty<Result<NodeDescription, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn load(&self, _: Request<LoadRequest>) -> Result<Response<LoadReply>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn drop(&self, _: Request<DropRequest>) -> Result<Response<DropReply>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn set_drained(
        &self,
        _: Request<SetDrainedRequest>,
    ) -> Result<Response<SetDrainedReply>, Status> {
        Err(Status::unimplemented(""))
    }

    type FetchStream = tokio_stream::Empty<Result<FetchPart, Status>>;

    async fn fetch(&self, _: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[test]
fn a_router_refuses_nodes_that_are_not_who_they_should_be() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let (certs, strange) = (Certs::new(&[]), Certs::new(&[]));
        let cases = [
            (
                certs.of(Role::ExpertNode, "expert-node-0"),
                "expert-node-1",
                "it calls itself `expert-node-1`",
            ),
            (
                certs.of(Role::Router, "router-0"),
                "expert-node-0",
                "it is router/router-0, not a process of role expert-node",
            ),
            (
                strange.of(Role::ExpertNode, "expert-node-0"),
                "expert-node-0",
                "authority that is not in tls_ca",
            ),
        ];
        let mut endpoints = Vec::new();
        for (tls, says, _) in &cases {
            let listener = transport::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
            endpoints.push(listener.local().to_string());
            let service = ExpertControlServer::new(Pretender(says));
            let (routes, tls) = (tonic::service::Routes::new(service), tls.clone());
            tokio::spawn(async move {
                transport::serve_grpc(listener, routes, Some(&tls), std::future::pending()).await
            });
        }
        let nodes = format!("{endpoints:?}");
        let mesh = Sandbox::of(&fixture.dir).tls(&certs.0).router_nodes(nodes).spawn();
        let mut told = Vec::new();
        for _ in 0..1200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if !mesh.socket("router-0").exists() {
                continue;
            }
            told = mesh.router_status().await.nodes.into_iter().map(|node| node.detail).collect();
            if !told.is_empty() && told.iter().all(|detail| detail != "not connected yet") {
                break;
            }
        }
        assert_eq!(told.len(), cases.len());
        for ((_, _, want), told) in cases.iter().zip(&told) {
            assert!(told.contains(want), "{told}");
        }
    });
}

/// Another node of the same mesh and the same model takes over an address.
#[test]
fn another_node_at_a_known_address_is_refused_until_the_first_is_back() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let certs = Certs::new(&["--expert-nodes", "2"]);
        let mut mesh = Sandbox::of(&fixture.dir).expert_nodes(1).tls(&certs.0).start().await;
        let rewrite = |mesh: &Sandbox, from: &str, to: &str| {
            let path = mesh.dir.join("expert-node-0.toml");
            let text = std::fs::read_to_string(&path).unwrap();
            let id = |id: &str| format!("id = \"{id}\"");
            let text = text.replace(&id(from), &id(to));
            let text = text.replace(&tls_settings(&certs.0, from), &tls_settings(&certs.0, to));
            std::fs::write(path, text).unwrap();
        };
        mesh.nodes[0].kill();
        rewrite(&mesh, "expert-node-0", "expert-node-1");
        mesh.nodes[0].restart();
        let mut told = String::new();
        for _ in 0..1200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let node = mesh.router_status().await.nodes.remove(0);
            assert!(!node.connected || node.node_id == "expert-node-0");
            told = node.detail;
            if told.contains("another node") {
                break;
            }
        }
        assert_eq!(
            told,
            "another node is at this address: it is expert-node/expert-node-1, \
             expected was expert-node/expert-node-0"
        );
        mesh.nodes[0].kill();
        rewrite(&mesh, "expert-node-1", "expert-node-0");
        mesh.nodes[0].restart();
        mesh.wait_ready().await;
        mesh.complete(&fixture.prompts[0].tokens, json!({ "max_tokens": 2 })).await;
    });
}
