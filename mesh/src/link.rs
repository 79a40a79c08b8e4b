//! The actor that keeps one data stream to one expert node.
//!
//! It connects, asks who is there, refuses a node of another model or numerics
//! class, opens the stream and pumps replies into the engine's channel. When
//! the stream ends it says so in the same channel, after the last reply, and
//! connects again with backoff. Neither frames nor replies pass through its mailbox: the
//! stream lives on the engine's own runtime (see [`crate::pump`]), and the engine
//! writes to it through a [`LinkHandle`].

mod liveness;
pub mod stream;
mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actix::{
    Actor, ActorContext as _, ActorFutureExt as _, AsyncContext as _, Context, Recipient,
    WrapFuture as _,
};
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::{DescribeRequest, DispatchReply, NodeDescription};
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::failpoint;
pub use crate::link::stream::Writer;
use crate::link::stream::{Reader, StreamError};
use crate::near::{Offer, Shortcut};
use crate::placement::NodeIndex;
use crate::shared::rings::Put;
use crate::supervise::Pulse;
use crate::tls::{Expected, Role, Tls};
use crate::transport::{self, CONNECT_TIMEOUT, Endpoint, channel_and_peer};

const FIRST_RECONNECT: Duration = Duration::from_millis(50);
/// A node that comes back is to be at work within a second, however often it went.
const SLOWEST_RECONNECT: Duration = Duration::from_millis(500);
/// Long, as the engine computes between looking after its streams.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// What a link tells the engine, in the order it happened.
#[derive(Debug)]
pub enum LinkEvent {
    Reply(NodeIndex, DispatchReply),
    /// The stream ended: what was sent and not answered will not be.
    Down {
        node: NodeIndex,
        damaged: bool,
    },
}

/// Told to the fleet whenever a link comes up or goes down, or its node owns something else.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct LinksChanged;

/// Whoever hears of changes now; a rebuilt fleet puts itself here.
pub type FleetAddress = Arc<ArcSwapOption<Recipient<LinksChanged>>>;

/// What a router requires of every node it talks to.
#[derive(Clone, Debug)]
pub struct Identity {
    pub model_digest: Vec<u8>,
    pub numerics: String,
    pub hidden: u32,
}

/// Why a link is not up.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("{0}")]
    Transport(#[from] crate::transport::TransportError),
    #[error("{}", transport::explain(.0))]
    Call(#[from] Box<tonic::Status>),
    #[error("serves another model: its digest is {got}, ours {want}")]
    Model { got: String, want: String },
    #[error("computes in {got}, this router in {want}: {}", remedy(.got, .want))]
    Numerics { got: String, want: String },
    #[error("its hidden size is {got}, ours {want}")]
    Hidden { got: u32, want: u32 },
    #[error("its certificate is of {certificate}, but it calls itself `{says}`")]
    Impostor { certificate: String, says: String },
    #[error("is draining")]
    Draining,
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("the stream ended")]
    Ended,
    #[error("it left the mesh")]
    Removed,
    #[error("gave no sign of life")]
    Hung,
}

/// One node as the engine and operators see it.
pub struct LinkHandle {
    pub node: NodeIndex,
    pub endpoint: Endpoint,
    stream: ArcSwapOption<Writer>,
    description: ArcSwapOption<NodeDescription>,
    detail: ArcSwap<String>,
    /// Turns true when the node is no longer one of the mesh.
    removed: tokio::sync::watch::Sender<bool>,
    /// The id that was certified here first: no other one is talked to.
    known: ArcSwapOption<String>,
    pub frames: AtomicU64,
    pub retries: AtomicU64,
    /// Exponentially weighted round trip of a frame, in microseconds.
    pub round_trip_us: AtomicU64,
    /// Replies that came; each is a sign of life.
    replies: AtomicU64,
    hung: AtomicBool,
    /// Has the link disconnect.
    cut: Notify,
}

impl LinkHandle {
    pub fn new(node: NodeIndex, endpoint: Endpoint) -> Arc<Self> {
        Arc::new(Self {
            node,
            endpoint,
            stream: ArcSwapOption::empty(),
            description: ArcSwapOption::empty(),
            detail: ArcSwap::from_pointee("not connected yet".to_owned()),
            removed: tokio::sync::watch::Sender::new(false),
            known: ArcSwapOption::empty(),
            frames: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            round_trip_us: AtomicU64::new(0),
            replies: AtomicU64::new(0),
            hung: AtomicBool::new(false),
            cut: Notify::new(),
        })
    }

