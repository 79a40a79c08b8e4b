//! Products of rows with weights, by the kernels of experts.cu: a weight is an expert with one matrix, and the heads of an
//! attention are experts with as many rows each. A product is in FP8 where its weight is stored so, and then takes rows that
//! [`Driver::code`] has coded; else everything is bf16 where it is multiplied.
//!
//! [`Driver::code`]: trait.Driver.html#method.code

use std::sync::Arc;

use half::bf16;

use super::super::call::{self, CODING_ROWS, Call, Product};
use super::super::error::GpuError;
use super::super::layout::{BLOCK, Coding, stride};
use super::super::schedule::RowTile;
use super::super::tensor_map::TensorMap;
use super::driver::Driver;
use super::launch::{Arg, word};
use super::memory::{Buffer, Slice, Uploader};
use super::op::Op;
use super::tables::{Scheduled, Tables};

/// Weights `[slots][n, k]`.
pub struct Weights {
    buffer: Buffer,
    n: usize,
    k: usize,
    slots: usize,
    map: TensorMap,
    /// f32 `[slots][n / 128][k / 128]` of FP8 weights.
    scales: Option<Buffer>,
}

impl Weights {
    /// Room for them, in FP8 if there are `scales` ([`Uploader::scales`]), else in bf16; [`Weights::fill`] has to follow.
    pub fn new(
        driver: &Arc<dyn Driver>,
        (n, k): (usize, usize),
        slots: usize,
        scales: Option<Buffer>,
    ) -> Result<Weights, GpuError> {
        let coding = if scales.is_some() { Coding::Fp8 } else { Coding::Bf16 };
        if let Some(scales) = &scales {
            scales.all().holding::<f32>(LINEAR, slots * table(n, k))?;
        }
        let (row, slot) = (stride(k, coding), n * stride(k, coding));
        let buffer = Buffer::new::<u8>(driver, "a weight of the trunk", slot * slots)?;
        let address = buffer.all().holding::<u8>(LINEAR, 0)?;
        let map =
            driver.tensor_map(&call::matrices((n, k, slots), (row, slot), coding, address))?;
        Ok(Weights { buffer, n, k, slots, map, scales })
    }

    /// Writes all rows: `write` is given the number of a first row, counted over all slots, and room for some from there on,
    /// [`Weights::stride`] bytes apart, all zero.
    pub fn fill(
        &self,
        uploader: &mut Uploader,
        mut write: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), GpuError> {
        uploader.rows(&self.buffer, self.stride(), self.n * self.slots, |first, to| {
            to.fill(0);
            write(first, to);
        })
    }

    pub fn coding(&self) -> Coding {
        if self.scales.is_some() { Coding::Fp8 } else { Coding::Bf16 }
    }

    /// Bytes from row to row.
    pub fn stride(&self) -> usize {
        stride(self.k, self.coding())
    }

    /// On the device, with scales.
    pub fn bytes(&self) -> usize {
        self.buffer.len() + self.scales.as_ref().map_or(0, Buffer::len)
    }
}

/// Scales of an FP8 matrix.
fn table(n: usize, k: usize) -> usize {
    n.div_ceil(BLOCK) * k.div_ceil(BLOCK)
}

/// Any product, to name in errors.
const LINEAR: Op = Op::Product(Product::Linear, Coding::Bf16, RowTile::R16);

/// Rows of `k` values that go into products, bf16, at the device's pitch.
pub struct Rows {
    buffer: Buffer,
    k: usize,
    capacity: usize,
    /// By row tile.
    maps: [TensorMap; 3],
    codes: Option<Codes>,
}

/// The same rows as FP8 weights take them.
struct Codes {
    values: Buffer,
    /// f32 `[k / 128][apart]`
    scales: Buffer,
    apart: usize,
    /// By row tile: values and scales.
    maps: [(TensorMap, TensorMap); 3],
}

impl Rows {
    pub fn new(
        driver: &Arc<dyn Driver>,
        what: &'static str,
        k: usize,
        capacity: usize,
    ) -> Result<Rows, GpuError> {
        let buffer = Buffer::new::<u8>(driver, what, capacity * stride(k, Coding::Bf16))?;
        let address = buffer.all().holding::<u8>(LINEAR, 0)?;
        let map = |tile| driver.tensor_map(&call::values(k, capacity, Coding::Bf16, tile, address));
        let [small, middle, large] = RowTile::ALL.map(map);
        Ok(Rows { buffer, k, capacity, maps: [small?, middle?, large?], codes: None })
    }

    /// With room for them in FP8 as well.
    pub fn with_codes(
        self,
        driver: &Arc<dyn Driver>,
        what: &'static str,
    ) -> Result<Rows, GpuError> {
        let (k, capacity) = (self.k, self.capacity);
        let values = Buffer::new::<u8>(driver, what, capacity * stride(k, Coding::Fp8))?;
        // Rows of a tensor are multiples of 16 bytes apart.
        let apart = capacity.next_multiple_of(4);
        let scales = Buffer::new::<f32>(driver, what, k.div_ceil(BLOCK) * apart)?;
        let at = values.all().holding::<u8>(LINEAR, 0)?;
        let table = scales.all().holding::<u8>(LINEAR, 0)?;
        let map = |tile| {
            let values = driver.tensor_map(&call::values(k, capacity, Coding::Fp8, tile, at))?;
            Ok((values, driver.tensor_map(&call::scales(k, apart, tile, table))?))
        };
        let [small, middle, large] = RowTile::ALL.map(map);
        let maps = [small?, middle?, large?];
        Ok(Rows { codes: Some(Codes { values, scales, apart, maps }), ..self })
    }

    /// Values of a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Values from row to row.
    pub fn stride(&self) -> usize {
        stride(self.k, Coding::Bf16) / 2
    }

