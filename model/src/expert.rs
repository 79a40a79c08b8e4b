//! Routed experts: many small networks, each over the few rows that chose it.
//!
//! Rows come and go in wire form. All experts of a call share the threads: the work is cut by
//! expert and by columns into tiles, first for the inner layer, then for the outer one. How it is
//! cut changes no bit, as every value is computed from its own row by one kernel call.

mod arriving;
mod batch;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;
use kernels::cuda::{ExpertShape, LayoutError, Row, Rows};
use kernels::{Acts, Compute, Gated, Mat, Out, Packed, Pool};

use crate::activations::{WireScratch, from_wire, to_wire};
use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::ffn::Ffn;
use crate::numerics::Numerics;
use crate::parallel::{Arena, for_each, grown};
use crate::weight::Weight;
pub use arriving::Arriving;
pub use batch::{CpuExperts, Experts};

/// One routed expert: offsets into its mapped checkpoint, which it keeps open.
#[derive(Clone)]
pub struct Expert {
    checkpoint: Arc<Checkpoint>,
    layer: usize,
    index: usize,
    weights: Ffn,
    /// No other lookup has the same; clones do.
    key: u64,
}

/// A key that no other expert has.
fn next_key() -> u64 {
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    TAKEN.fetch_add(1, Ordering::Relaxed)
}

