//! The one task that computes, on the thread that reads the frames: a frame is
//! read, computed and answered without waking another thread. It takes every
//! frame that has been read, up to a bound, groups their rows by expert, runs
//! them through the kernels' pool, or a GPU, and answers each frame. It never waits
//! for a socket: a frame carries the permit its reply needs. While a GPU computes,
//! frames are read and the next batch begins, so that its rows travel meanwhile.

mod answer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh::shared::Segment;
use mesh::telemetry::propagate;
use mesh::{failpoint, pump};
use model::rows::{decode_fp8, finite_fp8};
use model::{ExpertGroup, Experts, GpuError, Numerics, Results, Rows};
use proto::frame::all_finite;
use proto::v1::{DispatchFrame, Dtype, ErrorCode, SharedRows};
use proto::wire::Leaving;
use proto::{ExpertId, LayerId};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::mpsc::error::TryRecvError;
use tracing::Span;
use tracing::field::Empty;

use self::answer::Answers;
use crate::admission::Admission;
use crate::batcher::Batch;
use crate::metrics::NodeMetrics;
use crate::ports::{Ports, Reply};
use crate::results::{Writer, refusal, wire_dtype};
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
    pub tainted: AtomicBool,
    pub arrived: Instant,
    pub reply: Reply,
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
    pub ports: Ports,
    pub metrics: NodeMetrics,
}

/// See the module's text.
pub struct Executor {
    parts: Parts,
    /// Batches that are not under way; their memory is used again.
    idle: Vec<Flight>,
    /// When the sockets last had their turn.
    turned: Instant,
    /// What replies are written into; its memory comes back when they have left.
    wire: Leaving,
    /// Results of a stub: its rows as they came.
    echo: Vec<u8>,
    /// A frame's rows before decoding, if they stood in shared memory, and after it, on their way into a buffer of its own.
    coded: Vec<u8>,
    decoded: Vec<u8>,
    writer: Writer,
}

/// A batch on its way.
#[derive(Default)]
struct Flight {
    jobs: Vec<Job>,
    batch: Batch,
    experts: Vec<Arc<Resident>>,
    /// Per slot of all frames, in their order: which result row is its.
    rows: Vec<u32>,
    /// When it began; nothing if nothing of it is computed.
    start: Option<Instant>,
    stub: bool,
    span: Option<Span>,
}

impl Executor {
    pub fn new(parts: Parts) -> Self {
        Self {
            parts,
            idle: vec![Flight::default(), Flight::default()],
            turned: Instant::now(),
            wire: Leaving::default(),
            echo: Vec::new(),
            coded: Vec::new(),
            decoded: Vec::new(),
            writer: Writer::default(),
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
        let mut under_way: Option<Flight> = None;
        let mut awake = Instant::now();
        loop {
            let first = match under_way {
                Some(_) => self.meanwhile(&mut jobs).await?,
                None => match self.next(&mut jobs, awake).await {
                    Some(job) => Some(job),
                    None => return Ok(()),
                },
            };
            let mut begun = None;
            if let Some(first) = first {
                let mut flight = self.idle.pop().unwrap_or_default();
                self.take(first, &mut jobs, &mut flight);
                self.begin(&mut flight)?;
                begun = Some(flight);
            }
            if let Some(before) = std::mem::replace(&mut under_way, begun) {
                self.done().await?;
                self.finish(before)?;
            }
            if self.parts.experts.is_done()?
                && let Some(flight) = under_way.take()
            {
                self.finish(flight)?;
            }
            let now = Instant::now();
            awake = now + pump::AWAKE;
            self.turn(now).await;
        }
    }

    /// The next job, if there will be one. Does not sleep before `awake` is over.
    async fn next(&mut self, jobs: &mut UnboundedReceiver<Job>, awake: Instant) -> Option<Job> {
        loop {
            self.parts.ports.look();
            match jobs.try_recv() {
                Ok(job) => return Some(job),
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) if Instant::now() >= awake && self.parts.ports.sleep() => {
                    return jobs.recv().await;
                }
                Err(TryRecvError::Empty) => self.pass().await,
            }
        }
    }

    /// Leaves the CPU to other threads, if they have work for it, and the streams their turn.
    async fn pass(&mut self) {
        std::thread::yield_now();
        self.turn(Instant::now()).await;
    }

