//! The gate of an MoE layer: which experts a token goes to, and with what weight.
//!
//! DeepSeek-V3 report, section 2.1.2: sigmoid affinities; the correction bias counts for the choice
//! only; groups are ranked by the sum of their two best choices, and experts are taken from the
//! best groups. Everything is f32 in every numerics class. Ties go to the lower index. Pure: no
//! product is computed here, no state kept.

use crate::config::Config;

/// The gate's settings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Routing {
    pub top_k: usize,
    pub n_group: usize,
    pub topk_group: usize,
    pub norm_topk: bool,
    pub scaling: f32,
}

/// Reusable working memory of [`Routing::choose`].
#[derive(Default)]
pub(crate) struct GateScratch {
    choice: Vec<f32>,
    groups: Vec<f32>,
    kept: Vec<u32>,
}

impl Routing {
    pub fn of(config: &Config) -> Self {
        Routing {
            top_k: config.top_k,
            n_group: config.n_group,
            topk_group: config.topk_group,
            norm_topk: config.norm_topk,
            scaling: config.routed_scaling,
        }
    }

    /// Chooses for one token. `scores` `[experts]` are the sigmoid affinities, `bias` `[experts]`
    /// the correction; `experts` and `weights` `[top_k]` receive the choice in ascending order of
    /// experts.
    pub fn choose(
        &self,
        scores: &[f32],
        bias: &[f32],
        scratch: &mut GateScratch,
        experts: &mut [u32],
        weights: &mut [f32],
    ) {
        debug_assert!(experts.len() == self.top_k && weights.len() == self.top_k);
        let GateScratch { choice, groups, kept } = scratch;
        choice.clear();
        choice.extend(scores.iter().zip(bias).map(|(s, b)| s + b));
        if self.topk_group < self.n_group {
            let size = scores.len() / self.n_group;
            groups.clear();
            groups.extend(choice.chunks(size).map(best_two));
            kept.resize(self.topk_group, 0);
            largest(groups, kept);
            for (group, members) in choice.chunks_mut(size).enumerate() {
                if !kept.contains(&(group as u32)) {
                    members.fill(f32::NEG_INFINITY);
                }
            }
        }
        largest(choice, experts);
        experts.sort_unstable();

        for (weight, expert) in weights.iter_mut().zip(experts.iter()) {
            *weight = scores[*expert as usize];
        }
        if self.norm_topk {
            let sum = weights.iter().sum::<f32>() + 1e-20;
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= self.scaling);
    }
}

/// Sum of the two largest values (of the one, in a group of one).
fn best_two(values: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &v in values {
        if v > first {
            (first, second) = (v, first);
        } else if v > second {
            second = v;
        }
    }
    if values.len() > 1 { first + second } else { first }
}

/// Indices of the `out.len()` largest values, best first; of equal values the lower index.
/// `out.len()` is at most `values.len()`. NaN is never larger than a number.
fn largest(values: &[f32], out: &mut [u32]) {
    let wanted = out.len();
    let mut found = 0;
    for (index, value) in values.iter().enumerate() {
        // NaN sorts with the lowest, so that every index stays distinct.
        let better = |other: u32| {
            let other = values[other as usize];
            *value > other || (other.is_nan() && !value.is_nan())
        };
        if found == wanted && !better(out[wanted - 1]) {
            continue;
        }
        let mut at = found.min(wanted - 1);
        while at > 0 && better(out[at - 1]) {
            out[at] = out[at - 1];
            at -= 1;
        }
        out[at] = index as u32;
        found = (found + 1).min(wanted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(routing: Routing, scores: &[f32], bias: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let mut experts = vec![0; routing.top_k];
        let mut weights = vec![0.0; routing.top_k];
        let mut scratch = GateScratch::default();
        routing.choose(scores, bias, &mut scratch, &mut experts, &mut weights);
        (experts, weights)
    }

    const PLAIN: Routing =
        Routing { top_k: 2, n_group: 1, topk_group: 1, norm_topk: false, scaling: 1.0 };

    #[test]
    fn takes_the_largest_in_ascending_order() {
        let (experts, weights) = run(PLAIN, &[0.1, 0.9, 0.3, 0.8], &[0.0; 4]);
        assert_eq!(experts, [1, 3]);
        assert_eq!(weights, [0.9, 0.8]);
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let (experts, weights) = run(PLAIN, &[0.1, 0.9, 0.3, 0.8], &[1.0, 0.0, 0.0, -1.0]);
        assert_eq!(experts, [0, 1]);
        assert_eq!(weights, [0.1, 0.9]);
    }

    #[test]
    fn groups_are_ranked_by_their_two_best() {
        let routing = Routing { n_group: 2, ..PLAIN };
        // The single best expert is in a group whose two best sum to less.
        let (experts, _) = run(routing, &[0.9, 0.0, 0.5, 0.6], &[0.0; 4]);
        assert_eq!(experts, [2, 3]);
    }

    #[test]
    fn a_negative_choice_in_a_kept_group_beats_a_dropped_group() {
        let routing = Routing { n_group: 2, ..PLAIN };
        let (experts, weights) = run(routing, &[0.2, 0.1, 0.9, 0.9], &[-0.5, -0.6, -2.0, -2.0]);
        assert_eq!(experts, [0, 1]);
        assert_eq!(weights, [0.2, 0.1]);
    }

    #[test]
    fn weights_are_normalised_then_scaled() {
        let routing = Routing { norm_topk: true, scaling: 2.5, ..PLAIN };
        let (_, weights) = run(routing, &[0.25, 0.75, 0.1, 0.1], &[0.0; 4]);
        assert_eq!(weights, [0.625, 1.875]);
    }

    #[test]
    fn ties_go_to_the_lower_index_and_nan_never_repeats_an_index() {
        assert_eq!(run(PLAIN, &[0.5; 4], &[0.0; 4]).0, [0, 1]);
        assert_eq!(run(PLAIN, &[f32::NAN; 4], &[0.0; 4]).0, [0, 1]);
        assert_eq!(run(PLAIN, &[f32::NAN, 0.1, f32::NAN, 0.2], &[0.0; 4]).0, [1, 3]);
    }
}
