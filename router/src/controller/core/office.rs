//! A core that is elected: it knows what goes on before it decides anything, and
//! takes its term from the election.

use std::time::Instant;

use proto::v1::Order;

use super::{Core, Progress, Seen, Settings};

impl Core {
    /// One that decides nothing before it is elected.
    pub fn standby(settings: Settings, now: Instant) -> Self {
        Self { self_appointed: false, ..Self::new(settings, 0, now) }
    }

    /// Sees what the one in office sees: what is drained, what is missing, and since when.
    pub fn watch(&mut self, nodes: &[Seen], now: Instant) {
        self.look(nodes, now);
        for Seen { endpoint, incarnation, drained, .. } in nodes {
            match drained {
                true => self.draining.insert(endpoint.clone(), *incarnation),
                false => self.draining.remove(endpoint),
            };
        }
        self.choose(nodes, now);
    }

    /// It was elected.
    pub fn take_office(&mut self, term: u64, nodes: &[Seen], now: Instant) {
        self.watch(nodes, now);
        // Who is away may have been drained since it was last seen.
        self.known.clone_from(&self.live);
        self.order = Order { term, epoch: 0 };
        (self.deposed, self.goal, self.progress) = (None, None, Progress::default());
        (self.changed, self.not_before) = (now, now);
    }
}
