//! Weights from node to node: of experts that a node is to own and has no file of. The controller says
//! whose they are; how long they are is known from the checkpoint's heads before anything is asked,
//! and what has come is an expert only when its SHA-256 is right. All or nothing, as every load.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh::tls::{Expected, Role, Tls};
use mesh::transport::{Endpoint, TransportError, channel, explain};
use model::{Arriving, Checkpoint, Expert, LoadError};
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::fetch_part::Part;
use proto::v1::{ExpertHead, FetchPart, FetchRequest, LayerExperts, Source};
use proto::{ExpertId, LayerId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::{Status, Streaming};

use crate::metrics::NodeMetrics;
use crate::store::{Key, Resident, by_layer};

/// Bytes of weights in one message.
const PIECE: usize = 256 << 10;
/// Messages that wait for the network.
const AHEAD: usize = 4;
/// A source that sends nothing for so long is given up.
const STALL: Duration = Duration::from_secs(5);
/// Nodes that are served at the same time.
const MOST_SERVED: usize = 8;

/// Why experts could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("layer {0} expert {1}: its file is not here, and no owner of it was named")]
    NoSource(LayerId, ExpertId),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("{source_id} at {endpoint}: {what}")]
    Source { source_id: String, endpoint: String, what: What },
}

/// What a source did.
#[derive(Debug, thiserror::Error)]
pub enum What {
    #[error("{}", explain(.0))]
    Call(#[from] Box<Status>),
    #[error("it sent nothing for {STALL:?}")]
    Stalled,
    #[error("it ended before all had come")]
    Ended,
    #[error("{0}")]
    Wrong(String),
}

/// What a node fetches with.
#[derive(Clone)]
pub struct Fetcher {
    pub checkpoint: Arc<Checkpoint>,
    pub tls: Option<Tls>,
    pub metrics: NodeMetrics,
}

impl Fetcher {
    /// The weights of all `keys`, each from the first of `sources` that is said to own it.
    ///
    /// # Errors
    /// One could not be had; then none is kept.
    pub async fn fetch(
        &self,
        keys: &[Key],
        sources: &[Source],
    ) -> Result<Vec<(Key, Expert)>, FetchError> {
        let started = Instant::now();
        let mut asked: BTreeMap<usize, Vec<Key>> = BTreeMap::new();
        for &(layer, expert) in keys {
            let owns = |of: &LayerExperts| of.layer == layer.0 && of.experts.contains(&expert.0);
            let owner = sources.iter().position(|source| source.experts.iter().any(owns));
            let owner = owner.ok_or(FetchError::NoSource(layer, expert))?;
            asked.entry(owner).or_default().push((layer, expert));
        }
        let mut fetched = Vec::with_capacity(keys.len());
        for (source, keys) in asked {
            let source = &sources[source];
            let bytes = self.from(source, &keys, &mut fetched).await?;
            self.metrics.fetched_bytes.inc_by(bytes);
            tracing::info!(
                from = source.node_id,
                endpoint = source.endpoint,
                experts = keys.len(),
                bytes,
                took = ?started.elapsed(),
                "weights fetched"
            );
        }
        Ok(fetched)
    }

