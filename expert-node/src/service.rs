//! The node's judgement of frames. A frame is checked, admitted and queued here;
//! every refusal is a typed reply on the stream, so that one bad frame harms
//! neither its neighbours nor the stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use mesh::lifecycle::Shutdown;
use mesh::near::Offer;
use mesh::shared::Segment;
use mesh::transport::Endpoint;
use model::Numerics;
use proto::frame::{self, Shape};
use proto::v1::{DispatchFrame, Dtype, ErrorCode, NodeDescription};
use proto::{ExpertId, LayerId, MAX_MESSAGE_BYTES};
use tokio::sync::mpsc::UnboundedSender;

use crate::admission::Admission;
use crate::control::Control;
use crate::executor::Job;
use crate::metrics::NodeMetrics;
use crate::ports::Reply;
use crate::results::{refusal, wire_dtype};
use crate::store::Store;
use crate::stream::Spare;

/// Cheap to clone; one per gRPC service.
#[derive(Clone)]
pub struct Service(pub(crate) Arc<Inner>);

/// What the service shares with the executor.
pub struct Parts {
    pub store: Arc<Store>,
    pub queue: UnboundedSender<Job>,
    pub admission: Arc<Admission>,
    pub spare: Spare,
    pub metrics: NodeMetrics,
}

/// Who the node is.
pub struct Facts {
    pub id: String,
    pub digest: [u8; 32],
    pub numerics: Numerics,
    /// The full name of its numerics class.
    pub class: String,
    /// What computes, such as "cpu/avx512bf16" or "cuda:0/NVIDIA H800".
    pub device: String,
    pub shape: Shape,
    /// Where `/healthz` is served, if anywhere.
    pub alive_at: Option<Endpoint>,
    /// Not all weight files are here.
    pub partial: bool,
}

pub(crate) struct Inner {
    pub(crate) id: String,
    pub(crate) digest: [u8; 32],
    numerics: String,
    device: String,
    dtype: Dtype,
    shape: Shape,
    /// When the process started, which tells one life of a node from the next.
    incarnation: u64,
    alive_at: String,
    partial: bool,
    pub(crate) parts: Parts,
    pub(crate) control: Control,
    offer: Offer,
    shutdown: Shutdown,
    pub(crate) draining: AtomicBool,
}

/// One stream: what its frames are judged by.
#[derive(Default)]
pub struct Stream {
    /// Which experts of a frame have been looked up; used again.
    seen: Vec<bool>,
    /// The memory that it shares with its router.
    segment: Option<Arc<Segment>>,
}

impl Stream {
    pub fn new(segment: Option<Arc<Segment>>) -> Self {
        Self { seen: Vec::new(), segment }
    }
}

impl Service {
    pub fn new(
        facts: Facts,
        parts: Parts,
        (control, offer): (Control, Offer),
        shutdown: &Shutdown,
    ) -> Self {
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self(Arc::new(Inner {
            id: facts.id,
            digest: facts.digest,
            numerics: facts.class,
            device: facts.device,
            dtype: wire_dtype(facts.numerics),
            shape: facts.shape,
            incarnation: started.map_or(0, |since| since.as_nanos() as u64),
            alive_at: facts.alive_at.map(|at| at.to_string()).unwrap_or_default(),
            partial: facts.partial,
            parts,
            offer,
            control,
            shutdown: shutdown.clone(),
            draining: AtomicBool::new(false),
        }))
    }
}

impl Inner {
    pub(crate) fn draining(&self) -> bool {
        self.draining.load(Ordering::Acquire) || self.shutdown.is_triggered()
    }

    /// Checks a frame; returns how many slots it asks for.
    fn admit(
        &self,
        frame: &DispatchFrame,
        Stream { seen, segment }: &mut Stream,
    ) -> Result<usize, (ErrorCode, String)> {
        if self.draining() {
            return Err((ErrorCode::Draining, format!("node {} is draining", self.id)));
        }
        let invalid = |why: String| (ErrorCode::Invalid, why);
        let shared = segment.as_ref().map_or(0, |segment| segment.size());
        let (dtype, slots) =
            frame::check(frame, self.shape, shared).map_err(|error| invalid(error.to_string()))?;
        if dtype != self.dtype && dtype != Dtype::Fp8 {
            let (got, want) = (dtype.as_str_name(), self.dtype.as_str_name());
            return Err(invalid(format!("rows are {got}, this node computes {want}")));
        }
        seen.clear();
        seen.resize(self.shape.experts as usize, false);
        for (slot, &expert) in frame.experts.iter().enumerate() {
            let version = frame.versions.get(slot).copied().unwrap_or(0);
            if frame.versions.is_empty() && std::mem::replace(&mut seen[expert as usize], true) {
                continue;
            }
            self.parts.store.get(LayerId(frame.layer), ExpertId(expert), version)?;
        }
        if !self.parts.admission.enter(slots) {
            return Err((
                ErrorCode::Busy,
                format!("{} rows are queued", self.parts.admission.queued()),
            ));
        }
        Ok(slots)
    }

    pub(crate) fn describe(&self) -> NodeDescription {
        let tiers = self.parts.store.tiers().unwrap_or_default();
        NodeDescription {
            node_id: self.id.clone(),
            model_digest: self.digest.to_vec().into(),
            numerics: self.numerics.clone(),
            device: self.device.clone(),
            hidden: self.shape.hidden,
            owned: self.parts.store.owned(),
            max_frame_bytes: MAX_MESSAGE_BYTES as u64,
            draining: self.draining(),
            local_endpoint: self.offer.endpoint.clone(),
            instance: self.offer.instance.clone().into(),
            capacity_bytes: self.parts.store.limit().unwrap_or(0),
            resident_bytes: self.parts.store.bytes(),
            obeyed: Some(self.control.obeyed()),
            incarnation: self.incarnation,
            alive_at: self.alive_at.clone(),
            on_device: tiers.device as u32,
            in_host_memory: tiers.host as u32,
            on_disk: tiers.disk as u32,
            partial: self.partial,
            drained: self.control.drained(),
        }
    }
}

impl Service {
    /// Judges a frame that arrived: queues it, or answers that it will not be computed.
    pub fn take(&self, frame: DispatchFrame, arrived: Instant, reply: Reply, stream: &mut Stream) {
        let inner = &self.0;
        match inner.admit(&frame, stream) {
            Ok(slots) => {
                // Fails only after the executor is gone, and then the node goes down.
                let _ = inner.parts.queue.send(Job {
                    segment: stream.segment.clone().filter(|_| frame.shared.is_some()),
                    frame,
                    slots,
                    first: 0,
                    tainted: AtomicBool::new(false),
                    arrived,
                    reply,
                });
            }
            Err((code, message)) => {
                inner.parts.metrics.refuse(code);
                reply.send(refusal(&frame, code, message));
                inner.parts.spare.put(frame);
            }
        }
    }

    /// A frame came that is not what was sent.
    pub fn damaged(&self) {
        self.0.parts.metrics.damaged.inc();
    }

    /// Where frames come from and go to when they are done with.
    pub fn spare(&self) -> &Spare {
        &self.0.parts.spare
    }

    /// Resolves when the node is told to end.
    pub async fn stopped(&self) {
        self.0.shutdown.wait().await;
    }
}
