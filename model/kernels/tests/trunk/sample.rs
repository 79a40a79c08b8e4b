//! Choosing tokens.

use crate::device::{Memory, Random, launch, library};

const REFUSED: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Draw {
    seed: u64,
    position: u64,
    temperature: f32,
    min_p: f32,
}

fn run(logits: &[f32], draws: &[Draw]) -> Vec<u32> {
    let vocab = logits.len() / draws.len();
    let table: Vec<u64> = draws
        .iter()
        .flat_map(|draw| {
            let floats =
                u64::from(draw.temperature.to_bits()) | u64::from(draw.min_p.to_bits()) << 32;
            [draw.seed, draw.position, floats]
        })
        .collect();
    let (logits, table) = (Memory::of(logits), Memory::of(&table));
    let tokens = Memory::poisoned::<u32>(draws.len());
    let args = [logits.arg(), table.arg(), vocab.into(), tokens.arg()];
    launch("sample", (draws.len(), 1), 256, 1, &args);
    tokens.read()
}

/// Philox4x32-10, as model/src/sample/philox.rs.
fn uniform(seed: u64, position: u64) -> f64 {
    let mut counter = [position as u32, (position >> 32) as u32, 0, 0];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let first = 0xD251_1F53 * u64::from(counter[0]);
        let second = 0xCD9E_8D57 * u64::from(counter[2]);
        let [_, b, _, d] = counter;
        let high = |product: u64| (product >> 32) as u32;
        counter =
            [high(second) ^ b ^ key[0], second as u32, high(first) ^ d ^ key[1], first as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    let bits = (u64::from(counter[1]) << 32 | u64::from(counter[0])) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// As model/src/sample.rs draws without top-k and top-p.
fn reference(logits: &[f32], draw: Draw) -> u32 {
    let scaled: Vec<f32> = logits.iter().map(|l| l / draw.temperature).collect();
    let most = scaled.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights = scaled.iter().map(|l| (l - most).exp()).zip(0..);
    let kept: Vec<(f32, u32)> = weights.filter(|(w, _)| *w > 0.0 && *w >= draw.min_p).collect();
    let total: f64 = kept.iter().map(|(w, _)| f64::from(*w)).sum();
    let mut left = uniform(draw.seed, draw.position) * total;
    for (weight, id) in &kept {
        left -= f64::from(*weight);
        if left < 0.0 {
            return *id;
        }
    }
    kept[kept.len() - 1].1
}

#[test]
fn draws_are_those_of_the_reference() {
    if library().is_none() {
        return;
    }
    // The published vector for counter 0 and key 0.
    let bits = (0xe169_c58du64 << 32 | 0x6627_e8d5) >> 11;
    assert_eq!(uniform(0, 0), bits as f64 / (1u64 << 53) as f64);
    let mut random = Random(5);
    for (vocab, temperature, min_p) in
        [(1000, 0.7, 0.0), (1000, 1.0, 0.1), (100, 1.5, 0.0), (3, 1.0, 0.9)]
    {
        let draws: Vec<Draw> = (0..24)
            .map(|i| Draw { seed: 0x1234_5678_9abc + i, position: i << 31, temperature, min_p })
            .collect();
        let logits: Vec<f32> = (0..draws.len() * vocab).map(|_| 4.0 * random.unit()).collect();
        let tokens = run(&logits, &draws);
        let expected: Vec<u32> = logits
            .chunks_exact(vocab)
            .zip(&draws)
            .map(|(logits, draw)| reference(logits, *draw))
            .collect();
        assert_eq!(tokens, expected, "{vocab} tokens");
        // Alone, each is the same.
        assert_eq!(run(&logits[..vocab], &draws[..1]), expected[..1]);
    }
}

#[test]
fn greedy_takes_the_lower_of_equals_and_what_is_not_finite_is_refused() {
    if library().is_none() {
        return;
    }
    let vocab = 600;
    let mut random = Random(6);
    let mut logits: Vec<f32> = (0..4 * vocab).map(|_| random.below(20) as f32 - 30.0).collect();
    (logits[17], logits[300], logits[599]) = (5.0, 5.0, 5.0);
    logits[vocab + 599] = 9.0;
    logits[2 * vocab + 411] = f32::NAN;
    logits[3 * vocab] = f32::NEG_INFINITY;
    let greedy = Draw { seed: 1, position: 1, temperature: 0.0, min_p: 0.0 };
    assert_eq!(run(&logits, &[greedy; 4]), [17, 599, REFUSED, REFUSED]);
    let drawn = Draw { temperature: 1.0, ..greedy };
    assert_eq!(run(&logits, &[drawn; 4])[2..], [REFUSED; 2]);
}
