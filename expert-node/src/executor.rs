//! The one task that computes, on the thread that reads the frames: a frame is
//! read, computed and answered without waking another thread. It takes every
//! frame that has been read, up to a bound, groups their rows by expert, runs
//! them through the kernels' pool and answers each frame. It never waits for a
//! socket: a frame carries the permit its reply needs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{BufMut as _, Bytes, BytesMut};
use mesh::shared::Segment;
use mesh::telemetry::propagate;
use mesh::{failpoint, pump};
use model::rows::decode_fp8;
use model::{ExpertGroup, Experts, GpuError, Numerics};
use proto::frame::all_finite;
use proto::v1::{DispatchError, DispatchFrame, DispatchReply, Dtype, ErrorCode, SharedRows};
use proto::wire::{self, Leaving};
use proto::{ExpertId, LayerId};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{OwnedPermit, UnboundedReceiver};
use tonic::Status;
use tracing::Span;
use tracing::field::Empty;

use crate::admission::Admission;
use crate::batcher::Batch;
use crate::metrics::NodeMetrics;
use crate::results::Results;
use crate::store::{Resident, Store};
use crate::stream::Spare;

/// Rows × slots after which a batch takes no further frame.
const BATCH_ROWS: usize = 4096;

/// A frame that was checked and admitted, on its way to be computed.
pub struct Job {
    pub frame: DispatchFrame,
    /// What the frame's `shared`, if it has one, lies in.
    pub segment: Option<Arc<Segment>>,
    pub slots: usize,
    /// Where its slots begin among those of its batch.
    pub first: usize,
    /// Whether an input row of it was found not to be finite.
    pub tainted: bool,
    pub arrived: Instant,
    pub reply: OwnedPermit<Result<Bytes, Status>>,
}

impl Job {
    /// Where its rows stand and its results may, if in shared memory: as the frame was checked.
    fn shared(&self) -> Option<(&Segment, SharedRows)> {
        self.segment.as_deref().zip(self.frame.shared)
    }
}

/// What the executor owns.
pub struct Parts {
    pub compute: kernels::Compute,
    /// What computes experts: the CPU with `compute`, or a GPU.
    pub experts: Box<dyn Experts>,
    pub numerics: Numerics,
    pub hidden: usize,
    pub store: Arc<Store>,
    pub admission: Arc<Admission>,
    pub spare: Spare,
    pub metrics: NodeMetrics,
}

/// See the module's text.
pub struct Executor {
    parts: Parts,
    batch: Batch,
    experts: Vec<Arc<Resident>>,
    /// Per slot of all frames, in their order: which result row is its.
    rows: Vec<u32>,
    /// What replies are written into; its memory comes back when they have left.
    wire: Leaving,
    /// Input and result rows of a batch, in wire form, grouped by expert.
    x: Vec<u8>,
    out: Vec<u8>,
    /// A frame's rows before decoding, if they stood in shared memory, and after it, on their way into a buffer of its own.
    coded: Vec<u8>,
    decoded: Vec<u8>,
    results: Results,
}

impl Executor {
    pub fn new(parts: Parts) -> Self {
        Self {
            parts,
            batch: Batch::default(),
            experts: Vec::new(),
            rows: Vec::new(),
            wire: Leaving::default(),
            x: Vec::new(),
            out: Vec::new(),
            coded: Vec::new(),
            decoded: Vec::new(),
            results: Results::default(),
        }
    }

