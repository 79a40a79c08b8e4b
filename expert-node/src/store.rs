//! The resident experts: a concurrent map from (layer, expert) to mapped
//! weights and a load counter. Weights are pages of the checkpoint file, so
//! owning an expert costs memory only once its rows arrive or it is warmed.
//!
//! Frames are admitted by [`Store::get`] and computed by [`Store::held`]: an
//! expert that is being dropped is refused by the first and had by the second,
//! until the frames that were admitted before have been computed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dashmap::DashMap;
use mesh::placement::plan;
use model::gpu::GpuOffers;
use model::gpu::residency::Tiers;
use model::{Checkpoint, Expert, LoadError};
use proto::v1::{ErrorCode, ExpertLoad, LayerExperts};
use proto::{ExpertId, LayerId};
use tokio::sync::watch;

use crate::Shard;

/// One expert's address.
pub type Key = (LayerId, ExpertId);

/// One expert as the node holds it.
pub struct Resident {
    /// `None` in a stub, which answers with the row itself.
    pub weights: Option<Expert>,
    /// 0 is the checkpoint's own.
    pub version: u32,
    pub rows: AtomicU64,
    /// No new frame is taken for it.
    leaving: AtomicBool,
}

impl Resident {
    fn new(weights: Option<Expert>) -> Arc<Self> {
        let (rows, leaving) = (AtomicU64::new(0), AtomicBool::new(false));
        Arc::new(Self { weights, version: 0, rows, leaving })
    }

    fn bytes(&self) -> u64 {
        self.weights.as_ref().map_or(0, |weights| weights.bytes() as u64)
    }
}

/// Why experts cannot be taken in.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(
        "{experts} experts need {need} bytes, {free} of the {limit} bytes of memory_limit are \
         free: {} are missing", .need - .free
    )]
    Full { experts: usize, need: u64, free: u64, limit: u64 },
}

/// See the module's text. What is resident is changed by one caller at a time.
pub struct Store {
    experts: DashMap<Key, Arc<Resident>>,
    bytes: AtomicU64,
    /// Most bytes of experts; `None` is no bound.
    limit: Option<u64>,
    /// The GPU that experts are computed on, if there is one: it hears which are owned.
    gpu: Option<GpuOffers>,
    /// Counts what changes a description of the node.
    changes: watch::Sender<u64>,
}

impl Store {
    fn new(limit: Option<u64>) -> Self {
        let (experts, bytes) = (DashMap::new(), AtomicU64::new(0));
        Self { experts, bytes, limit, gpu: None, changes: watch::Sender::new(0) }
    }