    pub fn all(&self) -> Slice<'_> {
        self.buffer.all()
    }

    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Refuses rows that there is no room for.
    fn hold(&self, op: Op, rows: usize) -> Result<(), GpuError> {
        self.all().holding::<bf16>(op, rows * self.stride()).map(drop)
    }

    /// Their codes; an error if there is no room for such.
    fn codes(&self, op: Op) -> Result<&Codes, GpuError> {
        let need = self.capacity * stride(self.k, Coding::Fp8);
        let (kernel, what) = (op.name().1, "rows in FP8");
        self.codes.as_ref().ok_or(GpuError::Shape { kernel, what, need, have: 0 })
    }
}

impl dyn Driver {
    /// Codes the first `rows` rows of `x`, if one of `weights`, which are to multiply them, is in FP8.
    pub fn code<const N: usize>(
        &self,
        rows: usize,
        x: &Rows,
        weights: [&Weights; N],
    ) -> Result<(), GpuError> {
        if weights.iter().all(|weight| weight.coding() == Coding::Bf16) {
            return Ok(());
        }
        let op = Op::Quantize;
        x.hold(op, rows)?;
        let (codes, stride) = (x.codes(op)?, stride(x.k, Coding::Fp8));
        let blocks = x.k.div_ceil(BLOCK);
        let args = [
            Arg::Address(x.all().holding::<bf16>(op, rows * x.stride())?),
            word(x.stride()),
            word(rows),
            word(x.k),
            Arg::Address(codes.values.all().holding::<u8>(op, rows * stride)?),
            word(stride),
            Arg::Address(codes.scales.all().holding::<f32>(op, blocks * codes.apart)?),
            word(codes.apart),
        ];
        // SAFETY: checked above; a block's scales have room for as many rows as the codes.
        unsafe { self.run(op, (rows.div_ceil(CODING_ROWS), blocks), op.shared(), args) }
    }

    /// f32 `out` `[rows, n]` = `x` `weights`^T.
    pub fn linear(
        &self,
        tables: &Tables,
        scheduled: &Scheduled,
        x: &Rows,
        weights: &Weights,
        out: Slice<'_>,
    ) -> Result<(), GpuError> {
        self.product(Product::Linear, tables, scheduled, x, [weights; 2], out)
    }

    /// The same as bf16 rows.
    pub fn narrow(
        &self,
        tables: &Tables,
        scheduled: &Scheduled,
        x: &Rows,
        weights: &Weights,
        out: &Rows,
    ) -> Result<(), GpuError> {
        same("values of a product's rows", out.k, weights.n)?;
        self.product(Product::Down, tables, scheduled, x, [weights; 2], out.all())
    }

    /// `out` = silu(`x` gate^T) * (`x` up^T).
    pub fn gate_up(
        &self,
        tables: &Tables,
        scheduled: &Scheduled,
        x: &Rows,
        [gate, up]: [&Weights; 2],
        out: &Rows,
    ) -> Result<(), GpuError> {
        same("values of a layer's inner rows", out.k, gate.n)?;
        self.product(Product::GateUp, tables, scheduled, x, [gate, up], out.all())
    }

    fn product(
        &self,
        product: Product,
        tables: &Tables,
        scheduled: &Scheduled,
        x: &Rows,
        weights: [&Weights; 2],
        out: Slice<'_>,
    ) -> Result<(), GpuError> {
        let [first, second] = weights;
        for weight in weights {
            same("values of a weight's rows", weight.k, x.k)?;
            same("rows of a weight", weight.n, first.n)?;
            same("weights of their own", weight.slots, scheduled.slots)?;
        }
        same("bytes of a weight and its scales", second.bytes(), first.bytes())?;
        let coding = first.coding();
        let slot_scales = table(first.n, first.k);
        let [one, other] = weights.map(|weight| match &weight.scales {
            Some(scales) => scales.all().holding::<f32>(LINEAR, weight.slots * slot_scales),
            None => Ok(0),
        });
        let scales = [one?, other?];
        x.hold(LINEAR, scheduled.rows)?;
        for launch in &scheduled.launches {
            let op = Op::Product(product, coding, launch.tile);
            let count = scheduled.rows * product.out_stride(first.n);
            let out = match product {
                Product::Linear => out.holding::<f32>(op, count)?,
                Product::GateUp | Product::Down => out.holding::<bf16>(op, count)?,
            };
            let groups = tables.groups(scheduled).holding::<u8>(op, 0)?;
            let call = Call {
                scales,
                slot_bytes: (slot_scales * size_of::<f32>()) as u64,
                ..Call::plain(product, (x.k, first.n), coding, launch, groups, out)
            };
            let tile = launch.tile as usize;
            let (values, row_scales) = match coding {
                Coding::Fp8 => x.codes(op)?.maps[tile],
                // Without scales.
                Coding::Bf16 => (x.maps[tile], x.maps[tile]),
            };
            let args = [
                Arg::Map(first.map),
                Arg::Map(second.map),
                Arg::Map(values),
                Arg::Map(row_scales),
                Arg::Call(call),
            ];
            let blocks = self.processors().min(call.tiles).max(1);
            // SAFETY: the parameters of a product in their order; groups name slots and rows that are there, as was just
            // checked, and results are written to those rows.
            unsafe { self.run(op, (blocks as usize, 1), op.shared(), args)? };
        }
        Ok(())
    }
}

/// Refuses sizes that do not fit each other, in values.
fn same(what: &'static str, have: usize, need: usize) -> Result<(), GpuError> {
    match have == need {
        true => Ok(()),
        false => Err(GpuError::Shape { kernel: LINEAR.name().1, what, need, have }),
    }
}