    /// The node is connected and gives no sign of life; see [`liveness`].
    pub fn is_hung(&self) -> bool {
        self.hung.load(Ordering::Relaxed)
    }

    /// The stream to the node, while the link is up. A frame that was written for one stream
    /// goes to no other.
    pub fn stream(&self) -> Option<Arc<Writer>> {
        self.stream.load_full()
    }

    /// Hands an encoded frame to the stream; false when the stream is broken or has
    /// too many frames unanswered. It leaves at the engine's next turn of the pump.
    pub fn send(&self, stream: &Writer, frame: Bytes) -> bool {
        let sent = stream.send(frame);
        self.frames.fetch_add(u64::from(sent), Ordering::Relaxed);
        sent
    }

    /// As [`Self::send`], past the socket.
    pub fn put(&self, stream: &Writer, frame: &[u8]) -> Put {
        let put = stream.put(frame);
        self.frames.fetch_add(u64::from(put != Put::Not), Ordering::Relaxed);
        put
    }

    /// Whether replies may come by the socket alone.
    pub fn needs_socket(&self) -> bool {
        self.stream.load().as_ref().is_some_and(|stream| !stream.has_rings())
    }

    /// Replies are not looked for from now on and wake; false if one has come before.
    pub fn sleep(&self) -> bool {
        self.stream.load().as_ref().is_none_or(|stream| stream.sleep())
    }

    /// A reply that came past the socket.
    pub fn look(&self) -> Option<DispatchReply> {
        let reply = self.stream.load().as_ref()?.look()?;
        self.replies.fetch_add(1, Ordering::Relaxed);
        Some(reply)
    }

    /// Who answers there, while the link is up.
    pub fn description(&self) -> Option<Arc<NodeDescription>> {
        self.description.load_full()
    }

    /// That the link is up, or why it is down.
    pub fn detail(&self) -> String {
        self.detail.load().to_string()
    }

    /// Takes one measured round trip into the running average.
    pub fn observe(&self, round_trip: Duration) {
        let new = round_trip.as_micros() as u64;
        let old = self.round_trip_us.load(Ordering::Relaxed);
        let mean = if old == 0 { new } else { (old * 7 + new) / 8 };
        self.round_trip_us.store(mean, Ordering::Relaxed);
    }

    /// Ends the link for good.
    pub fn remove(&self) {
        self.removed.send_replace(true);
    }

    /// The link is not kept any more.
    pub fn is_removed(&self) -> bool {
        *self.removed.borrow()
    }

    async fn removal(&self) {
        // The sender lives as long as `self`.
        let _ = self.removed.subscribe().wait_for(|&removed| removed).await;
    }

    fn describe_as(&self, description: NodeDescription) {
        self.description.store(Some(Arc::new(description)));
    }

    fn up(&self, description: NodeDescription, stream: Writer, way: String) {
        self.hung.store(false, Ordering::Relaxed);
        self.describe_as(description);
        self.stream.store(Some(Arc::new(stream)));
        self.detail.store(Arc::new(way));
    }

    fn down(&self, reason: &LinkError) {
        self.stream.store(None);
        self.description.store(None);
        self.detail.store(Arc::new(reason.to_string()));
        self.hung.store(false, Ordering::Relaxed);
    }
}

/// Everything a link needs; cloned by its factory for each rebuild.
#[derive(Clone)]
pub struct LinkParts {
    pub handle: Arc<LinkHandle>,
    pub identity: Identity,
    pub tls: Option<Tls>,
    /// Whether rows stand in memory that is shared with a node of this host.
    pub shared_rows: Shortcut,
    pub events: mpsc::Sender<LinkEvent>,
    /// Where the data stream lives: the engine's own runtime.
    pub pump: Handle,
    pub fleet: FleetAddress,
}

/// See the module's text.
pub struct Link {
    parts: LinkParts,
    pause: Duration,
    /// When the present session began.
    began: Instant,
    _pulse: Pulse,
}

