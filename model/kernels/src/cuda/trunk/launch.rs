//! The kernels of rows.cu, gate.cu and attention.cu as calls. Each says what it needs of its operands; one that is
//! shorter is an error, and nothing is launched.

use std::ffi::c_void;
use std::ops::Range;

use half::bf16;

use super::super::call::Call;
use super::super::error::GpuError;
use super::super::gpu::Grid;
use super::super::tensor_map::TensorMap;
use super::driver::Driver;
use super::memory::{Buffer, Slice};
use super::op::{Attend, Draw, GATE_TILE, HEADS, Op, Place, Routing, Row, Span};
use super::product::Rows;
use super::tables::Tables;

/// A kernel's argument.
pub(super) enum Arg {
    Address(u64),
    Long(u64),
    Word(u32),
    Real(f32),
    Map(TensorMap),
    Call(Call),
    Attend(Attend),
    Routing(Routing),
}

impl Arg {
    fn pointer(&mut self) -> *mut c_void {
        match self {
            Arg::Address(x) | Arg::Long(x) => std::ptr::from_mut(x).cast(),
            Arg::Word(x) => std::ptr::from_mut(x).cast(),
            Arg::Real(x) => std::ptr::from_mut(x).cast(),
            Arg::Map(x) => std::ptr::from_mut(x).cast(),
            Arg::Call(x) => std::ptr::from_mut(x).cast(),
            Arg::Attend(x) => std::ptr::from_mut(x).cast(),
            Arg::Routing(x) => std::ptr::from_mut(x).cast(),
        }
    }
}

pub(super) fn word(value: usize) -> Arg {
    Arg::Word(value as u32)
}

/// A norm's weight.
pub struct Norm {
    pub weight: Buffer,
    pub n: usize,
    pub eps: f32,
}

/// How queries and keys are cut and rotated.
#[derive(Clone, Copy, Debug)]
pub struct Rotary {
    pub heads: usize,
    pub nope: usize,
    pub rope: usize,
    pub interleave: bool,
}

/// One layer of the paged cache: `[pages][layers][page_tokens][width]` in bf16.
#[derive(Clone, Copy)]
pub struct Cache<'a> {
    pub buffer: &'a Buffer,
    pub pages: usize,
    pub layers: usize,
    pub layer: usize,
    pub page_tokens: usize,
    pub width: usize,
}

impl Cache<'_> {
    /// Where the layer's part of the first page is, and values from page to page, if the step's pages are in it.
    fn of(&self, op: Op, tables: &Tables) -> Result<(u64, usize), GpuError> {
        let page = self.page_tokens * self.width;
        let bounds = tables.bounds();
        let needed = bounds.pages.max(self.pages) * self.layers * page;
        let whole = self.buffer.all().holding::<bf16>(op, needed)?;
        assert!(self.layer < self.layers && bounds.page_tokens == self.page_tokens, "a cache");
        Ok((whole + (self.layer * page * 2) as u64, self.layers * page))
    }
}

/// What attention reads and writes, for a step's rows: absorbed queries `[heads][rows][rank]`, rotated ones
/// `[rows][heads][rope]`, results as the absorbed queries are; `parts` f32 `[parts][heads][rank]` and `tops`
/// `[parts][heads][2]` hold long rows' spans.
pub struct Attention<'a> {
    pub heads: usize,
    pub rank: usize,
    pub scale: f32,
    pub absorbed: &'a Rows,
    pub rotated: &'a Buffer,
    pub out: &'a Rows,
    pub parts: &'a Buffer,
    pub tops: &'a Buffer,
}

impl dyn Driver {
    /// Launches `op`; an empty grid is nothing to do.
    ///
    /// # Safety
    /// `args` are the kernel's, in its order, and hold what it reads and writes.
    pub(super) unsafe fn run<const N: usize>(
        &self,
        op: Op,
        (x, y): (usize, usize),
        shared: u32,
        mut args: [Arg; N],
    ) -> Result<(), GpuError> {
        if x == 0 || y == 0 {
            return Ok(());
        }
        let grid = Grid { blocks: (x as u32, y as u32, 1), threads: op.threads(), shared };
        let mut pointers = args.each_mut().map(Arg::pointer);
        // SAFETY: the caller's promise; arguments outlive the call, which copies them.
        unsafe { self.launch(op, grid, &mut pointers) }
    }