    /// Maps the shard's experts of every MoE layer, as far as their files are here, and checks their
    /// tensors.
    /// `progress` hears, layer by layer, how many of all are mapped.
    ///
    /// # Errors
    /// One is not there, or they do not fit into `limit`.
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        shard: Shard,
        limit: Option<u64>,
        progress: impl Fn(usize, usize),
    ) -> Result<Self, StoreError> {
        let config = checkpoint.config();
        let owned = plan::shard(shard.index, shard.count, shard.replicas, config.experts as u32);
        let store = Self::new(limit);
        let mut mapped = Vec::new();
        let all = owned.len() * config.moe_layers().len();
        for layer in config.moe_layers() {
            progress(mapped.len(), all);
            let layer = LayerId(layer as u32);
            let keys: Vec<Key> = owned.iter().map(|&expert| (layer, ExpertId(expert))).collect();
            mapped.extend(map(checkpoint, &here(checkpoint, &keys)?.0)?);
        }
        store.check_fits(&mapped)?;
        store.adopt(mapped);
        Ok(store)
    }

    /// Has experts brought onto a GPU, those that are owned and those to come.
    pub fn bring_to(&mut self, gpu: GpuOffers) {
        let mut owned: Vec<Key> = self.experts.iter().map(|entry| *entry.key()).collect();
        owned.sort_unstable();
        for key in owned {
            let resident = self.experts.get(&key);
            if let Some(weights) = resident.as_ref().and_then(|found| found.weights.as_ref()) {
                gpu.offer(weights);
            }
        }
        self.gpu = Some(gpu);
    }

    /// Where experts are, if a GPU computes them.
    pub fn tiers(&self) -> Option<Tiers> {
        self.gpu.as_ref().map(GpuOffers::tiers)
    }

    /// The experts `owned` of each of `layers`, without weights.
    pub fn stub(layers: &[LayerId], owned: &[u32]) -> Self {
        let store = Self::new(None);
        let keys = layers.iter().flat_map(|&l| owned.iter().map(move |&e| (l, ExpertId(e))));
        store.adopt(keys.map(|key| (key, Resident::new(None))).collect());
        store
    }

    pub fn len(&self) -> usize {
        self.experts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.experts.is_empty()
    }

    /// Bytes of all resident experts' tensors.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Most bytes that may be resident; `None` is no bound.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Wakes when a description of the node is out of date.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Says that a description of the node is out of date.
    pub fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// The expert, if new frames are taken for it in the version asked for.
    pub fn get(
        &self,
        layer: LayerId,
        expert: ExpertId,
        version: u32,
    ) -> Result<Arc<Resident>, (ErrorCode, String)> {
        let found = self.held(layer, expert, version)?;
        match found.leaving.load(Ordering::Acquire) {
            false => Ok(found),
            true => {
                let message = format!("layer {layer} expert {expert} is leaving this node");
                Err((ErrorCode::NotResident, message))
            }
        }
    }

    /// The expert, if it is resident in the version asked for, for frames that
    /// were taken already.
    pub fn held(
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

    /// Which of `keys` are neither resident nor in a file that is here, if all that are not resident
    /// would fit.
    ///
    /// # Errors
    /// They would not.
    pub fn lacks(&self, checkpoint: &Checkpoint, keys: &[Key]) -> Result<Vec<Key>, StoreError> {
        let missing: Vec<Key> =
            keys.iter().copied().filter(|key| !self.experts.contains_key(key)).collect();
        let bytes = |&(layer, _): &Key| checkpoint.expert_bytes(layer.0 as usize);
        let need =
            missing.iter().map(|key| Ok(bytes(key)? as u64)).sum::<Result<_, LoadError>>()?;
        self.check_room(missing.len(), need)?;
        Ok(here(checkpoint, &missing)?.1)
    }

    /// Takes in those of `keys` that are not resident, all or none, and reads
    /// their weights in; says how many. Those that have no file here are among
    /// `fetched`. Blocks: not for a thread that computes.
    ///
    /// # Errors
    /// One cannot be mapped, or they do not fit; then nothing has changed.
    pub fn take_in(
        &self,
        checkpoint: &Arc<Checkpoint>,
        keys: &[Key],
        fetched: Vec<(Key, Expert)>,
    ) -> Result<usize, StoreError> {
        let (resident, mut files): (Vec<Key>, Vec<Key>) =
            keys.iter().partition(|key| self.experts.contains_key(key));
        files.retain(|key| fetched.iter().all(|(came, _)| came != key));
        let mut mapped = map(checkpoint, &files)?;
        for weights in mapped.iter().filter_map(|(_, resident)| resident.weights.as_ref()) {
            weights.warm();
        }
        mapped
            .extend(fetched.into_iter().map(|(key, weights)| (key, Resident::new(Some(weights)))));
        self.check_fits(&mapped)?;
        let stayed = |key: &&Key| {
            let found = self.experts.get(*key);
            found.is_some_and(|resident| resident.leaving.swap(false, Ordering::AcqRel))
        };
        let stayed = resident.iter().filter(stayed).count();
        Ok(stayed + self.adopt(mapped))
    }

    /// Refuses new frames for `keys` from now on; returns which were resident.
    pub fn retire(&self, keys: &[Key]) -> Vec<Key> {
        let retired: Vec<Key> = keys
            .iter()
            .copied()
            .filter(|key| {
                let found = self.experts.get(key);
                found.is_some_and(|resident| !resident.leaving.swap(true, Ordering::AcqRel))
            })
            .collect();
        if !retired.is_empty() {
            self.changed();
        }
        retired
    }

    /// Forgets those of `keys` that were retired.
    pub fn forget(&self, keys: &[Key]) {
        for key in keys {
            let leaving =
                |_: &Key, resident: &Arc<Resident>| resident.leaving.load(Ordering::Acquire);
            if let Some((_, resident)) = self.experts.remove_if(key, leaving) {
                self.bytes.fetch_sub(resident.bytes(), Ordering::AcqRel);
                if let (Some(gpu), Some(weights)) = (&self.gpu, &resident.weights) {
                    gpu.forget(weights);
                }
            }
        }
        self.changed();
    }

    fn check_fits(&self, mapped: &[(Key, Arc<Resident>)]) -> Result<(), StoreError> {
        self.check_room(mapped.len(), mapped.iter().map(|(_, resident)| resident.bytes()).sum())
    }

    fn check_room(&self, experts: usize, need: u64) -> Result<(), StoreError> {
        let Some(limit) = self.limit else { return Ok(()) };
        let free = limit.saturating_sub(self.bytes());
        match need > free {
            true => Err(StoreError::Full { experts, need, free, limit }),
            false => Ok(()),
        }
    }

    fn adopt(&self, mapped: Vec<(Key, Arc<Resident>)>) -> usize {
        let count = mapped.len();
        for (key, resident) in mapped {
            self.bytes.fetch_add(resident.bytes(), Ordering::AcqRel);
            if let (Some(gpu), Some(weights)) = (&self.gpu, &resident.weights) {
                gpu.offer(weights);
            }
            self.experts.insert(key, resident);
        }
        self.changed();
        count
    }

    /// What is owned, by layer, ascending.
    pub fn owned(&self) -> Vec<LayerExperts> {
        let owned = self.experts.iter().filter(|entry| !entry.leaving.load(Ordering::Acquire));
        by_layer(owned.map(|entry| *entry.key()))
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

/// Keys as they go over the wire, ascending.
pub fn by_layer(keys: impl Iterator<Item = Key>) -> Vec<LayerExperts> {
    let mut layers: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (layer, expert) in keys {
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

/// Which of `keys` have their files here, and which have not.
fn here(checkpoint: &Checkpoint, keys: &[Key]) -> Result<(Vec<Key>, Vec<Key>), LoadError> {
    let (mut here, mut absent) = (Vec::new(), Vec::new());
    for &(layer, expert) in keys {
        let found = checkpoint.has_expert(layer.0 as usize, expert.0 as usize)?;
        if found { &mut here } else { &mut absent }.push((layer, expert));
    }
    Ok((here, absent))
}

/// Looks the experts up in the checkpoint; reads no weights.
fn map(checkpoint: &Arc<Checkpoint>, keys: &[Key]) -> Result<Vec<(Key, Arc<Resident>)>, LoadError> {
    let one = |&(layer, expert): &Key| {
        let weights = Expert::load(checkpoint, layer.0 as usize, expert.0 as usize)?;
        Ok(((layer, expert), Resident::new(Some(weights))))
    };
    keys.iter().map(one).collect()
}
