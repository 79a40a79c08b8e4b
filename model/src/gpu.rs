//! Routed experts on a GPU: as many as fit into its slots, the others in pinned host memory and on disk, brought in when
//! rows come for them while those that are there are computed ([`residency`]).
//!
//! Rows come in bf16 or, where they travelled so, in FP8, and leave in bf16. With FP8 checkpoints activations are coded in
//! FP8 too (`kernels::cuda`), so that experts on a GPU are a numerics class of their own ([`crate::ExpertDevice::class`]).
//!
//! A batch begins while the one before is computed: its rows travel meanwhile. Experts are kept in their slots until the
//! results of their batch are taken, or until one has to be waited for that could need the place.

pub mod residency;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use kernels::Compute;
use kernels::cuda::{
    Arena, ExpertShape, Gpu, GpuError, GroupedFfn, Layout, LayoutError, Piece, Pinned, Results,
    Rows,
};
use parking_lot::{Condvar, Mutex};

use self::residency::{Key, Load, Residency, Tiers};
use crate::expert::{Expert, ExpertGroup, Experts};
use crate::numerics::Numerics;

/// Rows that are computed at once at most; more are cut.
const CHUNK_ROWS: usize = 4096;
/// Device memory that is left alone where no budget is given: for rows, the driver and others.
const SPARE: u64 = 3 << 30;

/// How much memory experts on a GPU may take.
#[derive(Clone, Copy, Debug)]
pub struct GpuBudget {
    /// Bytes of device memory for experts; `None` is what is free but for a reserve.
    pub device: Option<u64>,
    /// Bytes of pinned host memory for experts that are not on the device; at least one expert's.
    pub host: u64,
}

/// Why experts, or a trunk, cannot be on a GPU.
#[derive(Debug, thiserror::Error)]
pub enum GpuStartError {
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("one expert takes {need} bytes of device memory, {budget} are given to experts")]
    Budget { need: usize, budget: u64 },
    #[error("a GPU computes in bf16 or fp8: set numerics to \"bf16\"")]
    Numerics,
    #[error("a GPU's trunk needs {what} to be {needed}, this model has {have}")]
    Geometry { what: &'static str, needed: &'static str, have: usize },
    #[error("cannot start the thread that loads experts: {0}")]
    Thread(#[from] std::io::Error),
}

/// What the one who computes, the one who loads and the ones who offer share.
struct Shared {
    state: Mutex<State>,
    /// Something was loaded, or cannot be.
    loaded: Condvar,
    /// Something is wanted, or all ends.
    wanted: Condvar,
}

struct State {
    residency: Residency,
    /// Where experts that may have to be loaded come from.
    experts: HashMap<Key, Expert>,
    failed: Option<GpuError>,
    stop: bool,
}

/// Tells a device of experts that may be wanted. Cheap to clone.
#[derive(Clone)]
pub struct GpuOffers(Arc<Shared>);

impl GpuOffers {
    /// Has the expert loaded where there is a free place.
    pub fn offer(&self, expert: &Expert) {
        let mut state = self.0.state.lock();
        state.experts.entry(expert.key()).or_insert_with(|| expert.clone());
        state.residency.offer(expert.key());
        self.0.wanted.notify_one();
    }

    /// The expert is not wanted any more.
    pub fn forget(&self, expert: &Expert) {
        let mut state = self.0.state.lock();
        state.residency.forget(expert.key());
        if !state.residency.knows(expert.key()) {
            state.experts.remove(&expert.key());
        }
    }

    /// How many experts are where.
    pub fn tiers(&self) -> Tiers {
        self.0.state.lock().residency.tiers()
    }
}

/// See the module's text.
pub struct GpuExperts {
    ffn: GroupedFfn,
    /// By batch whose results were not taken: experts that are kept in their slots, and their rows.
    held: VecDeque<Vec<(Key, usize)>>,
    shared: Arc<Shared>,
    loader: Option<JoinHandle<()>>,
}

