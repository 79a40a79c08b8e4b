//! Which of two ways to do something is faster here, for each size of it: the
//! usual one, unless the other was measured to be better by a margin, and now and
//! then the slower one, to notice when that has changed. Pure: times come in.

/// Sizes are told apart by powers of two.
const SIZES: usize = usize::BITS as usize;
/// Of so many turns of a size, one takes the way that seemed slower.
const TRY_EVERY: u32 = 64;

/// How measurements are judged.
#[derive(Clone, Copy)]
pub struct Judgement {
    /// The other way has to take less than this part of the usual one's time.
    pub margin: f64,
    /// Weight of a new measurement.
    pub new: f64,
    /// A measurement counts as at most so many times the mean.
    pub most: f64,
}

/// Means of one size.
#[derive(Clone, Copy, Default)]
struct Size {
    usual: Option<f64>,
    other: Option<f64>,
    turns: u32,
}

/// See the module's text.
pub struct Choice {
    judgement: Judgement,
    sizes: [Size; SIZES],
}

impl Choice {
    pub fn new(judgement: Judgement) -> Self {
        Self { judgement, sizes: [Size::default(); SIZES] }
    }

    /// Whether to take the other way, for something of size `size`.
    pub fn other(&mut self, size: usize) -> bool {
        let size = &mut self.sizes[size.max(1).ilog2() as usize];
        size.turns = size.turns.wrapping_add(1);
        match (size.usual, size.other) {
            (None, _) => false,
            (_, None) => true,
            (Some(usual), Some(other)) => {
                let faster = other < usual * self.judgement.margin;
                faster != size.turns.is_multiple_of(TRY_EVERY)
            }
        }
    }

    /// Takes in what the way taken cost.
    pub fn observe(&mut self, size: usize, other: bool, cost: f64) {
        let Judgement { new, most, .. } = self.judgement;
        let size = &mut self.sizes[size.max(1).ilog2() as usize];
        let mean = if other { &mut size.other } else { &mut size.usual };
        *mean = Some(mean.map_or(cost, |old| old + (cost.min(old * most) - old) * new));
    }
}
