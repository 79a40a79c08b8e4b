//! Whether a router that stands for election may order anything now, and what it
//! does first in a term: every node hears of it, so that whoever was in office
//! before is refused from then on.

use std::collections::HashSet;
use std::time::Instant;

use actix::{ActorFutureExt as _, AsyncContext as _, Context, WrapFuture as _};
use mesh::registry::office::Office;
use proto::v1::Order;

use super::Controller;
use super::core::{Orders, Refusal, Seen};
use super::orders;

/// What an elected controller keeps.
pub(super) struct Elected {
    office: Office,
    /// The term that the core has.
    term: Option<u64>,
    /// A term in which another actor of this process has given orders.
    used: Option<u64>,
    /// It was in office when it last looked.
    serves: bool,
    /// Nodes that were told of the term, or are being told: endpoint, incarnation.
    told: HashSet<(String, u64)>,
}

impl Elected {
    pub fn new(office: Office, now: Instant) -> Self {
        let used = office.term(now).ok();
        used.inspect(|term| office.use_up(*term));
        Self { office, term: None, used, serves: false, told: HashSet::new() }
    }
}

impl Controller {
    /// Whether orders may be given now. Takes office if it was elected, stops its
    /// orders if its term has ended.
    pub(super) fn may_order(
        &mut self,
        seen: &[Seen],
        ctx: &mut Context<Self>,
    ) -> Result<(), Refusal> {
        let Some(elected) = &mut self.elected else { return Ok(()) };
        let now = Instant::now();
        seen.iter().for_each(|node| elected.office.saw(node.term));
        let term = match elected.office.term(now) {
            Ok(term) if elected.used == Some(term) => Err("its term is being renewed".to_owned()),
            term => term,
        };
        let serves = term.is_ok();
        let new = term.as_ref().is_ok_and(|term| elected.term != Some(*term));
        if std::mem::replace(&mut elected.serves, serves) != serves || new {
            match &term {
                Ok(term) => tracing::info!(term, "this router is the controller"),
                Err(why) => tracing::warn!(why, "this router is the controller no longer"),
            }
            // Of another term, or of one that has ended.
            if let Some(running) = self.busy.take() {
                ctx.cancel_future(running);
            }
        }
        let term = match term {
            Ok(term) => term,
            Err(why) => {
                self.core.watch(seen, now);
                return Err(Refusal::Deposed(why));
            }
        };
        if new {
            elected.term = Some(term);
            elected.told.clear();
            self.core.take_office(term, seen, now);
            self.parts.history.record("term", format_args!("\"term\":{term}"));
            self.parts.history.flush();
        }
        self.tell(seen, term, ctx);
        Ok(())
    }

    /// Has nodes that obey an older term obey this one: an order to load nothing.
    fn tell(&mut self, seen: &[Seen], term: u64, ctx: &mut Context<Self>) {
        for node in seen.iter().filter(|node| node.term < term) {
            let name = (node.endpoint.clone(), node.incarnation);
            let told = self.elected.as_mut().is_some_and(|elected| elected.told.insert(name));
            if !told {
                continue;
            }
            let load = vec![(node.endpoint.clone(), Vec::new())];
            let orders = Orders { order: Order { term, epoch: 0 }, load, ..Orders::default() };
            let name = (node.endpoint.clone(), node.incarnation);
            let telling = orders::give(self.targets(orders), self.parts.history.clone());
            let telling = telling.into_actor(self);
            ctx.spawn(telling.map(move |outcomes, controller, _| {
                let heard = outcomes.iter().any(|outcome| outcome.failure.is_none());
                if let Some(elected) = controller.elected.as_mut().filter(|_| !heard) {
                    elected.told.remove(&name);
                }
            }));
        }
    }
}
