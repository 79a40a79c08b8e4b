//! Gathers what the processes of a mesh say about themselves. One that does not
//! answer is part of the picture, not an error.

use std::time::Duration;

use mesh::tls::{self, Expected, Role, Tls};
use mesh::transport::{Endpoint, channel};
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::inference_client::InferenceClient;
use proto::v1::operations_client::OperationsClient;
use proto::v1::{
    NodeStatus, NodeStatusRequest, PlacementReply, PlacementRequest, RouterStatus,
    RouterStatusRequest,
};
use serde_json::{Value, json};

use crate::client::http::Server;
use crate::client::openai::first_model;
use crate::status::placement;
use crate::up::runtime_dir::{Member, State};

const TIMEOUT: Duration = Duration::from_secs(3);

/// One process: who it is, and what it said or why it did not.
pub struct Seen<T> {
    pub id: String,
    pub endpoint: String,
    pub answer: Result<T, String>,
}

/// What a gateway says.
pub struct GatewayStatus {
    pub model: String,
    /// Why it is not ready, if it is not.
    pub unready: Option<String>,
}

/// All of a mesh that could be found.
#[derive(Default)]
pub struct Mesh {
    /// What runs it, if that is known.
    pub about: Option<String>,
    pub gateways: Vec<Seen<GatewayStatus>>,
    pub routers: Vec<Seen<RouterStatus>>,
    pub nodes: Vec<Seen<NodeStatus>>,
    /// Who owns what: as the controller says, or else any router.
    pub placement: Option<PlacementReply>,
}

/// A gateway alone: it does not say what is behind it.
pub async fn gateway_only(server: Server) -> Mesh {
    let id = "gateway".to_owned();
    Mesh { gateways: vec![gateway(id, server).await], ..Mesh::default() }
}

/// A router and the nodes that it knows.
pub async fn router_and_nodes(endpoint: Endpoint, tls: Option<&Tls>) -> Mesh {
    let seen = router("router".to_owned(), endpoint.clone(), tls).await;
    let placement = placement_of([endpoint], tls).await;
    let mut nodes = Vec::new();
    if let Ok(status) = &seen.answer {
        for peer in &status.nodes {
            nodes.push(node(peer.node_id.clone(), &peer.endpoint, tls).await);
        }
    }
    Mesh { routers: vec![seen], nodes, placement, ..Mesh::default() }
}

/// Every process of a mesh that `moemesh up` runs.
pub async fn all(state: &State, tls: Option<&Tls>) -> Mesh {
    let about = format!("mesh of `moemesh up` with process id {}, {}", state.pid, state.model);
    let mut mesh = Mesh { about: Some(about), ..Mesh::default() };
    for Member { id, endpoint, .. } in &state.gateways {
        mesh.gateways.push(match endpoint.parse() {
            Ok(at) => gateway(id.clone(), Server::at(at)).await,
            Err(error) => failed(id, endpoint, error),
        });
    }
    for Member { id, endpoint, .. } in &state.routers {
        mesh.routers.push(match endpoint.parse() {
            Ok(at) => router(id.clone(), at, tls).await,
            Err(error) => failed(id, endpoint, error),
        });
    }
    for Member { id, endpoint, .. } in &state.expert_nodes {
        mesh.nodes.push(node(id.clone(), endpoint, tls).await);
    }
    let routers = state.routers.iter().filter_map(|router| router.endpoint.parse().ok());
    mesh.placement = placement_of(routers, tls).await;
    // Nodes that joined later are known to the routers only.
    let joined = mesh.placement.iter().flat_map(|known| &known.nodes);
    let started = |endpoint: &str| state.expert_nodes.iter().any(|node| node.endpoint == endpoint);
    let joined: Vec<_> = joined
        .filter(|node| !started(&node.endpoint))
        .map(|node| (node.node_id.clone(), node.endpoint.clone()))
        .collect();
    for (id, endpoint) in joined {
        mesh.nodes.push(node(id, &endpoint, tls).await);
    }
    mesh
}

/// Who owns what: as the controller says, or else the last router that answers.
async fn placement_of(
    routers: impl IntoIterator<Item = Endpoint>,
    tls: Option<&Tls>,
) -> Option<PlacementReply> {
    let mut known = None;
    for router in routers {
        let asked = async {
            let expected = Expected::any(Role::Router);
            let channel = channel(&router, tls, expected).map_err(|error| error.to_string())?;
            let answer = OperationsClient::new(channel).placement(PlacementRequest {}).await;
            answer.map(tonic::Response::into_inner).map_err(|status| explain(&status))
        };
        known = in_time(asked).await.ok().or(known);
        if known.as_ref().is_some_and(|known: &PlacementReply| known.controller.is_some()) {
            break;
        }
    }
    // With experts inside the router there is nothing to tell.
    known.filter(|known| !known.nodes.is_empty())
}

impl Mesh {
    /// The processes that are not ready, each with the reason.
    pub fn unready(&self) -> Vec<String> {
        let mut unready = Vec::new();
        for Seen { id, answer, .. } in &self.gateways {
            match answer {
                Ok(GatewayStatus { unready: Some(why), .. }) | Err(why) => {
                    unready.push(format!("{id} ({why})"));
                }
                Ok(_) => {}
            }
        }
        for Seen { id, answer, .. } in &self.routers {
            match answer {
                Ok(status) if !status.ready => unready.push(format!("{id} ({})", status.detail)),
                Ok(_) => {}
                Err(why) => unready.push(format!("{id} ({why})")),
            }
        }
        for Seen { id, answer, .. } in &self.nodes {
            let draining = |status: &NodeStatus| {
                status.description.as_ref().is_some_and(|description| description.draining)
            };
            match answer {
                Ok(status) if draining(status) => unready.push(format!("{id} (draining)")),
                Ok(_) => {}
                Err(why) => unready.push(format!("{id} ({why})")),
            }
        }
        unready
    }

