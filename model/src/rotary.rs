//! Rotary position embedding of the decoupled key and query parts (DeepSeek-V2 paper, section
//! 2.1.3).
//!
//! Angles are f32 as in the reference; their cosine and sine are computed in f64 and rounded once.
//! The result stays in the places of the pairs it came from: the reference moves interleaved pairs
//! apart, for queries and keys alike, which no product of the two can tell.

use crate::config::Rope;

impl Rope {
    /// Cosine and sine of every pair at `position`: `out` `[qk_rope]` receives all cosines, then
    /// all sines.
    pub(crate) fn table(&self, position: usize, out: &mut [f32]) {
        let (cos, sin) = out.split_at_mut(self.inv_freq.len());
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&self.inv_freq) {
            let angle = f64::from(position as f32 * frequency);
            *cos = angle.cos() as f32 * self.amplitude;
            *sin = angle.sin() as f32 * self.amplitude;
        }
    }

    /// Rotates `x` `[qk_rope]` in place by `table`.
    pub(crate) fn rotate(&self, x: &mut [f32], table: &[f32]) {
        let half = self.inv_freq.len();
        let (cos, sin) = table.split_at(half);
        let turn = |a: f32, b: f32, i: usize| (a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]);
        if self.interleave {
            for (i, pair) in x.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *pair = turn(pair[0], pair[1], i).into();
            }
        } else {
            let (first, second) = x.split_at_mut(half);
            for (i, (a, b)) in first.iter_mut().zip(second).enumerate() {
                (*a, *b) = turn(*a, *b, i);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(interleave: bool) -> Rope {
        Rope {
            kind: "default",
            theta: 10_000.0,
            interleave,
            inv_freq: vec![1.0, 0.01],
            amplitude: 1.0,
            score_factor: 1.0,
        }
    }

    fn rotated(interleave: bool, x: [f32; 4], position: usize) -> [f32; 4] {
        let (rope, mut table, mut x) = (rope(interleave), [0.0; 4], x);
        rope.table(position, &mut table);
        rope.rotate(&mut x, &table);
        x
    }

    #[test]
    fn pairs_are_neighbours_or_halves() {
        let (c, s) = (1f32.cos(), 1f32.sin());
        let near = |a: [f32; 4], b: [f32; 4]| {
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
        };
        let (c2, s2) = (0.01f32.cos(), 0.01f32.sin());
        near(rotated(true, [1.0, 0.0, 0.0, 1.0], 1), [c, s, -s2, c2]);
        near(rotated(false, [1.0, 0.0, 0.0, 1.0], 1), [c, -s2, s, c2]);
        assert_eq!(rotated(true, [1.0, 2.0, 3.0, 4.0], 0), [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn products_depend_on_the_distance_only() {
        let dot = |a: [f32; 4], b: [f32; 4]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let (q, k) = ([0.3, -1.0, 0.7, 0.2], [1.1, 0.4, -0.6, 0.9]);
        for interleave in [true, false] {
            let near = dot(rotated(interleave, q, 7), rotated(interleave, k, 4));
            let far = dot(rotated(interleave, q, 107), rotated(interleave, k, 104));
            assert!((near - far).abs() < 1e-4, "{near} {far}");
        }
    }
}