impl Expert {
    /// Looks up expert `index` of MoE layer `layer`; reads no weights.
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        layer: usize,
        index: usize,
    ) -> Result<Expert, LoadError> {
        let weights = checkpoint.expert(layer, index)?;
        checkpoint.check_here(&weights)?;
        let key = next_key();
        Ok(Expert { checkpoint: checkpoint.clone(), layer, index, weights, key })
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

    /// What tells its weights from all others' in this process.
    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    /// Gate, up and down, as they are stored.
    pub fn mats(&self) -> [Mat<'_>; 3] {
        self.weights().map(|weight| weight.mat(&self.checkpoint))
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

    /// Reads its weights in, so that its first rows wait for no disk.
    pub fn warm(&self) {
        for weight in self.weights() {
            weight.warm(&self.checkpoint);
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

    /// Whether the files of that expert's weights are here.
    pub fn has_expert(&self, layer: usize, index: usize) -> Result<bool, LoadError> {
        Ok(self.check_here(&self.expert(layer, index)?).is_ok())
    }

    fn check_here(&self, weights: &Ffn) -> Result<(), LoadError> {
        let absent = weights.spans().find(|span| self.is_absent(*span));
        absent.map_or(Ok(()), |span| Err(self.absent(span)))
    }

    /// The shape of the experts of MoE layer `layer` as a GPU sees them, from what is known without their bytes.
    pub fn expert_shape(
        &self,
        layer: usize,
    ) -> Result<Result<ExpertShape, LayoutError>, LoadError> {
        let Ffn { gate, up, down } = self.expert(layer, 0)?;
        Ok(ExpertShape::of_stored([gate, up, down].map(|weight| weight.stored())))
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

/// Rows of `width` bytes that lie one after the other, by place. Panics if they are not whole.
pub fn together(rows: &[u8], width: usize) -> impl Rows {
    assert!(rows.len().is_multiple_of(width), "rows of {width} bytes");
    move |place| Row { id: place, fp8: false, bytes: &rows[place * width..][..width] }
}

/// Reusable working memory of [`forward_experts`].
#[derive(Default)]
pub struct ExpertScratch {
    rows: InputScratch,
    spans: Vec<Span>,
    /// Values in tiles, `[group][tile][rows][tile columns]` in the class's type.
    tiles: Vec<u8>,
    /// Inner layer by rows, `[rows, inner]`, the same.
    inner: Vec<u8>,
    inner_wire: WireScratch,
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

/// Rows next to each other, as copied and as activations.
#[derive(Default)]
struct InputScratch {
    bytes: Vec<u8>,
    wire: WireScratch,
}

impl InputScratch {
    /// Those of the places `places`, `[places, width / class size]`.
    fn gather(
        &mut self,
        rows: &dyn Rows,
        numerics: Numerics,
        places: Range<usize>,
        width: usize,
    ) -> Acts<'_> {
        let bytes = grown(&mut self.bytes, places.len() * width);
        for (place, row) in places.zip(bytes.chunks_exact_mut(width)) {
            rows.copy(place, row);
        }
        from_wire(numerics, bytes, &mut self.wire)
    }
}

#[derive(Default)]
struct TaskScratch {
    rows: InputScratch,
    gated: Gated,
    packed: Packed,
    gate: Vec<f32>,
    up: Vec<f32>,
    out: Vec<f32>,
    rounded: Vec<bf16>,
}

/// Least multiplications that are worth waking a thread for.
const WORTH_SHARING: usize = 1 << 18;

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
/// Places of `x` are the groups' rows one after the other, `hidden` little-endian values of the class each; `out`
/// receives as many result rows of the same form, in the same order. Panics if experts differ in width: frames are
/// checked before they come here.
pub fn forward_experts(
    compute: &Compute,
    numerics: Numerics,
    groups: &[ExpertGroup<'_>],
    x: &dyn Rows,
    out: &mut Vec<u8>,
    scratch: &mut ExpertScratch,
) {
    let Some(first) = groups.iter().find(|g| g.rows > 0) else {
        out.clear();
        return;
    };
    let hidden = first.expert.hidden();
    let ExpertScratch { rows: all, spans, tiles, inner, inner_wire, tasks } = scratch;
    let (rows, inner_len) = lay_out(groups, hidden, spans);
    let row_bytes = hidden * numerics.bytes();
    let kernels = compute.kernels;
    let (pool, threads) = (&compute.pool, compute.pool.threads());
    let weights =
        |span: &Span| (&groups[span.group].expert.weights, &*groups[span.group].expert.checkpoint);

    let size = numerics.bytes();
    let work = 2 * inner_len * hidden;
    let columns = |n| tile_columns(n, spans.len(), threads, work);
    let count = |n: &dyn Fn(&Span) -> usize| -> usize {
        spans.iter().map(|s| n(s).div_ceil(columns(n(s)))).sum()
    };

    out.resize(rows * row_bytes, 0);
    if count(&|_| hidden) == spans.len() && count(&|s| weights(s).0.gate.n()) == spans.len() {
        // An expert a task: its rows are copied where they are packed, and what its inner layer gives goes
        // into its outer one in the kernel's own layout, so that neither leaves the cache.
        let mut rest = &mut out[..];
        let pieces = spans.iter().map(|span| {
            let (piece, after) = std::mem::take(&mut rest).split_at_mut(span.rows * row_bytes);
            rest = after;
            (span, piece)
        });
        return for_each(pool, spans.len(), pieces, |(span, piece)| {
            let (ffn, checkpoint) = weights(span);
            let [gate, up, down] = [ffn.gate, ffn.up, ffn.down].map(|w| w.mat(checkpoint));
            tasks.with(|t| {
                let places = span.row..span.row + span.rows;
                let x = t.rows.gather(x, numerics, places, row_bytes);
                t.gated.fill(&*kernels, None, x, span.rows, [gate, up, down]);
                if numerics == Numerics::Bf16
                    && let Ok(piece) = bytemuck::try_cast_slice_mut(piece)
                {
                    return kernels.matmul_rounded(t.gated.h(), down, piece);
                }
                let y = grown(&mut t.out, span.rows * hidden);
                kernels.matmul_packed(
                    t.gated.h(),
                    down,
                    &mut Out::new(y, span.rows, hidden, hidden),
                );
                to_wire(kernels, numerics, y, &mut t.rounded, piece);
            });
        });
    }

    let x = all.gather(x, numerics, 0..rows, row_bytes);
    // Inner layer: gate and up for the same columns in one task, so that their product is formed in
    // cache.
    let inner_of = |span: &Span| weights(span).0.gate.n();
    let cut = Cut { spans, width: &inner_of, columns: &columns, size };
    cut.compute(pool, count(&inner_of), tiles, grown(inner, inner_len * size), |tile, piece| {
        let Tile { span, from, to } = tile;
        let (ffn, checkpoint) = weights(&span);
        let x = x.slice(span.row * hidden..(span.row + span.rows) * hidden);
        let (gate, up) = (ffn.gate.mat(checkpoint), ffn.up.mat(checkpoint));
        let (gate, up) = (gate.rows(from..to), up.rows(from..to));
        let values = span.rows * (to - from);
        tasks.with(|t| {
            let mut product = |w: Mat<'_>, pack: bool, out: &mut Vec<f32>| {
                if pack {
                    kernels.pack(x, span.rows, w, &mut t.packed);
                }
                let mut out = Out::new(grown(out, values), span.rows, to - from, to - from);
                kernels.matmul_packed(&t.packed, w, &mut out);
            };
            product(gate, true, &mut t.gate);
            product(up, up.dtype() != gate.dtype(), &mut t.up);
            let h = grown(&mut t.out, values);
            kernels.silu_mul(&t.gate[..values], &t.up[..values], h);
            to_wire(kernels, numerics, h, &mut t.rounded, piece);
        });
    });

    // Outer layer.
    let h = from_wire(numerics, &inner[..inner_len * size], inner_wire);
    let hidden_of = |_: &Span| hidden;
    let cut = Cut { spans, width: &hidden_of, columns: &columns, size };
    cut.compute(pool, count(&hidden_of), tiles, out, |tile, piece| {
        let Tile { span, from, to } = tile;
        let (ffn, checkpoint) = weights(&span);
        let h = h.slice(span.inner..span.inner + span.rows * ffn.gate.n());
        let down = ffn.down.mat(checkpoint).rows(from..to);
        tasks.with(|t| {
            let y = grown(&mut t.out, span.rows * (to - from));
            kernels.matmul(h, span.rows, down, y, to - from);
            to_wire(kernels, numerics, y, &mut t.rounded, piece);
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

/// Columns of one span.
struct Tile {
    span: Span,
    from: usize,
    to: usize,
}

/// How the spans' values are cut into tiles.
struct Cut<'a> {
    spans: &'a [Span],
    /// Values of a row of a span.
    width: &'a (dyn Fn(&Span) -> usize + Sync),
    /// Columns of a tile of so many.
    columns: &'a (dyn Fn(usize) -> usize + Sync),
    /// Bytes of a value.
    size: usize,
}

impl Cut<'_> {
    /// Has `f` compute all `count` tiles, and puts them together in `out`, row by row. `f` gets
    /// the bytes of a tile `[rows, columns]`; where no row is cut they are those of `out`.
    fn compute(
        &self,
        pool: &Pool,
        count: usize,
        staged: &mut Vec<u8>,
        out: &mut [u8],
        f: impl Fn(Tile, &mut [u8]) + Sync,
    ) {
        let whole = count == self.spans.len();
        let mut rest = if whole { &mut *out } else { grown(staged, out.len()) };
        let pieces = self.tiles().map(|tile| {
            let len = tile.span.rows * (tile.to - tile.from) * self.size;
            let (piece, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            (tile, piece)
        });
        for_each(pool, count, pieces, |(tile, piece)| f(tile, piece));
        if whole {
            return;
        }
        let (mut rest, mut first) = (&staged[..out.len()], 0);
        for Tile { span, from, to } in self.tiles() {
            let (width, len) = ((self.width)(&span) * self.size, (to - from) * self.size);
            let (tile, after) = rest.split_at(span.rows * len);
            rest = after;
            for (row, piece) in tile.chunks(len).enumerate() {
                out[first + row * width + from * self.size..][..len].copy_from_slice(piece);
            }
            if to * self.size == width {
                first += span.rows * width;
            }
        }
    }

    /// The tiles of all spans in order.
    fn tiles(&self) -> impl Iterator<Item = Tile> + Send {
        self.spans.iter().flat_map(|span| {
            let width = (self.width)(span);
            let columns = (self.columns)(width);
            let starts = (0..width).step_by(columns);
            starts.map(move |from| Tile { span: *span, from, to: width.min(from + columns) })
        })
    }
}