    /// Leaves the runtime to the streams and their sockets, if it is time.
    async fn turn(&mut self, now: Instant) {
        if self.parts.ports.turn(self.turned, now) {
            tokio::task::yield_now().await;
            self.turned = now;
        }
    }

    /// A job that comes before what is under way is done.
    async fn meanwhile(
        &mut self,
        jobs: &mut UnboundedReceiver<Job>,
    ) -> Result<Option<Job>, GpuError> {
        while !self.parts.experts.is_done()? {
            self.parts.ports.look();
            if let Ok(job) = jobs.try_recv() {
                return Ok(Some(job));
            }
            self.pass().await;
        }
        Ok(None)
    }

    /// Reads frames until the oldest batch is done.
    async fn done(&mut self) -> Result<(), GpuError> {
        while !self.parts.experts.is_done()? {
            self.pass().await;
        }
        Ok(())
    }

    /// Takes `first` and what else is queued into a batch.
    fn take(&self, first: Job, jobs: &mut UnboundedReceiver<Job>, flight: &mut Flight) {
        let mut rows = first.slots;
        flight.jobs.push(first);
        while rows < BATCH_ROWS
            && let Ok(next) = jobs.try_recv()
        {
            rows += next.slots;
            flight.jobs.push(next);
        }
        self.parts.admission.leave(rows);
        self.parts.metrics.queued_rows.set(self.parts.admission.queued() as i64);
    }

    /// Has a batch computed; refuses what cannot be.
    fn begin(&mut self, flight: &mut Flight) -> Result<(), GpuError> {
        failpoint::pass("executor");
        let start = Instant::now();
        flight.start = None;
        for late in flight.jobs.extract_if(.., |job| expired(job, start).is_some()) {
            let Some(error) = expired(&late, start) else { continue };
            refuse(&self.parts.metrics, late, error);
        }
        // Computed under the first traced frame's span; a batch serves many. Most serve none.
        let jobs = &mut flight.jobs;
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
        if !self.parts.experts.takes_fp8() {
            self.decode(jobs);
        }
        flight.batch.group(jobs.iter().map(|job| &job.frame));
        if !flight.find_experts(&self.parts.store) {
            // Residency was checked at admission; it changed since.
            for job in flight.jobs.drain(..) {
                let layer = job.frame.layer;
                let message = format!("an expert of layer {layer} left this node");
                refuse(&self.parts.metrics, job, (ErrorCode::NotResident, message));
            }
            return Ok(());
        }
        flight.number();
        flight.span = Some(span.clone());
        let Flight { jobs, batch, experts, stub, .. } = flight;
        let groups = &batch.groups;
        let work: Vec<_> = groups
            .iter()
            .zip(&*experts)
            .filter_map(|(group, resident)| {
                let expert = resident.weights.as_ref()?;
                Some(ExpertGroup { expert, rows: group.places.len() })
            })
            .collect();
        let Parts { compute, experts: device, numerics, hidden, .. } = &mut self.parts;
        let once = device.takes_fp8();
        let rows = Standing { jobs, batch, hidden: *hidden, once };
        *stub = work.is_empty();
        if *stub {
            // All its experts answer with what they are given.
            let width = wire_dtype(*numerics).row_bytes(*hidden);
            self.echo.resize(batch.places().count() * width, 0);
            for (at, row) in self.echo.chunks_exact_mut(width).enumerate() {
                rows.copy(at, row);
            }
        } else {
            device.begin(compute, *numerics, &work, &rows)?;
        }
        flight.start = Some(start);
        Ok(())
    }

    /// Answers the jobs of a batch, once its results are there.
    fn finish(&mut self, mut flight: Flight) -> Result<(), GpuError> {
        let Some(start) = flight.start else {
            self.idle.push(flight);
            return Ok(());
        };
        let width = self.row_bytes();
        let Self { parts, idle, wire, echo, writer, .. } = self;
        let Parts { compute, experts, numerics, hidden, spare, metrics, .. } = parts;
        let results = match flight.stub {
            true => Results { bytes: echo, width, pitch: width },
            false => {
                failpoint::fail("device", GpuError::lost_as_told)?;
                experts.results()?
            }
        };
        let took = start.elapsed();
        let mut rows = 0;
        for (group, resident) in flight.batch.groups.iter().zip(&flight.experts) {
            rows += group.places.len() as u64;
            resident.rows.fetch_add(group.places.len() as u64, Ordering::Relaxed);
            metrics.rows_per_expert.observe(group.places.len() as f64);
        }
        if let Some(span) = flight.span.take() {
            span.record("rows", rows);
        }
        metrics.rows.inc_by(rows);
        metrics.compute_seconds.observe(took.as_secs_f64());
        let (kernels, numerics, hidden) = (compute.kernels, *numerics, *hidden);
        Answers { kernels, numerics, hidden, spare, metrics, wire, writer }.send(
            &mut flight,
            results,
            (start, took),
        );
        flight.experts.clear();
        idle.push(flight);
        Ok(())
    }

