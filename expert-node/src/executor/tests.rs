//! What becomes of frames when the device that computes is lost.

use std::cell::Cell;
use std::sync::Arc;

use bytes::Bytes;
use mesh::metrics::Metrics;
use model::synthetic::{Recipe, TempDir};
use model::{Checkpoint, ExpertGroup, Rows};
use proto::v1::DispatchReply;
use proto::wire;
use tokio::sync::mpsc;

use super::*;
use crate::Shard;

/// A device that fails at the first batch.
struct Failing;

impl Experts for Failing {
    fn begin(
        &mut self,
        _: &kernels::Compute,
        _: Numerics,
        groups: &[ExpertGroup<'_>],
        _: &dyn Rows,
    ) -> Result<(), GpuError> {
        assert!(!groups.is_empty());
        let code = "CUDA_ERROR_ECC_UNCORRECTABLE".to_owned();
        Err(GpuError::Lost { ordinal: 0, doing: "computing", code })
    }

    fn results(&mut self) -> Result<Results<'_>, GpuError> {
        unreachable!("nothing has begun")
    }
}

#[tokio::test]
async fn a_lost_device_ends_the_executor_and_answers_nothing() {
    let dir = TempDir::with(&Recipe::small()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let shard = Shard { index: 0, count: 1, replicas: 1 };
    let store = Arc::new(Store::load(&checkpoint, shard, None, |_, _| {}).unwrap());
    let hidden = checkpoint.config().hidden;
    let layer = checkpoint.config().moe_layers().start as u32;
    let admission = Arc::new(Admission::new(16));
    assert!(admission.enter(1));
    let executor = Executor::new(Parts {
        compute: kernels::Compute::new(kernels::Isa::Scalar, 1),
        experts: Box::new(Failing),
        numerics: Numerics::Bf16,
        hidden,
        store,
        admission,
        spare: Spare::default(),
        ports: Ports::default(),
        metrics: Metrics::default().register(NodeMetrics::new),
    });
    let (queue, jobs) = mpsc::unbounded_channel();
    let (replies, mut answered) = mpsc::channel(1);
    let frame = DispatchFrame {
        layer,
        dtype: Dtype::Bf16 as i32,
        hidden: hidden as u32,
        slot_counts: vec![1],
        experts: vec![0],
        rows: Bytes::from(vec![0; 2 * hidden]),
        ..Default::default()
    };
    let reply = replies.reserve_owned().await.unwrap().into();
    let arrived = Instant::now();
    let sent = queue.send(Job {
        frame,
        segment: None,
        slots: 1,
        first: 0,
        tainted: AtomicBool::new(false),
        arrived,
        reply,
    });
    assert!(sent.is_ok());
    let ended = executor.run(jobs).await;
    assert!(ended.is_err_and(|error| error.is_lost()));
    assert!(answered.recv().await.is_none(), "a frame that was not computed has no reply");
}

/// A device that is done with a batch only after it was asked some times, and adds one to the first value of a row.
#[derive(Default)]
struct Slow {
    begun: std::collections::VecDeque<Vec<u8>>,
    taken: Vec<u8>,
    asked: Cell<usize>,
    /// Most batches that had begun at once.
    most: Arc<std::sync::atomic::AtomicUsize>,
}

impl Experts for Slow {
    fn takes_fp8(&self) -> bool {
        true
    }

    fn begin(
        &mut self,
        _: &kernels::Compute,
        _: Numerics,
        groups: &[ExpertGroup<'_>],
        rows: &dyn Rows,
    ) -> Result<(), GpuError> {
        let count: usize = groups.iter().map(|group| group.rows).sum();
        let mut out = Vec::new();
        for place in 0..count {
            let (_, fp8) = rows.kind(place);
            let mut row = vec![0; if fp8 { 5 } else { 2 }];
            rows.copy(place, &mut row);
            out.extend(if fp8 { [8, 0] } else { [row[0] + 1, row[1]] });
        }
        self.begun.push_back(out);
        self.most.fetch_max(self.begun.len(), Ordering::Relaxed);
        assert!(self.begun.len() <= 2, "no more than one batch begins before another's results");
        Ok(())
    }

    fn is_done(&self) -> Result<bool, GpuError> {
        self.asked.set(self.asked.get() + 1);
        Ok(self.begun.is_empty() || self.asked.get().is_multiple_of(7))
    }

    fn results(&mut self) -> Result<Results<'_>, GpuError> {
        self.taken = self.begun.pop_front().unwrap();
        Ok(Results { bytes: &self.taken, width: 2, pitch: 2 })
    }
}

#[tokio::test]
async fn batches_overlap_and_every_frame_gets_its_own_results() {
    let dir = TempDir::with(&Recipe::small()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let shard = Shard { index: 0, count: 1, replicas: 1 };
    let store = Arc::new(Store::load(&checkpoint, shard, None, |_, _| {}).unwrap());
    let layer = checkpoint.config().moe_layers().start as u32;
    let most = Arc::default();
    let admission = Arc::new(Admission::new(1 << 20));
    let executor = Executor::new(Parts {
        compute: kernels::Compute::new(kernels::Isa::Scalar, 1),
        experts: Box::new(Slow { most: Arc::clone(&most), ..Slow::default() }),
        numerics: Numerics::Bf16,
        hidden: 1,
        store,
        admission: admission.clone(),
        spare: Spare::default(),
        ports: Ports::default(),
        metrics: Metrics::default().register(NodeMetrics::new),
    });
    let (queue, jobs) = mpsc::unbounded_channel();
    let running = tokio::spawn(executor.run(jobs));
    let (replies, mut answered) = mpsc::channel(64);
    let frames = 40u32;
    let feeding = tokio::spawn(async move {
        for ticket in 0..frames {
            // Every seventh in FP8: a code and a scale; every ninth is not finite; of two rows, two experts each.
            let (fp8, bad) = (ticket % 7 == 0, ticket % 9 == 8);
            let row = match (fp8, bad) {
                (true, bad) => vec![if bad { 0x7f } else { 0x38 }, 0, 0, 0, 0],
                (false, true) => vec![0x80, 0x7f],
                (false, false) => vec![ticket as u8, 0],
            };
            let frame = DispatchFrame {
                ticket: ticket.into(),
                layer,
                dtype: if fp8 { Dtype::Fp8 } else { Dtype::Bf16 } as i32,
                hidden: 1,
                slot_counts: vec![2, 2],
                experts: vec![0, 1, 1, 2],
                rows: Bytes::from([row.clone(), row].concat()),
                ..Default::default()
            };
            assert!(admission.enter(4));
            let reply = replies.clone().reserve_owned().await.unwrap().into();
            let (arrived, tainted) = (Instant::now(), AtomicBool::new(false));
            let (segment, slots, first) = (None, 4, 0);
            let job = Job { frame, segment, slots, first, tainted, arrived, reply };
            assert!(queue.send(job).is_ok());
            for _ in 0..ticket % 5 {
                tokio::task::yield_now().await;
            }
        }
    });
    for ticket in 0..frames {
        let message = answered.recv().await.unwrap().unwrap();
        let mut reply = DispatchReply::default();
        let mut messages = wire::Messages::new(1 << 20);
        messages.push(message);
        wire::read(messages.take().unwrap().unwrap(), &mut reply).unwrap();
        assert_eq!(reply.ticket, u64::from(ticket), "in the order they came");
        let expected = if ticket % 7 == 0 { 8 } else { ticket as u8 + 1 };
        match ticket % 9 == 8 {
            true => assert_eq!(reply.error.unwrap().code, ErrorCode::NonFinite as i32),
            false => assert_eq!(reply.rows, [expected, 0].repeat(4), "{ticket}"),
        }
    }
    feeding.await.unwrap();
    assert!(running.await.unwrap().is_ok());
    assert_eq!(most.load(Ordering::Relaxed), 2, "one batch begins while another is computed");
}