    /// f32 `residual` `[rows, n]` = the tokens' rows of `table` `[vocab, n]`, which is f32 if `wide`, else bf16.
    pub fn embed(
        &self,
        tables: &Tables,
        (table, wide): (&Buffer, bool),
        n: usize,
        residual: &Buffer,
    ) -> Result<(), GpuError> {
        let (rows, count) = (tables.rows(), tables.bounds().vocab * n);
        let (op, table) = match wide {
            true => (Op::EmbedF32, table.all().holding::<f32>(Op::EmbedF32, count)?),
            false => (Op::EmbedBf16, table.all().holding::<bf16>(Op::EmbedBf16, count)?),
        };
        let args = [
            Arg::Address(table),
            Arg::Address(tables.tokens().holding::<u32>(op, rows)?),
            word(n),
            Arg::Address(residual.all().holding::<f32>(op, rows * n)?),
        ];
        // SAFETY: checked above; tokens are below `vocab`.
        unsafe { self.run(op, (rows, 1), op.shared(), args) }
    }

    /// f32 `out` `[range, n]` = those of the wanted rows of `residual`.
    pub fn gather(
        &self,
        tables: &Tables,
        range: Range<usize>,
        n: usize,
        residual: &Buffer,
        out: &Buffer,
    ) -> Result<(), GpuError> {
        let op = Op::EmbedF32;
        let args = [
            Arg::Address(residual.all().holding::<f32>(op, tables.rows() * n)?),
            Arg::Address(tables.wanted(&range).holding::<u32>(op, range.len())?),
            word(n),
            Arg::Address(out.all().holding::<f32>(op, range.len() * n)?),
        ];
        // SAFETY: checked above; wanted rows are below the step's.
        unsafe { self.run(op, (range.len(), 1), op.shared(), args) }
    }

    /// `x` `[rows, n]` += `delta`, if there is one, whose rows are so many values apart (0: the same for all); `out`, and
    /// `wide` in f32 if that is given, = its norm.
    pub fn norm(
        &self,
        rows: usize,
        x: &Buffer,
        delta: Option<(&Buffer, usize)>,
        norm: &Norm,
        wide: Option<&Buffer>,
        out: &Rows,
    ) -> Result<(), GpuError> {
        let (op, n) = (Op::RmsNorm, norm.n);
        let (delta, delta_stride) = match delta {
            Some((delta, apart)) => {
                let count = rows.saturating_sub(1) * apart + n;
                (delta.all().holding::<f32>(op, count)?, apart)
            }
            None => (0, 0),
        };
        let wide = wide.map_or(Ok(0), |wide| wide.all().holding::<f32>(op, rows * n))?;
        assert_eq!(out.k(), n, "values of a normed row");
        let args = [
            Arg::Address(x.all().holding::<f32>(op, rows * n)?),
            Arg::Address(delta),
            word(delta_stride),
            Arg::Address(norm.weight.all().holding::<f32>(op, n)?),
            Arg::Real(norm.eps),
            word(n),
            Arg::Address(wide),
            Arg::Address(out.all().holding::<bf16>(op, rows * out.stride())?),
            word(out.stride()),
        ];
        // SAFETY: checked above.
        unsafe { self.run(op, (rows, 1), op.shared(), args) }
    }

    /// Queries f32 `[rows][heads][nope + rope]` as `plain` `[heads][rows][nope]` and `rotated` `[rows][heads][rope]`.
    pub fn queries(
        &self,
        tables: &Tables,
        rotary: Rotary,
        q: &Buffer,
        plain: &Rows,
        rotated: &Buffer,
    ) -> Result<(), GpuError> {
        let Rotary { heads, nope, rope, interleave } = rotary;
        let (op, rows) = (Op::Queries, tables.rows());
        assert!((plain.k(), plain.stride()) == (nope, nope), "rows of a head's queries");
        assert_eq!(tables.bounds().rope, rope, "a row's rotations");
        let args = [
            Arg::Address(q.all().holding::<f32>(op, rows * heads * (nope + rope))?),
            Arg::Address(tables.rotations().holding::<f32>(op, rows * rope)?),
            word(heads),
            word(nope),
            word(rope),
            word(interleave.into()),
            Arg::Address(plain.all().holding::<bf16>(op, rows * heads * nope)?),
            Arg::Address(rotated.all().holding::<bf16>(op, rows * heads * rope)?),
        ];
        // SAFETY: checked above.
        unsafe { self.run(op, (rows, 1), op.shared(), args) }
    }

