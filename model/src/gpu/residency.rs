//! Which experts are on the device and which in pinned host memory; the rest is on disk. A state machine without IO: who
//! computes acquires and releases slots, one who loads asks for the next load and says when it is done.
//!
//! - A slot that is acquired, or loaded for someone who waits for it, is not given to another expert: an expert's
//!   address is stable while it is in use.
//! - Who waits comes before what is merely offered, and may evict; an offer takes free places only.
//! - The expert with the least load goes first. Load is rows computed, halved every so often.
//! - Every load passes through a host slot, which keeps its copy until another expert needs the place.

use std::collections::{HashMap, VecDeque};

/// An expert's identity ([`crate::Expert`]'s).
pub type Key = u64;

/// Rows after which every expert's load is halved.
const HALVED_AFTER: u64 = 1 << 20;

/// What is to be loaded: read from disk into host slot `host` if `fill`, then copied to slot `device`, if any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub key: Key,
    pub host: u32,
    pub fill: bool,
    pub device: Option<u32>,
}

/// How many experts are where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Tiers {
    pub device: usize,
    /// In pinned host memory, and not on the device.
    pub host: usize,
    /// Known, and on disk only.
    pub disk: usize,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    holds: Option<Key>,
    /// Its bytes are the expert's.
    ready: bool,
    /// Users; while there are any it keeps its expert.
    pins: u32,
}

#[derive(Default)]
struct Entry {
    load: f64,
    device: Option<u32>,
    host: Option<u32>,
    /// Someone waits for it on the device.
    awaited: bool,
    /// It is in a queue or being loaded.
    pending: bool,
}

/// See the module's text.
pub struct Residency {
    entries: HashMap<Key, Entry>,
    device: Vec<Slot>,
    host: Vec<Slot>,
    awaited: VecDeque<Key>,
    offered: VecDeque<Key>,
    rows: u64,
}

impl Residency {
    /// With so many slots on the device and in the host's memory, at least one each.
    pub fn new(device: usize, host: usize) -> Residency {
        Residency {
            entries: HashMap::new(),
            device: vec![Slot::default(); device.max(1)],
            host: vec![Slot::default(); host.max(1)],
            awaited: VecDeque::new(),
            offered: VecDeque::new(),
            rows: 0,
        }
    }

    /// The expert's slot, kept for the caller until [`Residency::release`]; or it is put in line, before what was only
    /// offered, and kept for whoever asks again.
    pub fn acquire(&mut self, key: Key) -> Option<u32> {
        let entry = self.entries.entry(key).or_default();
        if let Some(slot) = entry.device
            && self.device[slot as usize].ready
        {
            entry.awaited = false;
            self.device[slot as usize].pins += 1;
            return Some(slot);
        }
        if !entry.awaited {
            entry.awaited = true;
            let offered = self.offered.iter().position(|waiting| *waiting == key);
            if let Some(at) = offered {
                self.offered.remove(at);
            }
            if !entry.pending || offered.is_some() {
                entry.pending = true;
                self.awaited.push_back(key);
            }
        }
        None
    }

