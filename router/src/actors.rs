//! Where the router's actors live: one thread with one arbiter, apart from the
//! threads that serve gRPC. Each actor is kept alive by a supervisor; the
//! streams of the links run on the engine's thread.

use std::sync::Arc;

use actix::Addr;
use mesh::link::{FleetAddress, Identity, Link, LinkEvent, LinkParts};
use mesh::supervise;
use mesh::tls::Tls;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use crate::fleet::{Fleet, FleetParts};
use crate::intake::{Intake, IntakeParts};
use crate::service::View;

/// Who is to play, and with what.
pub(crate) struct Cast {
    pub fleet: FleetParts,
    /// None where nobody submits sequences.
    pub intake: Option<(IntakeParts, Arc<View>)>,
    pub identity: Identity,
    pub link_events: mpsc::Sender<LinkEvent>,
    /// The engine's runtime, where the links' streams live.
    pub pump: Handle,
    /// How nodes are spoken to.
    pub tls: Option<Tls>,
}

/// The running actors; they end with it.
pub(crate) struct Actors {
    stop: oneshot::Sender<()>,
}

impl Actors {
    pub fn stop(self) {
        // The thread may have ended already; then there is nothing to stop.
        let _ = self.stop.send(());
    }
}

/// Starts the thread and the actors.
pub(crate) fn start(cast: Cast) -> std::io::Result<Actors> {
    let (stop, stopped) = oneshot::channel();
    std::thread::Builder::new().name("actors".into()).spawn(move || {
        actix::System::new().block_on(async move {
            play(cast);
            let _ = stopped.await;
        });
    })?;
    Ok(Actors { stop })
}

fn play(cast: Cast) {
    let Cast { fleet, intake, identity, link_events, pump, tls } = cast;
    if let Some((intake, view)) = intake {
        actix::spawn(supervise::keep(
            "intake".to_owned(),
            move |pulse| Some(Intake::new(intake.clone(), pulse)),
            move |address: Addr<Intake>| view.intake.store(Some(Arc::new(address))),
        ));
    }

    let links = fleet.links.clone();
    if links.is_empty() {
        // Experts inside the router: nobody to talk to, nothing to place.
        return;
    }
    let current = FleetAddress::default();
    let publish = current.clone();
    actix::spawn(supervise::keep(
        "fleet".to_owned(),
        move |pulse| Some(Fleet::new(fleet.clone(), pulse)),
        move |address: Addr<Fleet>| publish.store(Some(Arc::new(address.recipient()))),
    ));
    for handle in links.iter() {
        let parts = LinkParts {
            handle: handle.clone(),
            identity: identity.clone(),
            tls: tls.clone(),
            events: link_events.clone(),
            pump: pump.clone(),
            fleet: current.clone(),
        };
        actix::spawn(supervise::keep(
            format!("link {}", handle.endpoint),
            move |pulse| Some(Link::new(parts.clone(), pulse)),
            |_| {},
        ));
    }
}
