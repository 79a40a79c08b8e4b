//! A batch's replies.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::BufMut as _;
use model::{Kernels, Numerics, Results};
use proto::v1::{DispatchReply, ErrorCode};
use proto::wire::{self, Leaving};

use super::{Flight, micros, refuse};
use crate::metrics::NodeMetrics;
use crate::results::Writer;
use crate::stream::Spare;

/// What it takes to write them.
pub struct Answers<'a> {
    pub kernels: Kernels,
    pub numerics: Numerics,
    pub hidden: usize,
    pub spare: &'a Spare,
    pub metrics: &'a NodeMetrics,
    pub wire: &'a mut Leaving,
    pub writer: &'a mut Writer,
}

impl Answers<'_> {
    /// Writes one reply per frame, its results in its slot order.
    pub(super) fn send(
        self,
        flight: &mut Flight,
        results: Results<'_>,
        (start, took): (Instant, Duration),
    ) {
        let Self { kernels, numerics, hidden, spare, metrics, wire, writer } = self;
        let Flight { jobs, rows, .. } = flight;
        for job in jobs.drain(..) {
            if job.tainted.load(Ordering::Relaxed) {
                let message = format!("layer {}: an input row is not finite", job.frame.layer);
                refuse(metrics, job, (ErrorCode::NonFinite, message));
                continue;
            }
            let rows = &rows[job.first..job.first + job.slots];
            let queued = start.duration_since(job.arrived);
            let form = writer.form(&job.frame, numerics);
            let mut head = DispatchReply {
                ticket: job.frame.ticket,
                attempt: job.frame.attempt,
                dtype: form.dtype() as i32,
                hidden: hidden as u32,
                queue_us: micros(queued),
                compute_us: micros(took),
                ..Default::default()
            };
            let mut finite = true;
            let bytes = form.rows(&job.frame) * form.dtype().row_bytes(hidden);
            let results = rows.iter().map(|&row| results.row(row as usize));
            let room = job.shared().filter(|(_, place)| place.results_bytes >= bytes as u64);
            if let Some((segment, place)) = room {
                let mut at = place.at as usize;
                finite = writer.write(kernels, form, &job.frame, results, |row| {
                    segment.write(at, row);
                    at += row.len();
                });
                head.shared_bytes = bytes as u64;
                wire::put(wire.buffer(), &head, 0, |_| {});
            } else {
                wire::put(wire.buffer(), &head, bytes, |buffer| {
                    finite = writer.write(kernels, form, &job.frame, results, |row| {
                        buffer.put_slice(row);
                    });
                });
            }
            if job.frame.checksum.is_some() {
                wire::seal(wire.buffer());
            }
            let reply = wire.take();
            if !finite {
                let message = format!("layer {}: a result is not finite", job.frame.layer);
                refuse(metrics, job, (ErrorCode::NonFinite, message));
                continue;
            }
            metrics.frames.inc();
            metrics.queue_seconds.observe(queued.as_secs_f64());
            job.reply.send(reply);
            spare.put(job.frame);
        }
    }
}