    async fn from(
        &self,
        source: &Source,
        keys: &[Key],
        fetched: &mut Vec<(Key, Expert)>,
    ) -> Result<u64, FetchError> {
        let blame = |what: What| FetchError::Source {
            source_id: source.node_id.clone(),
            endpoint: source.endpoint.clone(),
            what,
        };
        let expected = Expected { role: Role::ExpertNode, id: Some(source.node_id.clone()) };
        let channel = channel(&source.endpoint.parse::<Endpoint>()?, self.tls.as_ref(), expected)?;
        let mut node = ExpertControlClient::new(channel);
        let request = FetchRequest {
            model_digest: self.checkpoint.digest().to_vec().into(),
            experts: by_layer(keys.iter().copied()),
        };
        let parts = match tokio::time::timeout(STALL, node.fetch(request)).await {
            Ok(Ok(parts)) => parts.into_inner(),
            Ok(Err(status)) => return Err(blame(Box::new(status).into())),
            Err(_) => return Err(blame(What::Stalled)),
        };
        let mut parts = Parts(parts);
        let mut bytes = 0;
        for &key in keys {
            let room = Arriving::new(&self.checkpoint, key.0.0 as usize, key.1.0 as usize)?;
            bytes += room.bytes() as u64;
            fetched.push((key, parts.expert(key, room).await.map_err(blame)?));
        }
        Ok(bytes)
    }
}

/// What a source sends.
struct Parts(Streaming<FetchPart>);

impl Parts {
    async fn expert(&mut self, key: Key, mut room: Arriving) -> Result<Expert, What> {
        let (layer, expert) = key;
        let head = ExpertHead { layer: layer.0, expert: expert.0, length: room.bytes() as u64 };
        match self.next().await? {
            Part::Head(said) if said == head => {}
            other => {
                let other = shown(&other);
                return Err(What::Wrong(format!("it sent {other} in place of {head:?}")));
            }
        }
        while room.missing() > 0 {
            let part = self.next().await?;
            match &part {
                Part::Bytes(bytes) if !bytes.is_empty() && room.put(bytes) => {}
                other => {
                    let (other, missing) = (shown(other), room.missing());
                    let problem = format!(
                        "layer {layer} expert {expert}: it sent {other} where {missing} bytes are missing"
                    );
                    return Err(What::Wrong(problem));
                }
            }
        }
        match self.next().await? {
            Part::Sha256(digest) => {
                room.finish(&digest).map_err(|error| What::Wrong(error.to_string()))
            }
            other => Err(What::Wrong(format!(
                "layer {layer} expert {expert}: it sent {} in place of a digest",
                shown(&other)
            ))),
        }
    }

    async fn next(&mut self) -> Result<Part, What> {
        let next = tokio::time::timeout(STALL, self.0.message()).await;
        match next.map_err(|_| What::Stalled)?.map_err(Box::new)? {
            Some(FetchPart { part: Some(part) }) => Ok(part),
            Some(FetchPart { part: None }) => Err(What::Wrong("it sent nothing".to_owned())),
            None => Err(What::Ended),
        }
    }
}

fn shown(part: &Part) -> String {
    match part {
        Part::Head(head) => format!("{head:?}"),
        Part::Bytes(bytes) => format!("{} bytes", bytes.len()),
        Part::Sha256(_) => "a digest".to_owned(),
    }
}

/// Who fetches from this node.
pub struct Served(Arc<Semaphore>);

impl Default for Served {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST_SERVED)))
    }
}

impl Served {
    /// One more, if there is room.
    ///
    /// # Errors
    /// There is none.
    pub fn enter(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.0.clone().try_acquire_owned().map_err(|_| {
            Status::unavailable(format!("{MOST_SERVED} nodes are fetching from this one already"))
        })
    }
}

/// Sends the weights of `experts` on a thread of its own, as they are read from disk.
pub fn send(
    experts: Vec<(Key, Arc<Resident>)>,
    permit: OwnedSemaphorePermit,
    metrics: NodeMetrics,
) -> mpsc::Receiver<Result<FetchPart, Status>> {
    let (send, parts) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        // False once nobody listens any more.
        let say = |part| send.blocking_send(Ok(FetchPart { part: Some(part) })).is_ok();
        for ((layer, expert), resident) in experts {
            let Some(weights) = &resident.weights else { return };
            let length = weights.bytes() as u64;
            if !say(Part::Head(ExpertHead { layer: layer.0, expert: expert.0, length })) {
                return;
            }
            let passed = weights.pass_on(PIECE, |piece| say(Part::Bytes(piece.to_vec().into())));
            let Some(digest) = passed else { return };
            if !say(Part::Sha256(digest.to_vec().into())) {
                return;
            }
            metrics.given_bytes.inc_by(length);
        }
    });
    parts
}

#[cfg(test)]
mod tests;
