//! How a model fits on devices: pure sums over the tensors that its configuration
//! asks for, cut between nodes as nodes cut them when they start.

use kernels::cuda::BLOCK;
use mesh::placement::plan::shard;
use model::{Config, KvPool, Numerics};

use crate::published::{Stored, Tensor, tensors};

/// In the names of routed experts' tensors.
const ROUTED: &str = ".mlp.experts.";

/// Bytes of a model's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// All routed experts, with their scales.
    pub routed: u64,
    /// Routed experts of a layer.
    pub experts: u32,
    pub moe_layers: u64,
    pub attention: u64,
    /// Networks of the dense layers.
    pub dense: u64,
    pub shared: u64,
    /// Embedding and head.
    pub embedding: u64,
    /// Gates and norms.
    pub small: u64,
    /// What a GPU holds of the trunk: as stored, but for keys' and values' up-projections, which are bf16 there.
    pub trunk_on_gpu: u64,
    /// A token's entry in the KV cache, all layers.
    pub kv_token: u64,
}

impl Parts {
    /// Of the checkpoint that `config` describes, as DeepSeek publishes it: bf16, or FP8 with
    /// scales if the configuration says so.
    pub fn of(config: &Config) -> Self {
        let mut parts = Self {
            experts: config.experts as u32,
            moe_layers: config.moe_layers().len() as u64,
            kv_token: KvPool::page_bytes(config, Numerics::Bf16, 1) as u64,
            ..Self::default()
        };
        // Other blocks become bf16 on a GPU.
        let multiplied = config.fp8_block == Some((BLOCK, BLOCK));
        for tensor in tensors(config) {
            *parts.part_of(&tensor) += tensor.bytes() as u64;
            if !tensor.name.contains(ROUTED) {
                let bytes = match tensor.stored {
                    Stored::Fp8 { .. } if !multiplied || tensor.name.contains(".kv_b_proj.") => {
                        2 * tensor.values()
                    }
                    _ => tensor.bytes(),
                };
                parts.trunk_on_gpu += bytes as u64;
            }
        }
        parts
    }

    fn part_of(&mut self, tensor: &Tensor) -> &mut u64 {
        let name = tensor.name.as_str();
        match name {
            _ if name.contains(ROUTED) => &mut self.routed,
            _ if name.contains("norm") || name.contains(".mlp.gate.") => &mut self.small,
            _ if name.contains(".self_attn.") => &mut self.attention,
            _ if name.contains(".shared_experts.") => &mut self.shared,
            _ if name.contains(".mlp.") => &mut self.dense,
            _ => &mut self.embedding,
        }
    }

    /// Experts of all layers.
    pub fn count(&self) -> u64 {
        u64::from(self.experts) * self.moe_layers
    }

    /// Bytes of one expert: all are alike.
    pub fn expert(&self) -> u64 {
        self.routed / self.count().max(1)
    }

    /// What every router holds.
    pub fn trunk(&self) -> u64 {
        self.attention + self.dense + self.shared + self.embedding + self.small
    }
}

/// What devices offer.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Bytes of a device.
    pub device: u64,
    /// Bytes of it that weights and KV cache may take.
    pub usable: u64,
    /// Owners of each expert.
    pub replicas: u16,
}

/// The fullest of so many nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFit {
    pub nodes: u16,
    pub experts: u64,
    pub bytes: u64,
    pub fits: bool,
}

/// The fullest of `nodes` nodes, by the shares that nodes start with.
pub fn node(parts: &Parts, budget: &Budget, nodes: u16) -> NodeFit {
    let share = |index| shard(index, nodes, budget.replicas, parts.experts).len() as u64;
    let most = (0..nodes).map(share).max().unwrap_or(0);
    let experts = most * parts.moe_layers;
    let bytes = experts * parts.expert();
    // Fewer nodes than owners cannot be.
    let fits = nodes >= budget.replicas && bytes <= budget.usable;
    NodeFit { nodes, experts, bytes, fits }
}

/// More nodes than that hold no fewer experts each.
fn most_nodes(parts: &Parts, budget: &Budget) -> u16 {
    let nodes = u64::from(parts.experts) * u64::from(budget.replicas);
    u16::try_from(nodes).unwrap_or(u16::MAX)
}

/// The least number of nodes that fits; none if even one expert a layer is too much.
pub fn least(parts: &Parts, budget: &Budget) -> Option<u16> {
    (1..=most_nodes(parts, budget)).find(|&nodes| node(parts, budget, nodes).fits)
}

/// Powers of two to beyond one that fits, and what is around the least.
pub fn worth_showing(parts: &Parts, budget: &Budget, least: Option<u16>) -> Vec<u16> {
    let most = most_nodes(parts, budget);
    let last = least.map_or(most, |nodes| nodes.saturating_mul(2).min(most));
    let powers = (0..16).map(|power| 1u16 << power).take_while(|&nodes| nodes <= last);
    let around = least.into_iter().flat_map(|nodes| [nodes - 1, nodes]).filter(|&nodes| nodes > 0);
    let mut shown: Vec<u16> = powers.chain(around).collect();
    shown.sort_unstable();
    shown.dedup();
    shown
}

