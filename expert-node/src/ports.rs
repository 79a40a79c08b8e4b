//! Streams whose routers share memory with the node: their frames are read out of rings by the
//! executor itself, between two batches and while it waits, and replies go the same way
//! (`mesh::shared::rings`). The stream's task is there for what comes by the socket, for the stream's
//! end, and for the time in which the executor sleeps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use mesh::pump::TURN;
use mesh::shared::Rings;
use mesh::shared::rings::{KNOCK, Passage, Put};
use parking_lot::Mutex;
use proto::wire;
use tokio::sync::mpsc::{OwnedPermit, Sender};
use tonic::{Code, Status};

use crate::service::{Service, Stream};
use crate::stream::invalid;

/// Frames of one stream that are taken before the others have their turn.
const AT_ONCE: usize = 16;

/// What goes to a stream's body.
pub type Leaving = Result<Bytes, Status>;

/// A frame's one reply, for which there is room.
pub struct Reply {
    permit: OwnedPermit<Leaving>,
    near: Option<Arc<Near>>,
}

/// A stream's rings.
pub struct Near {
    passage: Passage<Status>,
    /// See [`Ports::turn`].
    due: Arc<AtomicBool>,
}

impl From<OwnedPermit<Leaving>> for Reply {
    fn from(permit: OwnedPermit<Leaving>) -> Self {
        Self { permit, near: None }
    }
}

impl Reply {
    pub fn send(self, reply: Bytes) {
        let Self { permit, near } = self;
        let message = match near.as_ref().map_or(Put::Not, |near| near.passage.put(&reply)) {
            Put::There => return,
            Put::Knock => KNOCK,
            Put::Not => reply,
        };
        permit.send(Ok(message));
        if let Some(near) = near {
            near.due.store(true, Ordering::Relaxed);
        }
    }
}

impl Near {
    /// The next frame, as its message; none after a fault.
    ///
    /// # Errors
    /// The router has spoilt the ring.
    pub fn take(&self) -> Result<Option<Bytes>, Status> {
        if self.passage.is_faulty() { Ok(None) } else { self.passage.take() }
    }
}

/// One stream: what takes its frames.
pub struct Port {
    service: Service,
    stream: Mutex<Stream>,
    replies: Sender<Leaving>,
    pub near: Option<Arc<Near>>,
}

impl Port {
    /// Why the stream has to end; nothing if there is a frame that the executor has no permit for.
    pub async fn told(&self) -> Option<Status> {
        Passage::told(self.near.as_ref().map(|near| &near.passage)).await
    }

    /// A permit for a reply, when there is room.
    pub async fn room(&self) -> Option<OwnedPermit<Leaving>> {
        self.replies.clone().reserve_owned().await.ok()
    }

    /// Judges a frame.
    ///
    /// # Errors
    /// It is none, or not the one that was sent.
    pub fn take(&self, message: Bytes, permit: OwnedPermit<Leaving>) -> Result<(), Status> {
        let mut frame = self.service.spare().take();
        wire::read(message, &mut frame).map_err(invalid).inspect_err(|status| {
            if status.code() == Code::DataLoss {
                self.service.damaged();
            }
        })?;
        let reply = Reply { permit, near: self.near.clone() };
        self.service.take(frame, Instant::now(), reply, &mut self.stream.lock());
        Ok(())
    }

    /// Takes the frames that are in the ring; some, if there are always more.
    fn look(&self, near: &Near) {
        for _ in 0..AT_ONCE {
            if !near.passage.look() {
                return;
            }
            let Ok(permit) = self.replies.clone().try_reserve_owned() else {
                // The task waits for one, and looks then.
                near.passage.poke();
                return;
            };
            let taken = match near.take() {
                Ok(Some(message)) => self.take(message, permit),
                Ok(None) => return,
                Err(status) => Err(status),
            };
            if let Err(status) = taken {
                near.passage.fail(status);
            }
        }
    }
}

/// The streams of a node. Clones are the same.
#[derive(Clone, Default)]
pub struct Ports {
    near: Arc<Mutex<Vec<Arc<Port>>>>,
    /// Streams whose frames come by the socket alone.
    far: Arc<AtomicUsize>,
    due: Arc<AtomicBool>,
}

/// A stream that is open; ends with this value.
pub struct Open<'a> {
    ports: &'a Ports,
    pub port: Arc<Port>,
}

impl Ports {
    pub fn open(
        &self,
        service: Service,
        stream: Stream,
        rings: Option<Rings>,
        replies: Sender<Leaving>,
    ) -> Open<'_> {
        let near = rings
            .map(|rings| Arc::new(Near { passage: Passage::new(rings), due: self.due.clone() }));
        let port = Arc::new(Port { service, stream: Mutex::new(stream), replies, near });
        match port.near {
            Some(_) => self.near.lock().push(port.clone()),
            None => _ = self.far.fetch_add(1, Ordering::Relaxed),
        }
        Open { ports: self, port }
    }

    /// Takes the frames that are in rings.
    pub fn look(&self) {
        for port in self.near.lock().iter() {
            if let Some(near) = &port.near {
                port.look(near);
            }
        }
    }

    /// From now on frames wake; false if one has come before.
    pub fn sleep(&self) -> bool {
        // Without a permit the task has to look first, and wakes.
        self.near.lock().iter().all(|port| {
            port.near.as_ref().is_none_or(|near| near.passage.sleep())
                || port.replies.capacity() == 0
        })
    }

    /// Whether it is time for the sockets, which had their turn at `last`: at once if a reply is to
    /// leave or frames come by them alone.
    pub fn turn(&self, last: Instant, now: Instant) -> bool {
        self.due.swap(false, Ordering::Relaxed)
            || self.far.load(Ordering::Relaxed) > 0
            || self.near.lock().is_empty()
            || now.duration_since(last) >= TURN
    }
}

impl Open<'_> {
    /// Ends the stream with a status; no frame is taken any more.
    pub async fn end(self, status: Status) {
        let replies = self.port.replies.clone();
        drop(self);
        // What was taken before is answered first, as its permits are held.
        let _ = replies.send(Err(status)).await;
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        match self.port.near {
            Some(_) => self.ports.near.lock().retain(|port| !Arc::ptr_eq(port, &self.port)),
            None => _ = self.ports.far.fetch_sub(1, Ordering::Relaxed),
        }
    }
}
