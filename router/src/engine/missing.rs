//! What a step could not get for its sequences, and what becomes of them: each
//! waits, fails or does without, as its request says. The others of the step
//! go on and see nothing of it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use model::Step;
use proto::v1::OnMissing;
use tonic::Status;

use super::Engine;
use super::stream::Stream;
use crate::exchange::{Gap, Lack};
use crate::scheduler::{Part, SeqId};

/// See the module's text. Of one step.
#[derive(Default)]
pub(super) struct Shortfall {
    /// Sequences whose part of the step is lost, and why.
    lost: BTreeMap<SeqId, Arc<Lack>>,
    /// Results left out; a sequence may have rows in both lanes.
    dropped: BTreeMap<SeqId, u64>,
    /// Rows of the layer at hand that are not worth anything.
    rows: Vec<usize>,
}

impl Shortfall {
    /// Takes in the gaps of a layer of the batch `step`, which computes `parts`.
    pub fn take(
        &mut self,
        gaps: &[Gap],
        parts: &[Part],
        streams: &HashMap<SeqId, Stream>,
        step: &mut Step,
    ) {
        if gaps.is_empty() {
            return;
        }
        let top_k = step.routed().top_k;
        let mut rows: BTreeMap<usize, Vec<&Gap>> = BTreeMap::new();
        for gap in gaps {
            rows.entry(gap.slot as usize / top_k).or_default().push(gap);
        }
        for (row, gaps) in rows {
            let Some(id) = owner(row, parts) else { continue };
            let policy = streams.get(&id).map_or(OnMissing::Fail, Stream::on_missing);
            let absent = gaps.iter().all(|gap| gap.lack.is_absence());
            let slots: Vec<usize> = gaps.iter().map(|gap| gap.slot as usize).collect();
            if policy == OnMissing::Drop && absent {
                step.drop_slots(row, &slots);
                *self.dropped.entry(id).or_default() += slots.len() as u64;
                continue;
            }
            self.rows.push(row);
            // What can mend itself is waited for only if nothing else is wrong.
            let worst = gaps.iter().find(|gap| gap.lack.expert().is_none()).unwrap_or(&gaps[0]);
            self.lost.entry(id).or_insert_with(|| worst.lack.clone());
        }
    }

    /// Keeps lost rows from making trouble in later layers, such as values that
    /// are not finite.
    pub fn silence(&mut self, step: &mut Step) {
        self.rows.drain(..).for_each(|row| step.silence(row));
    }

    pub fn is_lost(&self, id: SeqId) -> bool {
        self.lost.contains_key(&id)
    }

    /// No sequence of the plan gets anything out of the step.
    pub fn is_all(&self, plan: &[Part]) -> bool {
        !self.lost.is_empty() && plan.iter().all(|part| self.is_lost(part.id))
    }

    pub fn is_any(&self) -> bool {
        !self.lost.is_empty()
    }

    /// Results left out of a sequence's rows in this step; told once.
    pub fn take_dropped(&mut self, id: SeqId) -> u64 {
        self.dropped.remove(&id).unwrap_or_default()
    }
}

/// Whose row it is.
fn owner(row: usize, parts: &[Part]) -> Option<SeqId> {
    let mut end = 0;
    parts.iter().find_map(|part| {
        end += part.len;
        (row < end).then_some(part.id)
    })
}

impl Engine {
    /// Parks or ends the sequences whose part of the step is lost.
    pub(super) fn make_do(&mut self, short: Shortfall) {
        let now = Instant::now();
        for (id, lack) in short.lost {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            match (lack.expert(), stream.on_missing()) {
                (Some((layer, expert)), OnMissing::Wait) => {
                    tracing::debug!(parent: &stream.span, %lack, "waits for an expert");
                    stream.park(layer, expert, now);
                }
                (_, policy) => {
                    tracing::warn!(%lack, "sequence ends without its expert");
                    // Asking elsewhere or again is not what such a request wants.
                    let status = match policy == OnMissing::Fail && lack.is_absence() {
                        true => Status::failed_precondition(lack.to_string()),
                        false => Status::unavailable(lack.to_string()),
                    };
                    stream.fail(status);
                    self.parts.metrics.failed.inc();
                    self.end(id);
                }
            }
        }
    }

    /// Goes on with sequences whose expert is there again, and ends those that
    /// have waited for too long.
    pub(super) fn look_for_experts(&mut self) {
        let now = Instant::now();
        let (experts, patience) = (&self.parts.experts, self.parts.expert_wait);
        let (mut parked, mut ended) = (0, Vec::new());
        for (&id, stream) in &mut self.streams {
            let Some(stalled) = stream.parked() else { continue };
            let waited = now.saturating_duration_since(stalled.since);
            if experts.has(stalled.layer, stalled.expert) {
                stream.unpark();
            } else if waited >= patience {
                let (layer, expert) = (stalled.layer, stalled.expert);
                stream.fail(Status::unavailable(format!(
                    "layer {layer} expert {expert} has no live owner, waited {waited:.1?}"
                )));
                ended.push(id);
            } else {
                parked += 1;
            }
        }
        self.parts.metrics.parked.set(parked);
        for id in ended {
            self.parts.metrics.failed.inc();
            self.end(id);
        }
    }
}
