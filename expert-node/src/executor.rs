//! The one task that computes, on the thread that reads the frames: a frame is
//! read, computed and answered without waking another thread. It takes every
//! frame that has been read, up to a bound, groups their rows by expert, runs
//! them through the kernels' pool and answers each frame. It never waits for a
//! socket: a frame carries the permit its reply needs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use mesh::telemetry::propagate;
use model::{ExpertGroup, ExpertScratch, Numerics, forward_experts};
use proto::frame::all_finite;
use proto::v1::{DispatchError, DispatchFrame, DispatchReply, Dtype, ErrorCode};
use proto::{ExpertId, LayerId};
use tokio::sync::mpsc::{OwnedPermit, UnboundedReceiver};
use tonic::Status;

use crate::admission::Admission;
use crate::batcher::{self, Group};
use crate::metrics::NodeMetrics;
use crate::store::{Resident, Store};

/// Rows × slots after which a batch takes no further frame.
const BATCH_ROWS: usize = 4096;

/// A frame that was checked and admitted, on its way to be computed.
pub struct Job {
    pub frame: DispatchFrame,
    pub slots: usize,
    pub arrived: Instant,
    pub reply: OwnedPermit<Result<DispatchReply, Status>>,
}

/// What the executor owns.
pub struct Parts {
    pub compute: kernels::Compute,
    pub numerics: Numerics,
    pub hidden: usize,
    pub store: Arc<Store>,
    pub admission: Arc<Admission>,
    pub metrics: NodeMetrics,
}

/// See the module's text.
pub struct Executor {
    parts: Parts,
    /// Input and result rows of a batch, in wire form, grouped by expert.
    x: Vec<u8>,
    out: Vec<u8>,
    scratch: ExpertScratch,
}

impl Executor {
    pub fn new(parts: Parts) -> Self {
        Self { parts, x: Vec::new(), out: Vec::new(), scratch: ExpertScratch::default() }
    }

    /// Computes what is queued until the last sender of jobs is gone. Between two
    /// batches the streams get their turn: replies leave, frames come in.
    pub async fn run(mut self, mut jobs: UnboundedReceiver<Job>) {
        while let Some(first) = jobs.recv().await {
            let mut rows = first.slots;
            let mut batch = vec![first];
            while rows < BATCH_ROWS
                && let Ok(next) = jobs.try_recv()
            {
                rows += next.slots;
                batch.push(next);
            }
            self.parts.admission.leave(rows);
            self.parts.metrics.queued_rows.set(self.parts.admission.queued() as i64);
            self.compute(batch);
            tokio::task::yield_now().await;
        }
    }

    fn compute(&mut self, batch: Vec<Job>) {
        let start = Instant::now();
        let mut jobs = Vec::with_capacity(batch.len());
        for job in batch {
            match self.expired(&job, start) {
                Some(error) => self.refuse(job, error),
                None => jobs.push(job),
            }
        }
        // Computed under the first traced frame's span; a batch serves many.
        let span =
            tracing::debug_span!("expert", frames = jobs.len(), rows = tracing::field::Empty);
        if let Some(job) = jobs.iter().find(|job| !job.frame.traceparent.is_empty()) {
            propagate::set_parent(&span, &job.frame.traceparent);
        }
        let _in_span = span.enter();

        let groups = batcher::group(jobs.iter().map(|job| &job.frame));
        let Some(experts) = self.resident(&groups) else {
            // Residency was checked at admission; it changed since.
            for job in jobs {
                let layer = job.frame.layer;
                let message = format!("an expert of layer {layer} left this node");
                self.refuse(job, (ErrorCode::NotResident, message));
            }
            return;
        };
        self.gather(&jobs, &groups);
        let work: Vec<_> = groups
            .iter()
            .zip(&experts)
            .map(|(group, resident)| ExpertGroup {
                expert: &resident.weights,
                rows: group.places.len(),
            })
            .collect();
        forward_experts(
            &self.parts.compute,
            self.parts.numerics,
            &work,
            &self.x,
            &mut self.out,
            &mut self.scratch,
        );
        let rows: usize = work.iter().map(|group| group.rows).sum();
        for (group, resident) in groups.iter().zip(&experts) {
            resident.rows.fetch_add(group.places.len() as u64, Ordering::Relaxed);
            self.parts.metrics.rows_per_expert.observe(group.places.len() as f64);
        }
        let took = start.elapsed();
        self.parts.metrics.rows.inc_by(rows as u64);
        self.parts.metrics.compute_seconds.observe(took.as_secs_f64());
        self.answer(jobs, &groups, start, took);
    }

