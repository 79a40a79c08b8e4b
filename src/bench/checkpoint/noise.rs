//! Where random weights come from: a generator that can start anywhere.

use kernels::round_bf16;

use crate::bench::stats::{GAMMA, mix};

/// The values of one tensor. Each depends on its place only.
pub struct Stream {
    key: u64,
    centre: f32,
    spread: f32,
}

impl Stream {
    /// Values around `centre` with standard deviation `spread`.
    pub fn new(seed: u64, name: &str, centre: f32, spread: f32) -> Self {
        // FNV-1a, mixed, so that neighbouring names and seeds have nothing in common.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { key: mix(hash ^ mix(seed.wrapping_add(GAMMA))), centre, spread }
    }

    /// The values from place `start` on, rounded to bf16 as all variants have them.
    pub fn fill(&self, start: usize, values: &mut [f32]) {
        for (at, value) in (start as u64..).zip(values) {
            let bits = mix(self.key.wrapping_add(at.wrapping_mul(GAMMA)));
            // Four uniform halves of a word add up to a bell: as good as normal, and
            // bounded, so that no single weight decides a block's scale.
            let sum = (0..4).map(|i| (bits >> (16 * i)) as u16 as f32).sum::<f32>();
            let bell = (sum - 2.0 * 65535.0) * (3.0f32.sqrt() / 65535.0);
            *value = round_bf16(self.centre + self.spread * bell).to_f32();
        }
    }
}

pub fn bf16_bytes(value: f32) -> [u8; 2] {
    round_bf16(value).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_depends_on_its_place_alone_and_is_spread_as_asked() {
        let stream = Stream::new(7, "a", 0.5, 2.0);
        let mut whole = vec![0.0; 100_000];
        stream.fill(0, &mut whole);
        let mut part = vec![0.0; 10];
        stream.fill(990, &mut part);
        assert_eq!(part, whole[990..1000]);
        let mean = whole.iter().sum::<f32>() / whole.len() as f32;
        let square = whole.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / whole.len() as f32;
        assert!((mean - 0.5).abs() < 0.03 && (square.sqrt() - 2.0).abs() < 0.03, "{mean} {square}");
        let mut other = vec![0.0; 10];
        Stream::new(8, "a", 0.5, 2.0).fill(990, &mut other);
        assert_ne!(part, other);
        Stream::new(7, "b", 0.5, 2.0).fill(990, &mut other);
        assert_ne!(part, other);
    }
}