    pub fn json(&self) -> String {
        fn list<T>(seen: &[Seen<T>], fields: impl Fn(&T) -> Value) -> Value {
            let one = |seen: &Seen<T>| {
                let mut entry = json!({ "id": seen.id, "endpoint": seen.endpoint });
                match &seen.answer {
                    Ok(answer) => entry["status"] = fields(answer),
                    Err(error) => entry["error"] = json!(error),
                }
                entry
            };
            seen.iter().map(one).collect()
        }
        let mesh = json!({
            "gateways": list(&self.gateways, |gateway| json!({
                "model": gateway.model,
                "ready": gateway.unready.is_none(),
                "detail": gateway.unready.clone().unwrap_or_default(),
            })),
            "routers": list(&self.routers, router_json),
            "expert_nodes": list(&self.nodes, node_json),
            "placement": self.placement.as_ref().map(placement::json),
        });
        format!("{mesh:#}\n")
    }
}

fn router_json(status: &RouterStatus) -> Value {
    let peers: Vec<Value> = status
        .nodes
        .iter()
        .map(|peer| {
            json!({
                "id": peer.node_id,
                "endpoint": peer.endpoint,
                "connected": peer.connected,
                "experts": peer.experts,
                "frames": peer.frames,
                "retries": peer.retries,
                "round_trip_us": peer.round_trip_us,
                "detail": peer.detail,
            })
        })
        .collect();
    json!({
        "ready": status.ready,
        "draining": status.draining,
        "detail": status.detail,
        "numerics": status.numerics,
        "device": status.device,
        "model_digest": hex(&status.model_digest),
        "running": status.running,
        "waiting": status.waiting,
        "max_waiting": status.max_waiting,
        "kv_pages_used": status.kv_pages_used,
        "kv_pages_total": status.kv_pages_total,
        "kv_page_tokens": status.kv_page_tokens,
        "max_context": status.max_context,
        "vocab_size": status.vocab_size,
        "epoch": status.epoch,
        "tokens_generated": status.tokens_generated,
        "tokens_prefilled": status.tokens_prefilled,
        "tickets_in_flight": status.tickets_in_flight,
        "nodes": peers,
    })
}

fn node_json(status: &NodeStatus) -> Value {
    let described = status.description.clone().unwrap_or_default();
    let owned: Vec<Value> = described
        .owned
        .iter()
        .map(|layer| json!({ "layer": layer.layer, "experts": layer.experts }))
        .collect();
    let loads: Vec<Value> = status
        .loads
        .iter()
        .map(|load| json!({ "layer": load.layer, "expert": load.expert, "rows": load.rows }))
        .collect();
    json!({
        "draining": described.draining,
        "numerics": described.numerics,
        "device": described.device,
        "model_digest": hex(&described.model_digest),
        "owned": owned,
        "frames": status.frames,
        "rows": status.rows,
        "refused": status.refused,
        "queued_rows": status.queued_rows,
        "resident_bytes": status.resident_bytes,
        "capacity_bytes": described.capacity_bytes,
        "loads": loads,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn gateway(id: String, server: Server) -> Seen<GatewayStatus> {
    let endpoint = format!("http://{}", server.endpoint);
    let asked = async {
        let ready = server.readiness().await.map_err(|error| error.to_string())?;
        let unready = ready.err();
        // A gateway lists its model whether or not it is ready.
        let model = first_model(&server).await.unwrap_or_else(|_| "?".to_owned());
        Ok(GatewayStatus { model, unready })
    };
    Seen { id, endpoint, answer: in_time(asked).await }
}

async fn router(id: String, endpoint: Endpoint, tls: Option<&Tls>) -> Seen<RouterStatus> {
    let asked = async {
        let expected = Expected::any(Role::Router);
        let channel = channel(&endpoint, tls, expected).map_err(|error| error.to_string())?;
        let answer = InferenceClient::new(channel).status(RouterStatusRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| explain(&status))
    };
    let answer = in_time(asked).await;
    let told = answer.as_ref().ok().map(|status| status.router_id.clone());
    let id = told.filter(|told| !told.is_empty()).unwrap_or(id);
    Seen { id, endpoint: endpoint.to_string(), answer }
}

async fn node(id: String, endpoint: &str, tls: Option<&Tls>) -> Seen<NodeStatus> {
    let asked = async {
        let at: Endpoint = endpoint.parse().map_err(|error| format!("{error}"))?;
        let expected = Expected::any(Role::ExpertNode);
        let channel = channel(&at, tls, expected).map_err(|error| error.to_string())?;
        let answer = ExpertControlClient::new(channel).status(NodeStatusRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| explain(&status))
    };
    Seen { id, endpoint: endpoint.to_owned(), answer: in_time(asked).await }
}

async fn in_time<T>(asked: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    match tokio::time::timeout(TIMEOUT, asked).await {
        Ok(answer) => answer,
        Err(_) => Err("no answer in time".to_owned()),
    }
}

/// One line for a failed call.
fn explain(status: &tonic::Status) -> String {
    if let Some(told) = tls::explain(status) {
        return told;
    }
    match status.code() {
        tonic::Code::Unavailable => "not reachable".to_owned(),
        code => format!("{code:?}: {}", status.message().replace('\n', " ")),
    }
}

fn failed<T>(id: &str, endpoint: &str, error: impl ToString) -> Seen<T> {
    Seen { id: id.to_owned(), endpoint: endpoint.to_owned(), answer: Err(error.to_string()) }
}