impl GpuExperts {
    /// Opens `cuda:ordinal` for experts of `shape`, of which there are `count` in all.
    pub fn open(
        ordinal: usize,
        shape: ExpertShape,
        count: usize,
        budget: GpuBudget,
    ) -> Result<GpuExperts, GpuStartError> {
        let layout = Layout::new(shape);
        let gpu = Gpu::open(ordinal)?;
        let device = match budget.device {
            Some(bytes) => bytes,
            None => (gpu.memory()?.0 as u64).saturating_sub(SPARE),
        };
        let slots = Arena::slots_in(&layout, device).min(count.max(1));
        if slots == 0 {
            return Err(GpuStartError::Budget { need: layout.bytes, budget: device });
        }
        let host = Arena::slots_in(&layout, budget.host).clamp(1, count.max(1));
        let arena = Arc::new(Arena::new(&gpu, layout, slots)?);
        let ffn = GroupedFfn::new(arena.clone(), CHUNK_ROWS)?;
        let pin = |_| gpu.pin("experts in the host's memory", layout.bytes);
        let places = (0..host).map(pin).collect::<Result<Vec<_>, _>>()?;

        let state = State {
            residency: Residency::new(slots, host),
            experts: HashMap::new(),
            failed: None,
            stop: false,
        };
        let (loaded, wanted) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { state: Mutex::new(state), loaded, wanted });
        let loader = Loader { shared: shared.clone(), arena, places };
        let loader = std::thread::Builder::new().name("loader".into()).spawn(|| loader.run())?;
        Ok(GpuExperts { ffn, held: VecDeque::new(), shared, loader: Some(loader) })
    }

    /// As the driver calls it, and how many experts fit on it.
    pub fn describe(&self) -> (String, usize) {
        let arena = self.ffn.arena();
        (arena.gpu().name().to_owned(), arena.slots())
    }

    /// What tells it of experts.
    pub fn offers(&self) -> GpuOffers {
        GpuOffers(self.shared.clone())
    }

    /// Takes the slots of those of `todo` that are on the device out of it; waits until there is one.
    fn acquire(
        &mut self,
        groups: &[ExpertGroup<'_>],
        todo: &mut Vec<usize>,
    ) -> Result<Vec<(usize, u32)>, GpuError> {
        let mut waits = false;
        loop {
            let mut state = self.shared.state.lock();
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let mut ready = Vec::new();
            let State { residency, experts, .. } = &mut *state;
            todo.retain(|&group| {
                let expert = groups[group].expert;
                experts.entry(expert.key()).or_insert_with(|| expert.clone());
                let slot = residency.acquire(expert.key());
                ready.extend(slot.map(|slot| (group, slot)));
                slot.is_none()
            });
            if !todo.is_empty() {
                self.shared.wanted.notify_one();
            }
            if !ready.is_empty() || todo.is_empty() {
                return Ok(ready);
            }
            if waits {
                self.shared.loaded.wait(&mut state);
                continue;
            }
            drop(state);
            // What is awaited may need a place that only this thread can free.
            self.ffn.settle()?;
            for held in &mut self.held {
                self.shared.release(std::mem::take(held));
            }
            waits = true;
        }
    }

    fn compute(&mut self, groups: &[ExpertGroup<'_>], rows: &dyn Rows) -> Result<(), GpuError> {
        let mut end = 0;
        let place = |group: &ExpertGroup<'_>| {
            end += group.rows;
            end - group.rows..end
        };
        let places: Vec<Range<usize>> = groups.iter().map(place).collect();
        self.ffn.begin(end)?;
        self.held.push_back(Vec::new());
        // What is there is computed while the others are on their way.
        let mut todo: Vec<usize> = (0..groups.len()).filter(|&at| groups[at].rows > 0).collect();
        while !todo.is_empty() {
            let ready = self.acquire(groups, &mut todo)?;
            let piece = |&(group, slot): &(usize, u32)| Piece { slot, rows: places[group].clone() };
            let pieces: Vec<Piece> = ready.iter().map(piece).collect();
            if let Some(held) = self.held.back_mut() {
                let expert = |&(group, _): &(usize, u32)| &groups[group];
                held.extend(ready.iter().map(expert).map(|group| (group.expert.key(), group.rows)));
            }
            self.ffn.compute(&pieces, rows)?;
        }
        Ok(())
    }
}

