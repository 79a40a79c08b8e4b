//! The gate.

use std::cmp::Ordering;

use crate::device::{Memory, Random, distance, launch, library, widened};

/// Experts, and rows, of a block (gate.cu), and its shared values.
const TILE: usize = 8;

fn scores(name: &str, x: &[f32], w: &Memory, experts: usize, n: usize) -> Vec<f32> {
    let rows = x.len() / n;
    let (x, out) = (Memory::of(x), Memory::poisoned::<f32>(rows * experts));
    let args = [x.arg(), w.arg(), rows.into(), experts.into(), n.into(), out.arg()];
    launch(name, (experts.div_ceil(TILE), rows.div_ceil(TILE)), 256, 5, &args);
    out.read()
}

#[test]
fn scores_are_those_of_the_reference_and_a_row_the_same_bits_in_any_batch() {
    if library().is_none() {
        return;
    }
    let mut random = Random(3);
    for (rows, experts, n) in [(9, 20, 700), (1, 8, 512), (3, 32, 40)] {
        let (x, narrow) = (random.floats(rows * n), random.halves(experts * n));
        let wide = widened(&narrow);
        let out = scores("gate_scores_bf16", &x, &Memory::of(&narrow), experts, n);
        let reference: Vec<f64> = x
            .chunks_exact(n)
            .flat_map(|x| wide.chunks_exact(n).map(move |w| (x, w)))
            .map(|(x, w)| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>())
            .map(|sum| 1.0 / (1.0 + (-sum).exp()))
            .collect();
        let off = distance(&out, &reference);
        assert!(off <= 1e-5, "{rows} x {experts} x {n}: off by {off}");
        assert!(scores("gate_scores_f32", &x, &Memory::of(&wide), experts, n) == out);
        for (row, x) in x.chunks_exact(n).enumerate() {
            let alone = scores("gate_scores_bf16", x, &Memory::of(&narrow), experts, n);
            assert!(alone == out[row * experts..(row + 1) * experts]);
        }
    }
}

#[derive(Clone, Copy)]
struct Routing {
    experts: usize,
    top_k: usize,
    groups: usize,
    kept: usize,
    normed: bool,
    scaling: f32,
}

impl Routing {
    fn run(&self, scores: &[f32], bias: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let rows = scores.len() / self.experts;
        let (scores, bias) = (Memory::of(scores), Memory::of(bias));
        let chosen = Memory::poisoned::<u32>(rows * self.top_k);
        let weights = Memory::poisoned::<f32>(rows * self.top_k);
        let routing = kernels::cuda::trunk::Routing {
            experts: self.experts as u32,
            top_k: self.top_k as u32,
            groups: self.groups as u32,
            kept_groups: self.kept as u32,
            normed: self.normed.into(),
            scaling: self.scaling,
        };
        let args = [scores.arg(), bias.arg(), routing.into(), chosen.arg(), weights.arg()];
        launch("gate_choose", (rows, 1), 32, 1, &args);
        (chosen.read(), weights.read())
    }

    /// By sorting, for one row.
    fn reference(&self, scores: &[f32], bias: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let mut choice: Vec<f32> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
        let size = self.experts / self.groups;
        if self.kept < self.groups {
            let best_two = |group: &[f32]| {
                let mut group: Vec<f32> = group.iter().copied().filter(|x| !x.is_nan()).collect();
                group.resize(group.len().max(2), f32::NEG_INFINITY);
                group.sort_by(|a, b| b.total_cmp(a));
                if size > 1 { group[0] + group[1] } else { group[0] }
            };
            let kept = best(&choice.chunks(size).map(best_two).collect::<Vec<_>>(), self.kept);
            for (group, members) in choice.chunks_mut(size).enumerate() {
                if !kept.contains(&(group as u32)) {
                    members.fill(f32::NEG_INFINITY);
                }
            }
        }
        let mut experts = best(&choice, self.top_k);
        experts.sort_unstable();
        let mut weights: Vec<f32> = experts.iter().map(|e| scores[*e as usize]).collect();
        let sum = weights.iter().sum::<f32>() + 1e-20;
        weights.iter_mut().for_each(|w| *w = if self.normed { *w / sum } else { *w });
        weights.iter_mut().for_each(|w| *w *= self.scaling);
        (experts, weights)
    }
}

/// Indices of the best, the lower of equals; NaN is below all.
fn best(values: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (values[a as usize], values[b as usize]);
        y.partial_cmp(&x).unwrap_or(match (x.is_nan(), y.is_nan()) {
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            _ => Ordering::Equal,
        })
    });
    order.truncate(count);
    order
}

#[test]
fn choices_are_exactly_the_references() {
    if library().is_none() {
        return;
    }
    let v3 = Routing { experts: 256, top_k: 8, groups: 8, kept: 4, normed: true, scaling: 2.5 };
    let cases = [
        v3,
        Routing { experts: 32, top_k: 4, groups: 4, kept: 2, ..v3 },
        Routing { experts: 40, top_k: 3, groups: 40, kept: 7, normed: false, ..v3 },
        Routing { experts: 6, top_k: 6, groups: 1, kept: 1, scaling: 1.0, ..v3 },
    ];
    let mut random = Random(11);
    for routing in cases {
        let experts = routing.experts;
        // Few values, so that there are many ties.
        let mut scores: Vec<f32> =
            (0..12 * experts).map(|_| random.below(9) as f32 / 8.0).collect();
        scores[2 * experts..3 * experts].fill(0.5);
        scores[3 * experts..4 * experts].fill(f32::NAN);
        (0..experts / 2).for_each(|i| scores[4 * experts + 2 * i] = f32::NAN);
        let bias: Vec<f32> = (0..experts).map(|_| random.below(3) as f32 / 4.0 - 0.25).collect();
        let (chosen, weights) = routing.run(&scores, &bias);
        for (row, scores) in scores.chunks_exact(experts).enumerate() {
            let (expected, expected_weights) = routing.reference(scores, &bias);
            let mine = row * routing.top_k..(row + 1) * routing.top_k;
            assert_eq!(chosen[mine.clone()], expected, "row {row} of {experts} experts");
            let bits = |w: &[f32]| -> Vec<u32> {
                // All NaN are one.
                w.iter().map(|w| if w.is_nan() { u32::MAX } else { w.to_bits() }).collect()
            };
            assert_eq!(bits(&weights[mine]), bits(&expected_weights), "row {row}");
        }
    }
}