    /// Latent rows f32 `[rows, rank + rope]`, plus `bias`, as they go to the cache: the first normed, the others rotated.
    pub fn latent(
        &self,
        tables: &Tables,
        rotary: Rotary,
        x: &Buffer,
        bias: Option<&Buffer>,
        norm: &Norm,
        cache: Cache<'_>,
    ) -> Result<(), GpuError> {
        let (op, rows, rank) = (Op::Latent, tables.rows(), norm.n);
        assert_eq!(rank + rotary.rope, cache.width, "values of an entry of the cache");
        let bias = bias.map_or(Ok(0), |bias| bias.all().holding::<f32>(op, cache.width))?;
        let (layer, page_stride) = cache.of(op, tables)?;
        let args = [
            Arg::Address(x.all().holding::<f32>(op, rows * cache.width)?),
            Arg::Address(bias),
            Arg::Address(norm.weight.all().holding::<f32>(op, rank)?),
            Arg::Real(norm.eps),
            Arg::Address(tables.rotations().holding::<f32>(op, rows * rotary.rope)?),
            word(rank),
            word(rotary.rope),
            word(rotary.interleave.into()),
            Arg::Address(tables.places().holding::<Place>(op, rows)?),
            Arg::Address(layer),
            Arg::Long(page_stride as u64),
        ];
        // SAFETY: checked above; places are pages of the cache and slots of a page.
        unsafe { self.run(op, (rows, 1), op.shared(), args) }
    }

    /// Attention of the step's rows over the cache, in waves whose parts there is room for.
    pub fn attention(
        &self,
        tables: &Tables,
        cache: Cache<'_>,
        attention: &Attention<'_>,
    ) -> Result<(), GpuError> {
        let &Attention { heads, rank, scale, absorbed, rotated, out, parts, tops } = attention;
        let (op, rows) = (Op::Attend, tables.rows());
        let (layer, page_stride) = cache.of(op, tables)?;
        let room = tables.bounds().parts;
        for values in [absorbed, out] {
            assert!((values.k(), values.stride()) == (rank, rank), "rows of a head's latents");
        }
        let whole = Attend {
            absorbed: absorbed.all().holding::<bf16>(op, heads * rows * rank)?,
            rotated: rotated.all().holding::<bf16>(op, rows * heads * (cache.width - rank))?,
            cache: layer,
            page_stride: page_stride as u64,
            pages: tables.pages().holding::<u32>(op, 0)?,
            row: tables.row_table().holding::<Row>(op, rows)?,
            spans: 0,
            out: out.all().holding::<bf16>(op, heads * rows * rank)?,
            parts: parts.all().holding::<f32>(op, room * heads * rank)?,
            tops: tops.all().holding::<f32>(op, room * heads * 2)?,
            rows: rows as u32,
            heads: heads as u32,
            width: cache.width as u32,
            rank: rank as u32,
            page_tokens: cache.page_tokens as u32,
            scale,
        };
        for wave in tables.waves() {
            let spans = tables.spans().holding::<Span>(op, wave.spans.end)?;
            let spans = spans + (wave.spans.start * size_of::<Span>()) as u64;
            let blocks = (wave.spans.len(), heads.div_ceil(HEADS));
            let args = [Arg::Attend(Attend { spans, ..whole })];
            // SAFETY: checked above; spans name rows of the step, whose pages are in the cache and whose parts have room.
            unsafe { self.run(op, blocks, op.shared(), args)? };
            // The wave's rows are counted from its first.
            let first = wave.rows.start;
            let mine = Attend {
                row: whole.row + (first * size_of::<Row>()) as u64,
                out: whole.out + (first * rank * 2) as u64,
                ..whole
            };
            let (op, blocks) = (Op::Merge, (wave.rows.len(), heads));
            // SAFETY: as above.
            unsafe { self.run(op, blocks, op.shared(), [Arg::Attend(mine)])? };
        }
        Ok(())
    }

    /// Values `[heads][rows][n]` side by side, `[rows, heads * n]`.
    pub fn join(
        &self,
        rows: usize,
        heads: usize,
        values: &Rows,
        out: &Rows,
    ) -> Result<(), GpuError> {
        let (op, n) = (Op::Join, values.k());
        assert!(values.stride() == n && out.k() == heads * n, "rows of heads side by side");
        let args = [
            Arg::Address(values.all().holding::<bf16>(op, heads * rows * n)?),
            word(heads),
            word(n),
            Arg::Address(out.all().holding::<bf16>(op, rows * out.stride())?),
            word(out.stride()),
        ];
        // SAFETY: checked above.
        unsafe { self.run(op, (rows, 1), op.shared(), args) }
    }