    /// Computes what is queued until the last sender of jobs is gone. Between two
    /// batches the streams get their turn: replies leave, frames come in.
    ///
    /// # Errors
    /// The device cannot compute any more. Frames are then left unanswered: the node
    /// has to go, and routers send them to other owners.
    pub async fn run(mut self, mut jobs: UnboundedReceiver<Job>) -> Result<(), GpuError> {
        self.parts.compute.pool.bind_caller();
        let mut batch = Vec::new();
        let mut awake = Instant::now();
        while let Some(first) = next(&mut jobs, awake).await {
            let mut rows = first.slots;
            batch.push(first);
            while rows < BATCH_ROWS
                && let Ok(next) = jobs.try_recv()
            {
                rows += next.slots;
                batch.push(next);
            }
            self.parts.admission.leave(rows);
            self.parts.metrics.queued_rows.set(self.parts.admission.queued() as i64);
            self.compute(&mut batch)?;
            awake = Instant::now() + pump::AWAKE;
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Computes and answers all `jobs`.
    fn compute(&mut self, jobs: &mut Vec<Job>) -> Result<(), GpuError> {
        failpoint::pass("executor");
        let start = Instant::now();
        for late in jobs.extract_if(.., |job| expired(job, start).is_some()) {
            let Some(error) = expired(&late, start) else { continue };
            self.refuse(late, error);
        }
        // Computed under the first traced frame's span; a batch serves many. Most serve none.
        let span = match jobs.iter().find(|job| !job.frame.traceparent.is_empty()) {
            Some(job) => {
                let span = tracing::debug_span!("expert", frames = jobs.len(), rows = Empty);
                propagate::set_parent(&span, &job.frame.traceparent);
                span
            }
            None => Span::none(),
        };
        let _in_span = span.enter();

        self.wire.begin();
        self.decode(jobs);
        self.batch.group(jobs.iter().map(|job| &job.frame));
        if !self.find_experts() {
            // Residency was checked at admission; it changed since.
            for job in jobs.drain(..) {
                let layer = job.frame.layer;
                let message = format!("an expert of layer {layer} left this node");
                self.refuse(job, (ErrorCode::NotResident, message));
            }
            return Ok(());
        }
        self.gather(jobs);
        let groups = &self.batch.groups;
        let work: Vec<_> = groups
            .iter()
            .zip(&self.experts)
            .filter_map(|(group, resident)| {
                let expert = resident.weights.as_ref()?;
                Some(ExpertGroup { expert, rows: group.places.len() })
            })
            .collect();
        if work.is_empty() {
            // A stub: all its experts answer with what they are given.
            std::mem::swap(&mut self.out, &mut self.x);
        } else {
            let Parts { compute, experts, numerics, .. } = &mut self.parts;
            experts.forward(compute, *numerics, &work, &self.x, &mut self.out)?;
        }
        let rows: usize = groups.iter().map(|group| group.places.len()).sum();
        for (group, resident) in groups.iter().zip(&self.experts) {
            resident.rows.fetch_add(group.places.len() as u64, Ordering::Relaxed);
            self.parts.metrics.rows_per_expert.observe(group.places.len() as f64);
        }
        span.record("rows", rows);
        let took = start.elapsed();
        self.parts.metrics.rows.inc_by(rows as u64);
        self.parts.metrics.compute_seconds.observe(took.as_secs_f64());
        drop(work);
        self.answer(jobs, start, took);
        self.experts.clear();
        Ok(())
    }

    /// Looks up the expert of every group; false if one is not here.
    fn find_experts(&mut self) -> bool {
        self.experts.clear();
        self.experts.extend(self.batch.groups.iter().map_while(|group| {
            let (layer, expert) = (LayerId(group.layer), ExpertId(group.expert));
            self.parts.store.held(layer, expert, group.version).ok()
        }));
        self.experts.len() == self.batch.groups.len()
    }

    /// Puts FP8 rows into the form that is computed with.
    fn decode(&mut self, jobs: &mut [Job]) {
        let hidden = self.parts.hidden;
        for job in jobs.iter_mut().filter(|job| job.frame.dtype == Dtype::Fp8 as i32) {
            self.decoded.clear();
            if let Some((segment, place)) = job.shared() {
                self.coded.clear();
                segment.read(place.rows_at as usize, place.rows_bytes as usize, &mut self.coded);
            }
            let rows = if job.frame.rows.is_empty() { &self.coded[..] } else { &job.frame.rows };
            for row in rows.chunks_exact(Dtype::Fp8.row_bytes(hidden)) {
                decode_fp8(self.parts.numerics, row, hidden, &mut self.decoded);
            }
            self.wire.buffer().extend_from_slice(&self.decoded);
            job.frame.rows = self.wire.take();
        }
    }

    /// Copies every group's input rows next to each other. Whether they are finite is
    /// looked at on the way, while they are in the cache: a row that is not spoils no
    /// other, and its frame is refused in the end.
    fn gather(&mut self, jobs: &mut [Job]) {
        let (width, dtype) = (self.row_bytes(), self.dtype());
        self.x.clear();
        for place in self.batch.places() {
            let job = &mut jobs[place.frame as usize];
            let (from, to) = (place.row as usize * width, self.x.len());
            match job.shared() {
                // Decoded rows are the frame's own.
                Some((segment, shared)) if job.frame.rows.is_empty() => {
                    segment.read(shared.rows_at as usize + from, width, &mut self.x);
                }
                _ => self.x.extend_from_slice(&job.frame.rows[from..][..width]),
            }
            job.tainted |= place.first && !all_finite(&self.x[to..], dtype);
        }
    }

    /// Writes one reply per frame, its results in its slot order.
    fn answer(&mut self, jobs: &mut Vec<Job>, start: Instant, took: Duration) {
        let width = self.row_bytes();
        // Where each frame's slots begin among all, found by walking the frames
        // in order; `first` is kept in the job it belongs to.
        let slots: usize = jobs.iter().map(|job| job.slots).sum();
        self.rows.clear();
        self.rows.resize(slots, 0);
        let mut first = 0;
        for job in jobs.iter_mut() {
            job.first = first;
            first += job.slots;
        }
        for (row, place) in self.batch.places().enumerate() {
            self.rows[jobs[place.frame as usize].first + place.slot as usize] = row as u32;
        }
        for job in jobs.drain(..) {
            if job.tainted {
                let message = format!("layer {}: an input row is not finite", job.frame.layer);
                self.refuse(job, (ErrorCode::NonFinite, message));
                continue;
            }
            let rows = &self.rows[job.first..job.first + job.slots];
            let queued = start.duration_since(job.arrived);
            let form = self.results.form(&job.frame, self.parts.numerics);
            let mut head = DispatchReply {
                ticket: job.frame.ticket,
                attempt: job.frame.attempt,
                dtype: form.dtype() as i32,
                hidden: self.parts.hidden as u32,
                queue_us: micros(queued),
                compute_us: micros(took),
                ..Default::default()
            };
            let mut finite = true;
            let bytes = form.rows(&job.frame) * form.dtype().row_bytes(self.parts.hidden);
            let kernels = self.parts.compute.kernels;
            let result = |&row: &u32| &self.out[row as usize * width..][..width];
            let results = rows.iter().map(result);
            let room = job.shared().filter(|(_, place)| place.results_bytes >= bytes as u64);
            if let Some((segment, place)) = room {
                let mut at = place.results_at as usize;
                finite = self.results.write(kernels, form, &job.frame, results, |row| {
                    segment.write(at, row);
                    at += row.len();
                });
                head.shared_bytes = bytes as u64;
                wire::put(self.wire.buffer(), &head, 0, |_| {});
            } else {
                wire::put(self.wire.buffer(), &head, bytes, |buffer| {
                    finite = self.results.write(kernels, form, &job.frame, results, |row| {
                        buffer.put_slice(row);
                    });
                });
            }
            if job.frame.checksum.is_some() {
                wire::seal(self.wire.buffer());
            }
            let reply = self.wire.take();
            if !finite {
                let message = format!("layer {}: a result is not finite", job.frame.layer);
                self.refuse(job, (ErrorCode::NonFinite, message));
                continue;
            }
            self.parts.metrics.frames.inc();
            self.parts.metrics.queue_seconds.observe(queued.as_secs_f64());
            job.reply.send(Ok(reply));
            self.parts.spare.put(job.frame);
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
        self.dtype().row_bytes(self.parts.hidden)
    }
}

/// The next job, if there will be one. Does not sleep before `awake` is over.
async fn next(jobs: &mut UnboundedReceiver<Job>, awake: Instant) -> Option<Job> {
    loop {
        match jobs.try_recv() {
            Ok(job) => return Some(job),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) if Instant::now() < awake => pump::pass().await,
            Err(TryRecvError::Empty) => return jobs.recv().await,
        }
    }
}

/// Why a job is not worth computing any more.
fn expired(job: &Job, now: Instant) -> Option<(ErrorCode, String)> {
    let waited = now.duration_since(job.arrived);
    let allowed = Duration::from_micros(u64::from(job.frame.timeout_us));
    (!allowed.is_zero() && waited > allowed).then(|| {
        let message = format!("waited {waited:?} of the {allowed:?} it was given");
        (ErrorCode::Expired, message)
    })
}

/// The dtype activations have on the wire in a numerics class.
pub fn wire_dtype(numerics: Numerics) -> Dtype {
    match numerics {
        Numerics::F32 => Dtype::F32,
        Numerics::Bf16 => Dtype::Bf16,
    }
}

/// The reply that refuses a frame, as it goes to the stream.
pub fn refusal(frame: &DispatchFrame, code: ErrorCode, message: String) -> Bytes {
    let head = DispatchReply {
        ticket: frame.ticket,
        attempt: frame.attempt,
        error: Some(DispatchError { code: code as i32, message }),
        ..Default::default()
    };
    let mut wire = BytesMut::new();
    wire::put(&mut wire, &head, 0, |_| {});
    if frame.checksum.is_some() {
        wire::seal(&mut wire);
    }
    wire.freeze()
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
