//! Routed experts: many small networks, each over the few rows that chose it.
//!
//! Rows come and go in wire form. All experts of a call share the threads: the work is cut by
//! expert and by columns into tiles, first for the inner layer, then for the outer one. How it is
//! cut changes no bit, as every value is computed from its own row by one kernel call.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use half::bf16;
use kernels::{Acts, Compute};

use crate::activations::{WireScratch, from_wire, to_wire};
use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::ffn::Ffn;
use crate::numerics::Numerics;
use crate::parallel::{Arena, for_each, grown};
use crate::weight::Weight;

/// One routed expert: offsets into its mapped checkpoint, which it keeps open.
#[derive(Clone)]
pub struct Expert {
    checkpoint: Arc<Checkpoint>,
    layer: usize,
    index: usize,
    weights: Ffn,
}

impl Expert {
    /// Looks up expert `index` of MoE layer `layer`; reads no weights.
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        layer: usize,
        index: usize,
    ) -> Result<Expert, LoadError> {
        let weights = checkpoint.expert(layer, index)?;
        Ok(Expert { checkpoint: checkpoint.clone(), layer, index, weights })
    }

    /// Its layer.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Its index in the layer.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Width of the rows that it takes and gives.
    pub fn hidden(&self) -> usize {
        self.weights.gate.k()
    }

    /// Bytes of its weights as stored.
    pub fn bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Gate, up and down.
    pub(crate) fn weights(&self) -> [Weight; 3] {
        [self.weights.gate, self.weights.up, self.weights.down]
    }

    /// Asks the system to read its weights in; only a hint.
    pub fn prefetch(&self) {
        for weight in self.weights() {
            weight.prefetch(&self.checkpoint);
        }
    }
}

impl Checkpoint {
    /// The weights of one routed expert, from the published layout (three matrices an expert) or
    /// the fused one (two stacks a layer).
    fn expert(&self, layer: usize, index: usize) -> Result<Ffn, LoadError> {
        let config = self.config();
        let (hidden, inner, count) = (config.hidden, config.moe_intermediate, config.experts);
        let prefix = format!("model.layers.{layer}.mlp.experts");
        if !config.is_moe(layer) || index >= count {
            let file = self.dir().join("config.json").display().to_string();
            let problem = format!("the configuration has no expert {index} in layer {layer}");
            return Err(LoadError::tensor(&file, &format!("{prefix}.{index}"), problem));
        }
        let fused = format!("{prefix}.gate_up_proj");
        if !self.contains(&fused) {
            return Ffn::load(self, &format!("{prefix}.{index}"), hidden, inner);
        }
        let pair = [count, 2 * inner, hidden];
        let down = format!("{prefix}.down_proj");
        Ok(Ffn {
            gate: self.stacked(&fused, pair, index, 0, inner)?,
            up: self.stacked(&fused, pair, index, inner, inner)?,
            down: self.stacked(&down, [count, hidden, inner], index, 0, hidden)?,
        })
    }

    /// Checks that experts `ids` of MoE layer `layer` are all there, in the right shape; reads no
    /// weights.
    pub fn check_experts(
        &self,
        layer: usize,
        ids: impl IntoIterator<Item = usize>,
    ) -> Result<(), LoadError> {
        ids.into_iter().try_for_each(|index| self.expert(layer, index).map(drop))
    }

    /// Bytes of one expert of MoE layer `layer`, as stored.
    pub fn expert_bytes(&self, layer: usize) -> Result<usize, LoadError> {
        self.expert(layer, 0).map(|e| e.bytes())
    }
}

/// Consecutive rows for one expert.
#[derive(Clone, Copy)]
pub struct ExpertGroup<'a> {
    /// The expert.
    pub expert: &'a Expert,
    /// How many of the rows are for it.
    pub rows: usize,
}