    /// Puts FP8 rows into the form that is computed with.
    fn decode(&mut self, jobs: &mut [Job]) {
        let hidden = self.parts.hidden;
        for job in jobs.iter_mut().filter(|job| job.frame.dtype == Dtype::Fp8 as i32) {
            self.decoded.clear();
            if let Some((segment, place)) = job.shared() {
                self.coded.clear();
                segment.read(place.at as usize, place.rows_bytes as usize, &mut self.coded);
            }
            let rows = if job.frame.rows.is_empty() { &self.coded[..] } else { &job.frame.rows };
            for row in rows.chunks_exact(Dtype::Fp8.row_bytes(hidden)) {
                decode_fp8(self.parts.numerics, row, hidden, &mut self.decoded);
            }
            self.wire.buffer().extend_from_slice(&self.decoded);
            job.frame.rows = self.wire.take();
            job.frame.dtype = wire_dtype(self.parts.numerics) as i32;
        }
    }

    fn row_bytes(&self) -> usize {
        wire_dtype(self.parts.numerics).row_bytes(self.parts.hidden)
    }
}

impl Flight {
    /// Looks up the expert of every group; false if one is not here.
    fn find_experts(&mut self, store: &Store) -> bool {
        self.experts.clear();
        self.experts.extend(self.batch.groups.iter().map_while(|group| {
            let (layer, expert) = (LayerId(group.layer), ExpertId(group.expert));
            store.held(layer, expert, group.version).ok()
        }));
        self.experts.len() == self.batch.groups.len()
    }

    /// Finds where each frame's slots begin among all, and which result row is each slot's.
    fn number(&mut self) {
        let mut slots = 0;
        for job in &mut self.jobs {
            job.first = slots;
            slots += job.slots;
        }
        self.rows.clear();
        self.rows.resize(slots, 0);
        for (row, place) in self.batch.places().enumerate() {
            self.rows[self.jobs[place.frame as usize].first + place.slot as usize] = row as u32;
        }
    }
}

/// A batch's rows, where they stand.
struct Standing<'a> {
    jobs: &'a [Job],
    batch: &'a Batch,
    hidden: usize,
    /// Each row is copied once or little more, whatever the number of its experts.
    once: bool,
}

impl Standing<'_> {
    fn dtype(&self, job: &Job) -> Dtype {
        // Known, as the frame was checked.
        Dtype::try_from(job.frame.dtype).unwrap_or_default()
    }
}

impl Rows for Standing<'_> {
    fn kind(&self, place: usize) -> (usize, bool) {
        let place = self.batch.place(place);
        let job = &self.jobs[place.frame as usize];
        // A frame has no more rows than slots.
        (job.first + place.row as usize, self.dtype(job) == Dtype::Fp8)
    }

    /// Whether a row is finite is looked at on the way, while it is in the cache: one that is not spoils no other,
    /// and its frame is refused in the end.
    fn copy(&self, place: usize, to: &mut [u8]) {
        let place = self.batch.place(place);
        let job = &self.jobs[place.frame as usize];
        let (dtype, width) = (self.dtype(job), to.len());
        let from = place.row as usize * width;
        match job.shared() {
            // Decoded rows are the frame's own.
            Some((segment, shared)) if job.frame.rows.is_empty() => {
                segment.read(shared.at as usize + from, width, &mut &mut *to);
            }
            _ => to.copy_from_slice(&job.frame.rows[from..][..width]),
        }
        if place.first || self.once {
            let finite = match dtype {
                Dtype::Fp8 => finite_fp8(to, self.hidden),
                _ => all_finite(to, dtype),
            };
            if !finite {
                job.tainted.store(true, Ordering::Relaxed);
            }
        }
    }
}

fn refuse(metrics: &NodeMetrics, job: Job, (code, message): (ErrorCode, String)) {
    metrics.refuse(code);
    job.reply.send(refusal(&job.frame, code, message));
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

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