    fn expired(&self, job: &Job, now: Instant) -> Option<(ErrorCode, String)> {
        let waited = now.duration_since(job.arrived);
        let allowed = Duration::from_micros(u64::from(job.frame.timeout_us));
        (!allowed.is_zero() && waited > allowed).then(|| {
            let message = format!("waited {waited:?} of the {allowed:?} it was given");
            (ErrorCode::Expired, message)
        })
    }

    fn resident(&self, groups: &[Group]) -> Option<Vec<Arc<Resident>>> {
        groups
            .iter()
            .map(|g| self.parts.store.get(LayerId(g.layer), ExpertId(g.expert), g.version).ok())
            .collect()
    }

    /// Copies every group's input rows next to each other.
    fn gather(&mut self, jobs: &[Job], groups: &[Group]) {
        let width = self.row_bytes();
        self.x.clear();
        for place in groups.iter().flat_map(|group| &group.places) {
            let from = place.row as usize * width;
            self.x.extend_from_slice(&jobs[place.frame as usize].frame.rows[from..from + width]);
        }
    }

    /// Scatters the results into one reply per frame, in its slot order.
    fn answer(&mut self, jobs: Vec<Job>, groups: &[Group], start: Instant, took: Duration) {
        let width = self.row_bytes();
        let mut replies: Vec<_> =
            jobs.iter().map(|job| BytesMut::zeroed(job.slots * width)).collect();
        let places = groups.iter().flat_map(|group| &group.places);
        for (place, row) in places.zip(self.out.chunks_exact(width)) {
            let at = place.slot as usize * width;
            replies[place.frame as usize][at..at + width].copy_from_slice(row);
        }
        let dtype = self.dtype();
        for (job, rows) in jobs.into_iter().zip(replies) {
            if !all_finite(&rows, dtype) {
                let message = format!("layer {}: a result is not finite", job.frame.layer);
                self.refuse(job, (ErrorCode::NonFinite, message));
                continue;
            }
            let queued = start.duration_since(job.arrived);
            self.parts.metrics.frames.inc();
            self.parts.metrics.queue_seconds.observe(queued.as_secs_f64());
            job.reply.send(Ok(DispatchReply {
                ticket: job.frame.ticket,
                attempt: job.frame.attempt,
                dtype: dtype as i32,
                hidden: self.parts.hidden as u32,
                queue_us: micros(queued),
                compute_us: micros(took),
                error: None,
                rows: rows.freeze(),
            }));
        }
    }

    fn refuse(&self, job: Job, (code, message): (ErrorCode, String)) {
        self.parts.metrics.refuse(code);
        job.reply.send(Ok(refusal(&job.frame, code, message)));
    }

    fn dtype(&self) -> Dtype {
        wire_dtype(self.parts.numerics)
    }

    fn row_bytes(&self) -> usize {
        self.parts.hidden * self.dtype().size()
    }
}

/// The dtype activations have on the wire in a numerics class.
pub fn wire_dtype(numerics: Numerics) -> Dtype {
    match numerics {
        Numerics::F32 => Dtype::F32,
        Numerics::Bf16 => Dtype::Bf16,
    }
}

/// The reply that refuses a frame.
pub fn refusal(frame: &DispatchFrame, code: ErrorCode, message: String) -> DispatchReply {
    DispatchReply {
        ticket: frame.ticket,
        attempt: frame.attempt,
        error: Some(DispatchError { code: code as i32, message }),
        ..Default::default()
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}
