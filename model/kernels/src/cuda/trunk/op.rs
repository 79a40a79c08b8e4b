//! The kernels that a trunk is made of, and what they take by value, as the device reads it (attention.cu, gate.cu).

use super::super::call::{self, Product};
use super::super::gpu::SHARED_BYTES;
use super::super::layout::Coding;
use super::super::schedule::RowTile;

/// Positions of a span, and heads of a block (attention.cu).
pub const SPAN: usize = 512;
pub(super) const HEADS: usize = 32;
/// Experts, and rows, of a block, and bytes that it holds of the rows (gate.cu).
pub(super) const GATE_TILE: usize = 8;
const GATE_HELD: u32 = 8 * 512 * 4;
/// Threads of a row's block (rows.cu), and a float for each warp.
const ROW_THREADS: u32 = 256;
const ROW_SHARED: u32 = ROW_THREADS / 32 * 4;

/// A kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    EmbedBf16,
    EmbedF32,
    RmsNorm,
    Queries,
    Latent,
    Join,
    Combine,
    ScoresBf16,
    ScoresF32,
    Choose,
    Attend,
    Merge,
    Quantize,
    Sample,
    Product(Product, Coding, RowTile),
}

impl Op {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Op> {
        let single = [
            Op::EmbedBf16,
            Op::EmbedF32,
            Op::RmsNorm,
            Op::Queries,
            Op::Latent,
            Op::Join,
            Op::Combine,
            Op::ScoresBf16,
            Op::ScoresF32,
            Op::Choose,
            Op::Attend,
            Op::Merge,
            Op::Quantize,
            Op::Sample,
        ];
        let products = [Product::GateUp, Product::Down, Product::Linear].into_iter();
        let coded = products.flat_map(|product| [Coding::Fp8, Coding::Bf16].map(|c| (product, c)));
        let products = coded.flat_map(|(product, coding)| {
            RowTile::ALL.into_iter().map(move |tile| Op::Product(product, coding, tile))
        });
        single.into_iter().chain(products)
    }

    /// The source file, and its name in there.
    pub const fn name(self) -> (&'static str, &'static str) {
        match self {
            Op::EmbedBf16 => ("rows", "embed_bf16"),
            Op::EmbedF32 => ("rows", "embed_f32"),
            Op::RmsNorm => ("rows", "rms_norm"),
            Op::Queries => ("rows", "queries"),
            Op::Latent => ("rows", "latent"),
            Op::Join => ("rows", "join"),
            Op::Combine => ("rows", "combine"),
            Op::ScoresBf16 => ("gate", "gate_scores_bf16"),
            Op::ScoresF32 => ("gate", "gate_scores_f32"),
            Op::Choose => ("gate", "gate_choose"),
            Op::Attend => ("attention", "attend"),
            Op::Merge => ("attention", "merge"),
            Op::Quantize => ("coding", "quantize"),
            Op::Sample => ("sample", "sample"),
            Op::Product(product, coding, tile) => ("experts", product_name(product, coding, tile)),
        }
    }

    /// Threads of a block.
    pub const fn threads(self) -> u32 {
        match self {
            Op::Choose => 32,
            Op::Merge => 128,
            Op::Quantize => call::CODING_THREADS,
            Op::Product(..) => call::THREADS,
            _ => ROW_THREADS,
        }
    }

    /// Bytes of dynamic shared memory that it may ask for: all that there are where it depends on the model.
    pub const fn shared(self) -> u32 {
        match self {
            Op::Attend | Op::Choose | Op::Product(..) => SHARED_BYTES,
            Op::Merge | Op::Quantize => 0,
            // A sum and a logit with its place for each thread.
            Op::Sample => ROW_THREADS * 16,
            Op::ScoresBf16 | Op::ScoresF32 => GATE_HELD,
            _ => ROW_SHARED,
        }
    }
}

const fn product_name(product: Product, coding: Coding, tile: RowTile) -> &'static str {
    macro_rules! by_tile {
        ($name:literal) => {
            [concat!($name, "_16"), concat!($name, "_64"), concat!($name, "_128")]
        };
    }
    let names = match (product, coding) {
        (Product::GateUp, Coding::Fp8) => by_tile!("gate_up_fp8"),
        (Product::GateUp, Coding::Bf16) => by_tile!("gate_up_bf16"),
        (Product::Down, Coding::Fp8) => by_tile!("down_fp8"),
        (Product::Down, Coding::Bf16) => by_tile!("down_bf16"),
        (Product::Linear, Coding::Fp8) => by_tile!("linear_fp8"),
        (Product::Linear, Coding::Bf16) => by_tile!("linear_bf16"),
    };
    names[tile as usize]
}