impl Link {
    pub fn new(parts: LinkParts, pulse: Pulse) -> Self {
        Self { parts, pause: FIRST_RECONNECT, began: Instant::now(), _pulse: pulse }
    }

    fn connect(&mut self, ctx: &mut Context<Self>) {
        let parts = self.parts.clone();
        self.began = Instant::now();
        // Ends the session with the actor.
        let mut stream = JoinSet::new();
        stream.spawn_on(session(parts), &self.parts.pump);
        let handle = self.parts.handle.clone();
        let session = async move {
            tokio::select! {
                ended = stream.join_next() => match ended {
                    Some(Ok(ended)) => ended,
                    // It panicked, or the engine is gone.
                    Some(Err(_)) | None => (LinkError::Ended, true),
                },
                () = handle.cut.notified() => (LinkError::Hung, true),
                () = handle.removal() => (LinkError::Removed, true),
            }
        }
        .into_actor(self);
        ctx.spawn(session.map(|(error, was_up), link, ctx| link.lost(&error, was_up, ctx)));
    }

    fn lost(&mut self, error: &LinkError, was_up: bool, ctx: &mut Context<Self>) {
        failpoint::pass("link");
        let LinkParts { handle, .. } = &self.parts;
        if handle.detail() != error.to_string() {
            tracing::warn!(node = %handle.endpoint, reason = %error, "link is down");
        }
        self.take_down(error);
        if matches!(error, LinkError::Removed) {
            ctx.stop();
            return;
        }
        // A node that breaks each session at once is not asked ever so often.
        if was_up && self.began.elapsed() > SLOWEST_RECONNECT {
            self.pause = FIRST_RECONNECT;
        }
        ctx.run_later(self.pause, |link, ctx| link.connect(ctx));
        self.pause = (self.pause * 2).min(SLOWEST_RECONNECT);
    }

    /// Publishes that nothing can be sent; the fleet and the engine hear of it.
    fn take_down(&self, reason: &LinkError) {
        let was_up = self.parts.handle.description().is_some();
        self.parts.handle.down(reason);
        if was_up {
            notify(&self.parts.fleet);
            let damaged = matches!(reason, LinkError::Stream(error) if error.is_damage());
            let event = LinkEvent::Down { node: self.parts.handle.node, damaged };
            // The channel holds more than all frames in flight, so it is full only
            // when a peer floods us; then a thread may wait for the engine.
            if let Err(TrySendError::Full(event)) = self.parts.events.try_send(event) {
                let events = self.parts.events.clone();
                actix::spawn(async move { deliver(&events, event).await });
            }
        }
    }
}

impl Actor for Link {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.connect(ctx);
        let handle = self.parts.handle.clone();
        ctx.spawn(async move { liveness::watch(&handle).await }.into_actor(self));
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // A panic unwinds past `lost`: the engine must still hear of it.
        self.take_down(&LinkError::Ended);
    }
}

fn notify(fleet: &FleetAddress) {
    if let Some(fleet) = fleet.load().as_ref() {
        // A full mailbox already holds a notice that will see this change, and
        // a fleet that is being rebuilt looks at all links when it starts.
        let _ = fleet.try_send(LinksChanged);
    }
}

/// One connection from first call to last reply. Returns why it ended and
/// whether it had been up.
async fn session(parts: LinkParts) -> (LinkError, bool) {
    let handle = &parts.handle;
    let opened = match open(&parts).await {
        Ok(opened) => opened,
        Err(error) => return (error, false),
    };
    let (description, (writer, mut reader), way) = opened;
    tracing::info!(node = description.node_id, endpoint = %handle.endpoint, "link is up");
    handle.up(description, writer, way);
    notify(&parts.fleet);
    let mut watching = JoinSet::new();
    watching.spawn(watch::follow(parts.clone()));
    let error = loop {
        match reader.next().await {
            Ok(reply) => {
                handle.replies.fetch_add(1, Ordering::Relaxed);
                deliver(&parts.events, LinkEvent::Reply(handle.node, reply)).await;
            }
            Err(error) => break error.into(),
        }
    };
    (error, true)
}