/// Reusable working memory of [`forward_experts`].
#[derive(Default)]
pub struct ExpertScratch {
    wire: WireScratch,
    spans: Vec<Span>,
    /// Inner layer in tiles, `[group][tile][rows][tile columns]`.
    tiles: Vec<f32>,
    /// Inner layer by rows, `[rows, inner]`, f32 class.
    inner: Vec<f32>,
    /// The same, bf16 class.
    rounded: Vec<bf16>,
    /// Results in tiles, as above.
    out: Vec<f32>,
    tasks: Arena<TaskScratch>,
}

/// Where one group's rows and values lie.
#[derive(Clone, Copy)]
struct Span {
    group: usize,
    /// First row among all rows.
    row: usize,
    rows: usize,
    /// First inner value among all groups'.
    inner: usize,
}

#[derive(Default)]
struct TaskScratch {
    gate: Vec<f32>,
    up: Vec<f32>,
    rounded: Vec<bf16>,
}

/// Least multiplications that are worth waking a thread for.
const WORTH_SHARING: usize = 1 << 16;

/// How many columns of `n` a tile takes, for `work` multiplications of all groups together.
fn tile_columns(n: usize, groups: usize, threads: usize, work: usize) -> usize {
    if threads == 1 || work < WORTH_SHARING {
        return n.max(1);
    }
    let tiles = (3 * threads).div_ceil(groups);
    n.div_ceil(tiles).next_multiple_of(32).clamp(1, n.max(1))
}