/// A row of a step, as attention sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Its sequence's first page in the table of pages.
    pub pages: u32,
    pub position: u32,
    /// Of its first span, if it has several.
    pub part: u32,
}

/// Positions of a row, [`SPAN`] at most.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub row: u32,
    pub index: u32,
}

/// Where a row's entry goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub page: u32,
    pub slot: u32,
}

impl Row {
    pub fn words(self) -> [u32; 3] {
        [self.pages, self.position, self.part]
    }
}

impl Span {
    pub fn words(self) -> [u32; 2] {
        [self.row, self.index]
    }
}

impl Place {
    pub fn words(self) -> [u32; 2] {
        [self.page, self.slot]
    }
}

/// What attention is told.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Attend {
    pub absorbed: u64,
    pub rotated: u64,
    pub cache: u64,
    pub page_stride: u64,
    pub pages: u64,
    pub row: u64,
    pub spans: u64,
    pub out: u64,
    pub parts: u64,
    pub tops: u64,
    pub rows: u32,
    pub heads: u32,
    pub width: u32,
    pub rank: u32,
    pub page_tokens: u32,
    pub scale: f32,
}

/// How a token is chosen by logits alone (`Draw` in sample.cu); without a temperature, the most probable.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Draw {
    /// Key of the generator, and what it is asked for.
    pub seed: u64,
    pub position: u64,
    pub temperature: f32,
    pub min_p: f32,
}

impl Draw {
    pub const BYTES: usize = 24;

    /// As the device reads it.
    pub fn to_bytes(self) -> [u8; Draw::BYTES] {
        let mut bytes = [0; Draw::BYTES];
        bytes[..8].copy_from_slice(&self.seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.position.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.temperature.to_le_bytes());
        bytes[20..].copy_from_slice(&self.min_p.to_le_bytes());
        bytes
    }
}

/// In place of a token where logits are not finite (sample.cu).
pub const REFUSED: u32 = u32::MAX;

/// What the gate's choice is told.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Routing {
    pub experts: u32,
    pub top_k: u32,
    pub groups: u32,
    pub kept_groups: u32,
    /// 1 if weights are divided by their sum.
    pub normed: u32,
    pub scaling: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_passed_is_as_long_as_the_device_thinks() {
        assert_eq!((size_of::<Attend>(), align_of::<Attend>()), (104, 8));
        assert_eq!(size_of::<Routing>(), 24);
        assert_eq!((size_of::<Row>(), size_of::<Span>(), size_of::<Place>()), (12, 8, 8));
    }

    #[test]
    fn numbers_and_names_are_those_of_the_sources() {
        let text = |file| match file {
            "attention" => include_str!("../attention.cu"),
            "gate" => include_str!("../gate.cu"),
            "rows" => include_str!("../rows.cu"),
            "sample" => include_str!("../sample.cu"),
            "coding" => include_str!("../coding.cu"),
            _ => include_str!("../experts.cu"),
        };
        for (file, name, value) in [
            ("attention", "SPAN", SPAN),
            ("attention", "HEADS", HEADS),
            ("gate", "GATE_WARPS", GATE_TILE),
            ("gate", "GATE_ROWS", GATE_TILE),
            ("gate", "CHUNK", GATE_HELD as usize / GATE_TILE / 4),
            ("rows", "ROW_THREADS", ROW_THREADS as usize),
            ("sample", "SAMPLE_THREADS", ROW_THREADS as usize),
        ] {
            let line = format!("constexpr u32 {name} = {value};");
            assert!(text(file).contains(&line), "{file}: {line}");
        }
        for op in Op::all() {
            let (file, name) = op.name();
            assert!(text(file).contains(&format!("{name}(")) || file == "experts", "{name}");
            if let Op::Product(product, coding, tile) = op {
                assert_eq!(name, product.kernel(coding, tile));
                assert!(text(file).contains(&format!("PRODUCT({name},")), "{name}");
            }
        }
    }
}