    /// f32 `residual` `[rows, n]` += the weighted sum of bf16 `results` `[rows][slots][n]`, then `shared` if there is one.
    pub fn combine(
        &self,
        rows: usize,
        n: usize,
        (results, weights, slots): (Slice<'_>, Slice<'_>, usize),
        shared: Option<&Buffer>,
        residual: &Buffer,
    ) -> Result<(), GpuError> {
        let op = Op::Combine;
        let shared = shared.map_or(Ok(0), |shared| shared.all().holding::<f32>(op, rows * n))?;
        let args = [
            Arg::Address(results.holding::<bf16>(op, rows * slots * n)?),
            Arg::Address(weights.holding::<f32>(op, rows * slots)?),
            word(slots),
            Arg::Address(shared),
            word(n),
            Arg::Address(residual.all().holding::<f32>(op, rows * n)?),
        ];
        // SAFETY: checked above.
        unsafe { self.run(op, (rows, 1), op.shared(), args) }
    }

    /// f32 `out` `[rows, experts]` = sigmoid(`x` w^T), x f32 `[rows, n]`, w `[experts, n]` in f32 if `wide`, else in bf16.
    pub fn scores(
        &self,
        rows: usize,
        (experts, n): (usize, usize),
        x: &Buffer,
        (w, wide): (&Buffer, bool),
        out: &Buffer,
    ) -> Result<(), GpuError> {
        let (op, w) = match wide {
            true => (Op::ScoresF32, w.all().holding::<f32>(Op::ScoresF32, experts * n)?),
            false => (Op::ScoresBf16, w.all().holding::<bf16>(Op::ScoresBf16, experts * n)?),
        };
        let args = [
            Arg::Address(x.all().holding::<f32>(op, rows * n)?),
            Arg::Address(w),
            word(rows),
            word(experts),
            word(n),
            Arg::Address(out.all().holding::<f32>(op, rows * experts)?),
        ];
        let blocks = (experts.div_ceil(GATE_TILE), rows.div_ceil(GATE_TILE));
        // SAFETY: checked above.
        unsafe { self.run(op, blocks, op.shared(), args) }
    }

    /// Experts u32 and weights f32 `[rows, top_k]` by `scores` and `bias`.
    pub fn choose(
        &self,
        rows: usize,
        routing: Routing,
        scores: &Buffer,
        bias: &Buffer,
        (chosen, weights): (&Buffer, &Buffer),
    ) -> Result<(), GpuError> {
        let op = Op::Choose;
        let (experts, top_k) = (routing.experts as usize, routing.top_k as usize);
        let shared = 5 * (routing.experts + routing.groups);
        if shared > op.shared() {
            let (need, have) = (shared as usize, op.shared() as usize);
            let kernel = op.name().1;
            return Err(GpuError::Shape { kernel, what: "shared memory", need, have });
        }
        let args = [
            Arg::Address(scores.all().holding::<f32>(op, rows * experts)?),
            Arg::Address(bias.all().holding::<f32>(op, experts)?),
            Arg::Routing(routing),
            Arg::Address(chosen.all().holding::<u32>(op, rows * top_k)?),
            Arg::Address(weights.all().holding::<f32>(op, rows * top_k)?),
        ];
        // SAFETY: checked above.
        unsafe { self.run(op, (rows, 1), shared, args) }
    }
    /// Tokens u32 `[rows]` by `draws` ([`Draw`]) from f32 `logits` `[rows, vocab]`; [`REFUSED`] where a row is not finite.
    ///
    /// [`REFUSED`]: super::op::REFUSED
    pub fn sample(
        &self,
        (rows, vocab): (usize, usize),
        logits: &Buffer,
        draws: &Buffer,
        tokens: &Buffer,
    ) -> Result<(), GpuError> {
        let op = Op::Sample;
        let args = [
            Arg::Address(logits.all().holding::<f32>(op, rows * vocab)?),
            Arg::Address(draws.all().holding::<[u8; Draw::BYTES]>(op, rows)?),
            word(vocab),
            Arg::Address(tokens.all().holding::<u32>(op, rows)?),
        ];
        // SAFETY: checked above.
        unsafe { self.run(op, (rows, 1), op.shared(), args) }
    }
}
