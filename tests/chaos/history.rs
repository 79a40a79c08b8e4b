//! Checks a router's event log (`router/src/history.rs`): every slot of every
//! layer is applied exactly once, from a frame that went to an owner of its
//! experts under the epoch it names; epochs only rise, and never fall within a
//! step; no expert is without an owner while a live node holds it; nobody who
//! has left takes part in a step.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::ops::AddAssign;

use serde_json::Value;

type Cell = (u64, u64);

/// How much was checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub lives: usize,
    pub placements: usize,
    pub steps: usize,
    pub failed: usize,
    pub frames: usize,
    pub again: usize,
    pub stale: usize,
}

impl AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        self.lives += other.lives;
        self.placements += other.placements;
        self.steps += other.steps;
        self.failed += other.failed;
        self.frames += other.frames;
        self.again += other.again;
        self.stale += other.stale;
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} steps ({} failed), {} frames, {} sent again, {} stale replies dropped, {} placements",
            self.steps, self.failed, self.frames, self.again, self.stale, self.placements
        )
    }
}

/// A frame under way.
struct Sent {
    node: u64,
    slots: Vec<u64>,
}

/// A layer's exchange in one lane.
struct Layer {
    layer: u64,
    /// The newest epoch seen in it.
    epoch: u64,
    applied: Vec<bool>,
    open: HashMap<u64, Sent>,
}

/// One life of a router.
#[derive(Default)]
struct Life {
    placements: BTreeMap<u64, HashMap<Cell, Vec<u64>>>,
    lanes: BTreeMap<u64, Layer>,
    ended: HashSet<u64>,
    last_step: u64,
    step: Option<u64>,
    /// The newest epoch of the step.
    epoch: u64,
    last_ticket: BTreeMap<u64, u64>,
}

/// Checks a whole log, several lives of the router included.
///
/// # Errors
/// The first line that must not be, and why.
pub fn check(text: &str) -> Result<Seen, String> {
    let mut seen = Seen::default();
    let mut life = Life::default();
    let mut torn = None;
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let Ok(event) = serde_json::from_str::<Value>(line) else {
            // A killed router may leave half a line, and nothing after it.
            torn = Some(number + 1);
            continue;
        };
        let kind = event["e"].as_str().unwrap_or_default();
        if kind == "start" {
            (life, torn) = (Life::default(), None);
            seen.lives += 1;
            continue;
        }
        if let Some(torn) = torn {
            return Err(format!("line {torn} is no JSON, and the log goes on after it"));
        }
        if seen.lives == 0 {
            return Err("the log does not begin with a start".to_owned());
        }
        life.take(kind, &event, &mut seen)
            .map_err(|why| format!("line {}: {why}: {line}", number + 1))?;
    }
    Ok(seen)
}

fn number(event: &Value, key: &str) -> Result<u64, String> {
    event[key].as_u64().ok_or_else(|| format!("no number `{key}`"))
}

fn numbers(value: &Value) -> Result<Vec<u64>, String> {
    let list = value.as_array().ok_or("no list")?;
    list.iter().map(|item| item.as_u64().ok_or_else(|| "no number".to_owned())).collect()
}

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why()) }
}

impl Life {
    fn take(&mut self, kind: &str, event: &Value, seen: &mut Seen) -> Result<(), String> {
        match kind {
            "placement" => {
                seen.placements += 1;
                self.placement(event)
            }
            "step" => {
                seen.steps += 1;
                self.step(event)
            }
            "layer" => self.layer(event),
            "sent" => {
                seen.frames += 1;
                seen.again += usize::from(number(event, "attempt")? > 0);
                self.sent(event)
            }
            "taken" => {
                let (lane, sent) = self.close(event)?;
                let all = &mut self.lanes.get_mut(&lane).ok_or("no such lane")?.applied;
                // Where two owners were asked, the first result of a slot is the one.
                let but = numbers(&event["but"])?;
                let mut fresh = 0;
                for slot in sent.slots.into_iter().filter(|slot| !but.contains(slot)) {
                    let twice = std::mem::replace(&mut all[slot as usize], true);
                    ensure(!twice, || format!("slot {slot} is applied twice"))?;
                    fresh += 1;
                }
                let applied = number(event, "applied")?;
                ensure(applied == fresh, || format!("{applied} slots applied, {fresh} lacked one"))
            }
            "refused" => self.close(event).map(|_| ()),
            // Sent twice, and the other reply was first.
            "late" => {
                seen.stale += 1;
                let _ = self.close(event);
                Ok(())
            }
            "stale" => {
                seen.stale += 1;
                Ok(())
            }
            "done" => {
                let lane = number(event, "lane")?;
                let layer = self.lanes.remove(&lane).ok_or("a layer that never began is done")?;
                // Their sequences wait, fail or do without.
                let gaps = numbers(&event["gaps"])?;
                let slots = (0..).zip(&layer.applied);
                let mut open = slots.filter(|(slot, applied)| !**applied && !gaps.contains(slot));
                let missing = open.next().map(|(slot, _)| slot);
                ensure(missing.is_none(), || format!("slot {missing:?} was never applied"))
            }
            "step_end" => {
                ensure(self.lanes.is_empty(), || "a layer is not done".to_owned())?;
                self.end_step(event)
            }
            "step_failed" => {
                seen.failed += 1;
                self.lanes.clear();
                self.end_step(event)
            }
            // Of several routers together: `offices`.
            "term" | "order" => Ok(()),
            "end" => {
                let seq = number(event, "seq")?;
                ensure(self.ended.insert(seq), || format!("sequence {seq} ends twice"))
            }
            other => Err(format!("unknown event `{other}`")),
        }
    }

