//! Work on single rows.

use half::bf16;

use crate::device::{Memory, NULL, Random, distance, launch, library, widened};

const THREADS: u32 = 256;
const EPS: f32 = 1e-6;

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

fn normed(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let inverse = 1.0 / (mean + f64::from(EPS)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * inverse * f64::from(*w)).collect()
}

/// As rotary.rs turns a pair.
fn rotated(x: &[f32], table: &[f32], interleave: bool) -> Vec<f64> {
    let (x, half) = (wide(x), x.len() / 2);
    let mut out = x.clone();
    for pair in 0..half {
        let (a, b) = if interleave { (2 * pair, 2 * pair + 1) } else { (pair, pair + half) };
        let (cos, sin) = (f64::from(table[pair]), f64::from(table[half + pair]));
        (out[a], out[b]) = (x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin);
    }
    out
}

#[test]
fn norms_add_what_is_due_and_a_row_is_the_same_bits_alone() {
    if library().is_none() {
        return;
    }
    let mut random = Random(1);
    for (rows, n, bias) in [(3, 700, false), (2, 96, true), (1, 8, false)] {
        let stride = n + 8;
        let (x, weight) = (random.floats(rows * n), random.floats(n));
        let delta = random.floats(if bias { n } else { rows * n });
        let run = |x: &[f32], delta: &[f32]| {
            let rows = x.len() / n;
            let (x, delta, weight) = (Memory::of(x), Memory::of(delta), Memory::of(&weight));
            let (wide, out) =
                (Memory::poisoned::<f32>(rows * n), Memory::poisoned::<bf16>(rows * stride));
            let delta_stride = if bias { 0 } else { n };
            let args = [
                x.arg(),
                delta.arg(),
                delta_stride.into(),
                weight.arg(),
                EPS.into(),
                n.into(),
                wide.arg(),
                out.arg(),
                stride.into(),
            ];
            launch("rms_norm", (rows, 1), THREADS, 1, &args);
            (x.read::<f32>(), wide.read::<f32>(), out.read::<bf16>())
        };
        let (sum, all, out) = run(&x, &delta);
        for row in 0..rows {
            let mine = row * n..(row + 1) * n;
            let delta = if bias { &delta[..] } else { &delta[mine.clone()] };
            let expected: Vec<f32> =
                x[mine.clone()].iter().zip(delta).map(|(x, d)| x + d).collect();
            assert_eq!(sum[mine.clone()], expected);
            assert!(distance(&all[mine.clone()], &normed(&wide(&expected), &weight)) <= 1e-6);
            let halves: Vec<_> =
                all[mine.clone()].iter().map(|x| kernels::round_bf16(*x)).collect();
            assert_eq!(out[row * stride..row * stride + n], halves);
            let (_, alone, _) = run(&x[mine.clone()], delta);
            assert!(alone == all[mine]);
        }
    }
}

#[test]
fn queries_and_cached_rows_are_rotated_and_laid_out() {
    if library().is_none() {
        return;
    }
    let mut random = Random(2);
    for (rows, heads, nope, rope, rank, interleave) in
        [(3, 5, 24, 8, 40, true), (2, 3, 16, 16, 24, false)]
    {
        let width = nope + rope;
        let (q, table) = (random.floats(rows * heads * width), random.floats(rows * rope));
        let (from, angles) = (Memory::of(&q), Memory::of(&table));
        let plain = Memory::poisoned::<bf16>(heads * rows * nope);
        let turned = Memory::poisoned::<bf16>(rows * heads * rope);
        let args = [
            from.arg(),
            angles.arg(),
            heads.into(),
            nope.into(),
            rope.into(),
            usize::from(interleave).into(),
            plain.arg(),
            turned.arg(),
        ];
        launch("queries", (rows, 1), THREADS, 1, &args);
        let (plain, turned) = (plain.read::<bf16>(), turned.read::<bf16>());
        for row in 0..rows {
            let table = &table[row * rope..(row + 1) * rope];
            for head in 0..heads {
                let query = &q[(row * heads + head) * width..][..width];
                let expected: Vec<_> =
                    query[..nope].iter().map(|x| kernels::round_bf16(*x)).collect();
                assert_eq!(plain[(head * rows + row) * nope..][..nope], expected);
                let got = widened(&turned[(row * heads + head) * rope..][..rope]);
                assert!(distance(&got, &rotated(&query[nope..], table, interleave)) <= 4e-3);
            }
        }

        // Into slots of pages that hold two layers of four positions each.
        let width = rank + rope;
        let (x, bias) = (random.floats(rows * width), random.floats(width));
        let weight = random.floats(rank);
        let page = 2 * 4 * width;
        let places: Vec<u32> = (0..rows as u32).flat_map(|row| [2 - row % 3, row]).collect();
        let cache = Memory::poisoned::<bf16>(3 * page);
        let (from, bias_at) = (Memory::of(&x), Memory::of(&bias));
        let (weight_at, places_at) = (Memory::of(&weight), Memory::of(&places));
        let args = [
            from.arg(),
            bias_at.arg(),
            weight_at.arg(),
            EPS.into(),
            angles.arg(),
            rank.into(),
            rope.into(),
            usize::from(interleave).into(),
            places_at.arg(),
            cache.arg(),
            page.into(),
        ];
        launch("latent", (rows, 1), THREADS, 1, &args);
        let mut cache = cache.read::<bf16>();
        for (row, x) in x.chunks_exact(width).enumerate() {
            let x: Vec<f32> = x.iter().zip(&bias).map(|(x, b)| x + b).collect();
            let mut expected = normed(&wide(&x[..rank]), &weight);
            expected.extend(rotated(&x[rank..], &table[row * rope..(row + 1) * rope], interleave));
            let at = places[2 * row] as usize * page + places[2 * row + 1] as usize * width;
            assert!(distance(&widened(&cache[at..at + width]), &expected) <= 4e-3);
            cache[at..at + width].fill(bf16::from_bits(0xffff));
        }
        assert!(cache.iter().all(|x| x.to_bits() == 0xffff), "nothing else is written");
    }
}

