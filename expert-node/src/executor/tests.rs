//! What becomes of frames when the device that computes is lost.

use std::sync::Arc;

use mesh::metrics::Metrics;
use model::synthetic::{Recipe, TempDir};
use model::{Checkpoint, ExpertGroup};
use tokio::sync::mpsc;

use super::*;
use crate::Shard;

/// A device that fails at the first batch.
struct Failing;

impl Experts for Failing {
    fn forward(
        &mut self,
        _: &kernels::Compute,
        _: Numerics,
        groups: &[ExpertGroup<'_>],
        _: &[u8],
        _: &mut Vec<u8>,
    ) -> Result<(), GpuError> {
        assert!(!groups.is_empty());
        let code = "CUDA_ERROR_ECC_UNCORRECTABLE".to_owned();
        Err(GpuError::Lost { ordinal: 0, doing: "computing", code })
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
    let reply = replies.reserve_owned().await.unwrap();
    let arrived = Instant::now();
    let sent = queue.send(Job {
        frame,
        segment: None,
        slots: 1,
        first: 0,
        tainted: false,
        arrived,
        reply,
    });
    assert!(sent.is_ok());
    let ended = executor.run(jobs).await;
    assert!(ended.is_err_and(|error| error.is_lost()));
    assert!(answered.recv().await.is_none(), "a frame that was not computed has no reply");
}