    /// Gives a slot back that was acquired, after `rows` rows.
    pub fn release(&mut self, key: Key, rows: usize) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.load += rows as f64;
        if let Some(slot) = entry.device {
            let pins = &mut self.device[slot as usize].pins;
            *pins = pins.saturating_sub(1);
        }
        self.rows += rows as u64;
        if self.rows >= HALVED_AFTER {
            self.rows = 0;
            self.entries.values_mut().for_each(|entry| entry.load /= 2.0);
        }
    }

    /// Makes an expert known; it is loaded where there is a free place for it.
    pub fn offer(&mut self, key: Key) {
        let entry = self.entries.entry(key).or_default();
        if entry.device.is_none() && !entry.pending {
            entry.pending = true;
            self.offered.push_back(key);
        }
    }

    /// Nobody waits any more.
    pub fn give_up(&mut self) {
        for key in self.awaited.drain(..) {
            if let Some(entry) = self.entries.get_mut(&key) {
                entry.pending = false;
            }
        }
        self.entries.values_mut().for_each(|entry| entry.awaited = false);
    }

    /// The expert is not this node's any more: its places are free when nobody uses them. One that is being loaded or used
    /// stays, as the least wanted.
    pub fn forget(&mut self, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.load = 0.0;
        let (device, host) = (entry.device, entry.host);
        let idle = |slots: &[Slot], slot: Option<u32>| {
            slot.is_none_or(|slot| slots[slot as usize].ready && slots[slot as usize].pins == 0)
        };
        if entry.pending || entry.awaited || !idle(&self.device, device) || !idle(&self.host, host)
        {
            return;
        }
        if let Some(slot) = device {
            self.device[slot as usize] = Slot::default();
        }
        if let Some(slot) = host {
            self.host[slot as usize] = Slot::default();
        }
        self.entries.remove(&key);
    }

    /// Whether it was told of the expert and did not forget it.
    pub fn knows(&self, key: Key) -> bool {
        self.entries.contains_key(&key)
    }

    /// The next load, if one is wanted and there is a place for it. Its slots are taken until [`Residency::done`] or
    /// [`Residency::failed`].
    pub fn next_load(&mut self) -> Option<Load> {
        if let Some(&key) = self.awaited.front() {
            let host = self.host_place(key, true)?;
            let device = self.victim(&self.device, true)?;
            self.awaited.pop_front();
            return Some(self.take(key, host, Some(device)));
        }
        while let Some(key) = self.offered.pop_front() {
            let device = self.victim(&self.device, false);
            // With a place on the device, any host slot will do to pass through; without, only a free one is worth it.
            let cached = self.entries.get(&key).is_some_and(|entry| entry.host.is_some());
            let host = self.host_place(key, device.is_some());
            match (host, device) {
                (Some(host), Some(device)) => return Some(self.take(key, host, Some(device))),
                (Some(host), None) if !cached => return Some(self.take(key, host, None)),
                (None, Some(_)) => {
                    // Host slots are all passed through at the moment.
                    self.offered.push_front(key);
                    return None;
                }
                _ => self.entries.entry(key).or_default().pending = false,
            }
        }
        None
    }

    /// A load is there.
    pub fn done(&mut self, load: Load) {
        self.finish(load, true);
    }

    /// A load did not succeed: its places are free again.
    pub fn failed(&mut self, load: Load) {
        self.finish(load, false);
    }

    fn finish(&mut self, load: Load, succeeded: bool) {
        let host = &mut self.host[load.host as usize];
        host.pins = host.pins.saturating_sub(1);
        let entry = self.entries.entry(load.key).or_default();
        entry.pending = false;
        if succeeded {
            host.ready = true;
            if let Some(slot) = load.device {
                self.device[slot as usize].ready = true;
            }
            // Asked for while only its way into the host's memory was under way.
            if load.device.is_none() && entry.awaited {
                entry.pending = true;
                self.awaited.push_back(load.key);
            }
            return;
        }
        if load.fill {
            *host = Slot::default();
            entry.host = None;
        }
        if let Some(slot) = load.device {
            self.device[slot as usize] = Slot::default();
            entry.device = None;
        }
        entry.awaited = false;
    }

    /// How many experts are where.
    pub fn tiers(&self) -> Tiers {
        let ready =
            |slots: &[Slot], slot: Option<u32>| slot.is_some_and(|slot| slots[slot as usize].ready);
        let mut tiers = Tiers::default();
        for entry in self.entries.values() {
            match (ready(&self.device, entry.device), ready(&self.host, entry.host)) {
                (true, _) => tiers.device += 1,
                (false, true) => tiers.host += 1,
                (false, false) => tiers.disk += 1,
            }
        }
        tiers
    }

    /// The host slot that holds the expert, or a place for it, and whether it has to be filled.
    fn host_place(&self, key: Key, evict: bool) -> Option<(u32, bool)> {
        match self.entries.get(&key).and_then(|entry| entry.host) {
            Some(slot) => Some((slot, false)),
            None => self.victim(&self.host, evict).map(|slot| (slot, true)),
        }
    }

    /// A free slot, or if `evict` the idle one whose expert is least wanted.
    fn victim(&self, slots: &[Slot], evict: bool) -> Option<u32> {
        if let Some(free) = slots.iter().position(|slot| slot.holds.is_none()) {
            return Some(free as u32);
        }
        if !evict {
            return None;
        }
        let on_device = std::ptr::eq(slots, self.device.as_slice());
        let candidates = slots.iter().enumerate().filter_map(|(at, slot)| {
            let entry = self.entries.get(&slot.holds?)?;
            // What is in the host's memory only passes through there: waiting protects a place on the device.
            let kept = slot.pins > 0 || !slot.ready || (on_device && entry.awaited);
            (!kept).then_some((at, entry.load))
        });
        candidates.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(at, _)| at as u32)
    }

    /// Gives the load's slots to its expert.
    fn take(&mut self, key: Key, (host, fill): (u32, bool), device: Option<u32>) -> Load {
        if fill {
            if let Some(old) = self.host[host as usize].holds
                && let Some(entry) = self.entries.get_mut(&old)
            {
                entry.host = None;
            }
            self.host[host as usize] = Slot { holds: Some(key), ready: false, pins: 0 };
        }
        self.host[host as usize].pins += 1;
        if let Some(slot) = device {
            if let Some(old) = self.device[slot as usize].holds
                && let Some(entry) = self.entries.get_mut(&old)
            {
                entry.device = None;
            }
            self.device[slot as usize] = Slot { holds: Some(key), ready: false, pins: 0 };
        }
        let entry = self.entries.entry(key).or_default();
        entry.pending = true;
        entry.host = Some(host);
        entry.device = device.or(entry.device);
        Load { key, host, fill, device }
    }
}

#[cfg(test)]
mod tests;