#[test]
fn embeddings_and_joined_heads() {
    if library().is_none() {
        return;
    }
    let mut random = Random(3);
    let (rows, n, heads) = (4, 40, 3);
    let (narrow, tokens) = (random.halves(9 * n), [8u32, 0, 3, 8]);
    let table = widened(&narrow);
    let expected: Vec<f32> =
        tokens.iter().flat_map(|t| table[*t as usize * n..][..n].to_vec()).collect();
    let tokens = Memory::of(&tokens);
    for (name, table) in [("embed_bf16", Memory::of(&narrow)), ("embed_f32", Memory::of(&table))] {
        let out = Memory::poisoned::<f32>(rows * n);
        let args = [table.arg(), tokens.arg(), n.into(), out.arg()];
        launch(name, (rows, 1), THREADS, 1, &args);
        assert_eq!(out.read::<f32>(), expected);
    }

    let values = random.halves(heads * rows * n);
    let stride = heads * n + 8;
    let (from, out) = (Memory::of(&values), Memory::poisoned::<bf16>(rows * stride));
    let args = [from.arg(), heads.into(), n.into(), out.arg(), stride.into()];
    launch("join", (rows, 1), THREADS, 1, &args);
    for (row, out) in out.read::<bf16>().chunks_exact(stride).enumerate() {
        for head in 0..heads {
            assert_eq!(out[head * n..][..n], values[(head * rows + row) * n..][..n]);
        }
    }
}

#[test]
fn layers_are_put_together_in_slot_order() {
    if library().is_none() {
        return;
    }
    let mut random = Random(4);
    let (rows, slots, n) = (3, 4, 300);
    let mut results = random.halves(rows * slots * n);
    let mut weights = random.floats(rows * slots);
    let (shared, residual) = (random.floats(rows * n), random.floats(rows * n));
    // One that was left out.
    weights[5] = 0.0;
    results[5 * n..6 * n].fill(bf16::NAN);
    for with_shared in [true, false] {
        let (results_at, weights_at) = (Memory::of(&results), Memory::of(&weights));
        let (shared_at, out) = (Memory::of(&shared), Memory::of(&residual));
        let given = if with_shared { shared_at.arg() } else { NULL.into() };
        let args = [results_at.arg(), weights_at.arg(), slots.into(), given, n.into(), out.arg()];
        launch("combine", (rows, 1), THREADS, 1, &args);
        for (at, got) in out.read::<f32>().into_iter().enumerate() {
            let (row, column) = (at / n, at % n);
            let slots = (row * slots..(row + 1) * slots).filter(|slot| weights[*slot] != 0.0);
            let mut sum = slots
                .fold(0f32, |sum, s| weights[s].mul_add(results[s * n + column].to_f32(), sum));
            sum += if with_shared { shared[at] } else { 0.0 };
            assert_eq!(got, residual[at] + sum, "row {row} column {column}");
        }
    }
}
