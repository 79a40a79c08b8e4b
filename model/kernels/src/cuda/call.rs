//! What the kernels of experts.cu are told: tensors as TMA sees them, and a product's `Call`. Plain arithmetic, apart from
//! who launches, so that a stand-in for the device is told the same.

use super::layout::{BLOCK, Coding, Layout, stride};
use super::schedule::{DOWN_COLUMNS, GATED_COLUMNS, Group, Launch, RowTile};
use super::tensor_map::{Element, Tiled};

/// Threads of a product's block (experts.cu).
pub const THREADS: u32 = 384;
/// Threads of a block that codes rows, and how many it takes (coding.cu).
pub const CODING_THREADS: u32 = 128;
pub const CODING_ROWS: usize = 4;
/// Weight rows of a box: what a warpgroup multiplies.
const BOX_ROWS: u32 = 64;
/// Bytes of k in a box: a swizzled row.
const BOX_BYTES: usize = 128;

/// What one product's launch is told (`Call` in experts.cu).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub scales: [u64; 2],
    pub slot_bytes: u64,
    pub groups: u64,
    pub out: u64,
    pub out_stride: u32,
    pub group_count: u32,
    pub tiles: u32,
    pub column_tiles: u32,
    pub columns: u32,
    pub k_blocks: u32,
    pub second: u32,
}

/// Which product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Product {
    /// silu(gate x) * up x, as bf16.
    GateUp,
    /// As bf16.
    Down,
    /// The same left in f32.
    Linear,
}

impl Product {
    /// The parts of an expert's slot that it multiplies with.
    pub const fn parts(self) -> [usize; 2] {
        match self {
            Product::GateUp => [0, 1],
            Product::Down | Product::Linear => [2, 2],
        }
    }

    /// Values from one row of `columns` results to the next.
    pub fn out_stride(self, columns: usize) -> usize {
        match self {
            Product::GateUp | Product::Down => stride(columns, Coding::Bf16) / 2,
            Product::Linear => columns,
        }
    }

    /// The kernel's name.
    pub fn kernel(self, coding: Coding, tile: RowTile) -> String {
        let name = match self {
            Product::GateUp => "gate_up",
            Product::Down => "down",
            Product::Linear => "linear",
        };
        let coding = match coding {
            Coding::Fp8 => "fp8",
            Coding::Bf16 => "bf16",
        };
        format!("{name}_{coding}_{}", tile.rows())
    }
}

impl Call {
    /// One product of one launch with experts: slots begin at `slots`, the launch's table of groups is at `groups`, and
    /// results go to `out`.
    pub fn new(
        layout: &Layout,
        product: Product,
        launch: &Launch,
        slots: u64,
        groups: u64,
        out: u64,
    ) -> Call {
        let shape = layout.shape;
        let (k, columns) = match product {
            Product::GateUp => (shape.hidden, shape.inner),
            Product::Down | Product::Linear => (shape.inner, shape.hidden),
        };
        Call {
            scales: product.parts().map(|part| slots + layout.parts[part].scales as u64),
            slot_bytes: layout.bytes as u64,
            ..Call::plain(product, (k, columns), shape.coding, launch, groups, out)
        }
    }

    /// One product of rows of `k` values with weights that have no scales.
    pub fn plain(
        product: Product,
        (k, columns): (usize, usize),
        coding: Coding,
        launch: &Launch,
        groups: u64,
        out: u64,
    ) -> Call {
        let (width, second) = match product {
            Product::GateUp => (GATED_COLUMNS, 0),
            Product::Down | Product::Linear => (DOWN_COLUMNS, DOWN_COLUMNS / 2),
        };
        Call {
            scales: [0; 2],
            slot_bytes: 0,
            groups: groups + (launch.groups.start * Group::BYTES) as u64,
            out,
            out_stride: product.out_stride(columns) as u32,
            group_count: launch.groups.len() as u32,
            tiles: launch.tiles(columns, width) as u32,
            column_tiles: columns.div_ceil(width) as u32,
            columns: columns as u32,
            k_blocks: (k * coding.size()).div_ceil(BOX_BYTES) as u32,
            second: second as u32,
        }
    }
}

/// A part of all slots.
pub fn weights(layout: &Layout, part: usize, slots: usize, address: u64) -> Tiled {
    let part = &layout.parts[part];
    let address = address + part.at as u64;
    matrices((part.n, part.k, slots), (part.stride, layout.bytes), layout.shape.coding, address)
}

/// `slots` weights `[n, k]`, whose rows and which are so many bytes apart.
pub fn matrices(
    (n, k, slots): (usize, usize, usize),
    (row, slot): (usize, usize),
    coding: Coding,
    address: u64,
) -> Tiled {
    Tiled {
        element: element(coding),
        address,
        sizes: vec![k as u64, n as u64, slots as u64],
        strides: vec![row as u64, slot as u64],
        tile: vec![(BOX_BYTES / coding.size()) as u32, BOX_ROWS, 1],
        swizzled: true,
    }
}

/// Activations: up to `capacity` rows of `k` values or codes.
pub fn values(k: usize, capacity: usize, coding: Coding, tile: RowTile, address: u64) -> Tiled {
    Tiled {
        element: element(coding),
        address,
        sizes: vec![k as u64, capacity as u64],
        strides: vec![stride(k, coding) as u64],
        tile: vec![(BOX_BYTES / coding.size()) as u32, tile.rows() as u32],
        swizzled: true,
    }
}

/// Their scales, `[k / 128, capacity]`.
pub fn scales(k: usize, capacity: usize, tile: RowTile, address: u64) -> Tiled {
    Tiled {
        element: Element::F32,
        address,
        sizes: vec![capacity as u64, k.div_ceil(BLOCK) as u64],
        strides: vec![(capacity * size_of::<f32>()) as u64],
        tile: vec![tile.rows() as u32, 1],
        swizzled: false,
    }
}

const fn element(coding: Coding) -> Element {
    match coding {
        Coding::Fp8 => Element::U8,
        Coding::Bf16 => Element::Bf16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_as_long_as_the_device_thinks() {
        assert_eq!((size_of::<Call>(), align_of::<Call>()), (72, 8));
        assert_eq!(size_of::<Group>(), Group::BYTES);
    }
}