    fn placement(&mut self, event: &Value) -> Result<(), String> {
        let epoch = number(event, "epoch")?;
        let last = self.placements.last_key_value().map_or(0, |(&epoch, _)| epoch);
        ensure(epoch > last, || format!("epoch {epoch} follows {last}"))?;
        let mut held: HashMap<Cell, Vec<u64>> = HashMap::new();
        for node in event["held"].as_array().ok_or("no `held`")? {
            let index = node[0].as_u64().ok_or("no node")?;
            for layer in node[1].as_array().ok_or("no layers")? {
                let at = layer[0].as_u64().ok_or("no layer")?;
                for expert in numbers(&layer[1])? {
                    held.entry((at, expert)).or_default().push(index);
                }
            }
        }
        let mut cells = HashMap::new();
        for cell in event["owners"].as_array().ok_or("no `owners`")? {
            let at = (cell[0].as_u64().ok_or("no layer")?, cell[1].as_u64().ok_or("no expert")?);
            let owners = numbers(&cell[2])?;
            let holders = held.get(&at).map(Vec::as_slice).unwrap_or_default();
            ensure(!owners.is_empty() || holders.is_empty(), || {
                format!("{at:?} has no owner, though {holders:?} hold it")
            })?;
            let stranger = owners.iter().find(|owner| !holders.contains(owner));
            ensure(stranger.is_none(), || {
                format!("{at:?} is owned by {stranger:?}, who lacks it")
            })?;
            cells.insert(at, owners);
        }
        self.placements.insert(epoch, cells);
        Ok(())
    }

    fn step(&mut self, event: &Value) -> Result<(), String> {
        let n = number(event, "n")?;
        ensure(self.step.is_none(), || "a step begins within another".to_owned())?;
        ensure(n == self.last_step + 1, || format!("step {n} follows {}", self.last_step))?;
        let seqs = numbers(&event["seqs"])?;
        let gone = seqs.iter().find(|seq| self.ended.contains(seq));
        ensure(gone.is_none(), || format!("sequence {gone:?} is computed after its end"))?;
        (self.step, self.last_step, self.epoch) = (Some(n), n, 0);
        Ok(())
    }

    fn end_step(&mut self, event: &Value) -> Result<(), String> {
        let n = number(event, "n")?;
        ensure(self.step.take() == Some(n), || format!("step {n} ends without having begun"))
    }

    fn layer(&mut self, event: &Value) -> Result<(), String> {
        let (lane, layer) = (number(event, "lane")?, number(event, "layer")?);
        let (slots, epoch) = (number(event, "slots")?, number(event, "epoch")?);
        ensure(self.step.is_some(), || "a layer outside a step".to_owned())?;
        ensure(epoch >= self.epoch, || format!("epoch {epoch} within a step at {}", self.epoch))?;
        ensure(self.placements.contains_key(&epoch), || {
            format!("epoch {epoch} was not published")
        })?;
        self.epoch = epoch;
        let begun =
            Layer { layer, epoch, applied: vec![false; slots as usize], open: HashMap::new() };
        let before = self.lanes.insert(lane, begun);
        ensure(before.is_none(), || format!("lane {lane} is still busy"))
    }

    fn sent(&mut self, event: &Value) -> Result<(), String> {
        let (ticket, lane) = (number(event, "ticket")?, number(event, "lane")?);
        let (node, layer) = (number(event, "node")?, number(event, "layer")?);
        let epoch = number(event, "epoch")?;
        let (slots, experts) = (numbers(&event["slots"])?, numbers(&event["experts"])?);
        let now = self.lanes.get_mut(&lane).ok_or("a frame outside a layer")?;
        ensure(now.layer == layer, || format!("a frame of layer {layer} in layer {}", now.layer))?;
        ensure(epoch >= now.epoch, || format!("epoch {epoch} after {}", now.epoch))?;
        now.epoch = epoch;
        self.epoch = self.epoch.max(epoch);
        let last = self.last_ticket.insert(ticket, lane);
        ensure(last.is_none(), || format!("ticket {ticket} is used twice"))?;
        let cells = self.placements.get(&epoch).ok_or("its epoch was not published")?;
        for &expert in &experts {
            let owners = cells.get(&(layer, expert)).map(Vec::as_slice).unwrap_or_default();
            ensure(owners.contains(&node), || {
                format!("node {node} does not own expert {expert}, {owners:?} do")
            })?;
        }
        ensure(slots.len() == experts.len(), || "slots and experts differ".to_owned())?;
        let mut mine = HashSet::new();
        for &slot in &slots {
            let applied = now.applied.get(slot as usize).ok_or("no such slot")?;
            ensure(!applied, || format!("slot {slot} has its result already"))?;
            ensure(mine.insert(slot), || format!("slot {slot} is twice in one frame"))?;
        }
        now.open.insert(ticket, Sent { node, slots });
        Ok(())
    }

    /// The frame that a reply answers.
    fn close(&mut self, event: &Value) -> Result<(u64, Sent), String> {
        let (ticket, node) = (number(event, "ticket")?, number(event, "node")?);
        for (&lane, layer) in &mut self.lanes {
            if let Some(sent) = layer.open.remove(&ticket) {
                ensure(sent.node == node, || format!("it was sent to node {}", sent.node))?;
                return Ok((lane, sent));
            }
        }
        Err("a reply to no open frame is taken".to_owned())
    }
}
