//! A router where etcd keeps the list of members: it is in the list itself,
//! follows the expert nodes in it, and stands for the office of controller.

use std::time::Instant;

use mesh::lifecycle::Shutdown;
use mesh::membership::Links;
use mesh::registry::office::Office;
use mesh::registry::{Etcd, Member};
use mesh::tls::Role;
use mesh::transport::Endpoint;
use tokio::task::JoinSet;

/// Runs until `shutdown`; it ends when what it held in etcd has been given back.
pub(crate) fn start(
    etcd: &Etcd,
    me: Member,
    links: Links,
    office: Option<Office>,
    shutdown: &Shutdown,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    if let Some(office) = office {
        tasks.spawn(etcd.clone().campaign(me.id.clone(), office, shutdown.clone()));
    }
    tasks.spawn(etcd.clone().register(me, shutdown.clone()));
    let (etcd, shutdown) = (etcd.clone(), shutdown.clone());
    tasks.spawn(async move {
        let hear = |node: &Endpoint| match links.join(node, Instant::now()) {
            Ok(true) => tracing::info!(%node, "a node joins"),
            Ok(false) => {}
            Err(full) => tracing::warn!(%node, %full, "a node cannot join"),
        };
        tokio::select! {
            () = etcd.follow(Role::ExpertNode, hear) => {}
            () = shutdown.wait() => {}
        }
    });
    tasks
}
