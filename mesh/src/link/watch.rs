//! Keeps what a link knows of its node current while the link is up: the node
//! says when it owns something else, over a call beside the data stream.

use std::sync::Arc;
use std::time::Duration;

use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::{NodeDescription, WatchRequest};

use super::{LinkError, LinkParts, notify};
use crate::tls::{Expected, Role};
use crate::transport::channel;

/// Before a watch that ended is begun again.
const PAUSE: Duration = Duration::from_millis(500);

/// Runs until it is dropped, which the link's session does when it ends.
pub(super) async fn follow(parts: LinkParts) {
    loop {
        if let Err(error) = watch(&parts).await {
            let node = &parts.handle.endpoint;
            tracing::debug!(%node, reason = %error, "its description is not followed");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn watch(parts: &LinkParts) -> Result<(), LinkError> {
    let LinkParts { handle, tls, .. } = parts;
    // Who the session was opened with, and nobody else.
    let id = handle.description().map(|about| about.node_id.clone());
    let expected = Expected { role: Role::ExpertNode, id };
    let channel = channel(&handle.endpoint, tls.as_ref(), expected)?;
    let mut client = ExpertControlClient::new(channel);
    let mut changes = client.watch(WatchRequest {}).await.map_err(Box::new)?.into_inner();
    while let Some(description) = changes.message().await.map_err(Box::new)? {
        take(parts, description)?;
    }
    Ok(())
}

fn take(parts: &LinkParts, description: NodeDescription) -> Result<(), LinkError> {
    match parts.identity.check(&description) {
        // It still answers what it was sent, and says so itself where it does not.
        Ok(()) | Err(LinkError::Draining) => {}
        Err(other) => {
            tracing::warn!(node = %parts.handle.endpoint, reason = %other, "it is another node now");
            return Err(other);
        }
    }
    let known = &parts.handle.description;
    // The data stream is with the process that the session was opened with.
    if known.load().as_ref().is_some_and(|known| known.incarnation != description.incarnation) {
        return Err(LinkError::Ended);
    }
    if known.load().as_deref() != Some(&description) {
        known.store(Some(Arc::new(description)));
        notify(&parts.fleet);
    }
    Ok(())
}
