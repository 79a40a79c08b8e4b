//! Putting an MoE layer together again: routed results in slot order, shared experts, residual.
//!
//! `x += (Σ_slot w_slot · r_slot) + shared`, the sum in f32 by fused multiply-add in slot order
//! (DeepSeek-V3 report, eq. 12). The order is the row's own; in which order results arrived, and
//! from where, cannot show.

use half::bf16;
use kernels::Kernels;

use crate::activations::{WireScratch, from_wire};
use crate::numerics::Numerics;
use crate::parallel::grown;

/// Results that are read side by side, as many as a row usually has.
const TOGETHER: usize = 8;

/// Reusable working memory of one task.
#[derive(Default)]
pub(crate) struct CombineScratch {
    sum: Vec<f32>,
    wire: WireScratch,
}

/// Adds to `residual` `[hidden]` the results of one row: `results` gives the wire row of each slot
/// and its weight; `shared` is empty if there are no shared experts.
pub(crate) fn combine<'a>(
    kernels: Kernels,
    numerics: Numerics,
    results: impl Iterator<Item = (&'a [u8], f32)>,
    shared: &[f32],
    residual: &mut [f32],
    scratch: &mut CombineScratch,
) {
    let CombineScratch { sum, wire } = scratch;
    let sum = grown(sum, residual.len());
    let mut together: [(f32, &[bf16]); TOGETHER] = [(0.0, &[]); TOGETHER];
    let (mut results, mut count, mut next) = (results, 0, None);
    for (result, weight) in results.by_ref() {
        match bytemuck::try_cast_slice(result) {
            Ok(result) if numerics == Numerics::Bf16 && count < TOGETHER => {
                together[count] = (weight, result);
                count += 1;
            }
            _ => {
                next = Some((result, weight));
                break;
            }
        }
    }
    kernels.weigh(&together[..count], sum);
    // After one that does not lie well, all, as the order is theirs.
    for (result, weight) in next.into_iter().chain(results) {
        kernels.axpy(weight, from_wire(numerics, result, wire), sum);
    }
    sum.iter_mut().zip(shared).for_each(|(sum, shared)| *sum += shared);
    residual.iter_mut().zip(sum).for_each(|(x, sum)| *x += *sum);
}