/// Tokens of KV cache beside the trunk on a router's device; `None` if the trunk does not fit.
pub fn kv_tokens(parts: &Parts, budget: &Budget) -> Option<u64> {
    Some(budget.usable.checked_sub(parts.trunk_on_gpu)? / parts.kv_token)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(dir: &str) -> Parts {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir).join("config.json");
        let text = std::fs::read_to_string(path).unwrap();
        Parts::of(&Config::from_json(&text, dir).unwrap())
    }

    fn v3() -> Parts {
        read("deploy/shapes/deepseek-v3")
    }

    fn gpu(gb: u64, replicas: u16) -> Budget {
        Budget { device: gb * 1_000_000_000, usable: gb * 900_000_000, replicas }
    }

    #[test]
    fn deepseek_v3_is_as_large_as_computed_by_hand() {
        let parts = v3();
        // Codes of three matrices 2048 x 7168 and a scale of four bytes per 128 x 128.
        let expert = 3 * (2048 * 7168 + 4 * 16 * 56);
        assert_eq!((parts.expert(), parts.experts, parts.moe_layers), (expert, 256, 58));
        assert_eq!(parts.routed, 58 * 256 * expert);
        // 61 layers of 512 latent and 64 rotary values, two bytes each.
        assert_eq!(parts.kv_token, 61 * 576 * 2);
        assert_eq!(parts.embedding, 2 * 2 * 129_280 * 7168);
        assert_eq!(parts.dense, 3 * 3 * (18_432 * 7168 + 4 * 144 * 56));
        assert_eq!(parts.shared, 58 * expert);
        let matrices: [(u64, u64); 5] =
            [(1536, 7168), (24_576, 1536), (576, 7168), (32_768, 512), (7168, 16_384)];
        let fp8 = |(n, k): (u64, u64)| n * k + 4 * n.div_ceil(128) * k.div_ceil(128);
        assert_eq!(parts.attention, 61 * matrices.map(fp8).iter().sum::<u64>());
        // As stored on a GPU, but for two bytes a value of keys' and values' up-projections.
        let up = 61 * (2 * 32_768 * 512 - fp8((32_768, 512)));
        assert_eq!(parts.trunk_on_gpu, parts.trunk() + up);
        // 671 B parameters in all: nearly all of them one byte, the embedding and head two.
        let all = (parts.trunk() + parts.routed) as f64;
        assert!((671e9..675e9).contains(&all), "{all}");
    }

    #[test]
    fn the_least_number_of_nodes_fits_and_one_fewer_does_not() {
        let parts = v3();
        for (gb, replicas) in [(80, 1), (80, 2), (141, 1), (24, 1), (1000, 3), (4, 2)] {
            let budget = gpu(gb, replicas);
            let nodes = least(&parts, &budget).unwrap();
            assert!(node(&parts, &budget, nodes).fits);
            assert!(nodes == 1 || !node(&parts, &budget, nodes - 1).fits, "{gb} GB");
            assert!(worth_showing(&parts, &budget, Some(nodes)).contains(&nodes));
        }
        // Even: 58 layers of 256 experts over 16 nodes.
        let sixteen = node(&parts, &gpu(80, 1), 16);
        assert_eq!((sixteen.experts, sixteen.bytes), (58 * 16, 58 * 16 * parts.expert()));
        assert!(sixteen.fits);
    }

    #[test]
    fn what_fits_nowhere_is_said() {
        let parts = v3();
        assert_eq!(least(&parts, &gpu(1, 1)), None);
        assert_eq!(kv_tokens(&parts, &gpu(20, 1)), None);
        assert!(!node(&parts, &gpu(10_000, 2), 1).fits, "two owners on one node");
    }

    #[test]
    fn the_sums_are_those_of_real_checkpoints() {
        for dir in ["deploy/tiny", "tests/fixtures/fp8", "tests/fixtures/tied"] {
            let parts = read(dir);
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir).join("model.safetensors");
            let file = std::fs::read(path).unwrap();
            let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            let header: serde_json::Value = serde_json::from_slice(&file[8..end]).unwrap();
            // The one layer for multi-token prediction is no part of what is served.
            let served =
                |name: &str| !name.starts_with("model.layers.3.") || dir != "tests/fixtures/fp8";
            let tensors: u64 = header
                .as_object()
                .unwrap()
                .iter()
                .filter(|(name, _)| *name != "__metadata__" && served(name))
                .map(|(_, tensor)| {
                    let at = |end: usize| tensor["data_offsets"][end].as_u64().unwrap();
                    at(1) - at(0)
                })
                .sum();
            assert_eq!(parts.trunk() + parts.routed, tensors, "{dir}");
        }
    }
}
