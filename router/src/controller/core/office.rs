//! A core that is elected: it knows what goes on before it decides anything, and
//! takes its term from the election.

use std::time::Instant;

use mesh::registry::office::Drained;
use proto::v1::Order;

use super::{Core, Progress, Seen, Settings};

impl Core {
    /// One that decides nothing before it is elected.
    pub fn standby(settings: Settings, now: Instant) -> Self {
        Self { self_appointed: false, ..Self::new(settings, 0, now) }
    }

    /// Sees what the one in office sees: what is missing, and since when.
    pub fn watch(&mut self, nodes: &[Seen], now: Instant) {
        self.look(nodes, now);
        self.choose(nodes, now);
    }

    /// It was elected. Nodes in `drained` were to own nothing under the one before.
    pub fn take_office(&mut self, term: u64, drained: Drained, now: Instant) {
        self.order = Order { term, epoch: 0 };
        self.draining = drained;
        (self.deposed, self.goal, self.progress) = (None, None, Progress::default());
        (self.changed, self.not_before) = (now, now);
    }

    /// Nodes that are to own nothing.
    pub fn draining(&self) -> &Drained {
        &self.draining
    }
}
