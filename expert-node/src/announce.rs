//! Tells routers of a running mesh that this node is there, again and again: a
//! router that was started later, or has forgotten the node, hears of it soon. Or
//! has etcd tell them.

use std::time::Duration;

use mesh::lifecycle::{Readiness, Shutdown};
use mesh::registry::{Etcd, Member};
use mesh::tls::{Expected, Role, Tls};
use mesh::transport::{Endpoint, channel};
use proto::v1::JoinRequest;
use proto::v1::operations_client::OperationsClient;
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// How often; a router forgets a silent node that has not answered for much longer.
const EVERY: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How often a node that is registered once it is ready looks whether it is.
const LOOK: Duration = Duration::from_millis(50);

/// What is said to whom.
pub struct Announcement {
    pub routers: Vec<Endpoint>,
    /// Where the node is reached.
    pub endpoint: Endpoint,
    pub tls: Option<Tls>,
}

/// Announces the node from when it is ready until `shutdown`.
pub async fn keep(announcement: Announcement, readiness: Readiness, shutdown: Shutdown) {
    let Announcement { routers, endpoint, tls } = announcement;
    let mut telling = JoinSet::new();
    for mut told in routers.into_iter().filter_map(|router| Told::new(router, tls.as_ref())) {
        let (endpoint, readiness) = (endpoint.clone(), readiness.clone());
        telling.spawn(async move {
            loop {
                if readiness.get().is_ok() {
                    told.tell(&endpoint).await;
                }
                tokio::time::sleep(EVERY).await;
            }
        });
    }
    // The tasks end with the set.
    shutdown.wait().await;
}

/// Keeps the node registered from when it is ready until `shutdown`.
pub async fn register(etcd: Etcd, me: Member, readiness: Readiness, shutdown: Shutdown) {
    while readiness.get().is_err() {
        if shutdown.is_triggered() {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
    etcd.register(me, shutdown).await;
}

/// One router, and what came of telling it the last time.
struct Told {
    router: Endpoint,
    client: OperationsClient<Channel>,
    problem: Option<String>,
}

impl Told {
    fn new(router: Endpoint, tls: Option<&Tls>) -> Option<Self> {
        match channel(&router, tls, Expected::any(Role::Router)) {
            Ok(channel) => {
                Some(Self { router, client: OperationsClient::new(channel), problem: None })
            }
            Err(error) => {
                tracing::error!(%router, %error, "cannot announce the node");
                None
            }
        }
    }

    async fn tell(&mut self, endpoint: &Endpoint) {
        let mut request = tonic::Request::new(JoinRequest { endpoint: endpoint.to_string() });
        request.set_timeout(ANSWER_WITHIN);
        let answer = self.client.join(request).await;
        let problem = match answer.map(tonic::Response::into_inner) {
            Ok(reply) => {
                if reply.added {
                    tracing::info!(router = reply.router_id, "joined the mesh");
                }
                None
            }
            Err(status) => Some(format!("{}: {}", status.code(), status.message())),
        };
        // A router that is away is no news every two seconds.
        if let Some(problem) = problem.as_ref().filter(|_| problem != self.problem) {
            tracing::warn!(router = %self.router, problem, "cannot announce the node");
        }
        self.problem = problem;
    }
}
