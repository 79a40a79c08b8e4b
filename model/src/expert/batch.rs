//! Batches of rows through experts, whatever computes them.

use kernels::Compute;
use kernels::cuda::{GpuError, Results, Rows};

use super::{ExpertGroup, ExpertScratch, forward_experts};
use crate::numerics::Numerics;

/// Where experts are computed. Batches begin, and their results are taken in the same order; another may begin before the
/// results of one are taken, not more.
pub trait Experts: Send {
    /// Whether rows are also taken in FP8, as they travelled.
    fn takes_fp8(&self) -> bool {
        false
    }

    /// Begins to compute every group's rows with its expert: places are the groups' rows one after the other, `rows` in
    /// the wire form of the class or in FP8. All are copied before it returns.
    ///
    /// # Errors
    /// The device that computes cannot any more; so of the others.
    fn begin(
        &mut self,
        compute: &Compute,
        numerics: Numerics,
        groups: &[ExpertGroup<'_>],
        rows: &dyn Rows,
    ) -> Result<(), GpuError>;

    /// Whether the results of the oldest batch are there.
    fn is_done(&self) -> Result<bool, GpuError> {
        Ok(true)
    }

    /// Waits for the results of the oldest batch: rows by place, in the wire form of the class.
    fn results(&mut self) -> Result<Results<'_>, GpuError>;
}

/// On the CPU: results are there when a batch has begun.
#[derive(Default)]
pub struct CpuExperts {
    scratch: ExpertScratch,
    out: Vec<u8>,
    width: usize,
}

impl Experts for CpuExperts {
    fn begin(
        &mut self,
        compute: &Compute,
        numerics: Numerics,
        groups: &[ExpertGroup<'_>],
        rows: &dyn Rows,
    ) -> Result<(), GpuError> {
        let Self { scratch, out, width } = self;
        *width = groups.first().map_or(0, |group| group.expert.hidden() * numerics.bytes());
        forward_experts(compute, numerics, groups, rows, out, scratch);
        Ok(())
    }

    fn results(&mut self) -> Result<Results<'_>, GpuError> {
        Ok(Results { bytes: &self.out, width: self.width, pitch: self.width })
    }
}