impl Shared {
    /// Experts are not used any more that were kept in their slots.
    fn release(&self, held: Vec<(Key, usize)>) {
        let mut state = self.state.lock();
        for (key, rows) in held {
            state.residency.release(key, rows);
        }
        drop(state);
        // Places that were in use are free for what is to be loaded.
        self.wanted.notify_one();
    }

    /// Nothing is computed any more.
    fn fail(&self, error: &GpuError) {
        let mut state = self.state.lock();
        state.residency.give_up();
        state.failed = Some(error.clone());
        drop(state);
        self.wanted.notify_one();
    }
}

impl Experts for GpuExperts {
    fn takes_fp8(&self) -> bool {
        true
    }

    fn begin(
        &mut self,
        _: &Compute,
        numerics: Numerics,
        groups: &[ExpertGroup<'_>],
        rows: &dyn Rows,
    ) -> Result<(), GpuError> {
        assert_eq!(numerics, Numerics::Bf16, "rows of a GPU's experts");
        self.compute(groups, rows).inspect_err(|error| self.shared.fail(error))
    }

    fn is_done(&self) -> Result<bool, GpuError> {
        self.ffn.is_done().inspect_err(|error| self.shared.fail(error))
    }

    fn results(&mut self) -> Result<Results<'_>, GpuError> {
        let results = self.ffn.results().inspect_err(|error| self.shared.fail(error))?;
        self.shared.release(self.held.pop_front().unwrap_or_default());
        Ok(results)
    }
}

impl Drop for GpuExperts {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.wanted.notify_all();
        if let Some(loader) = self.loader.take() {
            // It has said what was wrong with it.
            let _ = loader.join();
        }
    }
}

/// The thread that brings experts in.
struct Loader {
    shared: Arc<Shared>,
    arena: Arc<Arena>,
    places: Vec<Pinned>,
}

impl Loader {
    fn run(mut self) {
        while let Some((load, expert)) = self.next() {
            let loaded = self.load(load, &expert);
            let mut state = self.shared.state.lock();
            match loaded {
                Ok(()) => state.residency.done(load),
                Err(error) => {
                    state.residency.failed(load);
                    state.failed = Some(error);
                }
            }
            self.shared.loaded.notify_all();
        }
    }

    /// Waits for something to load; nothing when all ends.
    fn next(&self) -> Option<(Load, Expert)> {
        let mut state = self.shared.state.lock();
        loop {
            if state.stop || state.failed.is_some() {
                return None;
            }
            match state.residency.next_load() {
                Some(load) => {
                    let expert = state.experts.get(&load.key).cloned();
                    match expert {
                        Some(expert) => return Some((load, expert)),
                        // Forgotten before its turn.
                        None => state.residency.failed(load),
                    }
                }
                None => self.shared.wanted.wait(&mut state),
            }
        }
    }

    fn load(&mut self, load: Load, expert: &Expert) -> Result<(), GpuError> {
        let place = &mut self.places[load.host as usize];
        if load.fill {
            let (layout, ordinal) = (self.arena.layout(), self.arena.gpu().ordinal());
            layout.pack(&expert.mats(), place).map_err(|error| GpuError::Failed {
                ordinal,
                doing: "laying an expert out",
                code: format!("layer {} expert {}: {error}", expert.layer(), expert.index()),
            })?;
        }
        match load.device {
            Some(slot) => self.arena.fill(slot, place),
            None => Ok(()),
        }
    }
}

impl Drop for Loader {
    /// Nobody waits for a loader that panicked.
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        if std::thread::panicking() && state.failed.is_none() {
            let (ordinal, code) = (self.arena.gpu().ordinal(), "the loader panicked".to_owned());
            state.failed = Some(GpuError::Failed { ordinal, doing: "loading an expert", code });
        }
        self.shared.loaded.notify_all();
    }
}
