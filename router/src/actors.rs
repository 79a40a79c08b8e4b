//! Where the router's actors live: one thread with one arbiter, apart from the
//! threads that serve gRPC. Each actor is kept alive by a supervisor; the
//! streams of the links run on the engine's thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use mesh::link::{FleetAddress, Identity, Link, LinkEvent, LinkHandle, LinkParts};
use mesh::membership::Links;
use mesh::near::Shortcut;
use mesh::supervise;
use mesh::tls::Tls;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use crate::controller::{Controller, ControllerParts};
use crate::fleet::{Fleet, FleetParts};
use crate::intake::{Intake, IntakeParts};
use crate::service::View;

/// How often nodes that have been away are looked for.
const LOOK_FOR_SILENT: Duration = Duration::from_secs(1);

/// Who is to play, and with what.
pub(crate) struct Cast {
    /// None where experts are inside the router: nobody to talk to, nothing to place.
    pub fleet: Option<FleetParts>,
    /// On one router of the mesh.
    pub controller: Option<ControllerParts>,
    /// None where nobody submits sequences.
    pub intake: Option<(IntakeParts, Arc<View>)>,
    pub identity: Identity,
    pub link_events: mpsc::Sender<LinkEvent>,
    /// The engine's runtime, where the links' streams live.
    pub pump: Handle,
    /// How nodes are spoken to.
    pub tls: Option<Tls>,
    pub shared_rows: Shortcut,
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
    let Cast { fleet, controller, intake, identity, link_events, pump, tls, shared_rows } = cast;
    if let Some((intake, view)) = intake {
        actix::spawn(supervise::keep(
            "intake".to_owned(),
            move |pulse| Some(Intake::new(intake.clone(), pulse)),
            move |address: Addr<Intake>| view.intake.store(Some(Arc::new(address))),
        ));
    }

    let Some(fleet) = fleet else { return };
    if let Some(parts) = controller {
        let (door, heard) = (parts.door.clone(), fleet.controller.clone());
        actix::spawn(supervise::keep(
            "controller".to_owned(),
            move |pulse| Some(Controller::new(parts.clone(), pulse)),
            move |address: Addr<Controller>| {
                heard.store(Some(Arc::new(address.clone().recipient())));
                door.address.store(Some(Arc::new(address)));
            },
        ));
    }
    let links = fleet.links.clone();
    let current = FleetAddress::default();
    let publish = current.clone();
    actix::spawn(supervise::keep(
        "fleet".to_owned(),
        move |pulse| Some(Fleet::new(fleet.clone(), pulse)),
        move |address: Addr<Fleet>| publish.store(Some(Arc::new(address.recipient()))),
    ));
    actix::spawn(keep_links(links, move |handle| LinkParts {
        handle,
        identity: identity.clone(),
        tls: tls.clone(),
        shared_rows,
        events: link_events.clone(),
        pump: pump.clone(),
        fleet: current.clone(),
    }));
}

/// Keeps a link to every node of the list, for as long as it is in the list.
async fn keep_links(links: Links, parts: impl Fn(Arc<LinkHandle>) -> LinkParts) {
    let mut changes = links.changes();
    let mut kept: Vec<Arc<LinkHandle>> = Vec::new();
    loop {
        changes.mark_unchanged();
        for handle in links.members() {
            if kept.iter().any(|known| Arc::ptr_eq(known, &handle)) {
                continue;
            }
            kept.push(handle.clone());
            let parts = parts(handle.clone());
            actix::spawn(supervise::keep(
                format!("link {}", handle.endpoint),
                move |pulse| (!parts.handle.is_removed()).then(|| Link::new(parts.clone(), pulse)),
                |_| {},
            ));
        }
        kept.retain(|link| !link.is_removed());
        tokio::select! {
            // The list lives as long as `links`.
            _ = changes.changed() => {}
            () = tokio::time::sleep(LOOK_FOR_SILENT) => links.forget_silent(Instant::now()),
        }
    }
}
