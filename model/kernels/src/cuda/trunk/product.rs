//! Products of rows with weights, by the kernels of experts.cu: a weight is an expert with one matrix, and the heads of an
//! attention are experts with as many rows each. Everything is bf16 where it is multiplied.

use std::sync::Arc;

use half::bf16;

use super::super::call::{self, Call, Product};
use super::super::error::GpuError;
use super::super::layout::{Coding, stride};
use super::super::schedule::RowTile;
use super::super::tensor_map::TensorMap;
use super::driver::Driver;
use super::launch::Arg;
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
}

impl Weights {
    /// Room for them; [`Weights::fill`] has to follow.
    pub fn new(
        driver: &Arc<dyn Driver>,
        (n, k): (usize, usize),
        slots: usize,
    ) -> Result<Weights, GpuError> {
        let (row, slot) = (stride(k, Coding::Bf16), n * stride(k, Coding::Bf16));
        let buffer = Buffer::new::<u8>(driver, "a weight of the trunk", slot * slots)?;
        let tiled = call::matrices(
            (n, k, slots),
            (row, slot),
            Coding::Bf16,
            buffer.all().holding::<u8>(LINEAR, 0)?,
        );
        let map = driver.tensor_map(&tiled)?;
        Ok(Weights { buffer, n, k, slots, map })
    }

    /// Writes all rows: `write` is given the number of a first row, counted over all slots, and room for some from there on,
    /// [`Weights::stride`] values apart, all zero.
    pub fn fill(
        &self,
        uploader: &mut Uploader,
        mut write: impl FnMut(usize, &mut [bf16]),
    ) -> Result<(), GpuError> {
        let bytes = stride(self.k, Coding::Bf16);
        uploader.rows(&self.buffer, bytes, self.n * self.slots, |first, to| {
            to.fill(0);
            write(first, bytemuck::cast_slice_mut(to));
        })
    }

    /// Values from row to row.
    pub fn stride(&self) -> usize {
        stride(self.k, Coding::Bf16) / 2
    }

    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }
}

/// Any product, to name in errors.
const LINEAR: Op = Op::Product(Product::Linear, RowTile::R16);

/// Rows of `k` values that go into products, bf16, at the device's pitch.
pub struct Rows {
    buffer: Buffer,
    k: usize,
    capacity: usize,
    /// By row tile.
    maps: [TensorMap; 3],
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
        Ok(Rows { buffer, k, capacity, maps: [small?, middle?, large?] })
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
}

impl dyn Driver {
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
        if scheduled.rows > x.capacity {
            return Err(GpuError::Shape {
                kernel: LINEAR.name().1,
                what: "rows",
                need: scheduled.rows * x.stride() * 2,
                have: x.buffer.len(),
            });
        }
        for launch in &scheduled.launches {
            let op = Op::Product(product, launch.tile);
            let count = scheduled.rows * product.out_stride(first.n);
            let out = match product {
                Product::Linear => out.holding::<f32>(op, count)?,
                Product::GateUp | Product::Down => out.holding::<bf16>(op, count)?,
            };
            let groups = tables.groups(scheduled).holding::<u8>(op, 0)?;
            let call = Call::plain(product, (x.k, first.n), Coding::Bf16, launch, groups, out);
            let values = x.maps[launch.tile as usize];
            let args = [
                Arg::Map(first.map),
                Arg::Map(second.map),
                Arg::Map(values),
                // Scales, of which bf16 has none.
                Arg::Map(values),
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