/// Who is there, the stream to it, and which way that goes.
async fn open(parts: &LinkParts) -> Result<(NodeDescription, (Writer, Reader), String), LinkError> {
    let LinkParts { handle, tls, shared_rows, .. } = parts;
    let endpoint = &handle.endpoint;
    let known = handle.known.load_full().map(|id| (*id).clone());
    let mut expected = Expected { role: Role::ExpertNode, id: known };
    let (channel, peer) = channel_and_peer(endpoint, tls.as_ref(), expected.clone())?;
    let description = describe(channel, CALL_TIMEOUT).await?;
    if let Some(principal) = peer.principal() {
        if principal.id != description.node_id {
            let (certificate, says) = (principal.short(), description.node_id);
            return Err(LinkError::Impostor { certificate, says });
        }
        expected.id = Some(principal.id.clone());
    }
    parts.identity.check(&description)?;
    let tls = tls.as_ref().map(|tls| (tls, &expected));
    // What is encrypted and authenticated stays so.
    let near = match tls {
        None => near(endpoint, &description, *shared_rows).await,
        Some(_) => None,
    };
    let (stream, way) = match near {
        Some(opened) => (opened, "up, over its Unix socket"),
        None => (stream::open(endpoint, tls, *shared_rows).await?, "up"),
    };
    let rows = if stream.0.room().is_some() { ", rows in shared memory" } else { "" };
    let way = format!("{way}{rows}");
    // Certified, of our model, and it took the stream: from now on it is known.
    handle.known.store(expected.id.map(Arc::new));
    Ok((description, stream, way))
}

async fn describe(channel: Channel, limit: Duration) -> Result<NodeDescription, LinkError> {
    let mut request = tonic::Request::new(DescribeRequest {});
    request.set_timeout(limit);
    let mut node = ExpertControlClient::new(channel);
    Ok(node.describe(request).await.map_err(Box::new)?.into_inner())
}

/// The stream over the node's Unix socket, if the node is on this host: whoever
/// answers there has to be the process that answered over TCP.
async fn near(
    endpoint: &Endpoint,
    node: &NodeDescription,
    shared_rows: Shortcut,
) -> Option<(Writer, Reader)> {
    let socket = Offer::socket(&node.local_endpoint, &node.instance)?;
    if endpoint.is_local() {
        return None;
    }
    let opened = async {
        let there = describe(
            channel_and_peer(&socket, None, Expected { role: Role::ExpertNode, id: None })?.0,
            CONNECT_TIMEOUT,
        )
        .await?;
        match there.instance == node.instance {
            true => Ok(stream::open(&socket, None, shared_rows).await?),
            false => Err(LinkError::Ended),
        }
    };
    match opened.await {
        Ok(opened) => {
            tracing::info!(node = node.node_id, %endpoint, %socket, "same host: over a Unix socket");
            Some(opened)
        }
        Err(_) => {
            tracing::debug!(node = node.node_id, %endpoint, %socket, "not on this host");
            None
        }
    }
}

/// Waits for room; a flood stalls only its own link.
async fn deliver(events: &mpsc::Sender<LinkEvent>, event: LinkEvent) {
    // Nobody hears it when the engine has ended, and then the process does too.
    let _ = events.send(event).await;
}

impl Identity {
    fn check(&self, node: &NodeDescription) -> Result<(), LinkError> {
        if node.model_digest != self.model_digest {
            return Err(LinkError::Model {
                got: short_hex(&node.model_digest),
                want: short_hex(&self.model_digest),
            });
        }
        if node.numerics != self.numerics {
            return Err(LinkError::Numerics {
                got: node.numerics.clone(),
                want: self.numerics.clone(),
            });
        }
        if node.hidden != self.hidden {
            return Err(LinkError::Hidden { got: node.hidden, want: self.hidden });
        }
        if node.draining { Err(LinkError::Draining) } else { Ok(()) }
    }
}

/// What an operator can do about two numerics classes; `+` sets off the kind of device.
fn remedy(got: &str, want: &str) -> &'static str {
    const GPU: &str = "+sm90";
    if got.ends_with(GPU) != want.ends_with(GPU) {
        return "set `expert_device` of the router to what its nodes have as `device`, cpu or cuda";
    }
    match got.split('+').next() == want.split('+').next() {
        true => "set the same `isa` on both, one that both CPUs have, such as \"avx512bf16\"",
        false => "set the same `numerics` on both",
    }
}

fn short_hex(digest: &[u8]) -> String {
    digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}
