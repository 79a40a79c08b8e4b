//! Orders on their way to nodes, all nodes of a step at once, and the counters
//! that nodes are asked for. A node that does not answer in time is one that
//! failed; what it was told is told again or taken elsewhere.

use std::collections::HashMap;
use std::time::Duration;

use mesh::tls::{Expected, Role, Tls};
use mesh::transport::{Endpoint, channel};
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::{
    DropRequest, LayerExperts, LoadRequest, NodeStatusRequest, Order, SetDrainedRequest, Source,
};
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::core::{Failure, Orders};
use super::tally::Counted;
use crate::history::{self, History};

/// Loading reads weights from disk: many gigabytes when a node is lost.
const ORDER_TIMEOUT: Duration = Duration::from_secs(120);
const MARK_TIMEOUT: Duration = Duration::from_secs(2);
const MEASURE_TIMEOUT: Duration = Duration::from_secs(2);
/// Most channels that are kept.
const MOST_CHANNELS: usize = 2048;

/// A node and what it is to be asked.
pub struct Target<T> {
    pub endpoint: String,
    pub channel: Channel,
    pub what: T,
}

/// What a node is told.
pub enum Told {
    Load(Order, Vec<LayerExperts>, Vec<Source>),
    Drop(Order, Vec<LayerExperts>),
    SetDrained(Order, bool),
}

impl Told {
    fn order(&self) -> (Order, &'static str) {
        match self {
            Self::Load(order, ..) => (*order, "load"),
            Self::Drop(order, _) => (*order, "drop"),
            Self::SetDrained(order, _) => (*order, "set_drained"),
        }
    }
}

/// What came of telling it.
pub struct Outcome {
    pub endpoint: String,
    pub failure: Option<(Failure, String)>,
}

/// Connections to nodes, made when first used.
#[derive(Default)]
pub struct Channels(HashMap<Endpoint, Channel>);

impl Channels {
    /// To the node `id` at `endpoint`, and with TLS to no other.
    pub fn get(&mut self, endpoint: &Endpoint, id: &str, tls: Option<&Tls>) -> Option<Channel> {
        if let Some(known) = self.0.get(endpoint) {
            return Some(known.clone());
        }
        if self.0.len() >= MOST_CHANNELS {
            self.0.clear();
        }
        let expected = Expected { role: Role::ExpertNode, id: Some(id.to_owned()) };
        match channel(endpoint, tls, expected) {
            Ok(made) => {
                self.0.insert(endpoint.clone(), made.clone());
                Some(made)
            }
            Err(error) => {
                tracing::warn!(node = %endpoint, %error, "cannot give it orders");
                None
            }
        }
    }
}

/// Each order with the way to its node.
pub fn targets(
    orders: Orders,
    mut channel: impl FnMut(&str) -> Option<Channel>,
) -> Vec<Target<Told>> {
    let Orders { order, load, drop, mut sources, drained } = orders;
    let load = load.into_iter().map(|(endpoint, what)| {
        let sources = sources.remove(&endpoint).unwrap_or_default();
        (endpoint, Told::Load(order, what, sources))
    });
    let drop = drop.into_iter().map(|(endpoint, what)| (endpoint, Told::Drop(order, what)));
    let drained = drained.into_iter().map(|(endpoint, on)| (endpoint, Told::SetDrained(order, on)));
    drained
        .chain(load)
        .chain(drop)
        .filter_map(|(endpoint, what)| {
            let channel = channel(&endpoint)?;
            Some(Target { endpoint, channel, what })
        })
        .collect()
}

/// Tells every node its part; returns when all have answered.
pub async fn give(targets: Vec<Target<Told>>, history: History) -> Vec<Outcome> {
    let mut telling = JoinSet::new();
    for Target { endpoint, channel, what } in targets {
        let history = history.clone();
        telling.spawn(async move {
            let mut node = ExpertControlClient::new(channel);
            let (Order { term, epoch }, name) = what.order();
            let sent = history::now();
            let answer = match what {
                Told::Load(order, experts, sources) => {
                    let request = LoadRequest { order: Some(order), experts, sources };
                    node.load(timed(request, ORDER_TIMEOUT)).await.map(|_| ())
                }
                Told::Drop(order, experts) => {
                    let request = DropRequest { order: Some(order), experts };
                    node.drop(timed(request, ORDER_TIMEOUT)).await.map(|_| ())
                }
                Told::SetDrained(order, drained) => {
                    let request = SetDrainedRequest { order: Some(order), drained };
                    node.set_drained(timed(request, MARK_TIMEOUT)).await.map(|_| ())
                }
            };
            let obeyed = answer.is_ok();
            history.record(
                "order",
                format_args!(
                    "\"sent\":{sent},\"term\":{term},\"epoch\":{epoch},\"what\":\"{name}\",\
                     \"node\":{endpoint:?},\"obeyed\":{obeyed}"
                ),
            );
            history.flush();
            Outcome { endpoint, failure: answer.err().map(|status| judge(&status)) }
        });
    }
    telling.join_all().await
}

/// Asks every node what its experts have done; who does not answer is left out.
pub async fn measure(nodes: Vec<Target<u64>>) -> Vec<Counted> {
    let mut asking = JoinSet::new();
    for Target { endpoint, channel, what: incarnation } in nodes {
        asking.spawn(async move {
            let mut node = ExpertControlClient::new(channel);
            let answer = node.status(timed(NodeStatusRequest {}, MEASURE_TIMEOUT)).await.ok()?;
            Some(Counted { endpoint, incarnation, loads: answer.into_inner().loads })
        });
    }
    asking.join_all().await.into_iter().flatten().collect()
}

fn timed<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

fn judge(status: &Status) -> (Failure, String) {
    let failure = match status.code() {
        Code::FailedPrecondition => Failure::Deposed,
        Code::ResourceExhausted | Code::NotFound => Failure::Full,
        _ => Failure::Other,
    };
    (failure, format!("{}: {}", status.code(), status.message()))
}
