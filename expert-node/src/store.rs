//! The resident experts: a concurrent map from (layer, expert) to mapped
//! weights and a load counter. Weights are pages of the checkpoint file, so
//! owning an expert costs memory only once its rows arrive.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use mesh::placement::plan;
use model::{Checkpoint, Expert, LoadError};
use proto::v1::{ErrorCode, ExpertLoad, LayerExperts};
use proto::{ExpertId, LayerId};

use crate::Shard;

/// One expert as the node holds it.
pub struct Resident {
    /// `None` in a stub, which answers with the row itself.
    pub weights: Option<Expert>,
    /// 0 is the checkpoint's own.
    pub version: u32,
    pub rows: AtomicU64,
}

/// See the module's text.
pub struct Store {
    experts: DashMap<(LayerId, ExpertId), Arc<Resident>>,
    bytes: u64,
}

impl Store {
    /// Maps the shard's experts of every MoE layer and checks their tensors.
    /// `progress` hears, layer by layer, how many of all are mapped.
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        shard: Shard,
        progress: impl Fn(usize, usize),
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config();
        let owned = plan::shard(shard.index, shard.count, shard.replicas, config.experts as u32);
        let experts = DashMap::new();
        let mut bytes = 0;
        let all = owned.len() * config.moe_layers().len();
        for layer in config.moe_layers() {
            progress(experts.len(), all);
            for &expert in &owned {
                let weights = Expert::load(checkpoint, layer, expert as usize)?;
                bytes += weights.bytes() as u64;
                let resident =
                    Resident { weights: Some(weights), version: 0, rows: AtomicU64::new(0) };
                experts.insert((LayerId(layer as u32), ExpertId(expert)), Arc::new(resident));
            }
        }
        Ok(Self { experts, bytes })
    }

    /// The experts `owned` of layer `layer`, without weights.
    pub fn stub(layer: LayerId, owned: impl IntoIterator<Item = u32>) -> Self {
        let stub = |expert| {
            let resident = Resident { weights: None, version: 0, rows: AtomicU64::new(0) };
            ((layer, ExpertId(expert)), Arc::new(resident))
        };
        Self { experts: owned.into_iter().map(stub).collect(), bytes: 0 }
    }

    pub fn len(&self) -> usize {
        self.experts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.experts.is_empty()
    }

    /// Bytes of all resident experts' tensors.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The expert, if it is resident in the version asked for.
    pub fn get(
        &self,
        layer: LayerId,
        expert: ExpertId,
        version: u32,
    ) -> Result<Arc<Resident>, (ErrorCode, String)> {
        let Some(resident) = self.experts.get(&(layer, expert)) else {
            let message = format!("layer {layer} expert {expert} is not resident here");
            return Err((ErrorCode::NotResident, message));
        };
        if resident.version != version {
            let message = format!(
                "layer {layer} expert {expert} is version {}, not {version}",
                resident.version
            );
            return Err((ErrorCode::VersionMismatch, message));
        }
        Ok(resident.clone())
    }

    /// What is owned, by layer, ascending.
    pub fn owned(&self) -> Vec<LayerExperts> {
        let mut layers: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for entry in &self.experts {
            let (layer, expert) = entry.key();
            layers.entry(layer.0).or_default().push(expert.0);
        }
        layers
            .into_iter()
            .map(|(layer, mut experts)| {
                experts.sort_unstable();
                LayerExperts { layer, experts }
            })
            .collect()
    }

    /// Rows computed per expert since start, by layer and expert.
    pub fn loads(&self) -> Vec<ExpertLoad> {
        let mut loads: Vec<_> = self
            .experts
            .iter()
            .map(|entry| {
                let (layer, expert) = *entry.key();
                let rows = entry.rows.load(Ordering::Relaxed);
                ExpertLoad { layer: layer.0, expert: expert.0, rows }
            })
            .collect();
        loads.sort_unstable_by_key(|load| (load.layer, load.expert));
        loads
    }
}
