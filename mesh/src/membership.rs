//! The nodes a router talks to: a list that grows and shrinks while exchanges
//! run. A node's index is its place in the list and is given to another node
//! only after it has left; a frame that was on its way to the first is refused
//! by the second and routed anew.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::link::LinkHandle;
use crate::placement::NodeIndex;
use crate::transport::Endpoint;

/// Most nodes of a mesh.
const MOST_NODES: usize = 1024;
/// A node that joined by itself is forgotten when it has neither been connected
/// nor announced itself for so long.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// Why a node cannot join.
#[derive(Debug, thiserror::Error)]
#[error("{MOST_NODES} nodes have joined, which is the most there can be")]
pub struct Full;

/// Cheap to clone; clones are the same list.
#[derive(Clone)]
pub struct Links(Arc<Inner>);

struct Inner {
    list: ArcSwap<Vec<Arc<LinkHandle>>>,
    /// When each node that joined by itself was last heard of, by place. Held while
    /// the list is changed.
    heard: Mutex<Vec<Option<Instant>>>,
    changes: watch::Sender<u64>,
}

impl Links {
    /// Nodes that are never forgotten.
    pub fn new(endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
        let list: Vec<_> = (0..)
            .zip(endpoints)
            .map(|(index, endpoint)| LinkHandle::new(NodeIndex(index), endpoint))
            .collect();
        let heard = Mutex::new(vec![None; list.len()]);
        let list = ArcSwap::from_pointee(list);
        Self(Arc::new(Inner { list, heard, changes: watch::Sender::new(0) }))
    }

    /// The list as it is now, by index, those who have left included.
    pub fn load(&self) -> Guard<Arc<Vec<Arc<LinkHandle>>>> {
        self.0.list.load()
    }

    /// The nodes of the mesh now.
    pub fn members(&self) -> Vec<Arc<LinkHandle>> {
        self.load().iter().filter(|link| !link.is_removed()).cloned().collect()
    }

    pub fn get(&self, node: NodeIndex) -> Option<Arc<LinkHandle>> {
        self.load().get(usize::from(node.0)).cloned()
    }

    /// Wakes when a node has joined or left.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// The node at `endpoint` is one of the mesh; true if it was not before.
    ///
    /// # Errors
    /// There is no place left.
    pub fn join(&self, endpoint: &Endpoint, now: Instant) -> Result<bool, Full> {
        let mut heard = self.0.heard.lock();
        let mut list = Vec::clone(&self.load());
        let known = |link: &Arc<LinkHandle>| link.endpoint == *endpoint && !link.is_removed();
        if let Some(at) = list.iter().position(known) {
            // Those that were configured stay as they are.
            if let Some(last) = &mut heard[at] {
                *last = now;
            }
            return Ok(false);
        }
        let free = list.iter().position(|link| link.is_removed()).unwrap_or(list.len());
        if free >= MOST_NODES {
            return Err(Full);
        }
        let link = LinkHandle::new(NodeIndex(free as u16), endpoint.clone());
        let last = Some(now);
        if free == list.len() {
            list.push(link);
            heard.push(last);
        } else {
            list[free] = link;
            heard[free] = last;
        }
        self.0.list.store(Arc::new(list));
        self.0.changes.send_modify(|count| *count += 1);
        Ok(true)
    }

    /// The node at `endpoint` is no longer one of the mesh; false if it was none.
    pub fn leave(&self, endpoint: &Endpoint) -> bool {
        let _turn = self.0.heard.lock();
        let list = self.load();
        let mine = list.iter().filter(|link| link.endpoint == *endpoint && !link.is_removed());
        let left = mine.map(|link| link.remove()).count() > 0;
        if left {
            self.0.changes.send_modify(|count| *count += 1);
        }
        left
    }

    /// Forgets nodes that joined by themselves and have been away for long.
    pub fn forget_silent(&self, now: Instant) {
        let mut silent = Vec::new();
        for (link, last) in self.load().iter().zip(self.0.heard.lock().iter_mut()) {
            let Some(last) = last else { continue };
            if link.description().is_some() {
                *last = now;
            } else if now.duration_since(*last) > FORGET_AFTER && !link.is_removed() {
                silent.push(link.endpoint.clone());
            }
        }
        for endpoint in silent {
            tracing::warn!(node = %endpoint, "forgotten, as it has been away for {FORGET_AFTER:?}");
            self.leave(&endpoint);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(port: u16) -> Endpoint {
        Endpoint::Tcp(format!("node:{port}"))
    }

    #[test]
    fn nodes_join_leave_and_are_forgotten() {
        let (links, start) = (Links::new([at(1), at(2)]), Instant::now());
        let mut changes = links.changes();
        assert!(links.join(&at(3), start).unwrap() && !links.join(&at(3), start).unwrap());
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        assert_eq!(links.get(NodeIndex(2)).unwrap().endpoint, at(3));

        // A place is used again, by a link of its own.
        assert!(links.leave(&at(1)) && !links.leave(&at(1)) && !links.leave(&at(9)));
        assert!(changes.has_changed().unwrap());
        assert_eq!(links.members().len(), 2);
        assert!(links.join(&at(4), start).unwrap());
        assert_eq!(links.get(NodeIndex(0)).unwrap().endpoint, at(4));
        assert!(!links.get(NodeIndex(0)).unwrap().is_removed());

        // Who announces itself stays; who was configured stays in any case.
        links.join(&at(4), start + FORGET_AFTER).unwrap();
        links.forget_silent(start + FORGET_AFTER + Duration::from_secs(1));
        let left: Vec<_> = links.members().iter().map(|link| link.endpoint.clone()).collect();
        assert_eq!(left, [at(4), at(2)]);
    }

    #[test]
    fn there_is_an_end_to_joining() {
        let (links, now) = (Links::new([]), Instant::now());
        for port in 0..MOST_NODES as u16 {
            assert!(links.join(&at(port), now).unwrap());
        }
        assert!(links.join(&at(60_000), now).is_err());
        assert!(!links.join(&at(0), now).unwrap(), "who is a member is welcome");
    }
}
