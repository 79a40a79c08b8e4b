//! How a node opens its checkpoint. One that has not all weight files asks a router of the mesh, which
//! it is told of or finds in etcd, what they begin with; which of their experts it comes to own, and from whom it has their weights, is
//! said later, by the controller.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh::lifecycle::{Readiness, Shutdown};
use mesh::registry::Etcd;
use mesh::tls::{Expected, Role, Tls};
use mesh::transport::{self, Endpoint, channel};
use model::{Checkpoint, Head, LoadError};
use proto::MAX_MESSAGE_BYTES;
use proto::v1::operations_client::OperationsClient;
use proto::v1::{HeadsRequest, WeightFile};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::Status;

/// Before routers that did not answer are asked again.
const AGAIN: Duration = Duration::from_millis(500);
/// Between two files.
const STALL: Duration = Duration::from_secs(5);
/// Most bytes of all heads together (DeepSeek-V3's are 12 million).
const MOST: usize = 256 << 20;

/// The routers that a node may ask.
pub struct Routers<'a> {
    /// Those that it is told of.
    pub named: &'a [Endpoint],
    /// Where others are found.
    pub etcd: Option<&'a Etcd>,
    pub tls: Option<&'a Tls>,
}

/// Opens what is in `dir`; `None` if the node is to end before a router has answered.
///
/// # Errors
/// What is there, or what a router says, is no checkpoint.
pub async fn open(
    dir: &Path,
    routers: Routers<'_>,
    readiness: &Readiness,
    shutdown: &Shutdown,
) -> Result<Option<Arc<Checkpoint>>, LoadError> {
    let alone = routers.named.is_empty() && routers.etcd.is_none();
    let lacking = if alone { Vec::new() } else { Checkpoint::lacking(dir)? };
    let Some(first) = lacking.first() else {
        return Checkpoint::open(dir).map(Some);
    };
    tracing::warn!(
        files = lacking.len(),
        first,
        "weight files are not here: their experts will be fetched from other nodes"
    );
    readiness.set(Err(format!("asking a router what {} weight files hold", lacking.len())));
    tokio::select! {
        heads = routers.ask() => Checkpoint::open_partial(dir, &heads).map(Some),
        () = shutdown.wait() => Ok(None),
    }
}

impl Routers<'_> {
    /// Asks one router after the other until one has answered.
    async fn ask(&self) -> Vec<Head> {
        let (hear, mut heard) = mpsc::unbounded_channel();
        // Ends with the asking.
        let mut following = JoinSet::new();
        if let Some(etcd) = self.etcd.cloned() {
            let tell = move |router: &Endpoint| _ = hear.send(router.clone());
            following.spawn(etcd.follow(Role::Router, tell));
        }
        let mut routers: VecDeque<Endpoint> = self.named.iter().cloned().collect();
        let mut told = String::new();
        loop {
            while let Ok(router) = heard.try_recv() {
                if !routers.contains(&router) {
                    routers.push_back(router);
                }
            }
            if let Some(router) = routers.front() {
                let problem = match one(router, self.tls).await {
                    Ok(heads) => return heads,
                    Err(status) => format!("{router}: {}", transport::explain(&status)),
                };
                if problem != told {
                    tracing::warn!(problem, "cannot ask what the weight files hold");
                    told = problem;
                }
                routers.rotate_left(1);
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

async fn one(router: &Endpoint, tls: Option<&Tls>) -> Result<Vec<Head>, Status> {
    let channel = channel(router, tls, Expected::any(Role::Router))
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    let mut client = OperationsClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let stalled = |_| Status::deadline_exceeded(format!("silent for {STALL:?}"));
    let asking = tokio::time::timeout(STALL, client.heads(HeadsRequest {}));
    let mut files = asking.await.map_err(stalled)??.into_inner();
    let (mut heads, mut bytes) = (Vec::new(), 0);
    while let Some(file) = tokio::time::timeout(STALL, files.message()).await.map_err(stalled)?? {
        let WeightFile { name, length, header } = file;
        bytes += name.len() + header.len();
        if bytes > MOST {
            let problem = format!("heads of weight files are longer than {MOST} bytes");
            return Err(Status::out_of_range(problem));
        }
        heads.push(Head { name, len: length, bytes: header.into() });
    }
    Ok(heads)
}