/// Computes every group's rows with its expert.
///
/// `x` holds the groups' rows one after the other, `[rows, hidden]` little-endian values of the
/// class; `out` receives as many result rows of the same form, in the same order. Panics if `x` is
/// not that long, or if experts differ in width: frames are checked before they come here.
pub fn forward_experts(
    compute: &Compute,
    numerics: Numerics,
    groups: &[ExpertGroup<'_>],
    x: &[u8],
    out: &mut Vec<u8>,
    scratch: &mut ExpertScratch,
) {
    let Some(first) = groups.iter().find(|g| g.rows > 0) else {
        assert!(x.is_empty(), "rows without a group");
        out.clear();
        return;
    };
    let hidden = first.expert.hidden();
    let ExpertScratch { wire, spans, tiles, inner, rounded, out: results, tasks } = scratch;
    let (rows, inner_len) = lay_out(groups, hidden, spans);
    let row_bytes = hidden * numerics.bytes();
    assert_eq!(x.len(), rows * row_bytes, "rows of {hidden} values in {numerics}");
    let kernels = compute.kernels;
    let (pool, threads) = (&compute.pool, compute.pool.threads());
    let x = from_wire(numerics, x, wire);
    let weights =
        |span: &Span| (&groups[span.group].expert.weights, &*groups[span.group].expert.checkpoint);

    // Inner layer: gate and up for the same columns in one task, so that their product is formed in
    // cache.
    let work = 2 * inner_len * hidden;
    let columns = |n| tile_columns(n, spans.len(), threads, work);
    let count = |n: &dyn Fn(&Span) -> usize| -> usize {
        spans.iter().map(|s| n(s).div_ceil(columns(n(s)))).sum()
    };
    let inner_of = |span: &Span| weights(span).0.gate.n();
    let pieces = Tiles::new(spans, &inner_of, &columns, grown(tiles, inner_len));
    for_each(pool, count(&inner_of), pieces, |(span, from, to, tile)| {
        let (ffn, checkpoint) = weights(&span);
        let x = x.slice(span.row * hidden..(span.row + span.rows) * hidden);
        tasks.with(|t| {
            let gate = grown(&mut t.gate, tile.len());
            let up = grown(&mut t.up, tile.len());
            kernels.matmul(x, span.rows, ffn.gate.mat(checkpoint).rows(from..to), gate, to - from);
            kernels.matmul(x, span.rows, ffn.up.mat(checkpoint).rows(from..to), up, to - from);
            kernels.silu_mul(gate, up, tile);
        });
    });

    // Tiles to rows, rounded on the way in the bf16 class.
    let h = match numerics {
        Numerics::F32 => {
            let rows = grown(inner, inner_len);
            by_rows(spans, &inner_of, &columns, tiles, |at, piece| {
                rows[at..at + piece.len()].copy_from_slice(piece);
            });
            Acts::F32(rows)
        }
        Numerics::Bf16 => {
            let rows = grown(rounded, inner_len);
            by_rows(spans, &inner_of, &columns, tiles, |at, piece| {
                kernels.to_bf16(piece, &mut rows[at..at + piece.len()]);
            });
            Acts::Bf16(rows)
        }
    };

    // Outer layer.
    let hidden_of = |_: &Span| hidden;
    let pieces = Tiles::new(spans, &hidden_of, &columns, grown(results, rows * hidden));
    for_each(pool, count(&hidden_of), pieces, |(span, from, to, tile)| {
        let (ffn, checkpoint) = weights(&span);
        let h = h.slice(span.inner..span.inner + span.rows * ffn.gate.n());
        kernels.matmul(h, span.rows, ffn.down.mat(checkpoint).rows(from..to), tile, to - from);
    });

    out.resize(rows * row_bytes, 0);
    let size = numerics.bytes();
    tasks.with(|t| {
        by_rows(spans, &hidden_of, &columns, results, |at, piece| {
            let out = &mut out[at * size..(at + piece.len()) * size];
            to_wire(kernels, numerics, piece, &mut t.rounded, out);
        });
    });
}

/// Fills `spans` with the groups that have rows; gives all rows and all inner values.
fn lay_out(groups: &[ExpertGroup<'_>], hidden: usize, spans: &mut Vec<Span>) -> (usize, usize) {
    spans.clear();
    let (mut row, mut inner) = (0, 0);
    for (group, ExpertGroup { expert, rows }) in groups.iter().enumerate() {
        assert_eq!(expert.hidden(), hidden, "experts of one width");
        if *rows > 0 {
            spans.push(Span { group, row, rows: *rows, inner });
        }
        row += rows;
        inner += rows * expert.weights.gate.n();
    }
    (row, inner)
}

/// The tiles of all spans in order: span, first and last column, and the tile's `[rows, columns]`
/// of `rest`.
struct Tiles<'a, N, C> {
    spans: std::slice::Iter<'a, Span>,
    width: &'a N,
    columns: &'a C,
    rest: &'a mut [f32],
    /// The span being cut, and its next column.
    current: Option<(Span, usize)>,
}

impl<'a, N: Fn(&Span) -> usize, C: Fn(usize) -> usize> Tiles<'a, N, C> {
    fn new(spans: &'a [Span], width: &'a N, columns: &'a C, rest: &'a mut [f32]) -> Self {
        Tiles { spans: spans.iter(), width, columns, rest, current: None }
    }
}

impl<'a, N: Fn(&Span) -> usize, C: Fn(usize) -> usize> Iterator for Tiles<'a, N, C> {
    type Item = (Span, usize, usize, &'a mut [f32]);

    fn next(&mut self) -> Option<Self::Item> {
        let (span, from) = match self.current.take() {
            Some(current) => current,
            None => (*self.spans.next()?, 0),
        };
        let width = (self.width)(&span);
        let to = width.min(from + (self.columns)(width));
        if to < width {
            self.current = Some((span, to));
        }
        let (tile, rest) = std::mem::take(&mut self.rest).split_at_mut(span.rows * (to - from));
        self.rest = rest;
        Some((span, from, to, tile))
    }
}

/// Calls `put` with every row piece of every tile and the place of its first value in row-major
/// order.
fn by_rows(
    spans: &[Span],
    width: &impl Fn(&Span) -> usize,
    columns: &impl Fn(usize) -> usize,
    tiles: &[f32],
    mut put: impl FnMut(usize, &[f32]),
) {
    let (mut rest, mut first) = (tiles, 0);
    for span in spans {
        let width = width(span);
        let columns = columns(width);
        for from in (0..width).step_by(columns) {
            let len = columns.min(width - from);
            let (tile, after) = rest.split_at(span.rows * len);
            rest = after;
            for (row, piece) in tile.chunks(len).enumerate() {
                put(first + row * width + from, piece);
            }
        }
        first += span.rows * width;
    }
}
